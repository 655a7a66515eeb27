"""The figures of a run, as PNG and PDF, to be read at the width of a column and by the colour-blind."""

from pathlib import Path
from typing import Any, List, Sequence

BLUE, ORANGE = "#0072B2", "#D55E00"


def plot_log(rows: Sequence[Sequence[float]], path: Path) -> List[Path]:
    """Loss and accuracy over epochs from the rows of a log; returns the paths written, `path` with .png and .pdf."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(7, 2.8), constrained_layout=True)
    epochs = range(1, len(rows) + 1)
    _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*rows)
    for axis, train, test, label in ((left, train_loss, test_loss, "cross-entropy (nats)"),
                                     (right, train_accuracy, test_accuracy, "accuracy (%)")):
        axis.plot(epochs, train, "--", color=BLUE, label="training", marker="." if len(epochs) < 20 else None)
        axis.plot(epochs, test, "-", color=ORANGE, label="test", marker="." if len(epochs) < 20 else None)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    return _save(figure, path)


def plot_firing_rates(rates: Sequence[float], total: float, neurons: Sequence[int], title: str, path: Path) -> List[Path]:
    """Bars of the firing rate of each layer and of all neurons; returns the paths written, `path` with .png and .pdf."""
    figure, axis = _pyplot().subplots(figsize=(3.5, 2.6), constrained_layout=True)
    heights, counts = [*rates, total], [*neurons, sum(neurons)]
    names = [*map(str, range(1, len(counts))), "all"]
    bars = axis.bar(range(len(counts)), heights, width=0.65, color=[BLUE] * len(rates) + [ORANGE])
    axis.bar_label(bars, [f"{height:.4f}" for height in heights], fontsize=7, padding=1)
    axis.set_xticks(range(len(counts)), [f"{name}\n{count:,d}" for name, count in zip(names, counts)], fontsize=6.5)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylim(0, 1.15 * max(*heights, 1e-6))
    axis.set_xlabel("layer and its number of neurons", fontsize=8)
    axis.set_ylabel("firing rate\n(spikes per neuron and time step)", fontsize=8)
    axis.set_title(title, fontsize=8)
    return _save(figure, path)


def _pyplot() -> Any:
    """Imported late, as it takes a while, and without a display."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def _save(figure: Any, path: Path) -> List[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in paths:
        figure.savefig(file, dpi=200)
    _pyplot().close(figure)
    return paths
