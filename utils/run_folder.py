"""The folder of a run, `-c`: checked before any work, with no earlier run in it ever overwritten."""

import tempfile
from pathlib import Path

from utils.checkpoint import BEST, LATEST
from utils.errors import UserError

_FILES = ("log.txt", "log.png", "log.pdf", LATEST, BEST)


def open_run_folder(folder: Path, continued: bool) -> None:
    """Make `folder` and see that it can be written. Unless the run in it is `continued`, move that aside into earlier-N/.

    Raises UserError that names -c where the folder can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"-c {folder}: the folder can't be written ({error.strerror}); name another") from error
    earlier = [folder / name for name in _FILES if (folder / name).exists()]
    if continued or not earlier:
        return
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for file in earlier:
        file.rename(aside / file.name)
    print(f"Moved the earlier run in {folder} to {aside}.")
