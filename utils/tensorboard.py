"""The epochs' numbers as TensorBoard scalars beside the log: tensorboard --logdir DIR. The package tensorboard is optional."""

from pathlib import Path
from typing import Dict

from utils.errors import UserError

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Raises UserError where the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard; install it: pip install -r requirements-optional.txt") from error


class Scalars:
    """Writes event files into <run's folder>/tensorboard; of an earlier start's, what comes after `keep` epochs no longer shows."""

    def __init__(self, folder: Path, keep: int = 0):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / FOLDER), purge_step=keep + 1 if keep else None)

    def add(self, epoch: int, values: Dict[str, float]) -> None:
        """One point of each curve, on disk when this returns; epochs count from 1."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()
