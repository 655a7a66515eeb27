"""Fetches the data sets that are missing: python -m utils.fetch_data [--path ./data] [--only fashion-mnist …]"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Optional, Sequence

from termcolor import cprint

from utils.arguments import place
from utils.data.datasets import Images, load_cifar, load_fashion_mnist, load_mnist
from utils.data.fetching import NotFetched
from utils.errors import UserError

LOADERS = {"mnist": ("MNIST", load_mnist), "fashion-mnist": ("Fashion-MNIST", load_fashion_mnist),
           "cifar10": ("CIFAR-10", partial(load_cifar, name="cifar10")),
           "cifar100": ("CIFAR-100", partial(load_cifar, name="cifar100"))}
BY_HAND_IF_NEED_BE = ("cifar100",)  # No package holds it: where its one source is out of reach, this command has not failed.
NMNIST = "nmnist"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Exit status 2 where a data set that has a second source could not be fetched, or where a file is damaged."""
    parser = argparse.ArgumentParser(description="Fetch the data sets that are missing.")
    parser.add_argument("--path", type=place, default="./data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*LOADERS, NMNIST], default=[*LOADERS, NMNIST], metavar="NAME",
                        help="fetch these only, of %(choices)s (default: all)")
    args = parser.parse_args(argv)
    succeeded = [report_nmnist(Path(args.path)) if name == NMNIST else fetch_one(name, *LOADERS[name], args.path)
                 for name in args.only]
    sys.exit(0 if all(succeeded) else 2)


def fetch_one(name: str, title: str, load: Callable[[str], Images], root: str) -> bool:
    """Load a data set and thereby fetch what is missing of it; False for a failure."""
    try:
        data = load(root)
        print(f"{title}: {len(data.train_labels):,d} training and {len(data.test_labels):,d} test samples in {root}", flush=True)
        return True
    except UserError as error:
        excused = name in BY_HAND_IF_NEED_BE and isinstance(error, NotFetched)
        cprint(f"warning: {error}" if excused else f"error: {error}", "yellow" if excused else "red", file=sys.stderr)
        return excused


def report_nmnist(root: Path) -> bool:
    """N-MNIST has no source that a program can fetch from: say whether it is there, or what to get. Never a failure."""
    folder = root / "NMNIST"
    if folder.is_dir() and any(folder.iterdir()):
        print(f"N-MNIST: in {folder}")
    else:
        cprint("warning: N-MNIST can't be fetched automatically. By hand: get Train.zip and Test.zip of Mendeley Data 468j46mzdv "
               f"and put them into {folder}. See data/README.md.", "yellow", file=sys.stderr)
    return True


if __name__ == "__main__":
    main()
