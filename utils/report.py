"""A report of a trained network: python -m utils.report --resume FILE [--out DIR]

Its equilibrium, the solvers' convergence, firing rates, synaptic operations, energy and accuracy over T, as report.md with its figures
(PNG and PDF). The checkpoint tells experiment, neuron and T; a published one the experiment only, so that --leaky and -t say the rest.
--check-gradient compares the implicit gradient of a batch with a float64 reference.
"""

import argparse
from pathlib import Path
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from utils.arguments import real, whole
from utils.data.batches import Batches
from utils.device import choose_device
from utils.errors import UserError, told_in_a_sentence
from utils.instruments.equilibrium import check_gradient, equilibrium_residuals, is_zero, jacobian_spectrum, solver_traces
from utils.instruments.observers import Trace, UnitSpikes
from utils.instruments.operations import ASSUMPTIONS, count_operations, energies
from utils.instruments.plots import plot_firing_rates
from utils.instruments.report_figures import (layer_names, plot_accuracy_over_time, plot_confusion, plot_membranes, plot_raster,
                                              plot_residuals, plot_solver_traces, plot_spectrum)
from utils.instruments.time_step_sweep import accuracy, lasting, time_step_sweep
from utils.run_folder import check_writable
from utils.trained import Trained, find_arguments, load_trained

SWEEP = (1, 2, 5, 10, 20, 50, 100)


