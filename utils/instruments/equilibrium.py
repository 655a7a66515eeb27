"""How near a network is to its equilibrium, how contractive f is there, and whether the implicit gradient is right."""

import copy
from typing import Collection, Dict, List, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.implicit import autograd_vjp
from modules.jacobian import TransposedJacobian
from modules.network import FeedbackSNN
from modules.neuron import rate_weights
from modules.solvers import METHODS, solve
from utils.instruments.observers import RunningRates


def input_current(network: FeedbackSNN, x: Tensor, time_steps: int) -> Tensor:
    """F x̄ of the first `time_steps` steps, (batch, *first layer's shape), in the network's mode."""
    if network.events:
        x = torch.tensordot(rate_weights(time_steps, network.neuron.leak, dtype=x.dtype, device=x.device), x[:time_steps], dims=1)
    return network.input(x)


@torch.inference_mode()
def equilibrium_residuals(network: FeedbackSNN, x: Tensor, steps: Collection[int]) -> Dict[int, List[float]]:
    """‖a_l(T) − f_l(a_L(T))‖ / ‖a_l(T)‖ of each layer l for each T in `steps`, from one simulation of the longest, in evaluation mode.

    f_l is layer l's rate on the lap of f that starts from a_L(T), so the last layer's residual is that of a = f(a). The norms are over
    all samples; a layer that has not spiked yet counts as 1, or 0 where f agrees.
    """
    network.eval()
    weight, residuals = network.feedback.normalised_weight(), {}

    def visit(T: int, rates: List[Tensor]) -> None:
        lap = network.lap(rates[-1], input_current(network, x, T), weight)
        residuals[T] = [_ratio(rate - mapped, rate) for rate, mapped in zip(rates, lap)]

    network(x, observe=RunningRates(network.neuron.leak, steps, visit))
    return residuals


def _ratio(difference: Tensor, reference: Tensor) -> float:
    difference, reference = difference.norm().item(), reference.norm().item()
    return difference / reference if reference > 0 else float(difference > 0)


class Spectrum(NamedTuple):
    """Of J = ∂f/∂a at each sample's rate: spectral radius, norm, and the residual of the eigenpair behind the radius, (batch,) each."""

    radius: Tensor
    norm: Tensor
    residual: Tensor


@torch.no_grad()
def jacobian_spectrum(network: FeedbackSNN, x: Tensor, iterations: int = 64) -> Spectrum:
    """Spectral radius (Arnoldi) and norm (power iteration) of each sample's J, in evaluation mode, where samples are independent.

    J is taken where training takes it: at the simulated rate a for a single layer, at f(a) with hidden layers.
    """
    network.eval()
    current, weight, rate = input_current(network, x, network.time_steps), network.feedback.normalised_weight(), _rate(network, x)
    jacobian = network.transposed_jacobian(network.equilibrium_map(rate, current, weight) if network.hidden else rate, current, weight)
    start = torch.randn(rate.shape, dtype=rate.dtype, generator=torch.Generator().manual_seed(0)).to(rate.device)
    radius, residual = spectral_radius(jacobian, start, iterations)
    return Spectrum(radius, operator_norm(jacobian, start, iterations), residual)


def _rate(network: FeedbackSNN, x: Tensor) -> Tensor:
    """What the readout is given, in the last layer's shape."""
    last = []
    network(x, observe=RunningRates(network.neuron.leak, [network.time_steps], lambda T, rates: last.append(rates[-1])))
    return last[0]


def operator_norm(jacobian: TransposedJacobian, start: Tensor, iterations: int) -> Tensor:
    """‖J‖ (batch,) by power iterations u ← Jᵀ J u from `start` (batch, …); it comes from below."""
    u, norm = _unit(start)[0], None
    for _ in range(iterations):
        product, norm = _unit(jacobian.forward_product(u))
        u = _unit(jacobian(product))[0]
    return norm


def spectral_radius(jacobian: TransposedJacobian, start: Tensor, iterations: int) -> "tuple[Tensor, Tensor]":
    """The largest |eigenvalue| (batch,) by `iterations` steps of Arnoldi from `start` (batch, …), and its relative residual.

    H = Qᵀ Jᵀ Q in an orthonormal basis Q of the Krylov space has the Ritz values of Jᵀ, which are J's. They are exact, with residual 0,
    once the space is invariant. For an eigenvector y of H, ‖Jᵀ Q y − θ Q y‖ = h |last of y|, which is divided by |θ|.
    """
    batch, size = len(start), start[0].numel()
    steps = min(iterations, size)
    basis = [_unit(start)[0].flatten(1)]
    H = torch.zeros(batch, steps, steps, dtype=torch.float64, device=start.device)
    for step in range(steps):
        w = jacobian(basis[-1].view_as(start)).flatten(1)
        scale = w.norm(dim=1)
        # Orthogonalised twice, as once is not enough in floating point.
        for _ in range(2):
            for row, q in enumerate(basis):
                projection = (q * w).sum(1)
                H[:, row, step] += projection.double()
                w = w - projection[:, None] * q
        rest = w.norm(dim=1)
        # What is left of rounding is no direction: the space is invariant.
        rest = torch.where(rest > 100 * torch.finfo(w.dtype).eps * scale, rest, torch.zeros_like(rest))
        basis.append(torch.where(rest[:, None] > 0, w / rest[:, None], torch.zeros_like(w)))
        if step + 1 < steps:
            H[:, step + 1, step] = rest.double()
    values, vectors = torch.linalg.eig(H)
    radius, index = values.abs().max(1)
    last = vectors[torch.arange(batch, device=start.device), -1, index].abs()
    residual = rest.double() * last / radius.clamp_min(torch.finfo(torch.float64).tiny)
    return radius, torch.where(radius > 0, residual, torch.zeros_like(residual))


