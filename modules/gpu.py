"""Finds the kernels of triton_kernels.py for tensors that they can work on."""

import functools
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor


def kernels_for(tensor: Tensor) -> Optional[ModuleType]:
    """The module triton_kernels, if the layers whose state is like this tensor can be computed by it, else None."""
    return _kernels() if tensor.is_cuda and tensor.dtype == torch.float32 else None


@functools.lru_cache(maxsize=None)
def _kernels() -> Optional[ModuleType]:
    """None where Triton is not installed (it comes with PyTorch's CUDA builds)."""
    try:
        from modules import triton_kernels
        return triton_kernels
    except ImportError:
        return None
