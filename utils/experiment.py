"""What every training script does once its recipe is known: set up, train or evaluate, report."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
from termcolor import cprint
from torch import nn

from modules.across_processes import process_count
from modules.bptt import SURROGATES
from modules.implicit import BackwardSolver
from modules.network import FeedbackSNN
from modules.neuron import make_neuron
from modules.synchronised_norm import synchronise_batch_norms
from utils.arguments import parse_arguments
from utils.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, restore_network
from utils.data.batches import Batches, Samples
from utils.device import choose_device, set_deterministic, set_precision, working_on
from utils.errors import RunFailed, UserError
from utils.files import failing_clearly
from utils.fit import fit
from utils.instruments.firing_rate import FiringRates
from utils.instruments.plots import plot_firing_rates
from utils.interruption import Interrupted, Interruption
from utils.processes import (check_batches, draw_independently, first_of_each_machine_ahead, from_the_first, is_first, joined,
                             silent_unless_first, tells)
from utils.recipe import Recipe
from utils.run_files import NoFiles, RunFiles
from utils.run_folder import check_writable, open_run_folder
from utils.run_record import Used, write_run_record
from utils.run_state import RunState, announce, announce_evaluation, starting_point
from utils.tensorboard import check_tensorboard
from utils.training import evaluate


def main(recipe: Recipe, argv: Optional[Sequence[str]] = None) -> None:
    """Run the experiment from the command line.

    A user's mistake is one sentence and exit status 2, a run that can't go on one and status 1, a signal one and 128 + its number.
    """
    with silent_unless_first(errors_too=True):
        args = parse_arguments(recipe, argv)
    try:
        with silent_unless_first(), Interruption.watched() as interruption:
            device = choose_device(args.device, args.gpu_id)
            advice = f"To go on from the last checkpoint, give the same command with --resume auto -c {args.checkpoint}"
            with joined(device, advice), working_on(device):
                run(recipe, args, device, interruption)
    except (UserError, RunFailed) as error:
        if tells(error):
            cprint(f"error: {error}", "red", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Interrupted as interrupted:
        if is_first():
            print(f"\nStopped by {interrupted.name}.{interrupted.kept}", file=sys.stderr)
        sys.exit(interrupted.status)


def run(recipe: Recipe, args: Namespace, device: torch.device, interruption: Interruption) -> None:
    """Everything that can be refused is checked before the data is loaded and anything is written."""
    folder = Path(args.checkpoint)
    set_deterministic(args.deterministic)
    seed = from_the_first(lambda: seed_of(args))
    torch.manual_seed(seed)
    network = build_network(recipe, args)
    # A sample gives a dense layer's batch norm a single value of each unit, and a convolution's one of each position.
    least = 2 if any(isinstance(module, nn.BatchNorm1d) for module in network.modules()) else 1
    if not args.evaluate:
        check_batches(args, least_alone=least)
    if args.sync_bn and process_count() > 1:
        synchronise_batch_norms(network)
    draw_independently(seed)
    source, checkpoint = from_the_first(lambda: _source(args, folder))
    if checkpoint:
        restore_network(network, checkpoint, source)
    network.to(device)
    state = None if args.evaluate else starting_point(network, args, checkpoint, source)
    if state or args.firing_rate:
        from_the_first(lambda: check_writable(folder))
    if args.tensorboard:
        check_tensorboard()
    if state and state.finished and not args.firing_rate:
        _finish(state, folder, source)
        return
    if checkpoint and (state is None or state.finished):
        announce_evaluation(checkpoint, args)
    with first_of_each_machine_ahead():
        train, test, used = load_samples(recipe, args, device)
    title = f"{recipe.description.format(dataset=args.dataset)}, {network.neuron.name}, T = {args.time_step}"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    neurons = sum(network.neuron_counts)
    print(f"{title}: {parameters:,d} parameters, {neurons:,d} neurons, on {device}, seed {seed}\n{used}", flush=True)
    test_batches = Batches(test, args.test_batch, shuffled=False)
    if state and state.finished:
        _finish(state, folder, source)
    elif state:
        check_batches(args, len(train.labels), least)
        train_batches = Batches(train, args.train_batch, shuffled=True)
        if checkpoint:
            announce(state, checkpoint, source)
            state.go_on_with(train_batches)
        files = _open_files(state, args, seed, device, used, source) if is_first() else NoFiles(folder)
        fit(state, train_batches, test_batches, files, args, interruption)
    if args.evaluate or args.firing_rate:
        _report(network, test_batches, title, folder if args.firing_rate else None)


def seed_of(args: Namespace) -> int:
    return args.manualSeed if args.manualSeed is not None else 0 if args.deterministic else torch.seed() % 2**31


def _open_files(state: RunState, args: Namespace, seed: int, device: torch.device, used: Used, source: Optional[Path]) -> RunFiles:
    """The files of a run that starts, or goes on from `source`, in its folder, which is made ready."""
    folder = Path(args.checkpoint)
    continued = source is not None and source.resolve().parent == folder.resolve()
    with failing_clearly(folder, "Make room or choose another -c"):
        open_run_folder(folder, continued)
        write_run_record(folder, args, seed, device, used)
    return RunFiles(folder, state, source if continued else None)


def _source(args: Namespace, folder: Path) -> Tuple[Optional[Path], Optional[Checkpoint]]:
    """The checkpoint to go on from, and its file; None for a new run."""
    source = newest_checkpoint(folder) if args.resume == "auto" else Path(args.resume) if args.resume else None
    if source:
        return source, load_checkpoint(source)
    if args.evaluate:
        raise UserError(f"--resume auto: there is no readable checkpoint in {folder} to --evaluate")
    if args.resume:
        print(f"No readable checkpoint in {folder} to go on from: a new run starts.")
    return None, None


def build_network(recipe: Recipe, args: Namespace) -> FeedbackSNN:
    """The network that the recipe and the flags describe, on the CPU."""
    return recipe.network(classes=recipe.datasets[args.dataset], neuron=make_neuron(args.vth, args.leaky),
                          time_steps=args.time_step, dropout=args.dropout,
                          solver=BackwardSolver(args.solver, args.tol, args.max_iterations), jacobian_bn=args.jacobian_bn,
                          bf16_products=set_precision(args.precision),
                          surrogate=SURROGATES[args.surrogate] if args.gradient == "bptt" else None,
                          feedback_norm=args.feedback_norm)


def _finish(state: RunState, folder: Path, source: Path) -> None:
    """Complete the files of a run that stopped after its last epoch, and say that nothing is left to train."""
    files = RunFiles(folder, state, source) if is_first() else NoFiles(folder)
    if state.rows:
        files.plot()
    print(f"The run in {folder} is finished: {state.epoch} epochs, best test accuracy {state.best:.2f} %. "
          "To train on, raise --epochs.")


def load_samples(recipe: Recipe, args: Namespace, device: torch.device) -> Tuple[Optional[Samples], Samples, Used]:
    """The samples in use on the device, of the training set only to train; and how many they are of how many."""
    train, test = recipe.data(args)
    chosen_train, chosen_test = train.first(args.train_limit), test.first(args.test_limit)
    counts = [len(samples.labels) for samples in (chosen_train, train, chosen_test, test)]
    if args.evaluate:
        return None, chosen_test.to(device), Used(None, None, *counts[2:])
    return chosen_train.to(device), chosen_test.to(device), Used(*counts)


def _report(network: FeedbackSNN, batches: Batches, title: str, rates_folder: Optional[Path]) -> None:
    """Loss and accuracy and, where a folder for their chart is given, firing rates, all from one pass over the test set."""
    rates = FiringRates(network.neuron_counts) if rates_folder else None
    loss, top1, top5 = evaluate(network, batches, rates)
    print(f"test loss {loss:.4f} | top-1 {top1:.2f} % | top-5 {top5:.2f} %")
    if rates:
        rates.add_other_processes()
    if rates and is_first():
        rates_folder.mkdir(parents=True, exist_ok=True)
        chart = plot_firing_rates(rates.per_layer, rates.total, rates.neuron_counts, title, rates_folder / "firing_rate")
        print(f"{rates.table()}\nbar chart: {_listed(chart)}")


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
