"""Variational dropout: masks that hold for all time steps of a pass (method section 4)."""

import math
from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from modules.kernels import kernels_for


def draw_seeds(count: int) -> Tensor:
    """Seeds (count,) of masks, int64 of PyTorch's CPU generator."""
    return torch.empty(count, dtype=torch.int64).random_(-2**63, None)


def dropout_mask(shape: Sequence[int], p: float, like: Tensor, seed: Union[int, Tensor]) -> Tensor:
    """One variational mask, Bernoulli(1−p)/(1−p) for each output unit, to be used at every time step of a pass.

    p is rounded to a multiple of 2⁻¹⁶, with which the mask's mean is exactly 1. The mask follows from the `seed`, 64 bits, and is the
    same on every device. It is laid out as the kernels read it, images channels last. On a GPU the seed should be a tensor there,
    int64 (), as it is not read on the host.
    """
    drop, count = round(p * 65536), math.prod(shape)
    least, scale = drop - 32768, 65536 / (65536 - drop)
    kernels = kernels_for(like)
    if kernels:
        mask = kernels.keep_mask(seed, count, least, scale)
    else:
        mask = random_draws(seed, count, like.device).to(like.dtype).ge_(least).mul_(scale)
    batch, channels, *positions = shape
    return mask.view(batch, *positions, channels).movedim(-1, 1) if positions else mask.view(batch, channels)


def random_draws(seed: Union[int, Tensor], count: int, device: torch.device) -> Tensor:
    """Uniform int16 numbers (count,), four from each 64-bit word of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    # int64 products wrap as unsigned ones do; a shift fills with the sign, which has to be masked away.
    words = torch.arange(1, -(-count // 4) + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        words.bitwise_xor_((words >> shift) & (2 ** (64 - shift) - 1)).mul_(_signed(factor))
    return words.view(torch.int16)[:count]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def masked(output: Tensor, mask: Optional[Tensor]) -> Tensor:
    return output if mask is None else output * mask
