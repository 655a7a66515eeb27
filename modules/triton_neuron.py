"""The neuron update of one time step as one Triton kernel, for CUDA devices: what native_neuron.c is for CPUs."""

import functools
from typing import Optional

import torch
from torch import Tensor

BLOCK = 1024


@functools.lru_cache(maxsize=None)
def _kernel():
    """The kernel, or None where Triton is not installed (it comes with PyTorch's CUDA builds)."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def step(current, synaptic, mask, potential, spikes, total, n, threshold, leak, HAS_CURRENT: tl.constexpr,
             HAS_SYNAPTIC: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < n
        drive = tl.zeros((BLOCK,), tl.float32)
        if HAS_SYNAPTIC:
            drive = tl.load(synaptic + at, there, 0.0).to(tl.float32)
            if HAS_MASK:
                drive = drive * tl.load(mask + at, there, 0.0)
        if HAS_CURRENT:
            drive = tl.load(current + at, there, 0.0) + drive
        u = (tl.load(potential + at, there, 0.0) - threshold * tl.load(spikes + at, there, 0.0)) * leak + drive
        s = (u >= threshold).to(tl.float32)
        tl.store(potential + at, u, there)
        tl.store(spikes + at, s, there)
        if HAS_TOTAL:
            tl.store(total + at, tl.load(total + at, there, 0.0) * leak + s, there)

    return step


def serves(tensor: Tensor) -> bool:
    """Whether the kernel can work on tensors like this one."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _kernel() is not None


def neuron_step(current: Optional[Tensor], synaptic: Optional[Tensor], mask: Optional[Tensor], potential: Tensor, spikes: Tensor,
                total: Optional[Tensor], threshold: float, leak: float) -> None:
    """One time step in place: I = current + mask · synaptic, then `modules.neuron.neuron_step`, then total ← λ total + s.

    All tensors are of one shape and one dense memory layout, float32 (synaptic also bfloat16); at least one of `current` and
    `synaptic` is given.
    """
    n = potential.numel()
    given = [potential if tensor is None else tensor for tensor in (current, synaptic, mask, potential, spikes, total)]
    _kernel()[(-(-n // BLOCK),)](*given, n, threshold, leak, current is not None, synaptic is not None, mask is not None,
                                 total is not None, BLOCK)
