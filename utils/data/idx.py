"""Reader of IDX files, MNIST's format: a big-endian header, then unsigned bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Tuple

import numpy as np

from utils.errors import UserError

LARGEST = 2**28  # bytes of data; MNIST's training images have 47 million
PIECE = 2**20


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many dimensions, from the raw file `path` or, where that is missing, `path`.gz.

    The header is two zero bytes, the type code 8 (unsigned byte), the number of dimensions, and each size in 4 bytes. Raises
    UserError that names the file where it is missing, truncated, too long, or of another type or number of dimensions.
    """
    compressed = path.with_name(path.name + ".gz")
    if compressed.exists() and not path.exists():
        path = compressed
    try:
        with gzip.open(path) if path == compressed else path.open("rb") as file:
            return _parse(path, file, dimensions)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing; fetch it with `make data`, or name its folder with --path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _parse(path: Path, file: BinaryIO, dimensions: int) -> np.ndarray:
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"it is not an IDX file of unsigned bytes in {dimensions} dimensions")
    sizes: Tuple[int, ...] = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(sizes)
    if math.prod(max(length, 1) for length in sizes) > LARGEST:  # NumPy refuses such sizes even of empty arrays.
        raise _damaged(path, f"its header promises {size} bytes of data in the shape {sizes}, larger than is meant")
    contents = _read(file, size + 1)
    if len(contents) != size:
        held = f"more than {size}" if len(contents) > size else str(len(contents))
        raise _damaged(path, f"its header promises {size} bytes of data and it holds {held}")
    return np.frombuffer(contents, np.uint8).reshape(sizes)


def _read(file: BinaryIO, most: int) -> bytearray:
    """At most so many bytes, in pieces: neither a header nor a few compressed bytes can claim memory for what is not meant."""
    contents = bytearray()
    while len(contents) < most and (piece := file.read(min(PIECE, most - len(contents)))):
        contents += piece
    return contents


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: the file is damaged ({why}); delete it and fetch it again with `make data`")
