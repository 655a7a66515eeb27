"""The learning rate as a function of time alone, so that a resumed run cannot get it wrong."""

from typing import Sequence


def learning_rate(base: float, epoch: int, iteration: int, milestones: Sequence[int] = (), gamma: float = 0.1, warmup: int = 0) -> float:
    """The rate at `epoch` (from 0) and `iteration` (from 0, over the whole run).

    `base` · gamma^(milestones reached), rising linearly from 1/warmup of that over the first `warmup` iterations.
    """
    rate = base * gamma ** sum(epoch >= milestone for milestone in milestones)
    return rate * min(1.0, (iteration + 1) / warmup) if warmup else rate
