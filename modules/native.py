"""Builds and calls native.c, the CPU kernels of the simulation; without a C compiler there are none and PyTorch serves."""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
# -ffp-contract=off keeps every rounding as PyTorch's. The link step names no OpenMP library: the symbols resolve to the one that
# PyTorch has loaded, and both share one set of threads.
_COMPILE = ["cc", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", *(["-fopenmp"] if sys.platform == "linux" else []), "-c"]
_LINK = ["cc", "-shared"]


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
    kernels.neuron_step.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_ssize_t, ctypes.c_float, ctypes.c_float]
    kernels.neuron_step.restype = None
    return kernels


def _build() -> Path:
    """Path of the shared library for this source, these flags and this processor, compiled if it is not there yet."""
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    model = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    key = hashlib.sha256(_SOURCE.read_bytes() + repr((_COMPILE, _LINK, model)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "feedback-snn"
    path = folder / f"native-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects, shared = f"{scratch}/native.o", f"{scratch}/native.so"
        for command in ([*_COMPILE, str(_SOURCE), "-o", objects], [*_LINK, objects, "-o", shared]):
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