def _unit(vectors: Tensor) -> "tuple[Tensor, Tensor]":
    """Each sample's vector divided by its norm, and the norms (batch,); a vector of 0 stays."""
    norms = vectors.flatten(1).norm(dim=1)
    shape = (-1,) + (1,) * (vectors.dim() - 1)
    return vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny).view(shape), norms


def solver_traces(network: FeedbackSNN, x: Tensor, labels: Tensor, iterations: int) -> Dict[str, List[float]]:
    """The relative residual ‖g + Jᵀ v − v‖ / ‖g‖ at each iteration of each solver, for the backward solve of a training batch.

    Batch norms are in training mode, as in training, and nothing is dropped out. `network` stays as it is.
    """
    probe, traces = _training_copy(network), {}

    def record(vjp, gradient):
        for method in METHODS:
            trace = traces[method] = []

            def map(v):
                mapped = gradient + vjp(v)
                trace.append(((mapped - v).norm() / gradient.norm()).item())
                return mapped
            solve(map, gradient, method, tol=torch.finfo(gradient.dtype).eps, max_iterations=iterations)
        return gradient

    probe.solver = record
    F.cross_entropy(probe(x), labels).backward()
    return traces


def _training_copy(network: FeedbackSNN) -> FeedbackSNN:
    probe = copy.deepcopy(network).train()
    probe.dropout = 0.0
    probe.zero_grad()
    return probe


class GradientError(NamedTuple):
    """A parameter's implicit gradient against the reference: the reference's norm, the cosine, the relative error."""

    name: str
    norm: float
    cosine: float
    error: float


def check_gradient(network: FeedbackSNN, x: Tensor, labels: Tensor, tol: float = 1e-10) -> List[GradientError]:
    """The implicit gradient of a training batch, with the network's own solver, against a float64 reference solved to `tol`.

    The reference takes the same simulated rate, and the rest anew: f in float64, products with Jᵀ by autograd from its graph. Nothing
    is dropped out. Raises ArithmeticError where the reference does not converge. `network` stays as it is.
    """
    probe, exact = _training_copy(network), _training_copy(network).double()
    rates = []
    observer = RunningRates(network.neuron.leak, [network.time_steps], lambda T, layers: rates.append(layers[-1]))
    F.cross_entropy(probe(x, observe=observer), labels).backward()

    rate, x = rates[0].double().requires_grad_(), x.double()
    weight, current = exact.feedback.normalised_weight(), input_current(exact, x, network.time_steps)
    mapped = exact.equilibrium_map(rate.detach(), current, weight)
    vjp = autograd_vjp(lambda a: exact.equilibrium_map(a, current.detach(), weight.detach()),
                       mapped.detach() if exact.hidden else rate)
    gradient, *readout = torch.autograd.grad(F.cross_entropy(exact.readout(rate.flatten(1)), labels),
                                             [rate, *exact.readout.parameters()])
    solution = solve(lambda v: gradient + vjp(v), gradient, "broyden", tol, max_iterations=500)
    if not solution.converged:
        raise ArithmeticError(f"the reference solve stopped at a residual of {solution.residual:.1e}")
    names = [name for name, _ in exact.named_parameters() if not name.startswith("readout.")]
    others = torch.autograd.grad(mapped, [exact.get_parameter(name) for name in names], solution.value)
    references = dict(zip(names, others)) | dict(zip(("readout.weight", "readout.bias"), readout))
    return [_error(name, probe.get_parameter(name).grad.double(), reference) for name, reference in references.items()]


def _error(name: str, ours: Tensor, reference: Tensor) -> GradientError:
    norm = reference.norm().item()
    return GradientError(name, norm, F.cosine_similarity(ours.flatten(), reference.flatten(), dim=0).item(),
                         (ours - reference).norm().item() / max(norm, torch.finfo(torch.float64).tiny))


def is_zero(error: GradientError, errors: Sequence[GradientError]) -> bool:
    """Whether the reference is 0 but for rounding, as that of a bias in front of a batch norm, so that no error relates to it."""
    return error.norm < 1e-10 * max(other.norm for other in errors)
