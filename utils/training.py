"""One epoch of training and one pass of evaluation, as plain functions."""

import functools
import gc
import math
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from progress.bar import Bar
from torch import nn

from modules.across_processes import process_count, total
from modules.network import Observer
from modules.solvers import Reading
from utils.data.batches import Batches
from utils.epoch_state import EpochState
from utils.metrics import Averages, Metrics
from utils.processes import average_gradients, gathered, is_first, share_buffers

# Reading a metric waits for the device, so the bar shows new ones only so often.
ITERATIONS_PER_BAR_UPDATE = 10
# The distance from equilibrium costs a pass over the rates, and a few batches tell it.
ITERATIONS_PER_RESIDUAL = 50


class NotFinite(ArithmeticError):
    """In the epoch's `iteration` (from 0) the loss, or a current in the network, was infinite or not a number: no update was made."""

    def __init__(self, iteration: int, loss: float):
        self.iteration, self.what = iteration, f"the loss is {loss}"
        if math.isfinite(loss):
            self.what = f"the network's currents are not finite (while the loss, {loss:.4f}, is)"
        super().__init__(f"{self.what} in iteration {iteration}")


def nothing() -> None:
    pass


def train_one_epoch(network: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, learning_rate: Callable[[int], float],
                    state: Optional[EpochState] = None, after_iteration: Callable[[], None] = nothing,
                    on_nan: str = "stop") -> Averages:
    """Train on every batch once; `learning_rate` gives the rate of the epoch's i-th iteration.

    It goes on from `state`, which is up to date whenever `after_iteration` is called. Where the loss or a current is not finite, it
    raises NotFinite, or for `on_nan` "skip" leaves the network and the metrics as they were before the batch and counts it.
    In a job of several processes each pass starts from the first one's buffers, and gradients are averaged (utils/processes.py).
    """
    _spare_the_garbage_collector()
    state = EpochState() if state is None else state
    if state.order_state is None:
        # Every process draws the first one's order, and goes on with random numbers of its own.
        state.order_state, state.shape = gathered(torch.get_rng_state())[0], batches.shape
        remaining = iter(batches) if is_first() else batches.after(0, state.order_state)
    else:
        remaining = batches.after(state.iteration, state.order_state)
    network.train()
    network.solver.tally = state.tally
    # A neuron whose potential is not a number never spikes, so the loss can look healthy; the batch norms' statistics and the
    # feedback's singular vectors, which every pass renews, show it, and their sum is finite only if they are.
    statistics = [buffer.view(-1) for buffer in network.buffers() if buffer.is_floating_point()]
    parameters = list(network.parameters())
    with _bar("training", len(batches)) as bar:
        upcoming = next(remaining, None)
        while upcoming is not None:
            (x, labels), iteration = upcoming, state.iteration
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration)
            share_buffers(network)
            before = [buffer.clone() for buffer in network.buffers()] if on_nan == "skip" else []
            for parameter in parameters:  # optimizer.zero_grad() takes ten times as long.
                parameter.grad = None
            measures_residual = iteration % ITERATIONS_PER_RESIDUAL == 0
            if network.measures_residual != measures_residual:  # Setting a module's attribute takes ten times as long as reading it.
                network.measures_residual = measures_residual
            logits = network(x)
            loss = F.cross_entropy(logits, labels)
            reading = Reading(total(loss.detach() + torch.cat(statistics).sum()))
            # Here, while a GPU is busy with this pass: after the backward solve, which is waited for, it has little left to do.
            upcoming = next(remaining, None)
            # The processes' gradients are averaged, and each sample of the batch counts the same.
            weight = process_count() * len(labels) / batches.whole(iteration)
            (loss if weight == 1 else loss * weight).backward()
            # The solve in there has read values that a GPU computes after the loss, so this waits for nothing.
            if math.isfinite(reading.value()):
                average_gradients(network)
                optimizer.step()
                state.metrics.add(logits, labels, loss)
                if network.residual is not None and network.measures_residual:
                    state.residuals.append(network.residual / process_count())
            elif on_nan == "stop":
                raise NotFinite(iteration, total(loss.detach()).item() / process_count())
            else:
                state.skipped += 1
                for buffer, old in zip(network.buffers(), before):
                    buffer.copy_(old)
            state.iteration += 1
            after_iteration()
            if iteration % ITERATIONS_PER_BAR_UPDATE == 0:
                bar.show(iteration, state.metrics, f" | solver {state.tally.mean_iterations:.1f} iterations")
    share_buffers(network)
    return state.of_all_processes().metrics.averages()


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Batches, observe: Optional[Observer] = None,
             between: Callable[[], None] = nothing) -> Averages:
    """Loss and accuracy over all batches, in evaluation mode; `between` is called before each batch.

    `observe` sees every simulation of this process, which has its share of every batch; the averages are over all processes.
    """
    network.eval()
    metrics = Metrics()
    with _bar("testing", len(batches)) as bar:
        for iteration, (x, labels) in enumerate(batches):
            between()
            if len(labels):
                logits = network(x, observe=observe)
                metrics.add(logits, labels, F.cross_entropy(logits, labels))
            if iteration % ITERATIONS_PER_BAR_UPDATE == 0:
                bar.show(iteration, metrics)
    return EpochState(metrics=metrics).of_all_processes().metrics.averages()


@functools.lru_cache(maxsize=None)
def _spare_the_garbage_collector() -> None:
    """Once: what lives since the imports stays, and looking through it again and again takes several percent of a small network's step."""
    gc.collect()
    gc.freeze()


class _bar(Bar):
    """A progress bar on a terminal (nothing elsewhere), with the averages so far and the time left."""

    suffix = "%(index)d/%(max)d | %(eta_td)s left%(numbers)s"
    numbers = ""

    def __init__(self, title: str, iterations: int):
        super().__init__(f"{title:8s}", max=iterations, **({} if is_first() else {"file": None}))

    def show(self, iteration: int, metrics: Metrics, more: str = "") -> None:
        if not (self.file and self.is_tty()):
            return
        loss, top1, top5 = metrics.averages()
        self.numbers = f" | loss {loss:.4f} | top-1 {top1:.2f} % | top-5 {top5:.2f} %{more}"
        self.goto(iteration + 1)
