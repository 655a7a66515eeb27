"""The Triton kernels for what follows a hidden connection's linear map in training: what native_norm.c is on a CPU.

Batch norm with the batch's statistics, dropout mask and clamp, and the way back through them. The map's output y, rates and gradients are
(rows, channels) in memory, a row for each sample and position. A program has ROWS rows of TILE_C channels, whose sums it takes in
float32; those of all programs are added up in float64, always in the same order.
"""

from typing import TYPE_CHECKING, Optional, Tuple

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from modules.hidden_layer import SaturatedNorm

# A unit whose rate is 0 or that is dropped; between 0 and 1; 1. As in native_norm.c and modules/hidden_layer.py.
SILENT, OPEN, SATURATED = (tl.constexpr(state) for state in range(3))
ROWS, TILE_R, TILE_C = 128, 32, 32


@triton.jit
def _place(CHANNELS: tl.constexpr, TILE_C: tl.constexpr):
    """A program's part of the rows, and its channels. Programs side by side have the same rows."""
    across = (CHANNELS + TILE_C - 1) // TILE_C
    return tl.program_id(0) // across, tl.program_id(0) % across * TILE_C + tl.arange(0, TILE_C)


@triton.jit
def _tile(first, channel, rows, CHANNELS: tl.constexpr, TILE_R: tl.constexpr):
    """The addresses of TILE_R rows from `first` on, and which of them are there."""
    row = first + tl.arange(0, TILE_R)
    return row.to(tl.int64)[:, None] * CHANNELS + channel[None, :], (row < rows)[:, None] & (channel < CHANNELS)[None, :]


