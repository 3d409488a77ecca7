#!/usr/bin/env python3
"""Write the embedded sample of Fashion-MNIST: a balanced choice of 6,000 training and 2,000 test images.

    scripts/make_sample.py [SOURCE [TARGET]]

SOURCE holds the four Fashion-MNIST IDX .gz files (default: where Debian's `dataset-fashion-mnist` puts them),
TARGET receives four files of the same names (default: assets/fashion-mnist-sample). Plain Python 3, no packages.

The choice depends on SEED only: every image draws one number, the images of a class with the smallest numbers are
taken, and all taken images are ordered by that number. The decompressed files are the same everywhere; the compressed
bytes may differ between versions of zlib, but carry no time stamp and no file name.
"""

import gzip
import pathlib
import random
import struct
import sys

SEED = 20190616
CLASSES = 10
PER_CLASS = {"train": 600, "t10k": 200}


def read(path, magic, dims):
    """The header sizes and the payload of one IDX .gz file."""
    raw = gzip.decompress(path.read_bytes())
    head = struct.unpack(f">{1 + dims}I", raw[: 4 * (1 + dims)])
    if head[0] != magic:
        sys.exit(f"{path}: IDX magic {head[0]:#010x}, expected {magic:#010x}")
    return head[1:], raw[4 * (1 + dims) :]


def write(path, magic, sizes, payload):
    """One IDX .gz file without time stamp or file name."""
    with open(path, "wb") as file:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as out:
            out.write(struct.pack(f">{1 + len(sizes)}I", magic, *sizes))
            out.write(payload)


def main():
    source = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
    here = pathlib.Path(__file__).resolve().parent.parent
    target = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else here / "assets" / "fashion-mnist-sample"
    target.mkdir(parents=True, exist_ok=True)
    for part, wanted in PER_CLASS.items():
        (count, height, width), pixels = read(source / f"{part}-images-idx3-ubyte.gz", 0x803, 3)
        (labelled,), labels = read(source / f"{part}-labels-idx1-ubyte.gz", 0x801, 1)
        if count != labelled:
            sys.exit(f"{source}: {count} {part} images but {labelled} labels")
        draw = random.Random(f"{SEED} {part}")
        order = sorted((draw.random(), i) for i in range(count))
        taken, chosen = [0] * CLASSES, []
        for _, i in order:
            if taken[labels[i]] < wanted:
                taken[labels[i]] += 1
                chosen.append(i)
        if taken != [wanted] * CLASSES:
            sys.exit(f"{source}: too few {part} images in a class: {taken}")
        size = height * width
        picked = b"".join(pixels[i * size : (i + 1) * size] for i in chosen)
        write(target / f"{part}-images-idx3-ubyte.gz", 0x803, (len(chosen), height, width), picked)
        write(target / f"{part}-labels-idx1-ubyte.gz", 0x801, (len(chosen),), bytes(labels[i] for i in chosen))
        print(f"{part}: {len(chosen)} of {count} images, {wanted} per class")


if __name__ == "__main__":
    main()
