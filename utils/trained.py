"""A trained network with its experiment and test data, found from its checkpoint alone."""

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import torch

from modules.network import FeedbackSNN
from modules.neuron import make_neuron
from modules.solvers import METHODS
from utils.arguments import parse_arguments
from utils.checkpoint import Checkpoint, load_checkpoint, restore_network
from utils.data.batches import Samples
from utils.errors import UserError
from utils.experiment import build_network, load_samples
from utils.recipe import Recipe
from utils.run_record import Used

EXPERIMENTS = ("fmnist_mlp", "mnist_conv", "nmnist_conv", "cifar_alexnetf", "cifar_cifarnetf")


class Trained(NamedTuple):
    """The network on its device, the samples of its test set, and how it was trained: `args`, with what was changed."""

    network: FeedbackSNN
    test: Samples
    used: Used
    recipe: Recipe
    args: Namespace

    @property
    def title(self) -> str:
        return f"{self.recipe.description.format(dataset=self.args.dataset)}, {self.network.neuron.name}"


def find_arguments(path: Path, experiment: Optional[str], changes: Dict[str, Any]) -> "tuple[Recipe, Namespace]":
    """The recipe and the arguments that a checkpoint was trained with, those in `changes` that are not None in their place.

    A published file tells the shapes alone: the rest is as its experiment's defaults and `changes` say. `experiment` names the
    training script; without it, it is the one of EXPERIMENTS whose data set is the file's and whose network has its tensors' shapes.
    Raises UserError where there is none, and where the file is no checkpoint.
    """
    checkpoint = load_checkpoint(path)
    recipe = _named(experiment) if experiment else next(filter(lambda recipe: _fits(recipe, checkpoint), map(_named, EXPERIMENTS)), None)
    if recipe is None:
        raise UserError(f"--resume {path}: no experiment of {', '.join(EXPERIMENTS)} has such a network; "
                        "name the script that trained it with --experiment")
    args = parse_arguments(recipe, ["--resume", str(path)])
    given = {name: value for name, value in changes.items() if value is not None}
    vars(args).update({**checkpoint.arguments, **given, "resume": str(path), "evaluate": True})
    if args.solver not in METHODS:
        raise UserError(f"--resume {path}: its solver {str(args.solver)[:40]!r} is none of {', '.join(METHODS)}; name the script that adds "
                        "it with --experiment")
    if args.dataset not in recipe.datasets or not checkpoint.arguments:
        classes = len(checkpoint.state_dict.get("readout.bias", ()))
        args.dataset = next((name for name, count in recipe.datasets.items() if count == classes), next(iter(recipe.datasets)))
    return recipe, args


def _named(experiment: str) -> Recipe:
    try:
        return importlib.import_module(".".join(Path(experiment.removesuffix(".py")).parts)).RECIPE
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--experiment {experiment}: there is no training script of this name; "
                        f"name one such as {EXPERIMENTS[0]}, in the current folder") from error


def _fits(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    dataset = checkpoint.arguments.get("dataset", next(iter(recipe.datasets)))
    if dataset not in recipe.datasets or "readout.bias" not in checkpoint.state_dict:
        return False
    with torch.device("meta"):
        network = recipe.network(classes=len(checkpoint.state_dict["readout.bias"]), neuron=make_neuron(1, 1), time_steps=1,
                                 feedback_norm=checkpoint.arguments.get("feedback_norm", "matrix"))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in checkpoint.state_dict.items()}


def load_trained(recipe: Recipe, args: Namespace, device: torch.device) -> Trained:
    network = build_network(recipe, args)
    restore_network(network, load_checkpoint(Path(args.resume)), Path(args.resume))
    _, test, used = load_samples(recipe, args, device)
    return Trained(network.to(device).eval(), test, used, recipe, args)