class Page:
    """report.md in the making: text, tables and figures in the order in which they are added."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.parts = folder, [f"# {title}"]

    def text(self, text: str) -> None:
        self.parts.append(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        self.parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def figure(self, title: str, files: Sequence[Path]) -> None:
        self.parts.append(f"![{title}]({files[0].name})")

    def write(self) -> Path:
        path = self.folder / "report.md"
        path.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")
        return path


def report(args: argparse.Namespace) -> Path:
    """Make the report that the command line asks for; returns its report.md.

    Raises UserError before any long work, but where --check-gradient finds that there is no equilibrium: the rest is written by then.
    """
    device = choose_device(args.device, args.gpu_id)
    changes = {name: getattr(args, name) for name in ("path", "time_step", "leaky", "vth", "test_limit")}
    recipe, trained_args = find_arguments(Path(args.resume), args.experiment, changes)
    folder = Path(args.out) if args.out else Path(args.resume).parent / "report"
    check_writable(folder, "--out")
    trained = load_trained(recipe, trained_args, device)
    folder.mkdir(parents=True, exist_ok=True)
    network, T = trained.network, trained.network.time_steps
    steps = {T, *args.time_step_sweep}
    if network.events:
        steps = {step for step in steps if step <= T}  # There are no more frames than those of the data.
    x, labels = next(iter(Batches(trained.test, args.samples, shuffled=False)))

    page = Page(folder, trained.title)
    page.text(f"{args.resume}, T = {T}. {trained.used}; equilibrium and solvers on the first {len(labels):,d} of them.")
    _add_accuracy_and_operations(page, trained, steps)
    _add_equilibrium(page, trained, x, max(steps))
    _add_solvers(page, trained, x, labels)
    _add_traces(page, trained, x, max(steps))
    path = page.write()
    if args.check_gradient:
        _add_gradient_check(page, trained, x, labels)
        page.write()
    return path


def _add_accuracy_and_operations(page: Page, trained: Trained, steps: "set[int]") -> None:
    network, T = trained.network, trained.network.time_steps
    batches, spikes = Batches(trained.test, trained.args.test_batch, shuffled=False), UnitSpikes(T)
    matrices = time_step_sweep(network, batches, steps, spikes)
    accuracies = {step: accuracy(matrix) for step, matrix in matrices.items()}
    page.text("## Accuracy over time steps")
    page.table(["T", *map(str, accuracies)], [["test accuracy (%)", *(f"{value:.2f}" for value in accuracies.values())]])
    page.figure("accuracy over T", plot_accuracy_over_time(accuracies, T, page.folder / "accuracy_over_time"))
    page.figure("confusion matrix", plot_confusion(matrices[T], page.folder / "confusion"))

    page.text("## Firing rates, synaptic operations and energy")
    page.text("\n".join(f"- {sentence}" for sentence in ASSUMPTIONS))
    per_sample = [count.sum().item() / spikes.samples for count in spikes.counts]
    neurons = network.neuron_counts
    rates = [count / (T * layer) for count, layer in zip(per_sample, neurons)]
    total = sum(per_sample) / (T * sum(neurons))
    rows = zip([*layer_names(len(neurons)), "in total"], [*neurons, sum(neurons)], [*rates, total], [*per_sample, sum(per_sample)])
    page.table(["", "neurons", "firing rate", "spikes per sample"],
               [[name, f"{count:,d}", f"{rate:.4f}", f"{fired:,.1f}"] for name, count, rate, fired in rows])
    page.figure("firing rates", plot_firing_rates(rates, total, neurons, f"{network.neuron.name}, T = {T}", page.folder / "firing_rate"))

    operations = count_operations(network, spikes, _input_spikes(batches, T) if network.events else None)
    rows = []
    for projection, exact, formula in operations:
        static = projection.source is None and not network.events
        fan_out = projection.exact / projection.fan_out.numel()
        rows.append([projection.name, "MAC, each time" if static else "AC", f"{fan_out:,.1f}", f"{exact:,.0f}", f"{formula:,.0f}"])
    page.table(["connection", "kind", "mean fan-out", "operations, exact", "by formula"], rows)
    exact, formula = energies(operations, T, network.events), energies(operations, T, network.events, formula=True)
    page.table(["", "MACs, exact", "ACs, exact", "energy, exact (nJ)", "energy, by formula (nJ)"],
               [[row.name, f"{row.macs:,.0f}", f"{row.acs:,.0f}", f"{row.nanojoules:,.1f}", f"{other.nanojoules:,.1f}"]
                for row, other in zip(exact, formula)])


def _input_spikes(batches: Batches, time_steps: int) -> Tensor:
    """Events of each input unit per sample, float64 (*input shape)."""
    return sum(x[:time_steps].sum((0, 1), dtype=torch.float64) for x, _ in batches) / len(batches.samples.labels)


def _add_equilibrium(page: Page, trained: Trained, x: Tensor, longest: int) -> None:
    network, T = trained.network, trained.network.time_steps
    residuals = equilibrium_residuals(lasting(network, longest), x, {*_spread(longest), T})
    page.text("## Equilibrium")
    page.text("Residual ‖a − f(a)‖ / ‖a‖ of the firing rates after T steps, over all samples, in evaluation mode. Neurons without leak "
              "settle like 1/T; with leak, the weighted rate looks back on some 1/(1 − λ) steps only, and the residual levels off.")
    shown = [step for step in residuals if step in (*SWEEP, T, longest)]
    page.table(["T", *map(str, shown)], [[name, *(f"{residuals[step][layer]:.4f}" for step in shown)]
                                         for layer, name in enumerate(layer_names(len(network.layer_shapes)))])
    page.figure("residual over T", plot_residuals(residuals, page.folder / "residual_over_time"))
    spectrum = jacobian_spectrum(network, x)
    page.text(f"The Jacobian J of f at each sample's rate after T = {T} steps: where ρ(J) < 1 the plain iteration converges, where "
              f"‖J‖ < 1 f contracts. Arnoldi's largest relative residual of ρ(J) is {spectrum.residual.max():.1e}.")
    page.table(["", "mean", "largest"], [[name, f"{values.mean():.4f}", f"{values.max():.4f}"] for name, values in
                                         (("spectral radius ρ(J)", spectrum.radius), ("norm ‖J‖", spectrum.norm))])
    page.figure("spectral radius and norm of J", plot_spectrum(spectrum, page.folder / "spectrum"))


def _spread(longest: int) -> List[int]:
    """About forty numbers of steps up to the longest, evenly spread on a logarithmic axis."""
    return sorted({round(longest ** (index / 40)) for index in range(41)})


def _add_solvers(page: Page, trained: Trained, x: Tensor, labels: Tensor) -> None:
    traces, solver = solver_traces(trained.network, x, labels, iterations=30), trained.network.solver
    page.text("## The backward solve")
    page.text("Residual of v = g + Jᵀ v, relative to ‖g‖, for a training batch, over the products with Jᵀ.")
    rows = []
    for method, trace in traces.items():
        within = next((str(number) for number, residual in enumerate(trace, start=1) if residual <= solver.tol), "–")
        rows.append([method, within, f"{min(trace):.1e}"])
    page.table(["solver", f"products to {solver.tol:g}", f"lowest residual in {len(max(traces.values(), key=len))}"], rows)
    page.figure("solvers' convergence", plot_solver_traces(traces, solver.tol, page.folder / "solvers"))


def _add_gradient_check(page: Page, trained: Trained, x: Tensor, labels: Tensor) -> None:
    solver = trained.network.solver
    try:
        errors = check_gradient(trained.network, x, labels)
    except ArithmeticError as error:
        raise UserError(f"--check-gradient: {error}; the network has no equilibrium that could be differentiated") from error
    page.text("## The implicit gradient")
    page.text(f"Of a training batch, without dropout, by {solver.method} to {solver.tol:g}, against float64 solved to 1e-10 with "
              "products by autograd. A gradient that is 0 but for rounding, such as that of a bias in front of a batch norm, has no "
              "relative error.")
    page.table(["parameter", "norm of the gradient", "cosine", "relative error"],
               [[error.name, f"{error.norm:.2e}", *(("–", "–") if is_zero(error, errors) else
                                                    (f"{error.cosine:.8f}", f"{error.error:.1e}"))] for error in errors])


@torch.inference_mode()
def _add_traces(page: Page, trained: Trained, x: Tensor, longest: int) -> None:
    trace, first = Trace(), x[:, :1] if trained.network.events else x[:1]
    lasting(trained.network, longest)(first, observe=trace)
    page.text("## Spikes and membrane potentials")
    page.text("Of the first sample; the membrane potentials are those of neurons that fire rarely, moderately and often.")
    page.figure("spike raster", plot_raster(trace.of_layers(), page.folder / "raster"))
    page.figure("membrane potentials", plot_membranes(trace.of_layers(), trained.network.neuron.threshold, page.folder / "membranes"))


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Make a report of a trained network.")
    parser.add_argument("--resume", required=True, metavar="FILE", help="the checkpoint, this project's or a published one")
    parser.add_argument("--out", metavar="DIR", help="folder of the report (default: report/ beside the checkpoint)")
    parser.add_argument("--experiment", metavar="SCRIPT", help="the script that trained it (default: the one with such a network)")
    parser.add_argument("--path", help="folder of the data set (default: the run's)")
    parser.add_argument("-t", "--time_step", "--time-step", type=whole(1), help="time steps T (default: the run's)")
    parser.add_argument("--leaky", type=real(), help="leak λ (default: the run's)")
    parser.add_argument("--vth", type=real(above=0), help="threshold V_th (default: the run's)")
    parser.add_argument("--test-limit", type=whole(1), default=1000, metavar="N", help="test on the first N samples (default: 1000)")
    parser.add_argument("--samples", type=whole(2), default=64, metavar="N",
                        help="samples, two at least, for equilibrium, solvers and gradient (default: 64)")
    parser.add_argument("--time-step-sweep", type=whole(1), nargs="+", default=list(SWEEP), metavar="T",
                        help=f"numbers of time steps to classify after (default: {' '.join(map(str, SWEEP))})")
    parser.add_argument("--check-gradient", action="store_true", help="compare the implicit gradient with a float64 reference")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the best there is")
    parser.add_argument("--gpu-id", default="0", help="number of the CUDA device")
    args = parser.parse_args(argv)
    with told_in_a_sentence():
        print(report(args))


if __name__ == "__main__":
    main()
