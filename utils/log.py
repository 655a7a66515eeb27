"""The run's log.txt and its plot."""

from pathlib import Path
from typing import List, Sequence

COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")


class Log:
    """A tab-separated table with one row per epoch, in the published scripts' format.

    `keep` rows of an existing file stay (a resumed run repeats the epochs after its checkpoint); the rest is dropped.
    """

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        self.rows: List[List[float]] = read_log(path)[:keep] if keep and path.exists() else []
        header = "".join(f"{name}\t" for name in COLUMNS)
        path.write_text("\n".join([header, *map(_format, self.rows)]) + "\n")

    def append(self, row: Sequence[float]) -> None:
        self.rows.append(list(row))
        with self.path.open("a") as file:
            file.write(_format(row) + "\n")

    def plot(self) -> List[Path]:
        """Draw loss and accuracy over epochs beside the log, as PNG and PDF; returns the two paths."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        epochs = range(1, len(self.rows) + 1)
        _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*self.rows)
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 2.8), constrained_layout=True)
        for axis, train, test, label in ((left, train_loss, test_loss, "cross-entropy (nats)"),
                                         (right, train_accuracy, test_accuracy, "accuracy (%)")):
            axis.plot(epochs, train, "--", color="#0072B2", label="training", marker="." if len(epochs) < 20 else None)
            axis.plot(epochs, test, "-", color="#D55E00", label="test", marker="." if len(epochs) < 20 else None)
            axis.set(xlabel="epoch", ylabel=label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        left.legend(frameon=False)
        paths = [self.path.with_suffix(suffix) for suffix in (".png", ".pdf")]
        for path in paths:
            figure.savefig(path, dpi=200)
        pyplot.close(figure)
        return paths


def read_log(path: Path) -> List[List[float]]:
    """The rows of a log.txt; lines that are not a whole row (a torn last one) end the table."""
    rows = []
    for line in path.read_text().splitlines()[1:]:
        try:
            row = [float(cell) for cell in line.split()]
        except ValueError:
            break
        if len(row) != len(COLUMNS):
            break
        rows.append(row)
    return rows


def _format(row: Sequence[float]) -> str:
    return "".join(f"{value:.6f}\t" for value in row)
