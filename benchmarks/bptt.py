"""The same F64C5 trained by the implicit gradient here and by back-propagation through time in SpikingJelly and snnTorch.

    pip install -r requirements-bench.txt
    python -m benchmarks.bptt [--steps 5 15 30 60] [--batch 32] [--turns 3]

Each library's network is written as its documentation would have it: convolution, batch norm, a recurrent convolution onto the same
layer's spikes, LIF neurons with soft reset, a readout of the mean rate, cross-entropy. All see the same MNIST images; they take turns,
each in a process of its own, so that its peak memory is its own. Prints a table, and writes it with a plot into benchmarks/results/.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.results import FOLDER
from benchmarks.timed_step import save_batch, timed_step
from benchmarks.worker import Worker
from modules.neuron import make_neuron
from modules.zoo import f64c5_mnist
from utils.data.datasets import load_mnist
from utils.optimizer import SGD

THRESHOLD, LEAK, CHANNELS = 2.0, 0.95, 64


class Recurrent(nn.Module):
    """What the two libraries' networks share: the connections and the readout of the mean rate."""

    def __init__(self, time_steps: int):
        super().__init__()
        self.time_steps = time_steps
        self.input = nn.Sequential(nn.Conv2d(1, CHANNELS, 5, 2, 2), nn.BatchNorm2d(CHANNELS))
        self.feedback = nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2, bias=False)
        self.readout = nn.Linear(CHANNELS * 14 * 14, 10)
        with torch.no_grad():  # The feedback as strong as the project's, so that firing rates are alike.
            self.feedback.weight.div_(torch.linalg.matrix_norm(self.feedback.weight.flatten(1), 2))

    def forward(self, x):
        current, spikes, rate = self.input(x), torch.zeros(len(x), CHANNELS, 14, 14), 0.0
        self.begin()
        for _ in range(self.time_steps):
            spikes = self.neurons(current + self.feedback(spikes))
            rate = rate + spikes / self.time_steps
        return self.readout(rate.flatten(1))


class SpikingJelly(Recurrent):
    def __init__(self, time_steps: int):
        super().__init__(time_steps)
        from spikingjelly.activation_based import neuron, surrogate
        self.node = neuron.LIFNode(tau=1 / (1 - LEAK), decay_input=False, v_threshold=THRESHOLD, v_reset=None,
                                   surrogate_function=surrogate.ATan())

    def begin(self):
        from spikingjelly.activation_based import functional
        functional.reset_net(self)

    def neurons(self, current):
        return self.node(current)


class SnnTorch(Recurrent):
    def __init__(self, time_steps: int):
        super().__init__(time_steps)
        import snntorch
        from snntorch import surrogate
        self.leaky = snntorch.Leaky(beta=LEAK, threshold=THRESHOLD, reset_mechanism="subtract", spike_grad=surrogate.atan())

    def begin(self):
        self.membrane = self.leaky.init_leaky()

    def neurons(self, current):
        spikes, self.membrane = self.leaky(current, self.membrane)
        return spikes


def project(time_steps: int) -> nn.Module:
    return f64c5_mnist(neuron=make_neuron(THRESHOLD, LEAK), time_steps=time_steps, dropout=0.0)


CONTESTANTS = {"project, implicit": (project, None), "SpikingJelly, BPTT": (SpikingJelly, "spikingjelly"),
               "snnTorch, BPTT": (SnnTorch, "snntorch")}


class Side:
    """One contestant for one T; trains a few steps first, so that its firing rate has settled."""

    def __init__(self, name: str, time_steps: int, batch_file: str):
        torch.manual_seed(0)
        self.x, self.labels = torch.load(batch_file)
        self.network = CONTESTANTS[name][0](time_steps)
        self.optimizer = SGD(self.network.parameters(), 0.01, momentum=0.9)  # PyTorch's imports another 70 MB, for every contestant.
        for _ in range(3):
            self.step()

    def step(self) -> float:
        return timed_step(self.network, self.optimizer, self.x, self.labels)

    def simulate(self) -> float:
        """Seconds of a simulation without a gradient."""
        start = time.perf_counter()
        with torch.no_grad():
            self.network(self.x)
        return time.perf_counter() - start


def measure(time_steps: int, batch_file: str, turns: int) -> List[Dict[str, Any]]:
    there = [name for name, (_, package) in CONTESTANTS.items() if package is None or importlib.util.find_spec(package)]
    sides = {name: Worker(Side, name, time_steps, batch_file) for name in there}
    times = {name: {"step": [], "simulate": []} for name in there}
    for _ in range(turns):
        for name, side in sides.items():
            for work in ("step", "simulate"):
                times[name][work].append(side.call(work))
    return [{"name": name, "T": time_steps, "step_s": statistics.median(times[name]["step"]),
             "simulation_s": statistics.median(times[name]["simulate"]), "peak_mb": side.close()} for name, side in sides.items()]


def plot(rows: List[Dict[str, Any]]) -> None:
    """Time of a step and peak memory over T, a line for each contestant."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.8), constrained_layout=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for axis, key, label in zip(axes, ("step_s", "peak_mb"), ("training step (s)", "peak memory (MB)")):
        for name, color, marker in zip(names, ("#0072B2", "#D55E00", "#009E73"), "os^"):
            own = [row for row in rows if row["name"] == name]
            axis.plot([row["T"] for row in own], [row[key] for row in own], color=color, marker=marker, label=name)
        axis.set(xlabel="time steps T", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    for suffix in ("png", "pdf"):
        figure.savefig(FOLDER / f"bptt.{suffix}", dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 15, 30, 60], help="values of T")
    parser.add_argument("--batch", type=int, default=32, help="samples per step")
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    args = parser.parse_args()
    print(f"{describe_machine()}\n{'':20s} {'T':>4s} {'step s':>8s} {'simulation s':>13s} {'peak MB':>8s}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        samples, batch_file = load_mnist(args.path).normalised(0.1307, 0.3081)[0], str(Path(scratch) / "batch")
        save_batch(samples, args.batch, batch_file)
        for row in (row for time_steps in args.steps for row in measure(time_steps, batch_file, args.turns)):
            rows.append(row)
            print(f"{row['name']:20s} {row['T']:4d} {row['step_s']:8.3f} {row['simulation_s']:13.3f} {row['peak_mb']:8.0f}", flush=True)
    stamp = {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), "batch": args.batch}
    (FOLDER / "bptt.json").write_text(json.dumps([{**row, **stamp} for row in rows], indent=1) + "\n")
    plot(rows)
    print(f"written to {FOLDER}/bptt.json, bptt.png and bptt.pdf")


if __name__ == "__main__":
    main()
