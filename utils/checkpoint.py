"""Checkpoints: one file format to write, this project's and the published one to read."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from termcolor import cprint
from torch import Tensor, nn

from modules.across_processes import process_rank
from utils.checkpoint_checks import (check_fits, check_optimizer, check_partial_epoch, check_published_optimizer,
                                     check_random_state, checked_accuracy, checked_epoch, checked_rows, checked_tensors)
from utils.checkpoint_file import read_tensors
from utils.epoch_state import EpochState
from utils.errors import UserError
from utils.files import written_aside
from utils.processes import gathered
from utils.published import is_published, translate_momentum, translate_state_dict
from utils.version import VERSION

LATEST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.previous.pth.tar", "model_best.pth.tar"
DAMAGED = "checkpoint.damaged.pth.tar"


@dataclass
class Checkpoint:
    """What a run needs to go on: `epoch` is the one to run next or, where `partial` says how far it is, to go on with.

    Accuracies are in percent, `acc` the last whole epoch's and `best_acc` that of the first `best_epoch` epochs' last. `log_rows` is
    the log so far; `neuron` is the name of the neurons' class, where the file tells. `optimizer` is this project's PyTorch optimizer
    state; from a published file, `momentum` holds its buffers by parameter name.
    """

    epoch: int
    state_dict: Dict[str, Tensor]
    acc: float
    best_acc: float
    optimizer: Optional[Dict[str, Any]] = None
    momentum: Dict[str, Dict[str, Tensor]] = field(default_factory=dict)
    random_state: Optional[Dict[str, Any]] = None
    arguments: Dict[str, Any] = field(default_factory=dict)
    best_epoch: int = 0
    log_rows: Optional[List[List[float]]] = None
    partial: Optional[EpochState] = None
    neuron: Optional[str] = None
    torch_version: str = str(torch.__version__)
    project_version: str = VERSION

    @property
    def iteration(self) -> int:
        return self.partial.iteration if self.partial else 0


def save_checkpoint(checkpoint: Checkpoint, path: Path, previous: Optional[Path] = None) -> bytes:
    """Write the file, whole at any time, and return its contents. The file that was there is kept as `previous`, if that is named."""
    contents = io.BytesIO()
    torch.save({**vars(checkpoint), "partial": checkpoint.partial and checkpoint.partial.state_dict()}, contents)
    write_contents(contents.getvalue(), path, previous)
    return contents.getvalue()


def write_contents(contents: bytes, path: Path, previous: Optional[Path] = None) -> None:
    with written_aside(path, previous) as file:
        file.write(contents)


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest readable checkpoint of the run in `folder`, with a warning for each damaged one that was met; None without any."""
    good = []
    for path in (folder / LATEST, folder / PREVIOUS, folder / BEST):
        if path.exists():
            try:
                checkpoint = load_checkpoint(path)
            except UserError:
                cprint(f"warning: {path} is damaged; the newest checkpoint before it is used", "yellow")
                continue
            good.append((checkpoint.epoch, checkpoint.iteration, path))
            if path.name == LATEST:
                break
    return max(good, key=lambda entry: entry[:2])[2] if good else None


