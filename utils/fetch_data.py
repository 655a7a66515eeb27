"""Fetches every data set that can be fetched: python -m utils.fetch_data [--path ./data]"""

import argparse
import sys

from termcolor import cprint

from utils.datasets import load_fashion_mnist
from utils.errors import UserError

LOADERS = {"Fashion-MNIST": load_fashion_mnist}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the data sets that are missing.")
    parser.add_argument("--path", default="./data", help="folder of the data sets (default: %(default)s)")
    args = parser.parse_args()
    failed = False
    for name, load in LOADERS.items():
        try:
            data = load(args.path)
            print(f"{name}: {len(data.train_labels):,d} training and {len(data.test_labels):,d} test samples in {args.path}")
        except UserError as error:
            cprint(f"error: {error}", "red", file=sys.stderr)
            failed = True
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