@triton.jit
def _statistics(y, parts, rows, count, CHANNELS: tl.constexpr, ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """A part's mean of y, into parts[0], and its sum of squares about it, into parts[1]; `parts` is (2, count, channels)."""
    part, channel = _place(CHANNELS, TILE_C)
    own_rows = tl.minimum(rows - part * ROWS, ROWS)
    # Squares are summed about the mean of the first rows, so that nothing cancels.
    at, there = _tile(part * ROWS, channel, rows, CHANNELS, TILE_R)
    about = tl.sum(tl.load(y + at, there, 0.0).to(tl.float32), axis=0) / tl.minimum(own_rows, TILE_R)
    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    squares = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in tl.static_range(0, ROWS, TILE_R):
        at, there = _tile(part * ROWS + start, channel, rows, CHANNELS, TILE_R)
        away = tl.where(there, tl.load(y + at, there, 0.0).to(tl.float32) - about[None, :], 0.0)
        total += away
        squares += away * away
    offset = tl.sum(total, axis=0) / own_rows
    own = parts + part * CHANNELS + channel
    tl.store(own, about + offset, channel < CHANNELS)
    tl.store(own + count * CHANNELS, tl.sum(squares, axis=0) - own_rows * offset * offset, channel < CHANNELS)


@triton.jit
def _all_statistics(parts, mean, variance, inverse_std, rows, count, epsilon, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
                    TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Of all parts together; the variance has one row less in its denominator."""
    _, channel = _place(CHANNELS, TILE_C)
    total = tl.zeros((TILE_C,), tl.float64)
    for first in range(0, count, TILE_R):
        at, there = _tile(first, channel, count, CHANNELS, TILE_R)
        own_rows = tl.minimum(rows - (first + tl.arange(0, TILE_R)) * ROWS, ROWS)
        total += tl.sum(tl.load(parts + at, there, 0.0).to(tl.float64) * own_rows[:, None], axis=0)
    middle = total / rows
    squares = tl.zeros((TILE_C,), tl.float64)
    for first in range(0, count, TILE_R):
        at, there = _tile(first, channel, count, CHANNELS, TILE_R)
        own_rows = tl.minimum(rows - (first + tl.arange(0, TILE_R)) * ROWS, ROWS)
        away = tl.where(there, tl.load(parts + at, there, 0.0).to(tl.float64) - middle[None, :], 0.0)
        squares += tl.sum(tl.load(parts + count * CHANNELS + at, there, 0.0) + own_rows[:, None] * away * away, axis=0)
    there = channel < CHANNELS
    tl.store(mean + channel, middle.to(tl.float32), there)
    tl.store(variance + channel, (squares / (rows - 1)).to(tl.float32), there)
    tl.store(inverse_std + channel, (1 / tl.sqrt(squares / rows + epsilon)).to(tl.float32), there)


@triton.jit
def _rates(y, state, mask, rate, keep, mean, inverse_std, gamma, beta, rows, threshold, AGAIN: tl.constexpr, HAS_MASK: tl.constexpr,
           CHANNELS: tl.constexpr, ROWS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """The rates, every unit's state and the mask's value at what it keeps; or AGAIN, from those two, the rates alone."""
    part, channel = _place(CHANNELS, TILE_C)
    scale = tl.load(gamma + channel, channel < CHANNELS, 0.0) * tl.load(inverse_std + channel, channel < CHANNELS, 0.0)
    middle = tl.load(mean + channel, channel < CHANNELS, 0.0)
    shift = tl.load(beta + channel, channel < CHANNELS, 0.0)
    for start in tl.static_range(0, ROWS, TILE_R):
        at, there = _tile(part * ROWS + start, channel, rows, CHANNELS, TILE_R)
        if AGAIN:
            kept = tl.full((TILE_R, TILE_C), 1.0, tl.float32) * tl.load(keep)
        elif HAS_MASK:
            kept = tl.load(mask + at, there, 0.0)
        else:
            kept = tl.full((TILE_R, TILE_C), 1.0, tl.float32)
        away = tl.load(y + at, there, 0.0).to(tl.float32) - middle[None, :]
        drive = (away * scale[None, :] + shift[None, :]) * kept / threshold
        if AGAIN:
            stands = tl.load(state + at, there, 0)
            tl.store(rate + at, tl.where(stands == OPEN, drive, tl.where(stands == SATURATED, 1.0, 0.0)), there)
        else:
            # What is not a number stays so.
            tl.store(rate + at, tl.where(drive > 1, 1.0, tl.where(drive < 0, 0.0, drive)), there)
            stands = tl.where(drive > 1, SATURATED, tl.where((drive < 0) | (kept == 0), SILENT, OPEN))
            tl.store(state + at, stands.to(tl.int8), there)
            largest = tl.max(tl.max(kept, axis=1), axis=0)
            tl.store(keep, largest, largest > 0)  # Many programs do this, but all with the same value.


@triton.jit
def _sums(gradient, y, state, keep, mean, parts, rows, count, threshold, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
          TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """A part's sums of q = gain · gradient, into parts[0], and of q (y − mean), into parts[1]; `parts` is (2, count, channels)."""
    part, channel = _place(CHANNELS, TILE_C)
    middle = tl.load(mean + channel, channel < CHANNELS, 0.0)
    steep = tl.load(keep) / threshold
    total = tl.zeros((TILE_R, TILE_C), tl.float32)
    along = tl.zeros((TILE_R, TILE_C), tl.float32)
    for start in tl.static_range(0, ROWS, TILE_R):
        at, there = _tile(part * ROWS + start, channel, rows, CHANNELS, TILE_R)
        q = tl.load(gradient + at, there, 0.0) * tl.where(tl.load(state + at, there, 0) == OPEN, steep, 0.0)
        total += q
        along += q * (tl.load(y + at, there, 0.0).to(tl.float32) - middle[None, :])
    own = parts + part * CHANNELS + channel
    tl.store(own, tl.sum(total, axis=0), channel < CHANNELS)
    tl.store(own + count * CHANNELS, tl.sum(along, axis=0), channel < CHANNELS)


@triton.jit
def _all_sums(parts, keep, inverse_std, gamma, factors, of_gamma, of_beta, rows, count, threshold, WITH_OWN: tl.constexpr,
              CHANNELS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Of all parts together: the gradients in γ and β, and what `_gradients` needs, (3, channels)."""
    _, channel = _place(CHANNELS, TILE_C)
    total = tl.zeros((TILE_C,), tl.float64)
    along = tl.zeros((TILE_C,), tl.float64)
    for first in range(0, count, TILE_R):
        at, there = _tile(first, channel, count, CHANNELS, TILE_R)
        total += tl.sum(tl.load(parts + at, there, 0.0).to(tl.float64), axis=0)
        along += tl.sum(tl.load(parts + count * CHANNELS + at, there, 0.0).to(tl.float64), axis=0)
    there = channel < CHANNELS
    inverse = tl.load(inverse_std + channel, there, 0.0).to(tl.float64)
    steepness = tl.load(gamma + channel, there, 0.0) * inverse
    tl.store(factors + channel, (steepness * tl.load(keep) / threshold).to(tl.float32), there)
    tl.store(factors + CHANNELS + channel, (-steepness * inverse * inverse * along / rows).to(tl.float32), there)
    tl.store(factors + 2 * CHANNELS + channel, (-steepness * total / rows).to(tl.float32), there)
    if WITH_OWN:
        tl.store(of_gamma + channel, (along * inverse).to(tl.float32), there)
        tl.store(of_beta + channel, total.to(tl.float32), there)


@triton.jit
def _gradients(gradient, y, state, mean, factors, of_y, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, TILE_R: tl.constexpr,
               TILE_C: tl.constexpr):
    """Those in y: scale · gradient where the clamp lets a change pass, + slope (y − mean) + constant."""
    part, channel = _place(CHANNELS, TILE_C)
    middle = tl.load(mean + channel, channel < CHANNELS, 0.0)
    scale = tl.load(factors + channel, channel < CHANNELS, 0.0)
    slope = tl.load(factors + CHANNELS + channel, channel < CHANNELS, 0.0)
    constant = tl.load(factors + 2 * CHANNELS + channel, channel < CHANNELS, 0.0)
    for start in tl.static_range(0, ROWS, TILE_R):
        at, there = _tile(part * ROWS + start, channel, rows, CHANNELS, TILE_R)
        direct = tl.load(gradient + at, there, 0.0) * tl.where(tl.load(state + at, there, 0) == OPEN, scale[None, :], 0.0)
        away = tl.load(y + at, there, 0.0).to(tl.float32) - middle[None, :]
        tl.store(of_y + at, direct + away * slope[None, :] + constant[None, :], there)


def norm_forward(norm: "SaturatedNorm", mask: Optional[Tensor], epsilon: float, rate: Tensor) -> None:
    """As `modules.native.norm_forward`, but y may be bfloat16, and that the mask has one value beside 0 is taken for granted."""
    y, state, mean, variance, inverse_std, gamma, beta, keep = norm.tensors
    rows, channels, parts, across = _shape(y)
    sums = mean.new_empty(2, parts, channels)
    _statistics[(parts * across,)](y, sums, rows, parts, channels, ROWS, TILE_R, TILE_C)
    _all_statistics[(across,)](sums, mean, variance, inverse_std, rows, parts, epsilon, channels, ROWS, TILE_R, TILE_C)
    _rates[(parts * across,)](y, state, y if mask is None else mask, rate, keep, mean, inverse_std, gamma, beta, rows, norm.threshold,
                              False, mask is not None, channels, ROWS, TILE_R, TILE_C)


def norm_rates(norm: "SaturatedNorm", rate: Tensor) -> None:
    """As `modules.native.norm_rates`; y and the rates may be bfloat16."""
    y, state, mean, _, inverse_std, gamma, beta, keep = norm.tensors
    rows, channels, parts, across = _shape(y)
    _rates[(parts * across,)](y, state, y, rate, keep, mean, inverse_std, gamma, beta, rows, norm.threshold, True, False, channels, ROWS,
                              TILE_R, TILE_C)


def norm_backward(norm: "SaturatedNorm", gradient: Tensor, of_y: Tensor, of_gamma: Optional[Tensor], of_beta: Optional[Tensor]) -> None:
    """As `modules.native.norm_backward`; y and the gradient in it may be bfloat16."""
    y, state, mean, _, inverse_std, gamma, _, keep = norm.tensors
    rows, channels, parts, across = _shape(y)
    sums, factors, with_own = mean.new_empty(2, parts, channels), mean.new_empty(3, channels), of_gamma is not None
    _sums[(parts * across,)](gradient, y, state, keep, mean, sums, rows, parts, norm.threshold, channels, ROWS, TILE_R, TILE_C)
    _all_sums[(across,)](sums, keep, inverse_std, gamma, factors, of_gamma if with_own else mean, of_beta if with_own else mean, rows,
                         parts, norm.threshold, with_own, channels, TILE_R, TILE_C)
    _gradients[(parts * across,)](gradient, y, state, mean, factors, of_y, rows, channels, ROWS, TILE_R, TILE_C)


def _shape(y: Tensor) -> Tuple[int, int, int, int]:
    """Rows and channels, and over how many programs they are shared out."""
    rows, channels = y.numel() // y.shape[1], y.shape[1]
    return rows, channels, triton.cdiv(rows, ROWS), triton.cdiv(channels, TILE_C)
