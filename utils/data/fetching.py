"""Fetches what is missing of a data set into its folder: whole files only, whatever interrupts it."""

import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Callable, Mapping, Sequence

from utils.data.sources import Source, fetch_from
from utils.errors import UserError

SCRATCH = "fetching-"        # beginning of the names of the folders in which sources work
LEFTOVER_AGE_S = 24 * 3600   # no fetch takes so long, so an older folder is what an interrupted one has left
LARGEST_ARCHIVE = 2 * 10**9  # bytes, unpacked; the largest of the archives that are meant holds 190 MB


class NotFetched(UserError):
    """What is missing of a data set comes from none of its sources: it must be fetched by hand."""


def fetch(what: str, sources: Sequence[Source], root: Path, folder: Path, collect: Callable[[Path], Mapping[str, bytes]]) -> None:
    """Put files of the data set `what` into `folder`, which lies under `root`, from the first of the sources that serves.

    `collect(fetched)` gives the contents by name of the files to place from the folder that a source has filled, or raises where
    they are not right. A file appears under its name only once it is whole. Raises NotFetched with every source's reason where
    all fail, UserError where `root` can't be written.
    """
    def place(fetched: Path) -> None:
        files = collect(fetched)
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():
            with open(fetched / "whole", "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fetched / "whole", folder / name)

    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        print(f"Fetching {what} into {folder} …", flush=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH) as scratch:
            source = _first_that_serves(what, sources, Path(scratch), place)
    except OSError as error:
        raise UserError(f"--path {root}: the data can't be written there ({error.strerror})") from error
    print(f"Fetched {what} from {source}.", flush=True)


def _first_that_serves(what: str, sources: Sequence[Source], scratch: Path, place: Callable[[Path], None]) -> str:
    try:
        return fetch_from(sources, scratch, place, what)
    except UserError as error:
        raise NotFetched(str(error)) from error


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(f"{SCRATCH}*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def find_file(folder: Path, *names: str) -> Path:
    """The file of one of these names, wherever under `folder` a source has put it. Raises ValueError where there is none."""
    for path in sorted(folder.rglob("*")):
        if path.name in names and path.is_file():
            return path
    raise ValueError(f"{names[0]} is not in it")


def archive(path: Path) -> Source:
    """A tar archive that the user has put there."""
    return Source(f"the archive {path}", lambda folder: unpack(path, folder))


def unpack(path: Path, folder: Path) -> None:
    """Unpack a tar archive's files into `folder`, all side by side: no path in the archive can lead elsewhere.

    Raises ValueError or an error of tarfile where the archive is damaged or unreasonably large.
    """
    size = 0
    with tarfile.open(path) as packed:
        for member in packed:
            size += member.size
            if size > LARGEST_ARCHIVE:
                raise ValueError(f"it unpacks to more than {LARGEST_ARCHIVE:,d} bytes")
            if member.isfile():
                with packed.extractfile(member) as contents, open(folder / Path(member.name).name, "wb") as target:
                    shutil.copyfileobj(contents, target)
