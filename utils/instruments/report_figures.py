"""The figures of a network's report; each function returns the paths written, `path` with .png and .pdf."""

from pathlib import Path
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np
from torch import Tensor

from utils.instruments.equilibrium import Spectrum
from utils.instruments.plot_style import BLACK, BLUE, COLOURS, DASHES, MARKERS, legend_above, new_figure, plain_numbers, save

MOST_NEURONS = 60  # that a raster shows of a layer
TRACES = 3         # membrane traces of a layer
RASTER_STEPS, TRACE_STEPS = 60, 30  # at most shown


def layer_names(count: int) -> List[str]:
    return [f"layer {number}" for number in range(1, count + 1)]


def plot_residuals(residuals: Mapping[int, Sequence[float]], path: Path) -> List[Path]:
    """Equilibrium residual of each layer over T, with a line that falls like 1/T."""
    figure, axis = new_figure()
    steps = sorted(residuals)
    layers = list(zip(*(residuals[T] for T in steps)))
    for name, values, colour, dash in zip(layer_names(len(layers)), layers, COLOURS, DASHES):
        axis.loglog(steps, values, color=colour, linestyle=dash, marker="." if len(steps) < 40 else None, label=name)
    anchor = max(values[0] for values in layers) * steps[0]
    axis.loglog(steps, [anchor / T for T in steps], color="0.55", linewidth=0.8, linestyle=":", label="1/T")
    axis.set(xlabel="time steps T", ylabel="residual ‖a − f(a)‖ / ‖a‖")
    plain_numbers(axis, "x", _round_ticks(steps))
    axis.grid(which="major")
    legend_above(figure, *axis.get_legend_handles_labels(), columns=4)
    return save(figure, path)


def _round_ticks(steps: Sequence[int]) -> List[int]:
    return [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if steps[0] <= tick <= steps[-1]]


def plot_accuracy_over_time(accuracies: Mapping[int, float], own: int, path: Path) -> List[Path]:
    """Test accuracy over T, the network's own T marked."""
    figure, axis = new_figure()
    steps = sorted(accuracies)
    axis.semilogx(steps, [accuracies[T] for T in steps], color=BLUE, marker="o")
    axis.axvline(own, color="0.55", linestyle=":", linewidth=0.8)
    offset, side = (-3, "right") if own == steps[-1] else (3, "left")
    axis.annotate(f"T = {own}", (own, 0.04), xycoords=("data", "axes fraction"), xytext=(offset, 0), textcoords="offset points", ha=side,
                  fontsize=7, color="0.35")
    axis.set(xlabel="time steps T", ylabel="test accuracy (%)")
    plain_numbers(axis, "x", _round_ticks(steps))
    axis.grid(which="major")
    return save(figure, path)


def plot_solver_traces(traces: Mapping[str, Sequence[float]], tol: float, path: Path) -> List[Path]:
    """Relative residual of the backward solve over iterations, for each solver."""
    figure, axis = new_figure()
    # Solvers often agree to the eye: the later ones are drawn thinner, with larger empty markers.
    for place, ((method, values), colour, marker) in enumerate(zip(traces.items(), COLOURS, MARKERS)):
        axis.semilogy(range(1, len(values) + 1), values, color=colour, marker=marker, label=method, linewidth=1.6 - 0.4 * place,
                      markersize=3 + 1.5 * place, markerfacecolor="none" if place else colour, markeredgewidth=0.8)
    axis.axhline(tol, color="0.55", linestyle=":", linewidth=0.8, label=f"tolerance {tol:g}")
    axis.set(xlabel="iteration (product with Jᵀ)", ylabel="residual ‖g + Jᵀv − v‖ / ‖g‖")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid()
    legend_above(figure, *axis.get_legend_handles_labels(), columns=2)
    return save(figure, path)


def plot_spectrum(spectrum: Spectrum, path: Path) -> List[Path]:
    """Spectral radius against norm of each sample's J; below 1 f contracts."""
    figure, axis = new_figure()
    norm, radius = spectrum.norm.cpu(), spectrum.radius.cpu()
    axis.scatter(norm, radius, s=10, color=BLUE, edgecolors="none", alpha=0.7)
    axis.set(xlabel="norm ‖J‖", ylabel="spectral radius ρ(J)", xlim=(0, 1.1 * max(1, norm.max())), ylim=(0, 1.1 * max(1, radius.max())))
    for line in (axis.axvline, axis.axhline):
        line(1, color="0.55", linestyle=":", linewidth=0.8)
    axis.grid()
    return save(figure, path)


