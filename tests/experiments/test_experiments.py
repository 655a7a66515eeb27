"""Every experiment on its real data, through the real command line, within limits that two CPU cores bear: make test-experiments.

Each case types the published commands, with limits added: training, --resume, --resume --evaluate, firing rates. Fashion-MNIST,
MNIST and CIFAR-10 lie in ./data; the environment variables CIFAR100 and NMNIST name the folders of the others. A data set that is
neither there nor can be fetched fails its cases with the script's own sentence about where to get it.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from utils.log import read_log

PROJECT = Path(__file__).parents[2]
DATA, CIFAR100, NMNIST = "./data", os.environ.get("CIFAR100") or "./data", os.environ.get("NMNIST") or "./data/NMNIST"


class Case(NamedTuple):
    """An experiment's published command line, and flags that limit it; `accuracy`, in percent, is what it must reach."""

    published: str
    path: str
    limits: str
    epochs: int
    accuracy: float


# Few samples in small batches need a smaller learning rate on CIFAR, and 1,000 recordings more dropout, than the whole sets.
CIFAR = "--gpu-id 0 --time_step 30 --leaky 0.99"
FEW = "--train-limit 64 --test-limit 20 --train-batch 16 --lr 0.01 --warmup 8"
FEWER = "--train-limit 32 --test-limit 10 --train-batch 8 --lr 0.01 --warmup 8"
CASES = {
    "F400 on Fashion-MNIST": Case("fmnist_mlp.py --gpu-id 0", DATA, "--train-limit 10000 --test-limit 2000", 3, 75),
    "F64C5 on MNIST": Case("mnist_conv.py --gpu-id 0 --time_step 30 --leaky 0.99", DATA,
                           "--train-limit 1000 --test-limit 500 --train-batch 32", 3, 70),
    "F64C5 on N-MNIST": Case("nmnist_conv.py --gpu-id 0 --time_step 30 --leaky 1", NMNIST,
                             "--train-limit 1000 --test-limit 100 --train-batch 32 --drop 0.5 --schedule 8", 10, 90),
    "AlexNet-F on CIFAR-10": Case(f"cifar_alexnetf.py --dataset cifar10 {CIFAR}", DATA, FEW, 5, 0),
    "AlexNet-F on CIFAR-100": Case(f"cifar_alexnetf.py --dataset cifar100 {CIFAR}", CIFAR100, FEW, 5, 0),
    "CIFARNet-F on CIFAR-10": Case(f"cifar_cifarnetf.py --dataset cifar10 {CIFAR}", DATA, FEWER, 4, 0),
    "CIFARNet-F on CIFAR-100": Case(f"cifar_cifarnetf.py --dataset cifar100 {CIFAR}", CIFAR100, FEWER, 4, 0),
}


def run(command, *more):
    """Run a script as a user does and return what it prints; what it refuses fails the test with its sentence."""
    command = [*shlex.split(command), *map(str, more)]
    print("$ python", shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        pytest.fail(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()}", pytrace=False)
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_trains_resumes_evaluates_and_counts_spikes(name, tmp_path):
    case, folder = CASES[name], tmp_path / "run"
    typed, checkpoint = f"{case.published} --path {shlex.quote(case.path)}", folder / "checkpoint.pth.tar"
    limits = shlex.split(case.limits)
    run(typed, "-c", folder, *limits, "--epochs", case.epochs - 1, "--manualSeed", 1)
    run(typed, "-c", folder, *limits, "--epochs", case.epochs, "--resume", checkpoint)
    rows = read_log(folder / "log.txt")
    losses = [row[1] for row in rows]
    assert len(rows) == case.epochs and losses[-1] < losses[0], f"the loss must fall: {losses}"
    evaluated = run(typed, *limits, "--resume", checkpoint, "--evaluate")
    assert f"test loss {rows[-1][2]:.4f} | top-1 {rows[-1][4]:.2f} %" in evaluated
    assert max(row[4] for row in rows) >= case.accuracy, "the best over epochs, as in the paper"
    counted = run(typed, "-c", folder, *limits, "--resume", checkpoint, "--evaluate", "--firing-rate")
    assert_rates(counted, folder)
    if case.published.startswith("cifar_alexnetf.py"):
        by_script = run(f"get_rate_{typed}", "-c", folder, *limits, "--resume", checkpoint)
        assert measured(by_script) == measured(counted)


def measured(out):
    """What is printed after the title, which names the script and a drawn seed."""
    return out[out.index("\nTesting on"):]


def assert_rates(out, folder):
    rates = [float(rate) for rate in re.findall(r"firing rate ([\d.]+)", out)]
    *layers, total = rates
    assert layers and all(0 < rate < 1 for rate in rates) and min(layers) <= total <= max(layers)
    assert (folder / "firing_rate.png").exists() and (folder / "firing_rate.pdf").exists()
