"""The one style of all figures: for a column of 3.3 inches, 8-point type, Okabe and Ito's colours, saved as PNG and PDF."""

from pathlib import Path
from typing import Any, List

COLUMN = 3.3  # inches
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK)
# Lines that can be told apart without any colour.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
MARKERS = "osD^vPX"

_STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3,
    "grid.linewidth": 0.4, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False,
    "figure.constrained_layout.use": True, "pdf.fonttype": 42,  # text in a PDF stays text
}


def new_figure(height: float = 2.4, width: float = COLUMN, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """(figure, axes) of matplotlib; `options` are `pyplot.subplots`'. Axes are an array unless there is one."""
    return _pyplot().subplots(rows, columns, figsize=(width, height), **options)


def save(figure: Any, path: Path) -> List[Path]:
    """Writes `path` with .png and .pdf, closes the figure and returns both paths."""
    paths = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in paths:
        figure.savefig(file, dpi=200)
    _pyplot().close(figure)
    return paths


def legend_above(figure: Any, handles: Any, labels: Any, columns: int = 3) -> None:
    """A legend above the axes, where it can cover no data."""
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)),
                  handlelength=2.4, columnspacing=1.2)


def plain_numbers(axis: Any, which: str, ticks: Any) -> None:
    """Ticks at these values, written out, on a logarithmic axis."""
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axis, f"{which}axis").set_minor_locator(_pyplot().NullLocator())


def _pyplot() -> Any:
    """Imported late, as it takes a while, and without a display."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update(_STYLE)
    return pyplot
