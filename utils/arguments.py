"""The command line that every training script shares: flags in groups, defaults from the script's recipe, values checked."""

import argparse
import math
import os
from typing import Callable, Optional, Sequence

from modules.bptt import SURROGATES
from modules.solvers import METHODS
from utils.recipe import Recipe


def parse_arguments(recipe: Recipe, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse `argv` (default: the command line). The recipe's defaults override the shared ones by attribute name.

    A bad value ends the program with exit status 2 and a sentence that names the flag.
    """
    parser = argparse.ArgumentParser(description=recipe.summary, formatter_class=_Help)
    _add_data_flags(parser, recipe)
    _add_network_flags(parser)
    _add_gradient_flags(parser)
    _add_optimisation_flags(parser)
    _add_run_flags(parser)
    if recipe.flags:
        recipe.flags(parser)
    unknown = [name for name in recipe.defaults if not hasattr(parser.parse_args([]), name)]
    assert not unknown, f"a recipe's defaults must be flags, unlike {unknown}"
    parser.set_defaults(**recipe.defaults)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == [] and not isinstance(parser.get_default(name), list):  # what Python before 3.13 makes of --lr=--
            parser.error(f"argument --{name}: give a value, not '--'")
    if args.evaluate and not args.resume:
        parser.error("argument --resume is missing: it names the checkpoint to --evaluate")
    return args


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to the help, unless its text tells it already."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help if "(default: " in (action.help or "") else super()._get_help_string(action)


def _add_data_flags(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    group = parser.add_argument_group("data")
    # Users of the published code write cifar10, the paper CIFAR-10; both are meant.
    group.add_argument("-d", "--dataset", type=lambda text: text.lower().replace("-", ""), choices=list(recipe.datasets),
                       default=next(iter(recipe.datasets)), help="data set; it decides the number of classes")
    group.add_argument("--path", type=place, default="./data",
                       help="folder of the data set; fetched there if it is missing and can be had (data/README.md)")
    group.add_argument("-j", "--workers", type=whole(0), default=4,
                       help="accepted for the published command lines and unused: data is kept in memory, ready to use")
    group.add_argument("--train-limit", type=whole(1), metavar="N", help="train on the first N samples only (default: on all)")
    group.add_argument("--test-limit", type=whole(1), metavar="N", help="test on the first N samples only (default: on all)")
    group.add_argument("--train-batch", type=whole(1), default=128,
                       help="training samples per step, of all processes together: each takes an equal share")
    group.add_argument("--test-batch", type=whole(1), default=200, help="test samples per step, of all processes together")


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("-t", "--time_step", "--time-step", type=whole(1), default=30, help="time steps T of the simulation")
    group.add_argument("--vth", type=real(at_least=1e-9, below=1e9), default=2.0, help="firing threshold V_th of every neuron")
    group.add_argument("--leaky", type=real(), default=0.95,
                       help="leak λ: the LIF model for 0 < λ < 1, the IF model without leak for any other value")
    group.add_argument("--drop", "--dropout", dest="dropout", type=real(at_least=0, below=0.9999), default=0.2,
                       help="variational dropout: probability that a unit's input from one connection is dropped for a pass")
    group.add_argument("--feedback-norm", choices=("matrix", "operator"), default="matrix",
                       help="norm of the feedback that is bounded by 1: its weight's as a matrix (published) or the convolution operator's")


def _add_gradient_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("gradient")
    group.add_argument("--gradient", choices=("implicit", "bptt"), default="implicit",
                       help="implicit: of the equilibrium; bptt: back-propagation through time, in memory that grows with the steps")
    group.add_argument("--surrogate", choices=tuple(SURROGATES), default="sigmoid",
                       help="derivative of a spike for bptt, with x = u/V_th − 1: sigmoid 4σ(4x)(1 − σ(4x))/V_th, "
                            "triangular max(0, 1 − |x|)/V_th")
    group.add_argument("--solver", choices=sorted(METHODS), default="anderson", help="solver of (I − Jᵀ) v = ∂L/∂a")
    group.add_argument("--tol", type=real(above=0), default=1e-3,
                       help="residual, relative to ‖∂L/∂a‖, at which the solver stops; 1e-6 for comparisons of gradients")
    group.add_argument("--max-iterations", "--threshold", type=whole(1), default=30, help="most products with Jᵀ in one solve")
    group.add_argument("--jacobian-bn", choices=("train", "eval"), default="train",
                       help="mode of the batch norms in J: train as in f, or eval, with which early steps need fewer products")


def _add_optimisation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=whole(1), default=100, help="epochs in all")
    group.add_argument("--start-epoch", type=whole(0), default=None,
                       help="number of the first epoch (default: the resumed one, or 0)")
    group.add_argument("--optimizer", choices=("SGD", "Adam"), default="SGD", help="Adam uses betas 0.9 and 0.999")
    group.add_argument("--lr", "--learning-rate", type=real(above=0), default=0.05, help="learning rate before any milestone")
    group.add_argument("--schedule", type=whole(0), nargs="*", default=[30, 60, 90],
                       help="milestones: epochs from which the learning rate is multiplied by --gamma once more")
    group.add_argument("--gamma", type=real(above=0), default=0.1, help="factor of the learning rate at each milestone")
    group.add_argument("--warmup", type=whole(0), default=0, help="iterations over which the learning rate rises linearly")
    group.add_argument("--momentum", type=real(at_least=0, below=1), default=0.9, help="momentum of SGD")
    group.add_argument("--weight-decay", "--wd", type=real(at_least=0), default=5e-4, help="L2 penalty on every parameter")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("-c", "--checkpoint", type=place, default="checkpoint", metavar="DIR",
                       help="folder for checkpoints, log, plots and run.json")
    group.add_argument("--resume", type=place, default=None, metavar="FILE",
                       help="go on from this checkpoint, this project's or a published one; auto: from the newest good one in DIR, or "
                            "start where there is none (default: a new run)")
    group.add_argument("--checkpoint-every", type=whole(1), metavar="N", default=None,
                       help="write a checkpoint every N iterations too (default: after every epoch only)")
    group.add_argument("--on-nan", choices=("stop", "skip"), default="stop",
                       help="where the loss is infinite or not a number: stop, or leave the batch out and count it")
    group.add_argument("--deterministic", action="store_true",
                       help="the same numbers in every run on this machine; seed 0 unless --manualSeed is given")
    group.add_argument("-e", "--evaluate", action="store_true", help="evaluate the --resume checkpoint on the test set and stop")
    group.add_argument("--firing-rate", action="store_true",
                       help="firing rates per layer at the end, or with --evaluate: a table, and a bar chart in DIR")
    group.add_argument("--tensorboard", action="store_true",
                       help="every epoch's losses, accuracies, learning rate and solver also as TensorBoard scalars in DIR/tensorboard")
    group.add_argument("--manualSeed", "--seed", type=whole(0, 2**63 - 1), default=None, help="random seed (default: drawn, and printed)")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                       help="rounding of the factors of convolutions and matrix products (tf32: on CUDA); membrane potentials stay float32")
    group.add_argument("--gpu-id", default="0", help="number of the CUDA device; without any CUDA device, ignored with a warning; "
                                                     "under torchrun every process has its own device")
    group.add_argument("--sync-bn", action="store_true",
                       help="batch norms take the statistics of the samples of all processes, which torchrun starts, so that they "
                            "together compute what one would")


def place(text: str) -> str:
    """An argparse type: a path that a file or folder may have, whether or not there is one."""
    try:
        text.encode()
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # What must be there is looked for later.
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise argparse.ArgumentTypeError(f"the path {text[:80]!r} can't be used ({reason})") from error
    if not text:
        raise argparse.ArgumentTypeError("give the path of a file or folder, not an empty text")
    return text


def whole(at_least: int, at_most: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number from `at_least` to `at_most`."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(f"give a whole number of at least {at_least}, not {text[:80]!r}")
        if value > at_most:
            raise argparse.ArgumentTypeError(f"give a whole number of at most {at_most}, not {text[:80]!r}")
        return value
    return parse


def real(above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number within the bounds."""
    bounds = [f"above {above:g}" if above > -math.inf else "", f"of at least {at_least:g}" if at_least > -math.inf else "",
              f"below {below:g}" if below < math.inf else ""]
    wanted = " and ".join(filter(None, bounds))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above and value >= at_least and value < below):
            raise argparse.ArgumentTypeError(f"give a finite number {wanted}".rstrip() + f", not {text[:80]!r}")
        return value
    return parse
