"""One file of CIFAR's "python version": a pickled record of images and labels, read without executing it, and written."""

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np

from utils.data.inert_pickle import Call, read_inert
from utils.errors import UserError

PIXELS = 3 * 32 * 32
LARGEST_FILE = 400 * 10**6  # bytes; a re-packed training file of CIFAR-100 may have 224 MB


class Batch(NamedTuple):
    """The contents of one file: images uint8 (n, 3072), each the red, green and blue plane row by row, and labels int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def md5(self) -> str:
        """md5 of the pixels, then the labels as a byte each: it tells the same contents in another packing."""
        md5 = hashlib.md5(self.images, usedforsecurity=False)
        md5.update(self.labels.astype(np.uint8))
        return md5.hexdigest()


def read_contents(path: Path) -> bytes:
    """A file's bytes. Raises UserError where it is missing, can't be read or is unreasonably large."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise damaged(path, f"it has {size:,d} bytes and at most {LARGEST_FILE:,d} are meant")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the file can't be read ({error.strerror})") from error


def parse_batch(path: Path, contents: bytes, labels_key: str, classes: int) -> Batch:
    """The batch in a file's bytes; `labels_key` names its labels, which must lie in 0 … classes − 1.

    Raises UserError that names the file where it is damaged, where its arrays are not what is meant, and where it holds
    anything else than numbers, strings and arrays: a pickle can hold a program, and none of it is ever executed.
    """
    try:
        record = read_inert(contents)
        if type(record) is not dict or not {"data", labels_key} <= record.keys():
            raise ValueError(f"it is no record of \"data\" and \"{labels_key}\"")
        images, labels = _images(record["data"]), _labels(record[labels_key], classes)
        if len(images) != len(labels):
            raise ValueError(f"it holds {len(labels)} labels for {len(images)} images")
        return Batch(images, labels)
    except Exception as error:  # Whatever damaged bytes lead to, they are damaged.
        raise damaged(path, str(error) or type(error).__name__) from error


def _images(data: Any) -> np.ndarray:
    """The array in the description of the calls with which numpy pickles it: by its state, or by _frombuffer in protocol 5."""
    if type(data) is Call and data.function.endswith(" _reconstruct"):
        _, shape, dtype, fortran, raw = data.state
        order = "F" if fortran else "C"
    elif type(data) is Call and data.function.endswith(" _frombuffer"):
        raw, dtype, shape, order = data.arguments
    else:
        raise ValueError("its \"data\" is no array")
    if type(dtype) is not Call or dtype.function != "numpy dtype" or dtype.arguments[0] not in ("u1", "|u1"):
        raise ValueError("its images are not of unsigned bytes")
    if type(shape) is not tuple or len(shape) != 2 or shape[0] < 1 or shape[1] != PIXELS:
        raise ValueError(f"its images have the shape {str(shape)[:40]}, not (n, {PIXELS})")
    raw = _raw(raw)
    if len(raw) != math.prod(shape):
        raise ValueError(f"its images have {len(raw):,d} bytes, where {math.prod(shape):,d} are meant")
    return np.frombuffer(raw, np.uint8).reshape(shape, order=order)


def _raw(value: Any) -> bytes:
    """Bytes as Python 2 writes them, text with a character per byte, or as Python 3 does, in old protocols by a call."""
    if type(value) is Call and value.function == "_codecs encode" and value.arguments[1:] in (("latin1",), ("latin-1",)):
        value = value.arguments[0]
    return value.encode("latin1") if type(value) is str else bytes(memoryview(value))


def _labels(labels: Any, classes: int) -> np.ndarray:
    if type(labels) is not list or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"its labels are not a list of numbers from 0 to {classes - 1}")
    return np.array(labels, np.int64)


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: the file is damaged ({why}); delete it and fetch it again (see data/README.md)")


def pack_batch(title: str, images: np.ndarray, labels: Sequence[int]) -> bytes:
    """A file's bytes for images uint8 (n, 3072) and labels. The published files hold file names too, which nothing needs."""
    return pickle.dumps({"batch_label": title, "labels": list(labels), "data": images}, protocol=4)
