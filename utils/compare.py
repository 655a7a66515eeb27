"""Lays the training curves of several runs over each other: python -m utils.compare RUN RUN … [--out FILE]

A run is its folder or its log.txt. Writes loss and accuracy over epochs as PNG and PDF, and prints each run's best and last accuracy.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from utils.errors import UserError, told_in_a_sentence
from utils.instruments.plot_style import COLOURS
from utils.instruments.report_figures import plot_training_curves
from utils.log import read_log

Rows = List[List[float]]


def read_runs(paths: Sequence[str], names: Optional[Sequence[str]]) -> Dict[str, Rows]:
    """The rows of each run's log by the run's name, by default its folder's. Raises UserError where one can't be read or named."""
    if names is not None and len(names) != len(paths):
        raise UserError(f"--names: give a name for each of the {len(paths)} runs, not {len(names)}")
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs: at most {len(COLOURS)} can be told apart in one figure")
    runs = {}
    for index, given in enumerate(paths):
        log = Path(given) / "log.txt" if Path(given).is_dir() else Path(given)
        try:
            rows = read_log(log)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{given}: there is no log.txt that can be read; name a run's folder or its log.txt") from error
        if not rows:
            raise UserError(f"{log}: holds no whole epoch")
        name = names[index] if names else log.resolve().parent.name
        runs[name if name not in runs else str(given)] = rows
    return runs


def compare(args: argparse.Namespace) -> None:
    runs, out = read_runs(args.runs, args.names), Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        paths = plot_training_curves(runs, out)
    except OSError as error:
        raise UserError(f"--out {args.out}: can't be written ({error.strerror})") from error
    width = max(map(len, runs))
    for name, rows in runs.items():
        accuracies = [row[-1] for row in rows]
        print(f"{name:{width}}   {len(rows):4d} epochs   test accuracy: best {max(accuracies):.2f} %, last {accuracies[-1]:.2f} %")
    print(f"training curves: {', '.join(map(str, paths))}")


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Lay the training curves of several runs over each other.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its log.txt")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of the runs in the legend (default: their folders')")
    parser.add_argument("--out", default="compare", metavar="FILE", help="the figure's path; .png and .pdf are added (default: compare)")
    args = parser.parse_args(argv)
    with told_in_a_sentence():
        compare(args)


if __name__ == "__main__":
    main()
