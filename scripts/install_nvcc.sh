#!/usr/bin/env bash
# Installs the CUDA compiler (and cuobjdump, nvdisasm) from PyPI into .nvcc/ of this project, where build.rs finds it.
# Needs python3 with the venv module, no rights and no driver. Prints the path of nvcc; does nothing where it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

# Exact versions: docs/kernels.md is compared with what this compiler makes. The last two only read what it made.
packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-cuobjdump==13.2.78
    nvidia-cuda-nvdisasm==13.2.78
)

# The stamp is written last and names the versions, so that a broken or older installation is made again.
stamp=.nvcc/installed
if [ "$(cat "$stamp" 2>/dev/null)" != "${packages[*]}" ]; then
    rm -rf .nvcc
    python3 -m venv .nvcc
    .nvcc/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${packages[@]}" >&2
    echo "${packages[*]}" >"$stamp"
    touch scripts/install_nvcc.sh  # the build watches this file, and now looks for nvcc again
fi

found=(.nvcc/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
"${found[0]}" --version >/dev/null
echo "$PWD/${found[0]}"
