"""Reads a file of torch.save once its parts are known to fit together: nothing is executed, no memory taken for what is not there.

The pickle in it is first read as data (`utils.data.inert_pickle`), and every tensor that it describes must lie within a storage that
the file really holds: PyTorch itself would take a storage's size from the pickle.
"""

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Dict, Tuple

import torch

from utils.data.inert_pickle import Function, Machine, expect

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # The first of five pickles in files of PyTorch before 1.6; the storages follow.
LARGEST_PICKLE = 2**26  # bytes, without the tensors' values; a checkpoint of the largest network here has 10,000
ITEM_BYTES = {f"torch {name}Storage": size for name, size in {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}.items()}
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"


def read_tensors(path: Path) -> Any:
    """What torch.save wrote into the file, on the CPU. Raises ValueError, saying why, where it is damaged or more than data."""
    try:
        with path.open("rb") as file:  # Opened once, as a run that goes on may put a newer one into its place.
            _check(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make pickletools, zipfile and PyTorch raise nearly anything.
        reason = str(error).splitlines()
        raise ValueError(reason[0][:200] if reason else type(error).__name__) from error


def _check(file: BinaryIO) -> None:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            _check_zip(archive, file.seek(0, io.SEEK_END))
    else:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            if contents[:4] == ZIP_MAGIC:
                raise ValueError("its end is missing")
            _check_legacy(contents)


def _check_zip(archive: zipfile.ZipFile, file_size: int) -> None:
    """PyTorch stores without compressing, so the parts can't be larger than the file; a checksum tells damage in any of them."""
    members = archive.infolist()
    if len({member.filename.lower() for member in members}) != len(members):
        raise ValueError("two of its parts have the same name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, as PyTorch's files never are")
    if sum(member.file_size for member in members) > file_size:
        raise ValueError("its parts are larger than the file")
    damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part {damaged} is damaged")
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
        raise ValueError("it is no file of torch.save")
    description = _Description()
    description.run(archive.read(pickles[0]))
    folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
    for key, (kind, count) in description.storages.items():
        if archive.getinfo(folder + key).file_size != count * ITEM_BYTES[kind]:
            raise ValueError(f"its storage {key} has not the size that it states")


def _check_legacy(contents: mmap.mmap) -> None:
    if Machine().run(contents) != LEGACY_MAGIC:
        raise ValueError("it is no file of torch.save")
    for _ in range(2):  # the format's version and the machine that wrote it
        Machine().run(contents)
    description = _Description()
    description.run(contents)
    if sum(count * ITEM_BYTES[kind] for kind, count in description.storages.values()) > len(contents):
        raise ValueError("its storages are larger than the file")


class _Description(Machine):
    """Reads the pickle of a checkpoint; `storages` gives kind and number of elements by key. Tensors are checked and left out."""

    functions = {"_codecs encode", "collections OrderedDict", TENSOR, PARAMETER, *ITEM_BYTES}

    def __init__(self):
        super().__init__()
        self.storages: Dict[str, Tuple[str, int]] = {}

    def key(self, value: Any) -> Any:
        return value if type(value) is int else super().key(value)

    def persistent(self, identity: Any) -> "_Storage":
        _, function, key, _, count, *view = expect(identity, tuple)
        kind = expect(function, Function).name
        if kind not in ITEM_BYTES or _negative(count) or view not in ([], [None]):
            raise ValueError("it describes a storage wrongly")
        if self.storages.setdefault(expect(key, str), (kind, count)) != (kind, count):
            raise ValueError(f"it describes its storage {key} in two ways")
        return _Storage(count)

    def call(self, function: Any, arguments: Any) -> Any:
        name = expect(function, Function).name
        if name == TENSOR:
            _check_tensor(*expect(arguments, tuple)[:4])
            return _Tensor()
        if name == PARAMETER:
            return expect(expect(arguments, tuple)[0], _Tensor)
        if name == "collections OrderedDict":
            if arguments != ():
                raise ValueError("it has a dictionary of an unusual form")
            return {}
        return super().call(function, arguments)

    def build(self, state: Any) -> None:
        """Only state_dict() has attributes, its versions, which nothing reads."""
        expect(self.stack[-1], dict)
        if set(expect(state, dict)) != {"_metadata"}:
            raise ValueError("it gives attributes to what has none")


class _Tensor:
    """A tensor that fits into its storage."""


class _Storage:
    def __init__(self, count: int):
        self.count = count


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> None:
    numbers = (offset, *expect(size, tuple), *expect(stride, tuple))
    if any(map(_negative, numbers)) or len(size) != len(stride):
        raise ValueError("it describes a tensor wrongly")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if 0 not in size and last >= expect(storage, _Storage).count:
        raise ValueError("a tensor reaches beyond its storage")


def _negative(value: Any) -> bool:
    return type(value) is not int or value < 0
