"""What every training script does once its recipe is known: set up, train or evaluate, report."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
from termcolor import cprint

from modules.implicit import BackwardSolver
from modules.network import FeedbackSNN
from modules.neuron import make_neuron
from utils.arguments import parse_arguments
from utils.batches import Batches, Samples
from utils.checkpoint import LATEST, Checkpoint, load_checkpoint, restore_network
from utils.device import choose_device, set_precision
from utils.errors import UserError
from utils.firing_rate import FiringRates
from utils.fit import fit, starting_point
from utils.log import Log
from utils.plots import plot_firing_rates, plot_log
from utils.recipe import Recipe
from utils.run_folder import check_writable, open_run_folder
from utils.run_record import Used, write_run_record
from utils.training import evaluate


def main(recipe: Recipe, argv: Optional[Sequence[str]] = None) -> None:
    """Run the experiment from the command line; a user's mistake is one sentence and exit status 2."""
    args = parse_arguments(recipe, argv)
    try:
        run(recipe, args)
    except UserError as error:
        cprint(f"error: {error}", "red", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = "" if args.evaluate else f" The last whole epoch is in {Path(args.checkpoint) / LATEST}."
        print(f"\nStopped.{kept}", file=sys.stderr)
        sys.exit(130)


def run(recipe: Recipe, args: Namespace) -> None:
    """Everything that can be refused is checked before the data is loaded and anything is written."""
    device = choose_device(args.device, args.gpu_id)
    seed = args.manualSeed if args.manualSeed is not None else torch.seed() % 2**31
    torch.manual_seed(seed)
    network, checkpoint = build_network(recipe, args, device)
    folder = Path(args.checkpoint)
    start = None if args.evaluate else starting_point(network, args, checkpoint)
    if start or args.firing_rate:
        check_writable(folder)
    train, test, used = load_samples(recipe, args, device)
    title = f"{recipe.description.format(dataset=args.dataset)}, {network.neuron.name}, T = {args.time_step}"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    neurons = sum(network.neuron_counts)
    print(f"{title}: {parameters:,d} parameters, {neurons:,d} neurons, on {device}, seed {seed}\n{used}", flush=True)
    test_batches = Batches(test, args.test_batch, shuffled=False)
    if start:
        continued = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
        open_run_folder(folder, continued)
        write_run_record(folder, args, seed, device, used)
        log = Log(folder / "log.txt", keep=start.epoch if continued else 0)
        fit(network, Batches(train, args.train_batch, shuffled=True), test_batches, start, log, args)
        print(f"plots of the log: {_listed(plot_log(log.rows, folder / 'log'))}")
    if args.evaluate or args.firing_rate:
        _report(network, test_batches, title, folder if args.firing_rate else None)


def build_network(recipe: Recipe, args: Namespace, device: torch.device) -> Tuple[FeedbackSNN, Optional[Checkpoint]]:
    """The network on its device, with the tensors of the checkpoint to go on from, if there is one."""
    network = recipe.network(classes=recipe.datasets[args.dataset], neuron=make_neuron(args.vth, args.leaky),
                             time_steps=args.time_step, dropout=args.dropout,
                             solver=BackwardSolver(args.solver, args.tol, args.threshold), jacobian_bn=args.jacobian_bn,
                             bf16_products=set_precision(args.precision), feedback_norm=args.feedback_norm)
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume else None
    if checkpoint:
        restore_network(network, checkpoint, Path(args.resume))
    return network.to(device), checkpoint


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
        rates_folder.mkdir(parents=True, exist_ok=True)
        chart = plot_firing_rates(rates.per_layer, rates.total, rates.neuron_counts, title, rates_folder / "firing_rate")
        print(f"{rates.table()}\nbar chart: {_listed(chart)}")


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