def is_readable(path: Path) -> bool:
    try:
        return bool(load_checkpoint(path))
    except UserError:
        return False


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of either format onto the CPU; tensors and plain values only, nothing in the file is executed.

    Raises UserError that names the file where it is missing, damaged or something else.
    """
    if path.is_dir():
        raise UserError(f"--resume {path}: that is a folder; name a file in it, such as {path / LATEST}")
    if not path.is_file():
        raise UserError(f"--resume {path}: there is no such file")
    try:
        contents = read_tensors(path)
    except ValueError as error:
        raise UserError(f"--resume {path}: the file is not a readable checkpoint ({error})") from error
    try:
        return _from_contents(contents)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error) if type(error) is ValueError else f"it has no part {error}" if type(error) is KeyError \
            else "a part of it is missing or of another kind"
        raise UserError(f"--resume {path}: the file holds no checkpoint of a feedback spiking network ({reason})") from error


def _from_contents(contents: Dict[str, Any]) -> Checkpoint:
    state_dict = checked_tensors(contents["state_dict"])
    common = dict(epoch=checked_epoch(contents["epoch"]), acc=checked_accuracy(contents["acc"]),
                  best_acc=checked_accuracy(contents["best_acc"]))
    if is_published(state_dict):
        check_published_optimizer(contents.get("optimizer"))
        momentum = translate_momentum(state_dict, contents.get("optimizer"))
        return Checkpoint(state_dict=translate_state_dict(state_dict), momentum=momentum, **common)
    check_random_state(contents["random_state"])
    if not isinstance(contents["arguments"], dict) or not isinstance(contents["optimizer"], dict):
        raise ValueError("its arguments or its optimizer are not a table")
    if "threshold" in contents["arguments"]:  # what --max-iterations was called
        contents["arguments"].setdefault("max_iterations", contents["arguments"].pop("threshold"))
    partial = contents.get("partial")
    check_partial_epoch(partial)
    return Checkpoint(state_dict=state_dict, optimizer=contents["optimizer"], random_state=contents["random_state"],
                      arguments=contents["arguments"], best_epoch=checked_epoch(contents.get("best_epoch", 0)),
                      log_rows=checked_rows(contents.get("log_rows")),
                      partial=EpochState.from_state(partial) if partial else None,
                      neuron=None if contents.get("neuron") is None else str(contents["neuron"]),
                      torch_version=str(contents.get("torch_version", "unknown")),
                      project_version=str(contents.get("project_version", "unknown")), **common)


def restore_network(network: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load the tensors; raises UserError if they belong to another network or are not finite, naming the first that is so.

    Another network is also one of another class of neurons, whatever their constants; not every file names its own.
    """
    own = network.state_dict()
    for name in sorted(own.keys() | checkpoint.state_dict.keys()):
        there, here = checkpoint.state_dict.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            shapes = [f"of shape {tuple(tensor.shape)}" if tensor is not None else "missing" for tensor in (there, here)]
            raise UserError(f"--resume {path}: a checkpoint of another network ({name} is {shapes[0]} in the file, {shapes[1]} "
                            "in this network); use the script and flags that it was trained with")
        try:
            check_fits(name, there, here)
        except ValueError as error:
            raise UserError(f"--resume {path}: {error}") from error
    own_neuron = type(network.neuron).__name__
    if checkpoint.neuron not in (None, own_neuron):
        raise UserError(f"--resume {path}: its neurons are of the class {checkpoint.neuron:.40} and this network's of {own_neuron}; use "
                        "the script that it was trained with (utils.report takes it with --experiment)")
    network.load_state_dict(checkpoint.state_dict)


def restore_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load the optimizer's state (momentum included); raises UserError if another optimizer or network's wrote it."""
    kind = checkpoint.arguments.get("optimizer", "Adam" if _holds_moments(checkpoint.momentum) else "SGD")
    if kind != type(optimizer).__name__:
        raise UserError(f"--resume {path}: its optimizer is {kind}; go on with --optimizer {kind}")
    parameters = dict(network.named_parameters())
    try:
        check_optimizer(checkpoint.momentum, parameters)
        if checkpoint.optimizer is not None:
            check_optimizer(checkpoint.optimizer.get("state"), dict(enumerate(network.parameters())))
    except ValueError as error:
        raise UserError(f"--resume {path}: {error}") from error
    if checkpoint.optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
    for name, state in checkpoint.momentum.items():
        optimizer.state[parameters[name]] = {key: value.to(parameters[name].device) for key, value in state.items()}


def _holds_moments(momentum: Dict[str, Dict[str, Tensor]]) -> bool:
    return any("exp_avg" in state for state in momentum.values())


def random_state() -> Dict[str, Any]:
    """The states of every random generator in use; those of a job's processes after the first are under "others"."""
    first, *others = gathered({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []})
    return {**first, "others": others}


def restore_random_state(state: Optional[Dict[str, Any]]) -> None:
    """Nothing happens where there is no state of this process."""
    states = [] if state is None else [state, *state.get("others", [])]
    if process_rank() >= len(states):
        return
    state = states[process_rank()]
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
