"""Where N-MNIST lies and how it is read: the official zips, folders of raw recordings, or folders of the text layout."""

import hashlib
import os
import re
import struct
import zipfile
import zlib
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from termcolor import cprint

from utils.data.recordings import DamagedRecording
from utils.errors import UserError

ZIP_MD5 = {"Train": "20959b8e626244a1b502305a9e6e2031", "Test": "69ca8762b2fe404d9b9bad1103e97832"}
SPLITS = tuple(ZIP_MD5)
LARGEST = 2**20  # bytes of a recording, 25 times the largest of N-MNIST: no damaged file may fill the memory
TOGETHER = 16    # recordings decoded at once; their arrays still fit into a core's cache
NAME = re.compile(r"([0-9]{1,9})\.(bin|dat)")
ZIP_MEMBER = re.compile(r"(?!__MACOSX/)(?:.*/)?([0-9])/([0-9]{1,9})\.bin")
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, KeyError, OverflowError)
Stamp = Tuple[int, int, int]
Read = Callable[[str], bytes]
Decode = Callable[[List[bytes]], Sequence[Any]]


class Entry(NamedTuple):
    """A recording: the number in its file's name, its label, and its name within the folder or zip of its split."""

    number: int
    label: int
    name: str


class Recordings(NamedTuple):
    """All recordings of a split, in order of number and label, so that the labels are mixed as in MNIST.

    They lie in `where`, a folder or a zip, in the raw or the text format; `fingerprint` changes when any of them does.
    """

    where: Path
    is_text: bool
    entries: Sequence[Entry]
    fingerprint: str


def find_recordings(path: str) -> Tuple[Path, Dict[str, Recordings]]:
    """The folder that holds N-MNIST, `path` or else its parent, and the recordings of Train and of Test there.

    Of several forms in one folder, {Train,Test}/<label>/<number>.bin goes before {Train,Test}.zip, and both before
    {Train,Test}/<label>/<number>.dat. Raises UserError where a split is missing or can't be read.
    """
    try:
        for folder in (Path(path), Path(os.path.abspath(path)).parent):
            splits = {split: recordings for split in SPLITS if (recordings := _find_split(folder, split))}
            if len(splits) == len(SPLITS):
                return folder, splits
            for split in splits:
                missing, = set(SPLITS) - {split}
                raise UserError(f"{folder}: there are recordings of N-MNIST's {split} but none of {missing}; "
                                f"put {missing}.zip or a folder {missing} beside it")
    except OSError as error:
        raise UserError(f"--path {path}: the recordings can't be read ({error.strerror}: {error.filename})") from error
    raise UserError(f"--path {path}: N-MNIST is neither there nor in the folder above. No package mirrors it: get Train.zip (md5 "
                    f"{ZIP_MD5['Train']}) and Test.zip (md5 {ZIP_MD5['Test']}) from Mendeley Data, data set 468j46mzdv "
                    f"(CC BY-SA 4.0), and put both, zipped or unpacked, into {path} or the folder above")


def _find_split(folder: Path, split: str) -> Optional[Recordings]:
    raw, text = _in_folder(folder / split)
    archive = folder / f"{split}.zip"
    return raw or (_in_zip(archive) if archive.is_file() else None) or text


def _in_folder(folder: Path) -> Tuple[Optional[Recordings], Optional[Recordings]]:
    """The raw and the text recordings in a split's folder."""
    entries: Dict[str, Dict[Entry, Stamp]] = {"bin": {}, "dat": {}}
    for label in range(10):
        if not (folder / str(label)).is_dir():
            continue
        with os.scandir(folder / str(label)) as files:
            for file in files:
                name = NAME.fullmatch(file.name)
                if name and file.is_file():
                    entries[name[2]][Entry(int(name[1]), label, f"{label}/{file.name}")] = _stamp(file.stat())
    raw, text = (_recordings(folder, suffix == "dat", found, sorted(found.items())) for suffix, found in entries.items())
    return raw, text


