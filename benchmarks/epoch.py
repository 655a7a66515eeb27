"""Times a full epoch of F400 on Fashion-MNIST, the project against the yardstick and against the machine's limit.

    python -m benchmarks.epoch [--pairs 3] [--path ./data]

The two take turns, each in a process of its own. The project's epoch, a tenth as long as the yardstick's, is timed before and after that
one, and the mean counts, as a machine's speed changes within seconds. An epoch is training on 60,000 samples, testing on 10,000,
and what each does to the data per epoch. The floor is the time that the project's multiply-adds take at the rate of the machine's own
float32 matrix products, measured in each turn.
"""

import argparse
import time
from functools import partial
from typing import Dict

import torch

from benchmarks import multiply_adds
from benchmarks.machine import describe_machine, matmul_rate
from benchmarks.results import HEADER, describe_row, make_row, save_rows
from benchmarks.worker import Worker
from benchmarks.yardstick import yardstick_epoch, yardstick_f400
from fmnist_mlp import RECIPE
from modules.neuron import make_neuron
from utils.arguments import parse_arguments
from utils.data.batches import Batches
from utils.data.torchvision_import import import_torchvision
from utils.instruments.firing_rate import FiringRates
from utils.optimizer import make_optimizer
from utils.training import evaluate, train_one_epoch


class Project:
    """The project's training; its data is loaded once, as in a run, and a first epoch warms it up."""

    def __init__(self, path: str):
        torch.manual_seed(0)
        self.args = args = parse_arguments(RECIPE, ["--path", path])
        start = time.perf_counter()
        train, test = RECIPE.data(args)
        self.load_s = time.perf_counter() - start
        self.network = RECIPE.network(neuron=make_neuron(args.vth, args.leaky), time_steps=args.time_step, dropout=args.dropout)
        self.optimizer = make_optimizer(self.network, args)
        self.train, self.test = Batches(train, args.train_batch, shuffled=True), Batches(test, args.test_batch, shuffled=False)
        self.epoch()

    def epoch(self) -> Dict[str, float]:
        """Seconds of an epoch, the multiply-adds in it, seconds of loading the data once, and the firing rate after it."""
        self.network.solver.reset_tally()
        start = time.perf_counter()
        train_one_epoch(self.network, self.train, self.optimizer, lambda iteration: self.args.lr)
        evaluate(self.network, self.test)
        seconds = time.perf_counter() - start
        work = (len(self.train.samples.labels) * multiply_adds.training_step(self.network, self.network.solver.tally.mean_iterations)
                + len(self.test.samples.labels) * multiply_adds.evaluation(self.network))
        rates = FiringRates(self.network.neuron_counts)
        evaluate(self.network, self.test, rates)
        return {"seconds": seconds, "multiply_adds": work, "load_s": self.load_s, "firing_rate": rates.total}


class Yardstick:
    """The yardstick's training, its samples transformed one by one."""

    def __init__(self, path: str, workers: int):
        torch.manual_seed(0)
        vision = import_torchvision()
        transform = vision.transforms.Compose([vision.transforms.ToTensor(), vision.transforms.Normalize((0.1307,), (0.3081,)),
                                               partial(torch.flatten, start_dim=0)])
        self.data = [vision.datasets.FashionMNIST(path, train=part, transform=transform) for part in (True, False)]
        self.network, self.workers = yardstick_f400(), workers
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def epoch(self) -> float:
        """Seconds of an epoch."""
        start = time.perf_counter()
        yardstick_epoch(self.network, self.optimizer, *self.data, self.workers)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="how many turns they take")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    parser.add_argument("--workers", type=int, default=2, help="the yardstick's DataLoader processes")
    args = parser.parse_args()
    RECIPE.data(parse_arguments(RECIPE, ["--path", args.path]))  # Fetch what is missing before anything is timed.
    print(f"{describe_machine()}\n{HEADER}")
    project, yardstick = Worker(Project, args.path), Worker(Yardstick, args.path, args.workers)
    own, others, floors = [], [], []
    for _ in range(args.pairs):
        before = project.call("epoch")
        floors.append(before["multiply_adds"] / matmul_rate())
        others.append(yardstick.call("epoch"))
        after = project.call("epoch")
        own.append((before["seconds"] + after["seconds"]) / 2)
    row = make_row("F400 on Fashion-MNIST, an epoch", own, others, floors, project.close(), yardstick.close(), after["firing_rate"])
    print(describe_row(row))
    print(f"Loading the data takes the project {after['load_s']:.2f} s once a run. Not counted in the yardstick's memory are its "
          f"{args.workers} loader processes.\nrow written to {save_rows('cpu', [row])}")


if __name__ == "__main__":
    main()
