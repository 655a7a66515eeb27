"""Files that are whole at any time."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator, Optional

from utils.errors import RunFailed


@contextmanager
def written_aside(path: Path, previous: Optional[Path] = None) -> Iterator[BinaryIO]:
    """A file to write aside, flushed and renamed at the end: `path` is always a whole file, the old one or the new.

    The old one is kept as `previous`, if that is named. Where writing fails, all stays as it was.
    """
    aside, kept = path.with_name(path.name + ".part"), None
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # The old file gets its second name last: until the new one is in its place, `previous` is another file, and damage to one of
        # them leaves the other.
        kept = _second_name(path, previous) if previous and path.exists() else None
        os.replace(aside, path)
        if kept:
            os.replace(kept, previous)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)
        if kept:
            kept.unlink(missing_ok=True)


def _second_name(path: Path, previous: Path) -> Optional[Path]:
    """Another name of the file, which is to become `previous`; None where there are no hard links and it has become that already."""
    aside = previous.with_name(previous.name + ".part")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:
        os.replace(path, previous)
        return None
    return aside


def _flush_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def failing_clearly(path: Path, advice: str) -> Iterator[None]:
    """Turns an error of the disk while `path` is written into RunFailed."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{path} could not be written ({error.strerror or error}). {advice}") from error
