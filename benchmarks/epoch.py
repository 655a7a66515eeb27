"""Times a full epoch of F400 on Fashion-MNIST, the project against the yardstick and against the machine's limit.

    python -m benchmarks.epoch [--pairs 3] [--path ./data]

The two take turns, each in a process of its own. An epoch is training on 60,000 samples, testing on 10,000, and what each does
to the data per epoch. The floor is the time that the project's multiply-adds take at the rate of the machine's own float32
matrix products, measured next to each pair.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, Tuple

import torch

from benchmarks.machine import describe_machine, matmul_rate, run_isolated
from benchmarks.yardstick import yardstick_epoch, yardstick_f400
from fmnist_mlp import RECIPE
from modules.neuron import make_neuron
from utils.arguments import parse_arguments
from utils.batches import Batches
from utils.experiment import make_optimizer
from utils.firing_rate import FiringRates
from utils.training import evaluate, train_one_epoch
from utils.torchvision_import import import_torchvision

WIDTH, INPUTS, CLASSES, TRAIN, TEST = 400, 784, 10, 60_000, 10_000


def project_epoch(path: str) -> Dict[str, float]:
    """Seconds of one epoch after a warm-up epoch, of loading the data once, products with Jᵀ per step, and the firing rate."""
    torch.manual_seed(0)
    args = parse_arguments("", RECIPE.defaults, ["--path", path])
    start = time.perf_counter()
    train, test = RECIPE.data(args)
    load_s = time.perf_counter() - start
    network = RECIPE.network(neuron=make_neuron(args.vth, args.leaky), time_steps=args.time_step, dropout=args.dropout)
    optimizer = make_optimizer(network, args)
    train_batches, test_batches = Batches(train, args.train_batch, shuffled=True), Batches(test, args.test_batch, shuffled=False)
    train_one_epoch(network, train_batches, optimizer, lambda iteration: args.lr)
    network.solver.reset_tally()
    start = time.perf_counter()
    train_one_epoch(network, train_batches, optimizer, lambda iteration: args.lr)
    evaluate(network, test_batches)
    seconds = time.perf_counter() - start
    rates = FiringRates(network.neuron_counts)
    evaluate(network, test_batches, rates)
    return {"seconds": seconds, "load_s": load_s, "products": network.solver.tally.mean_iterations, "firing_rate": rates.total}


def yardstick_seconds(path: str, workers: int) -> float:
    """Seconds of one epoch of the yardstick, its samples transformed one by one."""
    torch.manual_seed(0)
    vision = import_torchvision()
    transform = vision.transforms.Compose([vision.transforms.ToTensor(), vision.transforms.Normalize((0.1307,), (0.3081,)),
                                           partial(torch.flatten, start_dim=0)])
    train, test = (vision.datasets.FashionMNIST(path, train=part, transform=transform) for part in (True, False))
    network = yardstick_f400()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    start = time.perf_counter()
    yardstick_epoch(network, optimizer, train, test, workers)
    return time.perf_counter() - start


def multiply_adds(products: float, time_steps: int = 5) -> float:
    """Multiply-adds of the project's matrix products in one epoch, with so many products with Jᵀ per training step."""
    dense, feedback, readout = INPUTS * WIDTH, WIDTH * WIDTH, WIDTH * CLASSES
    simulation = dense + (time_steps - 1) * feedback + readout
    gradient = feedback + products * feedback + (dense + feedback) + 2 * readout
    return TRAIN * (simulation + gradient) + TEST * simulation


def measure(path: str, workers: int) -> Tuple[Dict[str, float], float, float, float, float]:
    """One pair: the project's figures and peak MB, the yardstick's seconds and peak MB, and the floor in seconds."""
    project, project_mb = run_isolated(project_epoch, path)
    yardstick, yardstick_mb = run_isolated(yardstick_seconds, path, workers)
    return project, project_mb, yardstick, yardstick_mb, multiply_adds(project["products"]) / matmul_rate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="how often each is timed")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    parser.add_argument("--workers", type=int, default=2, help="the yardstick's DataLoader processes")
    args = parser.parse_args()
    RECIPE.data(parse_arguments("", RECIPE.defaults, ["--path", args.path]))  # Fetch what is missing before anything is timed.
    print(describe_machine())
    pairs = [measure(args.path, args.workers) for _ in range(args.pairs)]
    row = summarise(pairs)
    print(f"{'':10s} {'median s':>9s} {'peak MB':>8s}")
    print(f"{'project':10s} {row['project_s']:9.2f} {row['project_peak_mb']:8.0f}   (and {pairs[0][0]['load_s']:.2f} s once a run to load the data)")
    print(f"{'yardstick':10s} {row['yardstick_s']:9.2f} {row['yardstick_peak_mb']:8.0f}   (its {args.workers} loader processes not counted)")
    print(f"{'floor':10s} {row['floor_s']:9.2f}")
    print(f"speed-up over the yardstick {row['speedup']:.1f}, time over the floor {row['over_floor']:.2f} (medians of {args.pairs} pairs)")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "cpu.json").write_text(json.dumps([{**row, "machine": describe_machine(), "date": time.strftime("%Y-%m-%d")}], indent=1) + "\n")


def summarise(pairs) -> Dict[str, Any]:
    """One row of the results file: medians, and medians of the ratios pair by pair."""
    def median(of):
        return statistics.median(of(*pair) for pair in pairs)

    return {
        "name": "F400 on Fashion-MNIST, an epoch",
        "project_s": median(lambda p, pm, y, ym, f: p["seconds"]),
        "yardstick_s": median(lambda p, pm, y, ym, f: y),
        "floor_s": median(lambda p, pm, y, ym, f: f),
        "speedup": median(lambda p, pm, y, ym, f: y / p["seconds"]),
        "over_floor": median(lambda p, pm, y, ym, f: p["seconds"] / f),
        "project_peak_mb": median(lambda p, pm, y, ym, f: pm),
        "yardstick_peak_mb": median(lambda p, pm, y, ym, f: ym),
        "firing_rate": median(lambda p, pm, y, ym, f: p["firing_rate"]),
    }


if __name__ == "__main__":
    main()
