"""One epoch of training and one pass of evaluation, as plain functions."""

import gc
from argparse import Namespace
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from progress.bar import Bar
from torch import nn

from modules.network import Observer
from utils.batches import Batches
from utils.metrics import Averages, Metrics

# Reading a metric waits for the device, so the bar shows new ones only so often.
ITERATIONS_PER_BAR_UPDATE = 10


def make_optimizer(network: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """SGD with momentum or Adam, in PyTorch's fused implementation."""
    if args.optimizer == "Adam":
        return torch.optim.Adam(network.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)


def train_one_epoch(network: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer,
                    learning_rate: Callable[[int], float]) -> Averages:
    """Train on every batch once; `learning_rate` gives the rate of the epoch's i-th iteration."""
    _spare_the_garbage_collector()
    network.train()
    metrics = Metrics()
    with _bar("training", len(batches)) as bar:
        for iteration, (x, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration)
            logits = network(x)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            metrics.add(logits, labels, loss)
            if iteration % ITERATIONS_PER_BAR_UPDATE == 0:
                bar.show(iteration, metrics, f" | solver {network.solver.tally.mean_iterations:.1f} iterations")
    return metrics.averages()


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Batches, observe: Optional[Observer] = None) -> Averages:
    """Loss and accuracy over all batches, in evaluation mode; `observe` sees every simulation."""
    network.eval()
    metrics = Metrics()
    with _bar("testing", len(batches)) as bar:
        for iteration, (x, labels) in enumerate(batches):
            logits = network(x, observe=observe)
            metrics.add(logits, labels, F.cross_entropy(logits, labels))
            if iteration % ITERATIONS_PER_BAR_UPDATE == 0:
                bar.show(iteration, metrics)
    return metrics.averages()


def _spare_the_garbage_collector() -> None:
    """Once: what lives since the imports stays, and looking through it again and again takes several percent of a small network's step."""
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


class _bar(Bar):
    """A progress bar on a terminal (nothing elsewhere), with the averages so far and the time left."""

    suffix = "%(index)d/%(max)d | %(eta_td)s left%(numbers)s"
    numbers = ""

    def __init__(self, title: str, iterations: int):
        super().__init__(f"{title:8s}", max=iterations)

    def show(self, iteration: int, metrics: Metrics, more: str = "") -> None:
        if not self.is_tty():
            return
        loss, top1, top5 = metrics.averages()
        self.numbers = f" | loss {loss:.4f} | top-1 {top1:.2f} % | top-5 {top5:.2f} %{more}"
        self.goto(iteration + 1)