def plot_raster(layers: Sequence[Tuple[Tensor, Tensor]], path: Path) -> List[Path]:
    """Spikes of one sample: a row per neuron, evenly spread over those of each layer, a panel per layer."""
    figure, axes = new_figure(0.6 + 1.4 * min(len(layers), 1) + 0.9 * (len(layers) - 1), rows=len(layers), sharex=True, squeeze=False)
    for axis, (spikes, _), name, colour in zip(axes[:, 0], layers, layer_names(len(layers)), COLOURS):
        shown = np.unique(np.linspace(0, spikes.shape[1] - 1, MOST_NEURONS).round().astype(int))
        time, row = np.nonzero(spikes[:RASTER_STEPS, shown].cpu().numpy())
        axis.scatter(time + 1, row, s=7, marker="|", color=colour, linewidths=0.9)
        count = f"{len(shown)} of {spikes.shape[1]:,d}"
        axis.set(ylabel=f"{count} neurons" if len(layers) == 1 else f"{name}\n{count}", yticks=[], ylim=(-1, len(shown)))
    axes[-1, 0].set(xlabel="time step", xlim=(0.5, min(len(layers[0][0]), RASTER_STEPS) + 0.5))
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    return save(figure, path)


def plot_membranes(layers: Sequence[Tuple[Tensor, Tensor]], threshold: float, path: Path) -> List[Path]:
    """Membrane potentials u(t) of a few neurons of each layer that spike, with their spikes, for one sample."""
    figure, axes = new_figure(0.8 + 1.4 + 1.0 * (len(layers) - 1), rows=len(layers), sharex=True, squeeze=False)
    for axis, (spikes, potentials), name in zip(axes[:, 0], layers, layer_names(len(layers))):
        spikes, potentials = spikes[:TRACE_STEPS].cpu().numpy(), potentials[:TRACE_STEPS].cpu().numpy()
        steps = np.arange(1, len(spikes) + 1)
        for neuron, colour, dash in zip(_lively(spikes), COLOURS, DASHES):
            axis.plot(steps, potentials[:, neuron], color=colour, linestyle=dash, linewidth=1)
            fired = spikes[:, neuron] > 0
            axis.plot(steps[fired], potentials[fired, neuron], "o", color=colour)
        line = axis.axhline(threshold, color="0.4", linestyle=":", linewidth=0.8)
        axis.set_ylabel("membrane potential u" if len(layers) == 1 else f"u, {name}")
        axis.grid()
    axes[-1, 0].set_xlabel("time step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    dot, = axes[-1, 0].plot([], [], "o", color=BLACK)
    legend_above(figure, [line, dot], ["threshold V_th", "spike (any colour)"])
    return save(figure, path)


def _lively(spikes: np.ndarray) -> List[int]:
    """A few neurons (T, neurons) that fire seldom, middling and often."""
    rates = spikes.mean(0)
    firing = np.flatnonzero(rates > 0)
    ordered = firing[np.argsort(rates[firing], kind="stable")]
    if len(ordered) < TRACES:
        return [*ordered]
    return [int(ordered[int(share * (len(ordered) - 1))]) for share in np.linspace(0.1, 0.9, TRACES)]


def plot_confusion(matrix: Tensor, path: Path) -> List[Path]:
    """Percent of each class's samples by prediction; rows are the labels."""
    figure, axis = new_figure(3.0)
    counts = matrix.cpu().numpy()
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if len(percent) <= 12:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color="white" if value > 55 else "black")
        axis.set(xticks=range(len(percent)), yticks=range(len(percent)))
    axis.set(xlabel="predicted class", ylabel="class")
    figure.colorbar(image, ax=axis, label="samples of the class (%)", shrink=0.85)
    return save(figure, path)


def plot_training_curves(runs: Dict[str, Sequence[Sequence[float]]], path: Path) -> List[Path]:
    """Test loss and accuracy over epochs of several runs' logs, laid over each other; the training's in thin lines."""
    figure, axes = new_figure(4.2, rows=2, sharex=True)
    for (name, rows), colour, dash in zip(runs.items(), COLOURS, DASHES):
        epochs = range(1, len(rows) + 1)
        _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*rows)
        for axis, train, test in ((axes[0], train_loss, test_loss), (axes[1], train_accuracy, test_accuracy)):
            axis.plot(epochs, train, color=colour, linestyle=dash, linewidth=0.6, alpha=0.7)
            axis.plot(epochs, test, color=colour, linestyle=dash, label=name, marker="." if len(epochs) < 20 else None)
            axis.grid()
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[1].set(xlabel="epoch (thick: test, thin: training)", ylabel="accuracy (%)")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    legend_above(figure, *axes[0].get_legend_handles_labels(), columns=2)
    return save(figure, path)
