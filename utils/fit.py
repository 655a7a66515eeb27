"""Training over all epochs: where it starts, and what is printed, logged and saved after each."""

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from termcolor import colored
from torch import nn

from modules.implicit import SolveTally
from utils.batches import Batches
from utils.checkpoint import (BEST, LATEST, Checkpoint, random_state, restore_optimizer, restore_random_state, save_checkpoint)
from utils.errors import UserError
from utils.log import Log
from utils.schedule import learning_rate
from utils.tensorboard import Scalars
from utils.training import evaluate, make_optimizer, train_one_epoch


@dataclass(frozen=True)
class Start:
    """Where training starts: its optimizer, the first epoch to run, the best accuracy so far and the random states to restore."""

    optimizer: torch.optim.Optimizer
    epoch: int = 0
    best: float = 0.0
    random_state: Optional[Dict[str, Any]] = None


def starting_point(network: nn.Module, args: Namespace, checkpoint: Optional[Checkpoint]) -> Start:
    """The start of a new run or of one that goes on from `checkpoint`, whose tensors `network` holds already.

    Raises UserError where the checkpoint's optimizer is another one and where no epoch is left to run.
    """
    start = Start(make_optimizer(network, args))
    if checkpoint:
        restore_optimizer(start.optimizer, network, checkpoint, Path(args.resume))
        start = Start(start.optimizer, checkpoint.epoch, checkpoint.best_acc, checkpoint.random_state)
    if args.start_epoch is not None:
        start = Start(start.optimizer, args.start_epoch, start.best, start.random_state)
    if start.epoch >= args.epochs:
        raise UserError(f"--epochs {args.epochs}: the run starts at epoch {start.epoch}, so nothing is left to train; "
                        "raise --epochs")
    return start


def fit(network: nn.Module, train: Batches, test: Batches, start: Start, log: Log, args: Namespace) -> None:
    """Run the epochs that are left; after each, the checkpoint and the log beside it are whole."""
    folder, best = Path(args.checkpoint), start.best
    scalars = Scalars(folder, keep=start.epoch) if args.tensorboard else None
    restore_random_state(start.random_state)
    for epoch in range(start.epoch, args.epochs):
        began = time.perf_counter()

        def rate(iteration: int) -> float:
            return learning_rate(args.lr, epoch, epoch * len(train) + iteration, args.schedule, args.gamma, args.warmup)

        network.solver.reset_tally()
        training = train_one_epoch(network, train, start.optimizer, rate)
        tally = network.solver.reset_tally()
        testing = evaluate(network, test)
        is_best, best, last_rate = testing.top1 > best, max(best, testing.top1), rate(len(train) - 1)
        print(f"epoch {epoch + 1}/{args.epochs} | learning rate {last_rate:g} | "
              f"training loss {training.loss:.4f}, top-1 {training.top1:.2f} % | test loss {testing.loss:.4f}, "
              f"top-1 {testing.top1:.2f} %, best {best:.2f} % | {describe(tally)} | "
              f"{time.perf_counter() - began:.1f} s", flush=True)
        state = Checkpoint(epoch + 1, network.state_dict(), testing.top1, best, start.optimizer.state_dict(),
                           random_state=random_state(), arguments=vars(args))
        save_checkpoint(state, folder / LATEST)
        if is_best:
            save_checkpoint(state, folder / BEST)
        log.append([last_rate, training.loss, testing.loss, training.top1, testing.top1])
        if scalars:
            scalars.add(epoch + 1, {"learning rate": last_rate, "loss/training": training.loss, "loss/test": testing.loss,
                                    "accuracy/training": training.top1, "accuracy/test": testing.top1,
                                    "solver/iterations": tally.mean_iterations, "solver/not converged": tally.not_converged})
    print(f"best test accuracy over epochs: {best:.2f} %")


def describe(tally: SolveTally) -> str:
    """The epoch's backward solves in words, in yellow where some did not converge."""
    if not tally.solves:
        return "back-propagation through time"
    text = (f"solver {tally.mean_iterations:.1f} iterations, {tally.not_converged} of {tally.solves} not converged, "
            f"largest residual {tally.worst_residual:.1e}")
    return colored(text, "yellow") if tally.not_converged else text
