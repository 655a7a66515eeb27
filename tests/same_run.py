"""Whether two runs came to the same, to the last bit."""

from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import BEST, LATEST


def contents(path: Path) -> Any:
    """Everything in a checkpoint but the command line, with tensors as bytes."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items() if key != "arguments"}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
    return plain(torch.load(path, weights_only=True))


def assert_same(one: Path, other: Path) -> None:
    """The runs in the two folders have the same log, last checkpoint (weights, momentum, best accuracy, …) and best network."""
    assert (one / "log.txt").read_bytes() == (other / "log.txt").read_bytes(), "log.txt differs"
    for name in (LATEST, BEST):
        assert contents(one / name) == contents(other / name), f"{name} differs"
