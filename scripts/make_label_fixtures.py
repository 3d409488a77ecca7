#!/usr/bin/env python3
"""Writes the files of tests/data-fixtures: small label files and CIFAR batches in their true layouts.

    python3   scripts/make_label_fixtures.py          needs NumPy (2.x) and PyTorch: .pt, .npy, .json
    python2.7 scripts/make_label_fixtures.py          needs NumPy (1.x): CIFAR as its authors pickled it, with Python 2

`cifar-10n-old.pt` is `cifar-10n.pt` with the module name that NumPy 1.x gives to `_reconstruct`, as the published files have it.
Label i is formula i; the tests compute it anew.
"""
import os
import sys

import numpy as np

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "data-fixtures")


def path(name):
    return os.path.join(FOLDER, name)


def python3():
    import json

    import torch

    n = 40
    clean = np.arange(n, dtype=np.int64) * 7 % 10
    sets = {"clean_label": clean}
    names = ["aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"]
    for k, name in enumerate(names):
        noisy = clean.copy()
        noisy[:: k + 2] = (noisy[:: k + 2] + 1) % 10
        sets[name] = noisy
    torch.save(sets, path("cifar-10n.pt"))
    clean = (np.arange(n, dtype=np.int64) * 61 + 130) % 100  # bytes above 127 stand for labels from no such set
    noisy = np.where(np.arange(n) % 3 == 0, 255, clean).astype(np.int64)
    torch.save({"noisy_label": noisy, "clean_label": clean}, path("cifar-100n-bytes.pt"))
    torch.save({"tensor": torch.arange(3)}, path("tensor.pt"))
    with open(path("cifar-10n.pt"), "rb") as file:
        import io
        import zipfile

        archive = zipfile.ZipFile(io.BytesIO(file.read()))
    with zipfile.ZipFile(path("cifar-10n-old.pt"), "w", zipfile.ZIP_DEFLATED) as out:
        for info in archive.infolist():
            content = archive.read(info).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            out.writestr(zipfile.ZipInfo("archive/" + info.filename.split("/", 1)[1]), content, zipfile.ZIP_DEFLATED)
    np.save(path("labels-i8.npy"), sets["worse_label"])
    np.save(path("labels-u1.npy"), sets["worse_label"].astype(np.uint8))
    with open(path("labels.json"), "w") as file:
        json.dump(sets["worse_label"].tolist(), file)


def python2():
    import cPickle

    def batch(name, images, labels, keys):
        content = {"batch_label": name, "data": images, "filenames": ["image_%d.png" % i for i in range(len(images))]}
        for key, modulus in keys:
            content[key] = [label % modulus for label in labels]
        return content

    def images(seed, n):
        # Few different values, so that the files pack well; every pixel position tells image and place.
        grid = np.arange(n)[:, None] * 5 + np.arange(3072)[None, :] // 64 + seed
        return (grid % 256).astype(np.uint8)

    def write(folder, name, content):
        folder = path(folder)
        if not os.path.isdir(folder):
            os.makedirs(folder)
        with open(os.path.join(folder, name), "wb") as file:
            cPickle.dump(content, file, 2)

    ten = [("labels", 10)]
    for k in range(1, 6):
        content = batch("training batch %d of 5" % k, images(k, 2), [3 * k, 3 * k + 1], ten)
        write("cifar-10-batches-py", "data_batch_%d" % k, content)
    # Fortran order, as an array that was transposed before it was pickled.
    last = batch("testing batch 1 of 1", np.asfortranarray(images(9, 3)), [7, 8, 9], ten)
    write("cifar-10-batches-py", "test_batch", last)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    write("cifar-10-batches-py", "batches.meta", meta)
    hundred = [("coarse_labels", 20), ("fine_labels", 100)]
    write("cifar-100-python", "train", batch("training batch 1 of 1", images(11, 3), [19, 199, 42], hundred))
    write("cifar-100-python", "test", batch("testing batch 1 of 1", images(12, 1), [77], hundred))
    fine = ["fine %d" % i for i in range(100)]
    write("cifar-100-python", "meta", {"fine_label_names": fine, "coarse_label_names": ["c%d" % i for i in range(20)]})


if __name__ == "__main__":
    python3() if sys.version_info[0] == 3 else python2()
