"""Linear maps on a CPU that touch only the units that are not silent: what they need beside a LinearMap, for the C kernels.

The kernels see a layer as (batch, positions, channels), which is a dense layer's own layout and channels_last for images. Each output
position adds the weight rows of the active inputs in its window; a window's row of pixels is contiguous in the sorted list of
active units, so it is described by a segment (from, to, first weight row).
"""

import ctypes
import functools
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules import native
from modules.linear_map import LinearMap

Segment = Tuple[int, int, int]


class EventMap(NamedTuple):
    """A linear map with its weight and bias packed for the kernels; tensors in and out are as `kernel_layout` gives them."""

    geometry: "Geometry"
    packed: Tensor
    bias: Optional[Tensor]
    output_shape: Tuple[int, ...]

    def empty_output(self, batch: int) -> Tensor:
        """An uninitialised output (batch, *output_shape)."""
        layout = torch.channels_last if len(self.output_shape) == 3 else torch.contiguous_format
        return torch.empty((batch, *self.output_shape), dtype=self.packed.dtype, device=self.packed.device, memory_format=layout)


class Geometry:
    """The C struct `map` of modules/native.h with the arrays that it points to, which it keeps alive."""

    def __init__(self, in_positions: int, in_channels: int, out_channels: int, kernel_size: int, windows: Sequence[List[Segment]]):
        windows = [window or [(0, 0, 0)] for window in windows]  # An output that sees no input still gets its bias.
        counts = np.cumsum([0] + [len(window) for window in windows])
        flat = np.array([segment for window in windows for segment in window], dtype=np.int64).reshape(-1, 3)
        rows = (flat[:, 2] - flat[:, 0]) * in_channels
        arrays = [np.ascontiguousarray(array, dtype=np.int32) for array in (counts, flat[:, 0], flat[:, 1], rows)]
        self._arrays = arrays
        self.struct = native.MapStruct(in_positions, in_channels, len(windows), out_channels, kernel_size * in_channels,
                                       *(array.ctypes.data for array in arrays))
        self.pointer = ctypes.addressof(self.struct)


def event_map(map: LinearMap, weight: Tensor, bias: Optional[Tensor], input_shape: Sequence[int]) -> EventMap:
    """`map` with `weight` and `bias` for one input shape, without the batch dimension. Float32 on the CPU, no gradient."""
    output_shape = map.output_shape(input_shape, weight)
    geometry = _geometry(map, tuple(input_shape), output_shape, tuple(weight.shape[2:]))
    bias = None if bias is None else F.pad(bias.detach(), (0, -output_shape[0] % native.PANEL))
    return EventMap(geometry, native.pack_rows(_rows(map, weight.detach())), bias, output_shape)


def kernel_layout(x: Tensor) -> Tensor:
    """`x` (batch, …) with the memory layout that the kernels read: contiguous, channels last for images."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def layer_equilibrium(events: EventMap, map: LinearMap, weight: Tensor, current: Tensor, rates: Tensor, mask: Optional[Tensor],
                      threshold: float) -> Tuple[Tensor, Tensor]:
    """clamp((current + mask · W a) / V_th, 0, 1) for rates a by the kernels, and the gain mask / V_th or 0 that it has in W a.

    The value is differentiable in `current` and in `weight`, the W of `map` from which `events` was packed, not in the rates.
    """
    return _LayerEquilibrium.apply(current, weight, rates, mask, map, events, threshold)


class _LayerEquilibrium(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current, weight, rates, mask, map, events, threshold):
        rates, mask = kernel_layout(rates), mask if mask is None else kernel_layout(mask)
        mapped, slope, gain = native.layer_equilibrium(events, rates, kernel_layout(current), mask, threshold)
        ctx.save_for_backward(weight, rates, slope, gain)
        ctx.map = map
        ctx.mark_non_differentiable(gain)
        return mapped, gain

    @staticmethod
    def backward(ctx, gradient, _):
        weight, rates, slope, gain = ctx.saved_tensors
        return (gradient * slope, ctx.map.weight_gradient(gradient * gain, rates, weight), *[None] * 5)


def _rows(map: LinearMap, weight: Tensor) -> Tensor:
    """The weight as (kernel positions · input channels, output channels), in the order that makes every segment contiguous."""
    if map.kind == "dense":
        return weight.t()
    if map.kind == "convolutional":
        return weight.permute(2, 3, 1, 0).flatten(0, 2)
    order = _transposed_order(weight.shape[3], map.stride[1])
    return weight.permute(2, 3, 0, 1)[:, order].flatten(0, 2)


def _transposed_order(kernel: int, stride: int) -> List[int]:
    """Columns of a transposed kernel, those that meet the same output column next to each other, in the order of input columns."""
    return [column for rest in range(stride) for column in sorted(range(rest, kernel, stride), reverse=True)]


@functools.lru_cache(maxsize=None)
def dense_geometry(inputs: int, outputs: int) -> Geometry:
    """That of every dense map of these sizes: one position, whose one segment is all inputs."""
    return Geometry(1, inputs, outputs, 1, [[(0, 1, 0)]])


@functools.lru_cache(maxsize=None)
def _geometry(map: LinearMap, input_shape: Tuple[int, ...], output_shape: Tuple[int, ...], kernel: Tuple[int, ...]) -> Geometry:
    if map.kind == "dense":
        return dense_geometry(input_shape[0], output_shape[0])
    window = _convolution_window if map.kind == "convolutional" else _transposed_window
    windows = [window(map, input_shape[1:], kernel, y, x) for y in range(output_shape[1]) for x in range(output_shape[2])]
    return Geometry(input_shape[1] * input_shape[2], input_shape[0], output_shape[0], kernel[0] * kernel[1], windows)


def _convolution_window(map: LinearMap, size: Sequence[int], kernel: Sequence[int], y: int, x: int) -> List[Segment]:
    """Segments (first input position, one past the last, kernel position of the first) that output (y, x) of a convolution sees."""
    left = x * map.stride[1] - map.padding[1]
    begin, end = max(left, 0), min(left + kernel[1], size[1])
    segments = []
    for row in range(kernel[0]):
        source = y * map.stride[0] - map.padding[0] + row
        if 0 <= source < size[0] and begin < end:
            segments.append((source * size[1] + begin, source * size[1] + end, row * kernel[1] + begin - left))
    return segments


def _transposed_window(map: LinearMap, size: Sequence[int], kernel: Sequence[int], y: int, x: int) -> List[Segment]:
    """The same for a transposed convolution, where input (i, j) reaches output (i s − p + row, j s − p + column)."""
    order = _transposed_order(kernel[1], map.stride[1])
    reach = x + map.padding[1]
    begin = max(-((kernel[1] - 1 - reach) // map.stride[1]), 0)
    end = min(reach // map.stride[1] + 1, size[1])
    segments = []
    for row in range(kernel[0]):
        source, rest = divmod(y + map.padding[0] - row, map.stride[0])
        if rest == 0 and 0 <= source < size[0] and begin < end:
            first = order.index(reach - begin * map.stride[1])
            segments.append((source * size[1] + begin, source * size[1] + end, row * kernel[1] + first))
    return segments
