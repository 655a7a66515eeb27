"""The Triton kernels, for CUDA devices: what native_*.c is for CPUs.

One updates a layer's neurons, one does so with the products of a convolution that it computes itself; others evaluate neurons at
equilibrium, weigh the vectors of Anderson's method and draw dropout masks.
Tensors are dense and in the layout of `modules.event_driven.kernel_layout`, channels last for images, so that a unit's channel is its
address modulo the number of channels.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.event_driven import kernel_layout
from modules.linear_map import LinearMap

BLOCK = 1024


@triton.jit
def _advance(drive, at, there, current, mask, potential, spikes, total, threshold, leak, HAS_CURRENT: tl.constexpr,
             HAS_MASK: tl.constexpr, HAS_TOTAL: tl.constexpr):
    """One time step of the units at the addresses `at`, from their synaptic products `drive`."""
    if HAS_MASK:
        drive *= tl.load(mask + at, there, 0.0)
    if HAS_CURRENT:
        drive = tl.load(current + at, there, 0.0) + drive
    u = tl.load(potential + at, there, 0.0)
    # The last step's spike is known from its potential, so that spikes are written and not read.
    u = (u - tl.where(u >= threshold, threshold, 0.0)) * leak + drive
    s = (u >= threshold).to(tl.float32)
    tl.store(potential + at, u, there)
    tl.store(spikes + at, s, there)
    if HAS_TOTAL:
        tl.store(total + at, tl.load(total + at, there, 0.0) * leak + s, there)


@triton.jit
def _neuron_step(synaptic, current, bias, mask, potential, spikes, total, n, threshold, leak, CHANNELS: tl.constexpr,
                 HAS_SYNAPTIC: tl.constexpr, HAS_CURRENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
                 HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    drive = tl.zeros((BLOCK,), tl.float32)
    if HAS_SYNAPTIC:
        drive += tl.load(synaptic + at, there, 0.0).to(tl.float32)
    if HAS_BIAS:
        drive += tl.load(bias + at % CHANNELS, there, 0.0)
    _advance(drive, at, there, current, mask, potential, spikes, total, threshold, leak, HAS_CURRENT, HAS_MASK, HAS_TOTAL)


@triton.jit
def _convolution_step(x, weight, current, bias, mask, potential, spikes, total, batch, height, width, out_height, out_width, threshold,
                      leak, IN: tl.constexpr, OUT: tl.constexpr, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr,
                      STRIDE_X: tl.constexpr, PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr, TRANSPOSED: tl.constexpr,
                      PIECES: tl.constexpr, HAS_CURRENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
                      HAS_TOTAL: tl.constexpr, PIXELS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of PIXELS output positions by COLUMNS channels.

    A convolution's output (y, x) sees the inputs (y s − p + j, …) through the kernel's rows j. That of a transposed one sees
    ((y + p − k) / s, …) through the rows k ≡ y + p mod s; the positions of one remainder see the same rows, and are a program's.
    """
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    if TRANSPOSED:
        rest_y = tl.program_id(2) // STRIDE_X
        rest_x = tl.program_id(2) % STRIDE_X
        rows = tl.cdiv(out_height - rest_y, STRIDE_Y)
        columns = tl.cdiv(out_width - rest_x, STRIDE_X)
        first_y = (rest_y + PADDING_Y) % STRIDE_Y
        first_x = (rest_x + PADDING_X) % STRIDE_X
        taps_y = tl.cdiv(KERNEL_Y - first_y, STRIDE_Y)
        taps_x = tl.cdiv(KERNEL_X - first_x, STRIDE_X)
    else:
        rows = out_height
        columns = out_width
        taps_y = KERNEL_Y
        taps_x = KERNEL_X
    sample = m // (rows * columns)
    y = m % (rows * columns) // columns
    x_ = m % columns
    if TRANSPOSED:
        top = y + (rest_y + PADDING_Y - first_y) // STRIDE_Y
        left = x_ + (rest_x + PADDING_X - first_x) // STRIDE_X
        y = y * STRIDE_Y + rest_y
        x_ = x_ * STRIDE_X + rest_x
    else:
        top = y * STRIDE_Y - PADDING_Y
        left = x_ * STRIDE_X - PADDING_X
    real = sample < batch
    k = tl.arange(0, DEPTH)
    drive = tl.zeros((PIXELS, COLUMNS), tl.float32)
    for step in range(taps_y * taps_x * (IN // DEPTH)):
        tap = step // (IN // DEPTH)
        depth = step % (IN // DEPTH) * DEPTH
        tap_y = tap // taps_x
        tap_x = tap % taps_x
        if TRANSPOSED:
            source_y = top - tap_y
            source_x = left - tap_x
            row = (first_y + tap_y * STRIDE_Y) * KERNEL_X + first_x + tap_x * STRIDE_X
        else:
            source_y = top + tap_y
            source_x = left + tap_x
            row = tap
        inside = real & (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
        source = (sample * height + source_y) * width + source_x
        a = tl.load(x + (source * IN + depth)[:, None] + k[None, :], inside[:, None], 0.0)
        product = tl.zeros((PIXELS, COLUMNS), tl.float32)
        for piece in tl.static_range(PIECES):
            b = tl.load(weight + ((piece * KERNEL_Y * KERNEL_X + row) * IN + depth + k)[:, None] * OUT + channel[None, :],
                        (channel < OUT)[None, :], 0.0)
            if PIECES == 3:
                product = tl.dot(a, b, product)
            else:
                drive = tl.dot(a, b, drive)
        if PIECES == 3:  # Tensor cores sum up with truncation, so long sums are float32's own.
            drive += product
    if HAS_BIAS:
        drive += tl.load(bias + channel, channel < OUT, 0.0)[None, :]
    at = ((sample * out_height + y) * out_width + x_)[:, None] * OUT + channel[None, :]
    there = real[:, None] & (channel < OUT)[None, :]
    _advance(drive, at, there, current, mask, potential, spikes, total, threshold, leak, HAS_CURRENT, HAS_MASK, HAS_TOTAL)


@triton.jit
def _saturate(drive, rate, slope, n, threshold, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(drive + at, at < n, 0.0) / threshold
    # What is not a number stays so.
    clamped = tl.where(scaled < 0, 0.0, tl.where(scaled > 1, 1.0, scaled))
    tl.store(rate + at, clamped, at < n)
    tl.store(slope + at, tl.where(clamped == scaled, 1 / threshold, 0.0), at < n)


@triton.jit
def _anderson_weights(gram, products, weights, slot, used, regularisation, MEMORY: tl.constexpr, SIZE: tl.constexpr):
    """The weights from the Gram matrix with its new row, by elimination; it is positive definite, and needs no pivoting."""
    i = tl.arange(0, SIZE)
    row, column = i[:, None], i[None, :]
    inside = (row < used) & (column < used)
    new = tl.load(products + i, i < used, 0.0).to(tl.float64)
    g = tl.load(gram + row * MEMORY + column, inside, 0.0)
    g = tl.where(row == slot, new[None, :], tl.where(column == slot, new[:, None], g))
    tl.store(gram + row * MEMORY + column, g, inside)
    diagonal = tl.sum(tl.where(row == column, g, 0.0), axis=1)
    scale = tl.where(i < used, 1 / tl.sqrt(tl.maximum(diagonal, 2.2250738585072014e-308)), 0.0)
    a = tl.where(inside, g * scale[:, None] * scale[None, :], 0.0) + tl.where(row == column, tl.where(row < used, regularisation, 1.0), 0.0)
    b = scale
    for k in tl.static_range(MEMORY):
        pivots = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        factor = tl.sum(tl.where(column == k, a, 0.0), axis=1) / tl.sum(tl.where(i == k, pivots, 0.0), axis=0)
        factor = tl.where(i == k, 0.0, factor)
        b -= factor * tl.sum(tl.where(i == k, b, 0.0), axis=0)
        a -= factor[:, None] * pivots[None, :]
    found = b / tl.sum(tl.where(row == column, a, 0.0), axis=1) * scale
    tl.store(weights + i, (found / tl.sum(found, axis=0)).to(tl.float32), i < used)


@triton.jit
def _keep_mask(mask, n, seed: tl.int64, drop, scale, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Units are numbered channel by channel, whatever their layout.
    within = at % (CHANNELS * POSITIONS)
    unit = at - within + within % CHANNELS * POSITIONS + within // CHANNELS
    word = (unit // 4 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    draw = (word >> (unit % 4 * 16).to(tl.uint64)).to(tl.int32) & 0xFFFF
    kept = (draw ^ 0x8000) >= drop
    tl.store(mask + at, tl.where(kept, scale, 0.0), at < n)


class State(NamedTuple):
    """A layer's membrane potential and, written only, its spikes; and Σ λ^(T−1−t) s(t) where that is wanted.

    All have the layer's shape (batch, …). Potentials must have been 0 at rest, −∞ for units that are to stay silent, or come from the kernels.
    Potentials and sums are float32, spikes float32 or bfloat16.
    """

    potential: Tensor
    spikes: Tensor
    total: Optional[Tensor]


def neuron_step(synaptic: Optional[Tensor], current: Optional[Tensor], bias: Optional[Tensor], mask: Optional[Tensor], state: State,
                threshold: float, leak: float) -> None:
    """One time step in place: I = current + mask · (synaptic + bias), then `modules.neuron.neuron_step`, then total ← λ total + s.

    `current` and `mask` are float32 of the layer's shape, as is `synaptic`, which may be bfloat16; `bias` is float32 (channels,).
    """
    given = [state.potential if tensor is None else tensor for tensor in (synaptic, current, bias, mask, *state)]
    n = state.potential.numel()
    _neuron_step[(_blocks(n, BLOCK),)](*given, n, threshold, leak, state.potential.shape[1], synaptic is not None,
                                       *_are_there(current, bias, mask, state.total), BLOCK)


class PackedConvolution(NamedTuple):
    """A convolution, transposed or not, of spikes: its weight as bfloat16 pieces (pieces, kernel, kernel, in, out) that add up to it."""

    map: LinearMap
    pieces: Tensor


def pack_convolution(map: LinearMap, weight: Tensor, pieces: int) -> Optional[PackedConvolution]:
    """`map` with its float32 weight for `convolution_step`; None where that can't serve or is slower than cuDNN and `neuron_step`.

    Spikes are exact in bfloat16, so a weight in three pieces of 8 bits each gives float32 products at the rate of bfloat16 ones.
    """
    rows = weight if map.kind == "transposed" else weight.transpose(0, 1)
    strided = map.kind == "convolutional" and map.stride != (1, 1)
    if map.kind == "dense" or rows.shape[0] % 32 or strided and pieces < 3:
        return None
    rest, found = rows.permute(2, 3, 0, 1), []
    for _ in range(pieces):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return PackedConvolution(map, torch.stack(found).contiguous())


def convolution_step(packed: PackedConvolution, x: Tensor, current: Optional[Tensor], bias: Optional[Tensor], mask: Optional[Tensor],
                     state: State, threshold: float, leak: float) -> None:
    """`neuron_step` with the products of the packed convolution and the spikes x (batch, channels, height, width), bfloat16."""
    (batch, _, height, width), (out_height, out_width) = x.shape, state.potential.shape[2:]
    map, (pieces, kernel_y, kernel_x, channels_in, channels_out) = packed.map, packed.pieces.shape
    transposed = map.kind == "transposed"
    stride = map.stride if transposed else (1, 1)
    tiles, options = _tiles(channels_in, channels_out, pieces)
    pixels = batch * triton.cdiv(out_height, stride[0]) * triton.cdiv(out_width, stride[1])
    given = [state.potential if tensor is None else tensor for tensor in (current, bias, mask, *state)]
    grid = _blocks(channels_out, tiles[1]), _blocks(pixels, tiles[0]), stride[0] * stride[1]
    _convolution_step[grid](x, packed.pieces, *given, batch, height, width, out_height, out_width, threshold, leak, channels_in, channels_out,
                            kernel_y, kernel_x, *map.stride, *map.padding, transposed, pieces,
                            *_are_there(current, bias, mask, state.total), *tiles, **options)


def _tiles(channels_in: int, channels_out: int, pieces: int) -> tuple:
    """PIXELS, COLUMNS and DEPTH, and how many warps and pipeline stages: the fastest on an H200 for AlexNet-F and F64C5, or near it."""
    depth = 64 if channels_in % 64 == 0 and pieces == 1 else 32
    if pieces == 3 or channels_out <= 64:
        return (64, 64, depth), dict(num_warps=4, num_stages=4)
    if depth == 64 and channels_out > 128:
        return (64, 256 if channels_out % 256 == 0 else 128, 64), dict(num_warps=8, num_stages=4)
    return (64, 128, depth), dict(num_warps=4, num_stages=4)


def keep_mask(seed: int, shape: Sequence[int], drop: int, scale: float, device: torch.device) -> Tensor:
    """`scale` for the units of (batch, …) whose draw of 16 bits (`modules.dropout.random_draws`) is at least drop − 2¹⁵, 0 for the others."""
    mask = torch.empty(tuple(shape), device=device, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    n = mask.numel()
    _keep_mask[(_blocks(n, BLOCK),)](mask, n, seed, drop, scale, shape[1], max(1, n // max(1, shape[0] * shape[1])), BLOCK)
    return mask


def saturate(drive: Tensor, threshold: float) -> Tuple[Tensor, Tensor]:
    """clamp(drive / threshold, 0, 1) and its slope, 1/threshold or 0, of drive's shape and layout."""
    drive = kernel_layout(drive)
    rate, slope, n = torch.empty_like(drive), torch.empty_like(drive), drive.numel()
    _saturate[(_blocks(n, BLOCK),)](drive, rate, slope, n, threshold, BLOCK)
    return rate, slope


def anderson_weights(gram: Tensor, products: Tensor, slot: int, regularisation: float) -> Tensor:
    """As modules.solvers.Anderson: the weights (used,) after `products` (used,) have become row and column `slot` of `gram`, float64."""
    weights, memory = torch.empty_like(products), len(gram)
    _anderson_weights[(1,)](gram, products, weights, slot, len(products), regularisation, memory, triton.next_power_of_2(memory), num_warps=1)
    return weights


def _blocks(n: int, size: int) -> int:
    return max(1, triton.cdiv(n, size))


def _are_there(*tensors: Optional[Tensor]) -> tuple:
    return tuple(tensor is not None for tensor in tensors)
