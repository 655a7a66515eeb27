"""A training step with a clock."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timed_step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    """Seconds of one training step on the batch, on a CPU."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(network(x), labels).backward()
    optimizer.step()
    return time.perf_counter() - start
