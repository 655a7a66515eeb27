"""What every training script does once its recipe is known: set up, train or evaluate, log, save."""

import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from termcolor import colored, cprint

from modules.implicit import BackwardSolver, SolveTally
from modules.network import FeedbackSNN
from modules.neuron import make_neuron
from utils.arguments import parse_arguments
from utils.batches import Batches, Samples
from utils.checkpoint import (BEST, LATEST, Checkpoint, load_checkpoint, random_state, restore_network, restore_optimizer,
                              restore_random_state, save_checkpoint)
from utils.device import choose_device
from utils.errors import UserError
from utils.firing_rate import FiringRates
from utils.log import Log
from utils.run_folder import open_run_folder
from utils.schedule import learning_rate
from utils.training import evaluate, train_one_epoch


@dataclass(frozen=True)
class Recipe:
    """One experiment of the paper: a network, a data set and the defaults of the flags that differ from the shared ones.

    `network(args, **settings)` builds it, `data(args)` gives training and test samples.
    """

    description: str
    network: Callable[..., FeedbackSNN]
    data: Callable[[Namespace], Tuple[Samples, Samples]]
    defaults: Dict[str, Any] = field(default_factory=dict)


def main(recipe: Recipe, argv: Optional[Sequence[str]] = None) -> None:
    """Run the experiment from the command line; a user's mistake is one sentence and exit status 2."""
    args = parse_arguments(recipe.description, recipe.defaults, argv)
    try:
        run(recipe, args)
    except UserError as error:
        cprint(f"error: {error}", "red", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nStopped. The last whole epoch is in {Path(args.checkpoint) / LATEST}.", file=sys.stderr)
        sys.exit(130)


def run(recipe: Recipe, args: Namespace) -> None:
    """Everything that can be refused is checked before the data is loaded and anything is written."""
    device = choose_device(args.device, args.gpu_id)
    seed = args.manualSeed if args.manualSeed is not None else torch.seed() % 2**31
    torch.manual_seed(seed)
    neuron = make_neuron(args.vth, args.leaky)
    network = recipe.network(neuron=neuron, time_steps=args.time_step, dropout=args.dropout,
                             solver=BackwardSolver(args.solver, args.tol, args.threshold))
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume else None
    if checkpoint:
        restore_network(network, checkpoint, Path(args.resume))
    network.to(device)
    train, test = (samples.to(device) for samples in recipe.data(args))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{recipe.description}: {neuron.name}, T = {args.time_step}, {parameters:,d} parameters, on {device}, seed {seed}")
    test_batches = Batches(test, args.test_batch, shuffled=False)
    if not args.evaluate:
        _train(network, Batches(train, args.train_batch, shuffled=True), test_batches, args, checkpoint)
    if args.evaluate or args.firing_rate:
        _report(network, test_batches, args.firing_rate)


def _report(network: FeedbackSNN, batches: Batches, firing_rate: bool) -> None:
    rates = FiringRates(network.neuron_counts) if firing_rate else None
    loss, top1, top5 = evaluate(network, batches, rates)
    print(f"test loss {loss:.4f} | top-1 {top1:.2f} % | top-5 {top5:.2f} %")
    if rates:
        print(rates.table())


def _train(network: FeedbackSNN, train: Batches, test: Batches, args: Namespace, checkpoint: Optional[Checkpoint]) -> None:
    folder = Path(args.checkpoint)
    optimizer = make_optimizer(network, args)
    first_epoch, best = 0, 0.0
    if checkpoint:
        restore_optimizer(optimizer, network, checkpoint, Path(args.resume))
        restore_random_state(checkpoint.random_state)
        first_epoch, best = checkpoint.epoch, checkpoint.best_acc
    if args.start_epoch is not None:
        first_epoch = args.start_epoch
    if first_epoch >= args.epochs:
        raise UserError(f"--epochs {args.epochs}: the run starts at epoch {first_epoch}, so nothing is left to train; raise --epochs")
    continued = bool(checkpoint) and Path(args.resume).resolve().parent == folder.resolve()
    open_run_folder(folder, continued)
    log = Log(folder / "log.txt", keep=first_epoch if continued else 0)
    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()

        def rate(iteration: int) -> float:
            return learning_rate(args.lr, epoch, epoch * len(train) + iteration, args.schedule, args.gamma, args.warmup)

        network.solver.reset_tally()
        training = train_one_epoch(network, train, optimizer, rate)
        tally = network.solver.reset_tally()
        testing = evaluate(network, test)
        is_best, best = testing.top1 > best, max(best, testing.top1)
        print(f"epoch {epoch + 1}/{args.epochs} | learning rate {rate(len(train) - 1):g} | "
              f"training loss {training.loss:.4f}, top-1 {training.top1:.2f} % | test loss {testing.loss:.4f}, "
              f"top-1 {testing.top1:.2f} %, best {best:.2f} % | {describe(tally)} | {time.perf_counter() - start:.1f} s", flush=True)
        state = Checkpoint(epoch + 1, network.state_dict(), testing.top1, best, optimizer.state_dict(),
                           random_state=random_state(), arguments=vars(args))
        save_checkpoint(state, folder / LATEST)
        if is_best:
            save_checkpoint(state, folder / BEST)
        log.append([rate(len(train) - 1), training.loss, testing.loss, training.top1, testing.top1])
    plots = log.plot()
    print(f"best test accuracy over epochs: {best:.2f} %\nplots of the log: {', '.join(map(str, plots))}")


def make_optimizer(network: FeedbackSNN, args: Namespace) -> torch.optim.Optimizer:
    """SGD with momentum or Adam, in PyTorch's fused implementation."""
    if args.optimizer == "Adam":
        return torch.optim.Adam(network.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)


def describe(tally: SolveTally) -> str:
    """The epoch's backward solves in words, in yellow where some did not converge."""
    text = (f"solver {tally.mean_iterations:.1f} iterations, {tally.not_converged} of {tally.solves} not converged, "
            f"largest residual {tally.worst_residual:.1e}")
    return colored(text, "yellow") if tally.not_converged else text