def _in_zip(path: Path) -> Optional[Recordings]:
    with _open_zip(path) as archive:
        names = [member for name in archive.namelist() if (member := ZIP_MEMBER.fullmatch(name))]
    return _recordings(path, False, {Entry(int(name[2]), int(name[1]), name[0]) for name in names}, _stamp(path.stat()))


def _recordings(where: Path, is_text: bool, entries: Collection[Entry], stamps: object) -> Optional[Recordings]:
    """In order; one for each number and label, should several names say the same."""
    in_order = sorted({(entry.number, entry.label): entry for entry in sorted(entries)}.values())
    fingerprint = hashlib.md5(repr((is_text, stamps)).encode()).hexdigest()
    return Recordings(where, is_text, in_order, fingerprint) if entries else None


def _stamp(stat: os.stat_result) -> Stamp:
    """The time of the last change too: a copy may bring an old time of modification along."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def decoded(recordings: Recordings, decode: Decode, damaged: List[str]) -> Iterator[Tuple[Entry, Any]]:
    """Every sound recording with what `decode` makes of it; name and fault of each damaged one are appended to `damaged`.

    `decode` takes the contents of some files and raises DamagedRecording if any is damaged.
    """
    with _reader(recordings.where) as read:
        for start in range(0, len(recordings.entries), TOGETHER):
            entries = recordings.entries[start:start + TOGETHER]
            try:
                results = list(zip(entries, decode([read(entry.name) for entry in entries])))
            except DamagedRecording:
                results = list(_one_by_one(entries, read, decode, damaged))
            yield from results


def _one_by_one(entries: Sequence[Entry], read: Read, decode: Decode, damaged: List[str]) -> Iterator[Tuple[Entry, Any]]:
    for entry in entries:
        try:
            yield entry, decode([read(entry.name)])[0]
        except DamagedRecording as fault:
            damaged.append(f"{entry.name} ({fault})")


def damage_report(recordings: Recordings, damaged: Sequence[str]) -> str:
    """A warning that counts the damaged recordings and names the first; empty if there are none. UserError if all are damaged."""
    if not damaged:
        return ""
    names = "; ".join(damaged[:3]) + ("; …" if len(damaged) > 3 else "")
    if len(damaged) == len(recordings.entries):
        raise UserError(f"{recordings.where}: not one of its {len(damaged):,d} recordings can be used: {names}")
    count = f"{len(damaged):,d} of {len(recordings.entries):,d}"
    return f"warning: {recordings.where}: {count} recordings are damaged and left out: {names}"


@contextmanager
def _reader(where: Path) -> Iterator[Read]:
    """Reads a recording by its name; what can't be read is damaged."""
    if where.is_dir():
        yield lambda name: _read_file(f"{where}/{name}")
    else:
        with _open_zip(where) as archive:
            yield lambda name: _read_member(archive, name)


def _read_file(path: str) -> bytes:
    try:
        with FileIO(path) as file:  # half the time of open(), which matters for 70,000 small files
            return file.read(_checked_size(os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise DamagedRecording(f"it can't be read: {error.strerror}") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        member = archive.getinfo(name)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedRecording("it is compressed in another way than the official files")
        with archive.open(member) as file:
            return file.read(_checked_size(member.file_size))
    except ZIP_ERRORS as error:
        raise DamagedRecording(f"it can't be unpacked: {error}") from error


def _checked_size(size: int) -> int:
    if size > LARGEST:
        raise DamagedRecording(f"it is too large: {size:,d} bytes")
    return size


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise UserError(f"{path}: the zip file can't be read ({error}); if it is damaged, download it again") from error


def warn_of_other_md5(splits: Dict[str, Recordings]) -> None:
    """A zip packed anew may serve, but it is not the published file."""
    for split, recordings in splits.items():
        if recordings.where.is_file() and _md5(recordings.where) != ZIP_MD5[split]:
            cprint(f"warning: {recordings.where} is not the published file (its md5 differs)", "yellow")


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
