"""Builds and calls the CPU kernels in native_*.c; without a C compiler there are none and PyTorch serves."""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

if TYPE_CHECKING:
    from modules.event_driven import EventMap
    from modules.hidden_layer import SaturatedNorm

PANEL = 32  # as in native.h
ANDERSON_MEMORY = 5  # as in native_solve.c
SAMPLES_TO_JUDGE_BY = 16

_FOLDER = Path(__file__).parent
# Fused multiply-adds serve the products; the neuron update goes without, so that its roundings are PyTorch's. The link step names
# no OpenMP library: the symbols resolve to the one that PyTorch has loaded, and both share one set of threads.
_COMPILE = ["cc", "-O3", "-fPIC", *(["-fopenmp"] if sys.platform == "linux" else []), "-c"]
_TUNED = (["-march=native"], ["-mcpu=native"], [])  # Which of them a compiler knows depends on it and on the processor.
_SOURCES = {"native_neuron.c": ["-ffp-contract=off"],
            **dict.fromkeys(("native_events.c", "native_solve.c", "native_spectral.c", "native_dense.c", "native_tiles.c", "native_layer.c",
                             "native_norm.c"), ["-ffp-contract=fast"])}
_LINK = ["cc", "-shared", "-lm"]


class MapStruct(ctypes.Structure):
    """`struct map` of native.h."""

    _fields_ = [(name, ctypes.c_ssize_t) for name in ("in_positions", "in_channels", "out_positions", "out_channels", "rows")] + \
               [(name, ctypes.c_void_p) for name in ("segments", "first", "to", "row")]


class LayerStruct(ctypes.Structure):
    """`struct layer` of native_layer.c."""

    _fields_ = [*[(name, ctypes.c_ssize_t) for name in ("batch", "inputs", "units", "steps", "first_expectation")],
                ("most_active", ctypes.c_double),
                *[(name, ctypes.c_float) for name in ("threshold", "leak", "normaliser", "momentum", "epsilon")],
                *[(name, ctypes.c_void_p) for name in (
                    "map", "x", "weight", "bias", "gamma", "beta", "w", "g", "input_mask", "feedback_mask", "running_mean",
                    "running_variance", "u", "v", "batches_tracked", "rate", "mapped", "gain", "slope", "normalised", "mean",
                    "variance", "inverse_std", "new_u", "new_v", "sigma", "scale")]]


class NormStruct(ctypes.Structure):
    """`struct norm` of native_norm.c."""

    _fields_ = [*[(name, ctypes.c_ssize_t) for name in ("rows", "channels")], ("threshold", ctypes.c_float),
                *[(name, ctypes.c_void_p) for name in ("y", "state", "mean", "variance", "inverse_std", "gamma", "beta", "keep")]]


