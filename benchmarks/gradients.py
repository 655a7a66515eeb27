"""The implicit gradient against back-propagation through time, of the same networks: time, memory and accuracy over T.

    python -m benchmarks.gradients [--steps 5 15 30 60] [--accuracy-steps 5 15 30 60] [--f64c5-accuracy-steps 5 15 30 60] [--turns 3]

Steps: F400 on 128 images of Fashion-MNIST, F64C5 on 32 of MNIST; both gradients take turns on the same batch, each in a process of
its own, so that its peak memory, less what Python and PyTorch hold, is its own. Accuracy: each experiment's own recipe by its command line,
two epochs on its first samples. Prints a Markdown table; writes rows into benchmarks/results/ and a plot into docs/figures/.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

import fmnist_mlp
import mnist_conv
from benchmarks.machine import describe_machine
from benchmarks.results import FOLDER
from benchmarks.timed_step import save_batch, timed_step
from benchmarks.worker import Worker
from modules.bptt import SURROGATES
from modules.neuron import make_neuron
from modules.zoo import f64c5_mnist, f400
from utils.data.datasets import load_fashion_mnist, load_mnist
from utils.experiment import main as train
from utils.log import read_log
from utils.optimizer import SGD

ROWS, FIGURE = FOLDER / "gradients.json", Path(__file__).parents[1] / "docs/figures/gradients"
GRADIENTS = ("implicit", "bptt")
BATCH = {"F400": 128, "F64C5": 32}
RECIPES = {"F400": (fmnist_mlp.RECIPE, ["--train-limit", "10000", "--test-limit", "2000"]),
           "F64C5": (mnist_conv.RECIPE, ["--train-limit", "2000", "--test-limit", "1000"])}


class Side:
    """One gradient of one network for one T; trains a few steps first, so that its firing rate has settled."""

    def __init__(self, name: str, gradient: str, surrogate: str, time_steps: int, batch_file: str):
        torch.manual_seed(0)
        self.x, self.labels = torch.load(batch_file)
        build = f400 if name == "F400" else f64c5_mnist
        self.network = build(neuron=make_neuron(2.0, 0.95), time_steps=time_steps, dropout=0.2,
                             surrogate=SURROGATES[surrogate] if gradient == "bptt" else None)
        self.optimizer = SGD(self.network.parameters(), 0.01, momentum=0.9)
        for _ in range(3):
            self.step()

    def step(self) -> float:
        return timed_step(self.network, self.optimizer, self.x, self.labels)


def measure_steps(name: str, time_steps: int, batch_file: str, args: argparse.Namespace) -> Dict[str, Dict[str, float]]:
    """Median seconds of a step and peak memory in MB of both gradients."""
    sides = {gradient: Worker(Side, name, gradient, args.surrogate, time_steps, batch_file) for gradient in GRADIENTS}
    times = {gradient: [] for gradient in GRADIENTS}
    for _ in range(args.turns):
        for gradient, side in sides.items():
            times[gradient].append(side.call("step"))
    return {gradient: {"step_s": statistics.median(times[gradient]), "peak_mb": side.close(), "accuracy": None}
            for gradient, side in sides.items()}


def measure_accuracy(name: str, time_steps: int, gradient: str, args: argparse.Namespace) -> float:
    """Test accuracy in percent after two epochs on the first samples."""
    recipe, limits = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(recipe, ["--path", args.path, "-c", folder, "--seed", "1", "--epochs", "2", "-t", str(time_steps), "--device", "cpu",
                       "--gradient", gradient, "--surrogate", args.surrogate, *limits])
        return read_log(Path(folder) / "log.txt")[-1][4]


def table(rows: Sequence[Dict[str, Any]]) -> str:
    lines = ["| network | T | step (s), implicit · BPTT | peak memory (MB), implicit · BPTT | test accuracy (%), implicit · BPTT |",
             "|---|---|---|---|---|"]
    for row in rows:
        cells = [" · ".join("–" if row[gradient][key] is None else form.format(row[gradient][key]) for gradient in GRADIENTS)
                 for key, form in (("step_s", "{:.3g}"), ("peak_mb", "{:.0f}"), ("accuracy", "{:.1f}"))]
        lines.append(f"| {row['network']} | {row['T']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Time of a step, peak memory and accuracy over T: a row of axes for each network, a line for each gradient."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(len(names), 3, figsize=(7, 0.4 + 2 * len(names)), squeeze=False, constrained_layout=True)
    labels = {"step_s": "training step (s)", "peak_mb": "peak memory (MB)", "accuracy": "test accuracy (%)"}
    for name, own_axes in zip(names, axes):
        own = [row for row in rows if row["network"] == name]
        for axis, (key, label) in zip(own_axes, labels.items()):
            for gradient, color, marker in zip(GRADIENTS, ("#0072B2", "#D55E00"), "os"):
                points = [(row["T"], row[gradient][key]) for row in own if row[gradient][key] is not None]
                axis.plot(*(zip(*points) if points else ([], [])), color=color, marker=marker, markersize=4,
                          label={"implicit": "implicit", "bptt": "BPTT"}[gradient])
            axis.set_xticks([row["T"] for row in own])
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
            axis.set_xlim(0, 1.06 * max(row["T"] for row in own))
            if key != "accuracy":
                axis.set_ylim(0, 1.08 * max(value for _, value in axis.dataLim.get_points()))
            elif len(axis.lines[0].get_xdata()):
                low, high = axis.get_ylim()
                axis.set_ylim(min(low, high - 4) - 1, high + 1)  # A difference of tenths is one run's luck.
        own_axes[1].set_title(name, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("time steps T", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    pyplot.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 15, 30, 60], help="values of T to time")
    parser.add_argument("--accuracy-steps", type=int, nargs="*", default=[5, 15, 30, 60], help="values of T to train F400 with")
    parser.add_argument("--f64c5-accuracy-steps", type=int, nargs="*", default=[5, 15, 30, 60],
                        help="the same for F64C5, which takes longer")
    parser.add_argument("--turns", type=int, default=3, help="how often each step is timed")
    parser.add_argument("--surrogate", choices=tuple(SURROGATES), default="sigmoid")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    args = parser.parse_args(argv)
    # All steps are timed before anything is trained here: a new process's peak memory starts from its parent's.
    rows = []
    for name in args.networks:
        images = load_fashion_mnist(args.path) if name == "F400" else load_mnist(args.path)
        with tempfile.NamedTemporaryFile() as batch:
            save_batch(images.normalised(0.1307, 0.3081, flatten=name == "F400")[0], BATCH[name], batch.name)
            for time_steps in args.steps:
                rows.append({"network": name, "T": time_steps, **measure_steps(name, time_steps, batch.name, args)})
                write(rows, args.surrogate)
    for row in rows:
        if row["T"] in (args.accuracy_steps if row["network"] == "F400" else args.f64c5_accuracy_steps):
            for gradient in GRADIENTS:
                row[gradient]["accuracy"] = measure_accuracy(row["network"], row["T"], gradient, args)
                write(rows, args.surrogate)
    plot(rows, FIGURE)
    print(f"{table(rows)}\n\n{describe_machine()}, {time.strftime('%Y-%m-%d')}, surrogate {args.surrogate}\n"
          f"written to {ROWS}, {FIGURE}.png and {FIGURE}.pdf")


def write(rows: Sequence[Dict[str, Any]], surrogate: str) -> None:
    """The rows measured so far, so that a run that is stopped leaves them."""
    stamp = {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d"), "surrogate": surrogate}
    ROWS.write_text(json.dumps([{**row, **stamp} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
