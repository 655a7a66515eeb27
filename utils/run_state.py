"""A run of training at one moment: what a checkpoint saves and restores."""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from termcolor import cprint
from torch import nn

from utils.checkpoint import Checkpoint, random_state, restore_optimizer, restore_random_state
from utils.data.batches import Batches
from utils.epoch_state import EpochState
from utils.errors import RunFailed, UserError
from utils.log import COLUMNS, read_log
from utils.optimizer import make_optimizer

# Flags that change what a trained network computes; and those that say where a run is and what is shown of it, and nothing of its result.
OF_A_PASS = {"vth", "leaky", "time_step", "feedback_norm", "precision"}
NOT_OF_THE_RESULT = {"checkpoint", "checkpoint_every", "evaluate", "firing_rate", "manualSeed", "path", "resume", "start_epoch",
                     "tensorboard", "workers"}


class RunState:
    """`epoch` counts the whole epochs done; `best` is the best test accuracy of the first `best_epoch` of them, in percent.

    `source_is_best` says whether the checkpoint that it was restored from is that of its best epoch.
    """

    def __init__(self, network: nn.Module, args: Namespace):
        self.network, self.args, self.optimizer = network, args, make_optimizer(network, args)
        self.epoch, self.accuracy, self.best, self.best_epoch = 0, 0.0, 0.0, 0
        self.rows: List[List[float]] = []
        self.partial, self.source_is_best = EpochState(), False
        self._random_state: Optional[Dict[str, Any]] = None

    @property
    def ended_best(self) -> bool:
        """Whether the run stands at the end of its best epoch."""
        return self.epoch == self.best_epoch > 0 and self.partial.iteration == 0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.args.epochs

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Go on from `checkpoint`, whose tensors the network holds already. Raises UserError where its optimizer is another one."""
        restore_optimizer(self.optimizer, self.network, checkpoint, path)
        self.epoch, self.accuracy, self.best = checkpoint.epoch, checkpoint.acc, checkpoint.best_acc
        self.best_epoch, self.rows = checkpoint.best_epoch, checkpoint.log_rows
        if self.rows is None:  # A published checkpoint, or an early one of this project, has its log only beside it.
            log = path.with_name("log.txt")
            self.rows = read_log(log)[:self.epoch] if log.exists() else []
        self.partial, self._random_state = checkpoint.partial or EpochState(), checkpoint.random_state
        self.source_is_best = self.ended_best

    def start_at(self, epoch: int) -> None:
        self.epoch, self.partial, self.rows = epoch, EpochState(), self.rows[:epoch]
        self.source_is_best = False
        if self.best_epoch > epoch:  # It is to be run again.
            self.best, self.best_epoch = 0.0, 0
            for before, row in enumerate(self.rows):
                self._judge(before + 1, row[COLUMNS.index("Valid Acc.")])

    def go_on_with(self, batches: Batches) -> None:
        """Begin the epoch anew where `batches` are no longer those that were counted."""
        if self.partial.iteration and self.partial.shape != batches.shape:
            cprint(f"warning: other samples or another --train-batch than in the checkpoint: epoch {self.epoch + 1} begins anew", "yellow")
            self.partial = EpochState()

    def begin(self) -> None:
        """Set the random generators to where the checkpoint left them, and take this process's share of its epoch."""
        restore_random_state(self._random_state)
        self.partial = self.partial.share_to_go_on_with()

    def end_epoch(self, row: List[float], accuracy: float) -> None:
        """Count an epoch as done, with its `row` of the log and its test accuracy."""
        self.epoch, self.accuracy, self.partial = self.epoch + 1, accuracy, EpochState()
        self.rows.append(row)
        self._judge(self.epoch, accuracy)

    def _judge(self, epoch: int, accuracy: float) -> None:
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, epoch

    def checkpoint(self) -> Checkpoint:
        """The whole job's state, for which all its processes must ask together.

        Raises RunFailed where a tensor of the network is not finite: such a state is never saved.
        """
        tensors = self.network.state_dict()
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        if not finite.all():
            name = list(tensors)[finite.tolist().index(False)]
            raise RunFailed(f"{name} holds values that are not finite {self.place}. This state is not saved: the last good checkpoint "
                            "is kept. Lower --lr, or look at the data")
        arguments = {name: value for name, value in vars(self.args).items() if name != "resume"}
        return Checkpoint(self.epoch, tensors, self.accuracy, self.best, self.optimizer.state_dict(), random_state=random_state(),
                          neuron=type(self.network.neuron).__name__, arguments=arguments, best_epoch=self.best_epoch, log_rows=self.rows,
                          partial=self.partial.of_all_processes() if self.partial.iteration else None)

    @property
    def place(self) -> str:
        return f"in epoch {self.epoch + 1} after {self.partial.iteration} iterations" if self.partial.iteration \
            else f"after {self.epoch} epochs"


def starting_point(network: nn.Module, args: Namespace, checkpoint: Optional[Checkpoint], source: Optional[Path]) -> RunState:
    """The start of a new run, or of one that goes on from `checkpoint`, read from `source`, whose tensors `network` holds already.

    Raises UserError where the checkpoint's optimizer is another one, and where no epoch is left to run unless --resume is auto.
    """
    state = RunState(network, args)
    if checkpoint:
        state.restore(checkpoint, source)
    # Whoever gives the same command again and again wants --start-epoch once.
    if args.start_epoch is not None and not (checkpoint and args.resume == "auto"):
        state.start_at(args.start_epoch)
    if state.finished and not (checkpoint and args.resume == "auto"):
        raise UserError(f"--epochs {args.epochs}: the run starts at epoch {state.epoch}, so nothing is left to train; raise --epochs")
    return state


def announce(state: RunState, checkpoint: Checkpoint, source: Path) -> None:
    """Say where the run goes on, and what is other than when the checkpoint was written."""
    print(f"Going on from {source}, {state.place}.", flush=True)
    _warn(differences(checkpoint, state.args))


def announce_evaluation(checkpoint: Checkpoint, args: Namespace) -> None:
    """Say what makes the network compute something else than the one that was trained."""
    trained = {name: value for name, value in checkpoint.arguments.items() if name in OF_A_PASS}
    _warn(_changed(trained, vars(args)))


def _warn(changed: List[str]) -> None:
    if changed:
        cprint(f"warning: not as in the checkpoint: {'; '.join(changed)}", "yellow", flush=True)


def differences(checkpoint: Checkpoint, args: Namespace) -> List[str]:
    """The flags and versions that are other than when the checkpoint was written and can change the result, then and now."""
    changed = _changed(checkpoint.arguments, vars(args))
    if checkpoint.arguments and checkpoint.torch_version != str(torch.__version__):
        changed.append(f"PyTorch was {checkpoint.torch_version}, is now {torch.__version__}")
    return changed


def _changed(then: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    return [f"--{name.replace('_', '-')} was {_shown(then[name])}, is now {_shown(now[name])}" for name in now
            if name in then and name not in NOT_OF_THE_RESULT and then[name] != now[name]]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