@functools.lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled kernels, built on first use and kept in the user's cache folder; None, with a warning, if that fails.

    FEEDBACK_SNN_NATIVE=0 in the environment leaves them out.
    """
    if os.environ.get("FEEDBACK_SNN_NATIVE") == "0":
        return None
    try:
        kernels = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"the C kernels could not be built ({error}); the slower PyTorch operations serve instead")
        return None
    pointer, size, real, double = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_double
    kernels.neuron_step_shared.argtypes = [pointer] * 7 + [size, real, real]
    kernels.spike_step.argtypes = [pointer] * 11 + [size, real, real]
    kernels.neuron_step_shared.restype = kernels.spike_step.restype = size
    kernels.spike_drive.argtypes = [pointer] * 8 + [size]
    kernels.product.argtypes = [pointer] * 5 + [size]
    kernels.layer_equilibrium.argtypes = [pointer] * 8 + [real, size, real]
    kernels.pack_rows.argtypes = [pointer] + [size] * 4 + [real, pointer]
    kernels.pack_rows.restype = None
    kernels.keep_mask.argtypes = [ctypes.c_uint64, pointer, size, ctypes.c_int, real]
    kernels.keep_mask.restype = None
    kernels.saturate.argtypes = [pointer] * 4 + [size, real]
    kernels.saturate.restype = None
    kernels.power_iteration.argtypes = [pointer] * 5 + [size] * 2
    kernels.normalised_backward.argtypes = [pointer] * 4 + [real] * 2 + [pointer] * 3 + [size] * 2
    kernels.power_iteration.restype = kernels.normalised_backward.restype = None
    kernels.simulate_layer.argtypes = [pointer] * 5 + [size] * 3 + [double, real, real, real]
    kernels.more_active_than.argtypes = [pointer, size, double]
    kernels.layer_forward.argtypes = [ctypes.POINTER(LayerStruct)]
    kernels.layer_solve.argtypes = [ctypes.POINTER(LayerStruct), pointer, pointer, double, size, double, pointer, pointer]
    kernels.layer_backward.argtypes = [ctypes.POINTER(LayerStruct), pointer, double, *[pointer] * 6]
    kernels.norm_forward.argtypes = [ctypes.POINTER(NormStruct), pointer, real, pointer]
    kernels.norm_rates.argtypes = [ctypes.POINTER(NormStruct), pointer]
    kernels.norm_backward.argtypes = [ctypes.POINTER(NormStruct), *[pointer] * 4]
    kernels.solve_packed.argtypes = [pointer] * 5 + [size, double, size, double] + [pointer] * 2
    return kernels


def _build() -> Path:
    """Path of the shared library for this source, these flags and this processor, compiled if it is not there yet."""
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    model = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    sources = b"".join((_FOLDER / name).read_bytes() for name in ("native.h", *_SOURCES))
    key = hashlib.sha256(sources + repr((_COMPILE, _TUNED, _SOURCES, _LINK, model)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedback-snn"
    path = folder / f"native-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for tuned in _TUNED:
            try:
                _compile(tuned, Path(scratch))
                break
            except subprocess.CalledProcessError:
                if not tuned:
                    raise
        os.replace(f"{scratch}/native.so", path)
    return path


def _compile(tuned: List[str], scratch: Path) -> None:
    """Leave native.so in `scratch`."""
    objects = {name: str(scratch / f"{name}.o") for name in _SOURCES}
    compiling = [[*_COMPILE, *tuned, *flags, str(_FOLDER / name), "-o", objects[name]] for name, flags in _SOURCES.items()]
    for command in (*compiling, [*_LINK, *objects.values(), "-o", str(scratch / "native.so")]):
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can work on tensors like this one."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and library() is not None


def neuron_step(current: Optional[Tensor], synaptic: Optional[Tensor], mask: Optional[Tensor], potential: Tensor, spikes: Tensor,
                total: Optional[Tensor], count: Optional[Tensor], threshold: float, leak: float) -> int:
    """One time step in place: I = current + mask · synaptic, `modules.neuron.neuron_step`, total ← λ total + s or count ← count + s.

    All tensors are float32 but the spikes, int8, and the count, uint8, on the CPU, of one shape and one dense memory layout; at least one
    of `current` and `synaptic` is given, and at most one of `total` and `count`. The potential is 0 at rest or has come from here. Returns
    the number of spikes.
    """
    pointers = map(_pointer, (current, synaptic, mask, potential, spikes, total, count))
    return library().neuron_step_shared(*pointers, potential.numel(), threshold, leak)


def spike_step(synapses: "EventMap", source: Tensor, expected: Optional[Tensor], current: Optional[Tensor], mask: Optional[Tensor],
               potential: Tensor, spikes: Tensor, total: Optional[Tensor], count: Optional[Tensor], threshold: float, leak: float) -> int:
    """The same, with the synaptic current computed from the spikes `source` by an event-driven map: I = current + mask · (W s + b).

    Where spikes are `expected`, s stands for the departure from them. All tensors are laid out as `kernel_layout` gives them. Returns the
    number of spikes.
    """
    pointers = map(_pointer, (synapses.packed, synapses.bias, source, expected, current, mask, potential, spikes, total, count))
    return _check(library().spike_step(synapses.geometry.pointer, *pointers, len(source), threshold, leak))


def spike_drive(synapses: "EventMap", source: Tensor, expected: Optional[Tensor], current: Optional[Tensor], mask: Optional[Tensor],
                drive: Tensor) -> None:
    """Write the same current, I, into `drive`, which may be `current` itself."""
    pointers = map(_pointer, (synapses.packed, synapses.bias, source, expected, current, mask, drive))
    _check(library().spike_drive(synapses.geometry.pointer, *pointers, len(source)))


def product(map: "EventMap", x: Tensor) -> Tensor:
    """W x + b by an event-driven map, which passes over the zeros in x; both are laid out as `kernel_layout` gives them."""
    out = map.empty_output(len(x))
    _check(library().product(map.geometry.pointer, *(_pointer(tensor) for tensor in (map.packed, map.bias, x, out)), len(x)))
    return out


def layer_equilibrium(map: "EventMap", rates: Tensor, current: Tensor, mask: Optional[Tensor],
                      threshold: float) -> Tuple[Tensor, Tensor, Tensor]:
    """clamp((current + mask · W a) / V_th, 0, 1) for rates a, by a map without a bias; its slope in the current, and that in W a.

    Tensors are laid out as `kernel_layout` gives them.
    """
    mapped, slope = torch.empty_like(current), torch.empty_like(current)
    gain = None if mask is None else torch.empty_like(current)
    _check(library().layer_equilibrium(map.geometry.pointer, *pointers(map.packed, rates, current, mask, mapped, slope, gain), 1,
                                       len(current), threshold))
    return mapped, slope, slope if gain is None else gain


def pack_rows(matrix: Tensor) -> Tensor:
    """A matrix (rows, columns) as panels (panels, rows, PANEL), with zeros behind the last column."""
    rows, columns = matrix.shape
    packed = matrix.new_empty(-(-columns // PANEL), rows, PANEL)
    library().pack_rows(matrix.data_ptr(), *matrix.stride(), rows, columns, 1.0, packed.data_ptr())
    return packed


def keep_mask(seed: Union[int, Tensor], count: int, least: int, scale: float) -> Tensor:
    """A float32 mask (count,): `scale` where a draw of `modules.dropout.random_draws` is at least `least`, else 0."""
    mask = torch.empty(count, dtype=torch.float32, device="cpu")
    library().keep_mask(int(seed), mask.data_ptr(), count, least, scale)
    return mask


def saturate(drive: Tensor, mask: Optional[Tensor], threshold: float) -> Tuple[Tensor, Tensor]:
    """`modules.neuron.equilibrium_rate`'s value and slope, in one pass."""
    drive = _dense(drive)
    if mask is not None and mask.stride() != drive.stride():
        mask = torch.empty_like(drive).copy_(mask)
    rate, slope = torch.empty_like(drive), torch.empty_like(drive)
    library().saturate(*map(_pointer, (drive, mask, rate, slope)), drive.numel(), threshold)
    return rate, slope


