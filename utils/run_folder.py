"""The folder of a run, `-c`: checked before any work, with no earlier run in it ever overwritten."""

import tempfile
from pathlib import Path

from utils.checkpoint import BEST, DAMAGED, LATEST, PREVIOUS
from utils.errors import UserError
from utils.run_record import RUN_RECORD
from utils.tensorboard import FOLDER as TENSORBOARD

_FILES = ("log.txt", "log.png", "log.pdf", "firing_rate.png", "firing_rate.pdf", RUN_RECORD, LATEST, PREVIOUS, BEST, DAMAGED, TENSORBOARD)


def check_writable(folder: Path, flag: str = "-c") -> None:
    """See that `folder` can be written, or be made, and leave nothing behind; raises UserError that names `flag` where it can't."""
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder}: the folder can't be written ({error.strerror}); name another") from error


def open_run_folder(folder: Path, continued: bool) -> None:
    """Make `folder` ready for a run. Unless the run that is in it is `continued`, move that aside into earlier-N/."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [folder / name for name in _FILES if (folder / name).exists()]
    if continued or not earlier:
        return
    number = 1 + sum(1 for _ in folder.glob("earlier-*"))
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for file in earlier:
        file.rename(aside / file.name)
    print(f"Moved the earlier run in {folder} to {aside}.")
