"""Training over all epochs: what is printed, logged and saved, and when."""

import time
from argparse import Namespace
from typing import Optional

from termcolor import colored, cprint

from modules.implicit import SolveTally
from utils.checkpoint import LATEST
from utils.data.batches import Batches
from utils.epoch_state import EpochState
from utils.errors import RunFailed
from utils.interruption import Interrupted, Interruption
from utils.processes import is_first, known_to_all, share_network
from utils.run_files import RunFiles
from utils.run_state import RunState
from utils.schedule import learning_rate
from utils.tensorboard import Scalars
from utils.training import NotFinite, evaluate, train_one_epoch

# Shares and sizes above which an epoch's numbers deserve a warning; the README tells why these.
MOST_UNCONVERGED, LARGEST_MEAN_RESIDUAL = 0.1, 0.5


def fit(run: RunState, train: Batches, test: Batches, files: RunFiles, args: Namespace, interruption: Interruption) -> None:
    """Run the epochs that are left and plot the log. Where a signal asks for it, save and raise Interrupted between two iterations."""
    run.begin()
    scalars = Scalars(files.folder, keep=run.epoch) if args.tensorboard and is_first() else None
    share_network(run.network)
    with interruption.deferred():
        try:
            while not run.finished:
                _run_epoch(run, train, test, files, args, interruption, scalars)
        except Interrupted as interrupted:
            files.save(run)
            interrupted.kept = (f" {run.place.capitalize()}, saved in {files.folder / LATEST}; to go on, give the same command "
                                f"with --resume auto -c {files.folder}")
            raise
        except NotFinite as error:
            kept = f"{files.folder / LATEST} is kept" if (files.folder / LATEST).exists() else "no checkpoint was written before"
            raise known_to_all(RunFailed(f"{error.what} in epoch {run.epoch + 1}, iteration {error.iteration + 1}; {kept}. Lower --lr, "
                            "look at the data, or leave such batches out with --on-nan skip")) from error
        print(f"best test accuracy over epochs: {run.best:.2f} %\nplots of the log: {', '.join(map(str, files.plot()))}", flush=True)


def _run_epoch(run: RunState, train: Batches, test: Batches, files: RunFiles, args: Namespace, interruption: Interruption,
               scalars: Optional[Scalars]) -> None:
    began, epoch, state, every = time.perf_counter(), run.epoch, run.partial, args.checkpoint_every

    def rate(iteration: int) -> float:
        return learning_rate(args.lr, epoch, epoch * len(train) + iteration, args.schedule, args.gamma, args.warmup)

    def after_iteration() -> None:
        if every and state.iteration % every == 0 and state.iteration < len(train):
            files.save(run)
        interruption.stop_if_asked()

    training = train_one_epoch(run.network, train, run.optimizer, rate, state, after_iteration, args.on_nan)
    state = state.of_all_processes()
    testing = evaluate(run.network, test, between=interruption.stop_if_asked)
    last_rate = rate(len(train) - 1)
    run.end_epoch([last_rate, training.loss, testing.loss, training.top1, testing.top1], testing.top1)
    print(f"epoch {epoch + 1}/{args.epochs} | learning rate {last_rate:g} | "
          f"training loss {training.loss:.4f}, top-1 {training.top1:.2f} % | test loss {testing.loss:.4f}, "
          f"top-1 {testing.top1:.2f} %, best {run.best:.2f} % | {describe(state.tally)} | "
          f"{_residual(state)}{time.perf_counter() - began:.1f} s", flush=True)
    _warn(state)
    files.save_epoch(run)
    if scalars:
        scalars.add(run.epoch, {"learning rate": last_rate, "loss/training": training.loss, "loss/test": testing.loss,
                                "accuracy/training": training.top1, "accuracy/test": testing.top1,
                                "solver/iterations": state.tally.mean_iterations, "solver/not converged": state.tally.not_converged,
                                "equilibrium residual": state.mean_residual})


def describe(tally: SolveTally) -> str:
    """The epoch's backward solves in words, in yellow where some did not converge."""
    if not tally.solves:
        return "back-propagation through time"
    text = (f"solver {tally.mean_iterations:.1f} iterations, {tally.not_converged} of {tally.solves} not converged, "
            f"largest residual {tally.worst_residual:.1e}")
    return colored(text, "yellow") if tally.not_converged else text


def _residual(state: EpochState) -> str:
    return f"equilibrium residual {state.mean_residual:.2f} | " if state.residuals else ""


def _warn(state: EpochState) -> None:
    tally = state.tally
    if tally.not_converged > MOST_UNCONVERGED * tally.solves:
        cprint(f"warning: {tally.not_converged} of {tally.solves} backward solves did not converge, so gradients are inexact; "
               "raise --max-iterations or --tol, or lower --lr", "yellow", flush=True)
    if state.residuals and not state.mean_residual <= LARGEST_MEAN_RESIDUAL:  # It may be no number.
        cprint(f"warning: firing rates are far from their equilibrium (relative residual {state.mean_residual:.2f}), so gradients are "
               "inexact; raise --time_step", "yellow", flush=True)
    if state.skipped:
        cprint(f"warning: {state.skipped} batches were skipped, as their loss or currents were not finite", "yellow", flush=True)

