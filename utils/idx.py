"""Reader of IDX files, MNIST's format: a big-endian header, then unsigned bytes."""

import gzip
import math
import struct
from pathlib import Path
from typing import Tuple

import numpy as np

from utils.errors import UserError


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many dimensions, from the raw file `path` or `path`.gz.

    The header is two zero bytes, the type code 8 (unsigned byte), the number of dimensions, and each size in 4 bytes. Raises
    UserError that names the file where it is missing, truncated, too long, or of another type or number of dimensions.
    """
    contents, path = _contents(path)
    header = 4 + 4 * dimensions
    if len(contents) < header or contents[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"it is not an IDX file of unsigned bytes in {dimensions} dimensions")
    sizes: Tuple[int, ...] = struct.unpack(f">{dimensions}I", contents[4:header])
    if math.prod(sizes) != len(contents) - header:
        raise _damaged(path, f"its header promises {math.prod(sizes)} bytes of data and it holds {len(contents) - header}")
    return np.frombuffer(contents, np.uint8, offset=header).reshape(sizes)


def _contents(path: Path) -> Tuple[bytes, Path]:
    compressed = path.with_name(path.name + ".gz")
    try:
        if path.exists() or not compressed.exists():
            return path.read_bytes(), path
        path = compressed
        return gzip.decompress(compressed.read_bytes()), compressed
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file is missing; fetch it with `make data`, or name its folder with --path") from error
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: the file is damaged ({why}); delete it and fetch it again with `make data`")
