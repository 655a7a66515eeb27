"""Short runs of training with something done to them at a chosen moment: the fixtures `data`, `train` and `after`."""

import os

import pytest

from tests.small_data import command, write_small_data
from utils import fit, run_files
from utils.data.batches import Batches

BATCHES = 6  # of 16 samples, the last one of 10


@pytest.fixture
def data(tmp_path):
    return write_small_data(tmp_path / "data", train=90)


@pytest.fixture
def train(data, tmp_path, monkeypatch):
    """Trains in the folder of a name, by default for 2 epochs and without plots; returns status, output and error output."""
    monkeypatch.setattr(run_files, "plot_log", lambda rows, path: [path.with_suffix(".png")])
    def run(name, *more):
        return command("--path", data, "-c", tmp_path / name, "--train-batch", 16, "--manualSeed", 5, "--device", "cpu", "--lr", 0.02,
                       "--warmup", 9, "--epochs", 2, *more)
    return run


@pytest.fixture
def after(monkeypatch):
    """after(n, act) has `act` called once, behind the n-th training iteration and what belongs to it."""
    def arrange(count, act):
        real, calls = fit.train_one_epoch, [0]

        def train_one_epoch(network, batches, optimizer, rate, state, after_iteration, on_nan):
            def counted():
                calls[0] += 1
                if calls[0] == count:
                    act()
                after_iteration()
            return real(network, batches, optimizer, rate, state, counted, on_nan)
        monkeypatch.setattr(fit, "train_one_epoch", train_one_epoch)
    return arrange


def epoch_line(out):
    """The second epoch's line without its seconds."""
    return next(line for line in out.splitlines() if line.startswith("epoch 2/2")).rpartition(" | ")[0]


def send(number):
    return lambda: os.kill(os.getpid(), number)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it."""


def kill(*_):
    raise Killed


def spoil(monkeypatch, *bad, value=float("nan")):
    """The bad-th batches (from 1) hold a value that is not finite."""
    real, calls = Batches._batches, [0]

    def batches(self, *drawn):
        for x, labels in real(self, *drawn):
            calls[0] += self.shuffled
            if self.shuffled and calls[0] in bad:
                x[0, 0] = value
            yield x, labels
    monkeypatch.setattr(Batches, "_batches", batches)
