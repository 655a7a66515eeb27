"""What a training script states: an experiment of the paper as a recipe."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from modules.network import FeedbackSNN
from utils.data.batches import Samples


@dataclass(frozen=True)
class Recipe:
    """One experiment of the paper: a network, its data sets and the defaults of the flags that differ from the shared ones.

    `network(classes=…, **settings)` builds it and `data(args)` gives training and test samples. `datasets` are the choices of
    --dataset, the default first, with their numbers of classes. `description` may name the chosen one as {dataset}. `flags` adds
    flags that only this experiment has.
    """

    description: str
    network: Callable[..., FeedbackSNN]
    data: Callable[[Namespace], Tuple[Samples, Samples]]
    datasets: Mapping[str, int]
    defaults: Dict[str, Any] = field(default_factory=dict)
    flags: Optional[Callable[[ArgumentParser], None]] = None

    @property
    def summary(self) -> str:
        return self.description.format(dataset=" or ".join(self.datasets))
