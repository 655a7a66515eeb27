"""Builds and calls the CPU kernels in native*.c; without a C compiler there are none and PyTorch serves."""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Optional, Tuple

import torch
from torch import Tensor

_SOURCES = sorted(Path(__file__).parent.glob("native*.c"))
# -ffp-contract=off keeps every rounding as PyTorch's. The link step names no OpenMP library: the symbols resolve to the one that
# PyTorch has loaded, and both share one set of threads.
_COMPILE = ["cc", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", *(["-fopenmp"] if sys.platform == "linux" else []), "-c"]
_LINK = ["cc", "-shared", "-lm"]


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
    kernels.neuron_step.argtypes = [pointer] * 6 + [size, real, real]
    kernels.neuron_step.restype = None
    kernels.simulate_dense.argtypes = [pointer] * 5 + [size] * 3 + [real, real]
    kernels.solve_dense.argtypes = [pointer] * 4 + [size] * 2 + [double, size, double] + [pointer] * 2
    return kernels


def _build() -> Path:
    """Path of the shared library for this source, these flags and this processor, compiled if it is not there yet."""
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    model = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    key = hashlib.sha256(sources + repr((_COMPILE, _LINK, model)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedback-snn"
    path = folder / f"native-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        shared, objects = f"{scratch}/native.so", [f"{scratch}/{source.stem}.o" for source in _SOURCES]
        compiling = [[*_COMPILE, str(source), "-o", made] for source, made in zip(_SOURCES, objects)]
        for command in (*compiling, [*_LINK, *objects, "-o", shared]):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        os.replace(shared, path)
    return path


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can work on tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and library() is not None


def neuron_step(current: Optional[Tensor], synaptic: Optional[Tensor], mask: Optional[Tensor], potential: Tensor, spikes: Tensor,
                total: Optional[Tensor], threshold: float, leak: float) -> None:
    """One time step in place: I = current + mask · synaptic, then `modules.neuron.neuron_step`, then total ← λ total + s.

    All tensors are float32, on the CPU and of one shape; at least one of `current` and `synaptic` is given.
    """
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (current, synaptic, mask)]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*tensors, potential, spikes, total)]
    library().neuron_step(*pointers, potential.numel(), threshold, leak)


def simulate_dense(current: Tensor, weight: Tensor, mask: Optional[Tensor], time_steps: int, threshold: float, leak: float,
                   with_spikes: bool = False) -> Tuple[Tensor, Optional[Tensor]]:
    """Simulate one dense layer under a constant current (batch, n) with feedback `mask · weight s` (n, n) onto itself.

    Returns Σ_t λ^(T−1−t) s(t) (batch, n) and, if wanted, all spikes (T, batch, n).
    """
    current, weight = current.contiguous(), weight.contiguous()
    total = torch.empty_like(current)
    spikes = torch.empty(time_steps, *current.shape) if with_spikes else None
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (current, weight, mask, total, spikes)]
    _check(library().simulate_dense(*pointers, *current.shape, time_steps, threshold, leak))
    return total, spikes


def solve_dense(weight: Tensor, gain: Tensor, gradient: Tensor, tol: float, max_iterations: int,
                regularisation: float) -> Tuple[Tensor, float, float]:
    """Solve v = gradient + (gain · v) weight by Anderson acceleration, each sample on its own; (batch, n) and weight (n, n).

    Every sample iterates until its residual is at most tol ‖gradient‖ / √batch, the norm being that of the whole batch, which
    bounds the joint relative residual by `tol`. Returns v, that joint residual, and the mean number of products per sample.
    """
    weight, gain, gradient = weight.contiguous(), gain.contiguous(), gradient.contiguous()
    v, squares, products = torch.empty_like(gradient), ctypes.c_double(), ctypes.c_ssize_t()
    norm = torch.linalg.vector_norm(gradient).item() or 1.0
    pointers = [tensor.data_ptr() for tensor in (weight, gain, gradient, v)]
    _check(library().solve_dense(*pointers, *gradient.shape, tol * norm / len(gradient) ** 0.5, max_iterations, regularisation,
                                 ctypes.byref(squares), ctypes.byref(products)))
    return v, squares.value ** 0.5 / norm, products.value / len(gradient)


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("a CPU kernel found no memory")
