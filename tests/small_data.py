"""Small data sets in every layout that the scripts read, which a network can learn, and a way to run a script on them."""

import contextlib
import io
import pickle
import struct

import numpy as np

import fmnist_mlp
from utils.experiment import main

RAW = "FashionMNIST/raw"


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_small_data(root, train=60, test=30, folder=RAW):
    """Fashion-MNIST's or MNIST's files; images whose bright rows tell the label."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = random.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels):
            image[2 * label:2 * label + 3] += 150
        write_idx(root / folder / f"{split}-images-idx3-ubyte", images)
        write_idx(root / folder / f"{split}-labels-idx1-ubyte", labels)
    return root


def write_small_mnist(root, train=60, test=30):
    return write_small_data(root, train, test, "MNIST/raw")


def write_small_cifar(root, dataset="cifar10", train=20, test=10):
    """CIFAR's python pickles; `train` samples in all, spread over CIFAR-10's five files. The brightness tells the label."""
    random = np.random.default_rng(0)
    five = [(f"data_batch_{number}", train // 5) for number in range(1, 6)]
    folder, key, classes, splits = {
        "cifar10": ("cifar-10-batches-py", "labels", 10, [*five, ("test_batch", test)]),
        "cifar100": ("cifar-100-python", "fine_labels", 100, [("train", train), ("test", test)]),
    }[dataset]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, count in splits:
        labels = random.integers(0, classes, count)
        images = random.integers(0, 60, (count, 3072)) + labels[:, None] * (190 // classes)
        record = {"data": images.astype(np.uint8), key: labels.tolist(), "filenames": [f"{i}.png" for i in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(record, protocol=2))
    return root


def write_small_nmnist(root, train=20, test=10):
    """Raw recordings of about 300 ms, {Train,Test}/<label>/NNNNN.bin, on a row that tells the label."""
    random = np.random.default_rng(0)
    for split, count in (("Train", train), ("Test", test)):
        for number in range(count):
            label, events = number % 10, 2000
            x, y = random.integers(0, 34, events), 3 * label + random.integers(0, 4, events)
            polarity, time = random.integers(0, 2, events), np.sort(random.integers(0, 300_000, events))
            record = np.stack([x, y, polarity << 7 | time >> 16, time >> 8 & 255, time & 255], axis=1).astype(np.uint8)
            path = root / split / str(label) / f"{number + 1:05d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record.tobytes())
    return root


def command(*arguments, script=fmnist_mlp):
    """Run the script's main with these arguments: exit status, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(script.RECIPE, [str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit:
            status = exit.code
    return status, out.getvalue(), err.getvalue()
