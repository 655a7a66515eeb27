"""Times training steps and evaluations of F400, F64C5 and AlexNet-F, the project against the yardstick and the machine's limit.

    python -m benchmarks.steps [--device cpu|cuda] [--precision fp32 tf32 bf16] [--turns 3] [--path ./data] [--only F64C5]
                               [--trained F64C5=checkpoints/mnist/checkpoint.pth.tar] [--yardstick-tolerance 1e-3]

Project and yardstick take turns on the same batch of real images with the same weights: those of a checkpoint (--trained), or, after
a short training here, weights on the way there; firing rates and the solves' products, and so the times, are those of that network.
The floor is the time that the project's multiply-adds, done densely, take at the rate of the device's own matrix products, measured in
every turn. On a GPU each precision has its rows; the yardstick of bf16 rows has tf32 products. With another than the published tolerance
of the yardstick's solve, rows are printed and not kept.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from benchmarks import multiply_adds, yardstick
from benchmarks.machine import describe_machine, matmul_rate
from benchmarks.results import HEADER, describe_row, make_row, save_rows
from benchmarks.timed_step import save_batch
from benchmarks.worker import OnGpu, Worker
from benchmarks.yardstick import copy_weights, yardstick_alexnet_f, yardstick_f400, yardstick_f64c5
from modules.neuron import make_neuron
from modules.zoo import alexnet_f, f64c5_mnist, f400
from utils.checkpoint import load_checkpoint
from utils.data.batches import Batches
from utils.data.datasets import load_cifar, load_fashion_mnist, load_mnist
from utils.device import set_precision, working_on
from utils.instruments.firing_rate import FiringRates
from utils.optimizer import SGD


class Case(NamedTuple):
    network: str
    training: bool
    batch: int
    time_steps: int
    precision: Optional[str] = None  # on a GPU

    @property
    def name(self) -> str:
        name = f"{self.network}, {'training step' if self.training else 'evaluation'}, batch {self.batch}, T = {self.time_steps}"
        return f"{name}, {self.precision}" if self.precision else name


CASES = [
    Case("F400", True, 128, 5), Case("F400", False, 200, 5), Case("F64C5", True, 128, 30), Case("F64C5", False, 200, 30),
    Case("AlexNet-F", True, 32, 30), Case("AlexNet-F", False, 32, 30),
    *[Case("F64C5", True, 32, steps) for steps in (5, 10, 30, 100)], *[Case("F64C5", True, batch, 10) for batch in (8, 128)],
]
GPU_CASES = [
    Case("F400", True, 128, 5), Case("F64C5", True, 128, 30), Case("F64C5", False, 200, 30), Case("AlexNet-F", True, 128, 30),
    Case("AlexNet-F", False, 200, 30), *[Case("AlexNet-F", True, 128, steps) for steps in (10, 100)],
]
NETWORKS = {"F400": (f400, yardstick_f400, 0.95), "F64C5": (f64c5_mnist, yardstick_f64c5, 0.95),
            "AlexNet-F": (alexnet_f, yardstick_alexnet_f, 0.99)}
LEAST_S = 0.3  # One short step after the other side's turn would find cold caches and sleeping threads.
WARM_STEPS = {"F400": 400, "F64C5": 40, "AlexNet-F": 25}


def load_images(network: str, path: str):
    if network == "F400":
        return load_fashion_mnist(path).normalised(0.1307, 0.3081, flatten=True)[0]
    if network == "F64C5":
        return load_mnist(path).normalised(0.1307, 0.3081)[0]
    return load_cifar(path, "cifar10").normalised((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))[0]


class Side:
    """One contestant: a network, an optimiser, and the batch that it steps on."""

    def __init__(self, case: Case, device: str, batch_file: str):
        self.case, self.device = case, torch.device(device)
        self.x, self.labels = (tensor.to(self.device) for tensor in torch.load(batch_file))

    def start(self) -> None:
        self.network.to(self.device).train(self.case.training)
        self.optimizer = self.sgd(self.network.parameters(), 0.0, momentum=0.9)

    def time(self) -> float:
        """Seconds of one step, its learning rate 0 so that every turn does the same work; the mean of as many as LEAST_S holds."""
        self._choose_precision()
        self._wait()
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < LEAST_S:
            self._step()
            self._wait()
            steps += 1
        return (time.perf_counter() - start) / steps

    def _step(self) -> None:
        with torch.set_grad_enabled(self.case.training):
            if self.case.training:
                self.optimizer.zero_grad()
            logits = self.network(self.x)
            if self.case.training:
                F.cross_entropy(logits, self.labels).backward()
                self.optimizer.step()

    def _choose_precision(self) -> bool:
        return set_precision(self.case.precision or "fp32")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Project(Side):
    sgd = SGD

    def __init__(self, case: Case, device: str, batch_file: str, weights: str):
        with working_on(torch.device(device)):
            super().__init__(case, device, batch_file)
            self.network = build(case)
            self.network.bf16_products = self._choose_precision()
            self.network.load_state_dict(torch.load(weights))
            self.start()

    def time(self) -> float:
        with working_on(self.device):
            return super().time()

    def facts(self) -> Dict[str, float]:
        """Multiply-adds of the batch, done densely, and the firing rate."""
        tally = self.network.solver.tally
        per_sample = (multiply_adds.training_step(self.network, tally.mean_iterations) if self.case.training
                      else multiply_adds.evaluation(self.network))
        rates = FiringRates(self.network.neuron_counts)
        with torch.no_grad():
            self.network.eval()(self.x[:16], observe=rates)
        return {"multiply_adds": per_sample * len(self.x), "firing_rate": rates.total}


class Yardstick(Side):
    sgd = torch.optim.SGD

    def __init__(self, case: Case, device: str, batch_file: str, weights: str, tolerance: float):
        super().__init__(case, device, batch_file)
        yardstick.TOLERANCE = tolerance  # in this process
        project = build(case)
        project.load_state_dict(torch.load(weights))
        _, make, leak = NETWORKS[case.network]
        self.network = make(time_steps=case.time_steps, leak=leak)
        copy_weights(self.network, project)
        self.start()


class Rate:
    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device

    def measure(self) -> float:
        rounded = set_precision(self.case.precision or "fp32")
        return matmul_rate(device=self.device, dtype=torch.bfloat16 if rounded else torch.float32)


def build(case: Case):
    make, _, leak = NETWORKS[case.network]
    return make(neuron=make_neuron(2.0, leak), time_steps=case.time_steps, dropout=0.2)


class Trained:
    """Leaves a checkpoint's weights in a file, or those of a network that it trains for some steps."""

    def __init__(self, network: str, device: str, path: str):
        self.name, self.device, self.samples = network, torch.device(device), load_images(network, path)

    def batch(self, size: int, file: str) -> None:
        save_batch(self.samples, size, file)

    def weights(self, steps: int, checkpoint: Optional[str], file: str) -> None:
        if checkpoint:
            torch.save(load_checkpoint(Path(checkpoint)).state_dict, file)
            return
        torch.manual_seed(0)
        case = next(case for case in CASES if case.network == self.name)
        network = build(case).to(self.device).train()
        optimizer = SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        batches = iter(Batches(self.samples, case.batch, shuffled=True))
        for step in range(steps):
            x, labels = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * min(1, (step + 1) / 20)
            optimizer.zero_grad()
            F.cross_entropy(network(x.to(self.device)), labels.to(self.device)).backward()
            optimizer.step()
        torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, file)


