"""The figures of a run: its training curves and its firing rates."""

from pathlib import Path
from typing import List, Sequence

from utils.instruments.plot_style import BLUE, ORANGE, new_figure, save


def plot_log(rows: Sequence[Sequence[float]], path: Path) -> List[Path]:
    """Loss and accuracy over epochs from the rows of a log; returns the paths written, `path` with .png and .pdf."""
    figure, (left, right) = new_figure(2.6, width=7, columns=2)
    epochs = range(1, len(rows) + 1)
    _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*rows)
    for axis, train, test, label in ((left, train_loss, test_loss, "cross-entropy (nats)"),
                                     (right, train_accuracy, test_accuracy, "accuracy (%)")):
        axis.plot(epochs, train, "--", color=BLUE, label="training", marker="." if len(epochs) < 20 else None)
        axis.plot(epochs, test, "-", color=ORANGE, label="test", marker="." if len(epochs) < 20 else None)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid()
    left.legend()
    return save(figure, path)


def plot_firing_rates(rates: Sequence[float], total: float, neurons: Sequence[int], title: str, path: Path) -> List[Path]:
    """Bars of the firing rate of each layer and of all neurons; returns the paths written, `path` with .png and .pdf."""
    figure, axis = new_figure(2.4)
    heights, counts = [*rates, total], [*neurons, sum(neurons)]
    names = [*map(str, range(1, len(counts))), "all"]
    bars = axis.bar(range(len(counts)), heights, width=0.65, color=[BLUE] * len(rates) + [ORANGE])
    axis.bar_label(bars, [f"{height:.4f}" for height in heights], fontsize=7, padding=1)
    axis.set_xticks(range(len(counts)), [f"{name}\n{count:,d}" for name, count in zip(names, counts)], fontsize=6.5)
    axis.set_ylim(0, 1.15 * max(*heights, 1e-6))
    axis.set_xlabel("layer and its number of neurons")
    axis.set_ylabel("firing rate\n(spikes per neuron and time step)")
    axis.set_title(title)
    return save(figure, path)
