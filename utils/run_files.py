"""The files that a run writes while it trains: checkpoints, the best network, the log and its plot."""

from pathlib import Path
from typing import List, Optional

from utils.checkpoint import BEST, DAMAGED, LATEST, PREVIOUS, is_readable, save_checkpoint, write_contents
from utils.files import failing_clearly
from utils.instruments.plots import plot_log
from utils.log import Log
from utils.run_state import RunState


class RunFiles:
    """Everything in the run's folder follows from `run`: killed at any moment, the next start repairs what was not yet written.

    A checkpoint holds the log and whether its epoch is the best, and is written before the files that tell the same. `source` is the
    checkpoint in the folder that the run goes on from, if it does.
    """

    def __init__(self, folder: Path, run: RunState, source: Optional[Path] = None):
        self.folder = folder
        self.advice = f"The last good checkpoint is kept; make room or choose another -c, then go on with: --resume auto -c {folder}"
        with failing_clearly(folder / "log.txt", self.advice):
            for leftover in folder.glob("*.part"):
                leftover.unlink()
            if source and (folder / LATEST).exists() and not is_readable(folder / LATEST):
                # It must not become the previous one.
                (folder / LATEST).replace(folder / DAMAGED)
            if source and run.source_is_best:
                write_contents(source.read_bytes(), folder / BEST)
            self.log = Log(folder / "log.txt", run.rows)

    def save(self, run: RunState) -> bytes:
        """Write the checkpoint; raises RunFailed, with the last one kept, where the weights or the disk don't allow it."""
        checkpoint = run.checkpoint()
        with failing_clearly(self.folder / LATEST, self.advice):
            return save_checkpoint(checkpoint, self.folder / LATEST, self.folder / PREVIOUS)

    def save_epoch(self, run: RunState) -> None:
        """What is written after a whole epoch."""
        contents = self.save(run)
        with failing_clearly(self.folder / BEST, self.advice):
            if run.ended_best:
                write_contents(contents, self.folder / BEST)
        with failing_clearly(self.log.path, self.advice):
            self.log.append(run.rows[-1])

    def plot(self) -> List[Path]:
        with failing_clearly(self.folder / "log.png", self.advice):
            return plot_log(self.log.rows, self.folder / "log")


class NoFiles(RunFiles):
    """What the processes after the first have in place of RunFiles: they write nothing, and give their part of each checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, run: RunState) -> bytes:
        run.checkpoint()
        return b""

    def save_epoch(self, run: RunState) -> None:
        self.save(run)

    def plot(self) -> List[Path]:
        return []
