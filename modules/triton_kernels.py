"""The Triton kernels, for CUDA devices: what native_*.c is for CPUs.

One updates a layer's neurons, one does so with the products of a convolution that it computes itself; others evaluate neurons at
equilibrium, weigh the vectors of Anderson's method and draw dropout masks. Those of hidden layers' batch norms are in triton_norm.py.
Tensors are dense and in the layout of `modules.event_driven.kernel_layout`, channels last for images, so that a unit's channel is its
address modulo the number of channels.
"""

import math
from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.event_driven import kernel_layout
from modules.linear_map import LinearMap
from modules.triton_norm import norm_backward, norm_forward, norm_rates  # noqa: F401, for modules.kernels

BLOCK = 1024


@triton.jit
def _advance(drive, at, there, current, mask, potential, spikes, total, threshold, leak, HAS_CURRENT: tl.constexpr,
             HAS_MASK: tl.constexpr, HAS_TOTAL: tl.constexpr):
    """One time step of the units at the addresses `at`, from their synaptic products `drive`."""
    if HAS_MASK:
        drive *= tl.load(mask + at, there, 0).to(tl.float32)
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
def _products(x, digits, top, left, sample, real, channel, first_y, first_x, taps_y, taps_x, height, width, IN: tl.constexpr,
              OUT: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, TRANSPOSED: tl.constexpr,
              PIXELS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Sums over a window's taps and the input channels, (PIXELS, COLUMNS), of spikes with one digit of the weights."""
    total = tl.zeros((PIXELS, COLUMNS), tl.int32)
    for first in range(0, taps_y * taps_x * IN, DEPTH):
        tap = (first + tl.arange(0, DEPTH)) // IN
        depth = (first + tl.arange(0, DEPTH)) % IN
        some = tap < taps_y * taps_x
        tap_y = tap // taps_x
        tap_x = tap % taps_x
        if TRANSPOSED:
            row = (first_y + tap_y * STRIDE_Y) * KERNEL_X + first_x + tap_x * STRIDE_X
            tap_y = -tap_y
            tap_x = -tap_x
        else:
            row = tap
        source_y = top[:, None] + tap_y[None, :]
        source_x = left[:, None] + tap_x[None, :]
        inside = real[:, None] & some[None, :] & (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
        source = (sample[:, None] * height + source_y) * width + source_x
        a = tl.load(x + source * IN + depth[None, :], inside, 0)
        b = tl.load(digits + (row[:, None] * OUT + channel[None, :]) * IN + depth[:, None], some[:, None] & (channel < OUT)[None, :], 0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    return total


@triton.jit
def _convolution_step(x, upper, lowest, scale, current, bias, mask, potential, spikes, total, batch, height, width, out_height, out_width,
                      threshold, leak, IN: tl.constexpr, OUT: tl.constexpr, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr,
                      STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PADDING_Y: tl.constexpr, PADDING_X: tl.constexpr,
                      TRANSPOSED: tl.constexpr, HAS_LOWEST: tl.constexpr, HAS_CURRENT: tl.constexpr, HAS_BIAS: tl.constexpr,
                      HAS_MASK: tl.constexpr, HAS_TOTAL: tl.constexpr, PIXELS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of PIXELS output positions by COLUMNS channels.

    A convolution's output (y, x) sees the inputs (y s − p + j, …) through the kernel's rows j. That of a transposed one sees
    ((y + p − k) / s, …) through the rows k ≡ y + p mod s; the positions of one remainder see the same rows, and are a program's.
    """
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
        first_y = 0
        first_x = 0
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
    # The two upper digits of a channel lie side by side, in the columns of one product.
    pair = tl.program_id(0) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    sums = _products(x, upper, top, left, sample, real, pair, first_y, first_x, taps_y, taps_x, height, width, IN, 2 * OUT, KERNEL_X,
                     STRIDE_Y, STRIDE_X, TRANSPOSED, PIXELS, 2 * COLUMNS, DEPTH)
    low, high = tl.split(sums.reshape(PIXELS, COLUMNS, 2))
    drive = high.to(tl.float32) * 256 + low.to(tl.float32)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_LOWEST:
        sums = _products(x, lowest, top, left, sample, real, channel, first_y, first_x, taps_y, taps_x, height, width, IN, OUT, KERNEL_X,
                         STRIDE_Y, STRIDE_X, TRANSPOSED, PIXELS, COLUMNS, DEPTH)
        drive = drive * 256 + sums.to(tl.float32)
    drive *= tl.load(scale + channel, channel < OUT, 0.0)[None, :]
    if HAS_BIAS:
        drive += tl.load(bias + channel, channel < OUT, 0.0)[None, :]
    at = ((sample * out_height + y) * out_width + x_)[:, None] * OUT + channel[None, :]
    there = real[:, None] & (channel < OUT)[None, :]
    _advance(drive, at, there, current, mask, potential, spikes, total, threshold, leak, HAS_CURRENT, HAS_MASK, HAS_TOTAL)


@triton.jit
def _write_digits(rows, scale, upper, lowest, n, stride_in, stride_out, stride_y, stride_x, IN: tl.constexpr, OUT: tl.constexpr,
                  KERNEL_X: tl.constexpr, HAS_LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = at % IN
    o = at // IN % OUT
    tap = at // (IN * OUT)
    weight = tl.load(rows + i * stride_in + o * stride_out + tap // KERNEL_X * stride_y + tap % KERNEL_X * stride_x, at < n, 0.0)
    number = tl.floor(weight.to(tl.float64) / tl.load(scale + o, at < n, 1.0) + 0.5).to(tl.int32)
    # With 128 added to every digit, these are the bytes; bit 7 takes the 128 away again.
    written = (number + 0x808080) ^ 0x808080
    if HAS_LOWEST:
        tl.store(lowest + at, written.to(tl.int8), at < n)
        written = written >> 8
    low = (tap * OUT + o) * 2 * IN + i
    tl.store(upper + low, written.to(tl.int8), at < n)
    tl.store(upper + low + IN, (written >> 8).to(tl.int8), at < n)


@triton.jit
def _saturate(drive, mask, rate, slope, n, threshold, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(drive + at, at < n, 0.0)
    steep = 1 / threshold
    if HAS_MASK:
        keep = tl.load(mask + at, at < n, 0.0)
        scaled *= keep
        steep *= keep
    scaled /= threshold
    # What is not a number stays so.
    clamped = tl.where(scaled < 0, 0.0, tl.where(scaled > 1, 1.0, scaled))
    tl.store(rate + at, clamped, at < n)
    tl.store(slope + at, tl.where(clamped == scaled, steep, 0.0), at < n)


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
def _keep_mask(mask, n, seed, least, scale, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = (unit // 4 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + tl.load(seed).to(tl.uint64)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    draw = (word >> (unit % 4 * 16).to(tl.uint64)).to(tl.int32) & 0xFFFF
    kept = (draw ^ 0x8000) - 0x8000 >= least
    tl.store(mask + unit, tl.where(kept, scale, 0.0), unit < n)


class State(NamedTuple):
    """A layer's membrane potential and, written only, its spikes; and Σ λ^(T−1−t) s(t) where that is wanted.

    All have the layer's shape (batch, …). Potentials must have been 0 at rest, −∞ for units that are to stay silent, or come from
    the kernels. Potentials and sums are float32, spikes float32, bfloat16 or int8.
    """

    potential: Tensor
    spikes: Tensor
    total: Optional[Tensor]


def neuron_step(synaptic: Optional[Tensor], current: Optional[Tensor], bias: Optional[Tensor], mask: Optional[Tensor], state: State,
                threshold: float, leak: float) -> None:
    """One time step in place: I = current + mask · (synaptic + bias), then `modules.neuron.neuron_step`, then total ← λ total + s.

    `current` is float32 of the layer's shape, as are `mask`, which may be int8, and `synaptic`, which may be bfloat16; `bias` is float32
    (channels,).
    """
    given = [state.potential if tensor is None else tensor for tensor in (synaptic, current, bias, mask, *state)]
    n = state.potential.numel()
    _neuron_step[(_blocks(n, BLOCK),)](*given, n, threshold, leak, state.potential.shape[1], synaptic is not None,
                                       *_are_there(current, bias, mask, state.total), BLOCK)


class PackedConvolution(NamedTuple):
    """A convolution, transposed or not, of spikes, its weight in fixed point with a scale (out,) per output channel.

    Its numbers are written to the base 256 with digits from −128 to 127, int8: the two `upper` ones of a weight lie side by side,
    (kernel, kernel, out, 2, in), those of the next order apart, in `lowest` (kernel, kernel, out, 1, in) if there are three.
    """

    map: LinearMap
    upper: Tensor
    lowest: Optional[Tensor]
    scale: Tensor


def convolves(map: LinearMap, weight: Tensor) -> bool:
    """Whether `pack_convolution` and `convolution_step` can serve for this map."""
    return map.kind != "dense" and weight.shape[0 if map.kind == "transposed" else 1] % 32 == 0


def pack_convolution(map: LinearMap, weight: Tensor, digits: int) -> PackedConvolution:
    """`map` with its float32 weight in two or three digits for `convolution_step`.

    Spikes are exact in int8 and sums of products with them in int32, so three digits give float32's accuracy: a weight's error is
    about 2⁻²⁴ of the largest weight of its output channel at most, with two digits 2⁻¹⁶.
    """
    rows = weight if map.kind == "transposed" else weight.transpose(0, 1)
    channels_in, channels_out, *kernel = rows.shape
    largest = 127 * (256**digits - 1) // 255  # that so many digits can write on both sides of 0
    scale = torch.linalg.vector_norm(rows, math.inf, dim=(0, 2, 3)).clamp_min(torch.finfo(weight.dtype).tiny).double() / largest
    upper, lowest = (torch.empty((*kernel, channels_out, count, channels_in), dtype=torch.int8, device=weight.device) for count in (2, 1))
    n = weight.numel()
    _write_digits[(_blocks(n, BLOCK),)](rows, scale, upper, lowest, n, *rows.stride(), channels_in, channels_out, kernel[1], digits == 3,
                                        BLOCK)
    return PackedConvolution(map, upper, lowest if digits == 3 else None, scale.float())


def convolution_step(packed: PackedConvolution, x: Tensor, current: Optional[Tensor], bias: Optional[Tensor], mask: Optional[Tensor],
                     state: State, threshold: float, leak: float) -> None:
    """`neuron_step` with the products of the packed convolution and the spikes x (batch, channels, height, width), int8."""
    (batch, _, height, width), (out_height, out_width) = x.shape, state.potential.shape[2:]
    map, (kernel_y, kernel_x, channels_out, _, channels_in) = packed.map, packed.upper.shape
    transposed = map.kind == "transposed"
    stride = map.stride if transposed else (1, 1)
    pixels = batch * triton.cdiv(out_height, stride[0]) * triton.cdiv(out_width, stride[1])
    tiles, options = _tiles(channels_in, channels_out, not transposed and map.stride != (1, 1))
    given = [state.potential if tensor is None else tensor for tensor in (packed.lowest, packed.scale, current, bias, mask, *state)]
    grid = _blocks(channels_out, tiles[1]), _blocks(pixels, tiles[0]), stride[0] * stride[1]
    _convolution_step[grid](x, packed.upper, *given, batch, height, width, out_height, out_width, threshold, leak,
                            channels_in, channels_out, kernel_y, kernel_x, *map.stride, *map.padding, transposed,
                            *_are_there(packed.lowest, current, bias, mask, state.total), *tiles, **options)


def _tiles(channels_in: int, channels_out: int, strided: bool) -> tuple:
    """PIXELS, COLUMNS and DEPTH, and how they are computed: the fastest on an H200 for AlexNet-F and F64C5, or near it."""
    if channels_out % 64:
        return (128, 32, 64), dict(num_warps=4, num_stages=3)
    if channels_out == 64:
        return (64, 64, 64), dict(num_warps=4, num_stages=4)
    if channels_in % 128:
        return (128, 64, 64), dict(num_warps=4, num_stages=3)
    if strided:
        return (64, 64, 128), dict(num_warps=4, num_stages=3)
    return (64, 64, 128), dict(num_warps=4, num_stages=2, **(dict(maxnreg=128) if torch.version.cuda else {}))


def keep_mask(seed: Tensor, count: int, least: int, scale: float) -> Tensor:
    """As `modules.native.keep_mask`, on the device of the seed, which is a tensor ()."""
    mask = torch.empty(count, device=seed.device)
    _keep_mask[(_blocks(count, BLOCK),)](mask, count, seed, least, scale, BLOCK)
    return mask


def saturate(drive: Tensor, mask: Optional[Tensor], threshold: float) -> Tuple[Tensor, Tensor]:
    """clamp(mask · drive / threshold, 0, 1) and its slope in the drive, mask/threshold or 0, of drive's shape."""
    drive, mask = kernel_layout(drive), None if mask is None else kernel_layout(mask)
    rate, slope, n = torch.empty_like(drive), torch.empty_like(drive), drive.numel()
    _saturate[(_blocks(n, BLOCK),)](drive, drive if mask is None else mask, rate, slope, n, threshold, mask is not None, BLOCK)
    return rate, slope


def anderson_weights(gram: Tensor, products: Tensor, slot: int, regularisation: float) -> Tensor:
    """As modules.solvers.Anderson: the weights (used,) after `products` (used,) have become row and column `slot` of `gram`, float64."""
    weights, memory = torch.empty_like(products), len(gram)
    _anderson_weights[(1,)](gram, products, weights, slot, len(products), regularisation, memory,
                            triton.next_power_of_2(memory), num_warps=1)
    return weights


def _blocks(n: int, size: int) -> int:
    return max(1, triton.cdiv(n, size))


def _are_there(*tensors: Optional[Tensor]) -> tuple:
    return tuple(tensor is not None for tensor in tensors)
