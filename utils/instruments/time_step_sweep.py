"""Accuracy over T of one network, from one simulation of the longest T."""

import copy
from typing import Collection, Dict, Iterable, Tuple

import torch
from torch import Tensor

from modules.network import FeedbackSNN
from modules.simulation import Observer
from utils.instruments.observers import RunningRates, together


def lasting(network: FeedbackSNN, time_steps: int) -> FeedbackSNN:
    """The same network, its parameters shared, simulated for another T."""
    longer = copy.copy(network)
    longer.time_steps = time_steps
    return longer


@torch.inference_mode()
def time_step_sweep(network: FeedbackSNN, batches: Iterable[Tuple[Tensor, Tensor]], steps: Collection[int],
                    *observers: Observer) -> Dict[int, Tensor]:
    """For each T in `steps` the confusion matrix, int64 (classes, classes), of labels (rows) and predictions (columns).

    Each is what the network classifies in T steps: its spikes up to then do not depend on how long it goes on. `observers` see the
    spikes too. In evaluation mode; an event input has the network's own T frames, the most in `steps`.
    """
    network.eval()
    longest, classes = lasting(network, max(steps)), network.readout.out_features
    matrices = {T: torch.zeros(classes, classes, dtype=torch.int64) for T in sorted(steps)}
    for x, labels in batches:
        def count(T, rates):
            pairs = labels * classes + network.readout(rates[-1].flatten(1)).argmax(1)
            matrices[T] += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
        longest(x, observe=together(RunningRates(network.neuron.leak, steps, count), *observers))
    return matrices


def accuracy(confusion: Tensor) -> float:
    """In percent."""
    return 100 * (confusion.trace() / confusion.sum()).item()