def power_iteration(matrix: Tensor, u: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """`modules.feedback.power_iteration` of a contiguous matrix (rows, columns)."""
    sigma, following, v = matrix.new_empty(()), torch.empty_like(u), matrix.new_empty(matrix.shape[1])
    library().power_iteration(*map(_pointer, (matrix, u, following, v, sigma)), *matrix.shape)
    return sigma, following, v


def normalised_backward(gradient: Tensor, w: Tensor, u: Tensor, v: Tensor, scale: float, sigma: float) -> Tuple[Tensor, Tensor]:
    """∂L/∂w and ∂L/∂gain from ∂L/∂(scale · w), scale = gain / σ(w) with u and v held constant; w and the gradient are contiguous."""
    gradient_w, along, sums = torch.empty_like(w), w.new_empty(()), torch.empty_like(u, dtype=torch.float64)
    library().normalised_backward(*map(_pointer, (gradient, w, u, v)), scale, sigma, *map(_pointer, (sums, along, gradient_w)),
                                  len(u), len(v))
    return gradient_w, along


def simulate_layer(feedback: "EventMap", current: Tensor, mask: Optional[Tensor], time_steps: int, first_expectation: int,
                   most_active: float, normaliser: float, threshold: float, leak: float) -> Optional[Tensor]:
    """Σ_t λ^(T−1−t) s(t) / normaliser of a single layer under a constant current with feedback onto itself, all steps in one call.

    Tensors are (batch, *layer shape), laid out as `kernel_layout` gives them. Before the step `first_expectation`, and later ones as in
    modules/simulation.py, the kernel learns which spikes to expect, and touches only what departs from them then. None where more than
    the fraction `most_active` of some samples' neurons spiked in one step: dense products are faster there.
    """
    rate = torch.empty_like(current)
    pointers = map(_pointer, (feedback.packed, current, mask, rate))
    lively = _check(library().simulate_layer(feedback.geometry.pointer, *pointers, len(current), time_steps, first_expectation, most_active,
                                             normaliser, threshold, leak))
    return None if lively else rate


def more_active_than(values: Tensor, fraction: float) -> bool:
    """Whether more than this fraction of `values` (batch, …) is not zero, judged by some samples."""
    values = _dense(values[:SAMPLES_TO_JUDGE_BY])
    return bool(library().more_active_than(values.data_ptr(), values.numel(), fraction * values.numel()))


def solve_layer(adjoint: "EventMap", gain: Tensor, gradient: Tensor, tol: float, max_iterations: int,
                regularisation: float) -> Tuple[Tensor, float, float]:
    """Solve v = gradient + Bᵀ (gain · v) by Anderson acceleration, each sample on its own; `adjoint` is Bᵀ, from a layer to itself.

    Neighbours, eight at a time, iterate until their joint residual is at most tol ‖gradient‖ √(8 / batch), the norm being that of the
    whole batch, which bounds the joint relative residual by `tol`. Tensors are (batch, *layer shape), laid out as `kernel_layout` gives
    them. Returns v, that joint residual, and the mean number of products per sample.
    """
    v, residual, products = torch.empty_like(gradient), ctypes.c_double(), ctypes.c_ssize_t()
    pointers = map(_pointer, (adjoint.packed, gain, gradient, v))
    _check(library().solve_packed(adjoint.geometry.pointer, *pointers, len(gradient), tol, max_iterations, regularisation,
                                  ctypes.byref(residual), ctypes.byref(products)))
    return v, residual.value, products.value / len(gradient)


def layer_forward(layer: LayerStruct) -> bool:
    """All of a single dense layer's training pass before the readout (native_layer.c).

    False, with no statistic or singular vector changed, where the layer is too active for event-driven products.
    """
    return _check(library().layer_forward(layer)) == 0


def layer_solve(layer: LayerStruct, gradient: Tensor, tol: float, max_iterations: int,
                regularisation: float) -> Tuple[Tensor, float, float]:
    """As `solve_layer`, with the layer's feedback and gain."""
    v, residual, products = torch.empty_like(gradient), ctypes.c_double(), ctypes.c_ssize_t()
    _check(library().layer_solve(layer, *pointers(gradient, v), tol, max_iterations, regularisation, ctypes.byref(residual),
                                 ctypes.byref(products)))
    return v, residual.value, products.value / len(gradient)


def layer_backward(layer: LayerStruct, v: Tensor, tol: float, gradients: Sequence[Tensor]) -> None:
    """Write the gradients in its six parameters, for v (batch, units) that was solved to a residual of `tol`.

    A matrix unit, where there is one, multiplies 16 bits of each number if that is 1e-3 or more, else all 24.
    """
    _check(library().layer_backward(layer, v.data_ptr(), tol, *pointers(*gradients)))


def norm_forward(norm: "SaturatedNorm", mask: Optional[Tensor], epsilon: float, rate: Tensor) -> None:
    """Write the rates behind a batch norm, mask and clamp (native_norm.c), and into `norm`, from its y, γ and β, what is in it beside."""
    if _check(library().norm_forward(_norm_struct(norm), _pointer(mask), epsilon, _pointer(rate))):
        raise ValueError("a dropout mask has one value at all the units that it keeps, and 0 at the others")


def norm_rates(norm: "SaturatedNorm", rate: Tensor) -> None:
    """Write the same rates again."""
    _check(library().norm_rates(_norm_struct(norm), _pointer(rate)))


def norm_backward(norm: "SaturatedNorm", gradient: Tensor, of_y: Tensor, of_gamma: Optional[Tensor], of_beta: Optional[Tensor]) -> None:
    """Write the gradients for one in the rates; `of_y` may be that one itself. Those in γ and β may be None."""
    _check(library().norm_backward(_norm_struct(norm), *pointers(gradient, of_y, of_gamma, of_beta)))


def _norm_struct(norm: "SaturatedNorm") -> NormStruct:
    # Made for each call: autograd's hooks may have put other tensors into their places.
    return NormStruct(norm.y.numel() // norm.y.shape[1], norm.y.shape[1], norm.threshold, *pointers(*norm.tensors))


def pointers(*tensors: Optional[Tensor]) -> List[Optional[int]]:
    return [_pointer(tensor) for tensor in tensors]


def row_pointers(tensor: Tensor) -> List[int]:
    """Those of tensor[0], tensor[1], …, without making them."""
    first, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    return [first + row * step for row in range(len(tensor))]


def _dense(tensor: Tensor) -> Tensor:
    """The tensor without gaps in memory, in any order of dimensions that it may have, for what works number by number."""
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else tensor.contiguous()


def _pointer(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _check(status: int) -> int:
    if status < 0:
        raise MemoryError("a CPU kernel found no memory")
    return status