def measure(case: Case, device: str, batch_file: str, weights: str, turns: int, tolerance: float) -> Dict[str, Any]:
    """One row of the table."""
    start = OnGpu if device == "cuda" else Worker
    rate = start(Rate, case, device)
    plain = start(Yardstick, case, device, batch_file, weights, tolerance)
    plain.call("time")
    project = start(Project, case, device, batch_file, weights)
    project.call("time")
    times, floors = {"project": [], "yardstick": []}, []
    for _ in range(turns):
        times["project"].append(project.call("time"))
        times["yardstick"].append(plain.call("time"))
        floors.append(1 / rate.call("measure"))
    rate.close()
    facts = project.call("facts")
    return make_row(case.name, times["project"], times["yardstick"], [facts["multiply_adds"] * floor for floor in floors],
                    project.close(), plain.close(), facts["firing_rate"])


def trained_file(pair: str) -> Tuple[str, str]:
    """An argparse type: a network and its checkpoint."""
    network, _, file = pair.partition("=")
    if network not in NETWORKS or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{pair} is not NETWORK=FILE, with one of {', '.join(NETWORKS)} and a checkpoint")
    return network, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), nargs="+", default=["fp32", "tf32", "bf16"],
                        help="precisions to time on a GPU")
    parser.add_argument("--turns", type=int, default=3, help="how often each side is timed")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="networks to time")
    parser.add_argument("--trained", type=trained_file, nargs="+", default=[], metavar="NETWORK=FILE",
                        help="checkpoints whose weights to use")
    parser.add_argument("--yardstick-tolerance", type=float, default=yardstick.TOLERANCE,
                        help="relative residual at which the yardstick's solve stops (default: the published code's)")
    args = parser.parse_args()
    trained_files = dict(args.trained)
    print(f"{describe_machine(args.device)}\n{HEADER}")
    with tempfile.TemporaryDirectory() as scratch:
        for network in args.only:
            start = OnGpu if args.device == "cuda" else Worker
            trained, weights = start(Trained, network, args.device, args.path), str(Path(scratch) / "weights")
            trained.call("weights", WARM_STEPS[network], trained_files.get(network), weights)
            cases = [case._replace(precision=precision) for case in GPU_CASES for precision in args.precision]
            for case in cases if args.device == "cuda" else CASES:
                if case.network == network:
                    batch = str(Path(scratch) / "batch")
                    trained.call("batch", case.batch, batch)
                    row = measure(case, args.device, batch, weights, args.turns, args.yardstick_tolerance)
                    print(describe_row(row), flush=True)
                    if args.yardstick_tolerance == yardstick.TOLERANCE:
                        save_rows(args.device, [row])
            trained.close()


if __name__ == "__main__":
    main()
