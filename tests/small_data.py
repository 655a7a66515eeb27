"""A small data set in Fashion-MNIST's files, which a network can learn, and a way to run the command line on it."""

import contextlib
import io
import struct

import numpy as np

import fmnist_mlp
from utils.experiment import main

RAW = "FashionMNIST/raw"


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_small_data(root, train=60, test=30):
    """Images whose bright rows tell the label."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = random.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels):
            image[2 * label:2 * label + 3] += 150
        write_idx(root / RAW / f"{split}-images-idx3-ubyte", images)
        write_idx(root / RAW / f"{split}-labels-idx1-ubyte", labels)
    return root


def command(*arguments):
    """Run fmnist_mlp.py's main with these arguments: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(fmnist_mlp.RECIPE, [str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit:
            status = exit.code
    return status, out.getvalue(), err.getvalue()
