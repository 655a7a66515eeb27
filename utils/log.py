"""The run's log.txt."""

from pathlib import Path
from typing import List, Sequence

from utils.files import written_aside

COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")


class Log:
    """A tab-separated table with one row per epoch, in the published scripts' format.

    It starts with the `rows` of the epochs before: what was in the file beside them is dropped.
    """

    def __init__(self, path: Path, rows: Sequence[Sequence[float]] = ()):
        self.path, self.rows = path, [list(row) for row in rows]
        header = "".join(f"{name}\t" for name in COLUMNS)
        with written_aside(path) as file:
            file.write(("\n".join([header, *map(_format, self.rows)]) + "\n").encode())

    def append(self, row: Sequence[float]) -> None:
        self.rows.append(list(row))
        with self.path.open("a") as file:
            file.write(_format(row) + "\n")


def read_log(path: Path) -> List[List[float]]:
    """The rows of a log.txt; lines that are not a whole row (a torn last one) end the table."""
    rows = []
    for line in path.read_text(errors="replace").splitlines()[1:]:
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
