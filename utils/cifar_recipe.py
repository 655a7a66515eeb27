"""The paper's recipe on CIFAR, which its networks share: data sets, augmentation and training schedule."""

from argparse import Namespace
from typing import Callable, Tuple

from modules.network import FeedbackSNN
from utils.data.batches import Samples
from utils.data.datasets import load_cifar
from utils.recipe import Recipe

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def cifar_data(args: Namespace) -> Tuple[Samples, Samples]:
    return load_cifar(args.path, args.dataset).augmented(MEAN, STD)


def cifar_recipe(name: str, network: Callable[..., FeedbackSNN]) -> Recipe:
    return Recipe(
        description=f"{name} on {{dataset}}",
        network=network,
        data=cifar_data,
        datasets={"cifar10": 10, "cifar100": 100},
        defaults=dict(time_step=100, leaky=0.99, epochs=100, schedule=[50, 75], warmup=400, lr=0.05, dropout=0.2),
    )
