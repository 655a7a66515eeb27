"""run.json: what a run was, beside its log, so that its numbers can be traced back to a command."""

import json
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy
import torch

from modules.across_processes import process_count
from utils.device import describe_device
from utils.files import written_aside
from utils.version import VERSION

RUN_RECORD = "run.json"


class Used(NamedTuple):
    """How many samples are used, of how many there are; no training samples where a checkpoint is only evaluated."""

    train: Optional[int]
    train_of: Optional[int]
    test: int
    test_of: int

    def __str__(self) -> str:
        if self.train is None:
            return f"Testing on {self.test:,d} of {self.test_of:,d} samples"
        return f"Training on {self.train:,d} of {self.train_of:,d} samples, testing on {self.test:,d} of {self.test_of:,d}"


def write_run_record(folder: Path, args: Namespace, seed: int, device: torch.device, used: Used) -> None:
    """Write folder/run.json. What a resumed run finds there, it keeps under "earlier_starts"."""
    record = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": vars(args),
        "seed": seed,
        "training_samples": {"used": used.train, "of": used.train_of},
        "test_samples": {"used": used.test, "of": used.test_of},
        "device": str(device),
        "processes": process_count(),
        "device_name": describe_device(device),
        "versions": {"project": VERSION, "python": platform.python_version(), "torch": str(torch.__version__),
                     "numpy": numpy.__version__},
        "git_commit": git_commit(),
        "earlier_starts": _earlier_starts(folder / RUN_RECORD),
    }
    with written_aside(folder / RUN_RECORD) as file:
        file.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _earlier_starts(path: Path) -> List[Dict[str, Any]]:
    try:
        last = json.loads(path.read_text())
        return [*last.pop("earlier_starts"), last]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []  # There is none, or it is no record of ours.


def git_commit() -> Optional[str]:
    """The project's commit, with "-dirty" behind it where files differ from it; None outside a git repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"], timeout=10,
                              cwd=Path(__file__).parent, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
