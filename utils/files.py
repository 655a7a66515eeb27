"""Files that are whole at any time."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write aside, flushed and renamed at the end: `path` is always a whole file, the old one or the new."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
