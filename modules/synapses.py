"""A connection held fixed for a simulation: the weight that its batch norm is folded into, and the ways to apply it to spikes."""

import functools
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from modules import gpu, native
from modules.event_driven import EventMap, event_map, kernel_layout, layer_equilibrium
from modules.linear_map import LinearMap, scaled_filters
from modules.neuron import Neuron

# The fraction of spiking inputs below which touching only what spiked beats a dense product, measured on F64C5 and AlexNet-F.
EVENT_DRIVEN_BELOW = 0.4


class Synapses:
    """A fixed affine map from spikes (batch, *input_shape) to current, W s + b, for use at every time step.

    W is `filters`, each output channel's multiplied by its entry of `scale` (channels,) if that is given, and rounded once. On a CPU the
    map can touch only what spiked; `native` says whether the C kernels, which know no gradient, serve its weight.
    """

    def __init__(self, map: LinearMap, filters: Tensor, bias: Optional[Tensor], input_shape: Sequence[int], scale: Optional[Tensor] = None):
        self.map, self.bias, self.input_shape = map, bias, input_shape
        wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (filters, bias, scale))
        self.native = native.serves(filters) and not wanted
        self._filters, self._scale, self.dtype = filters, scale, filters.dtype
        self._events: Optional[EventMap] = None

    def __call__(self, spikes: Tensor) -> Tensor:
        """W s + b (batch, *output shape) for spikes or rates s (batch, *input_shape)."""
        return self.map(spikes, self._factor, self.bias)

    def product(self, spikes: Tensor) -> Tensor:
        """W s alone."""
        return self.map(spikes, self._factor)

    @functools.cached_property
    def weight(self) -> Tensor:
        """W, made where something needs it as it is."""
        return self._scaled_filters()

    def _scaled_filters(self) -> Tensor:
        return self._filters if self._scale is None else scaled_filters(self.map, self._filters, self._scale).to(self._filters.dtype)

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether a Triton kernel computes the map's product and the neurons' update together."""
        kernels = gpu.kernels_for(self.weight)
        return kernels is not None and not self.weight.requires_grad and kernels.convolves(self.map, self.weight)

    @functools.cached_property
    def convolution(self) -> NamedTuple:
        """The map packed for that kernel."""
        rounded = product_dtype(self.weight) == torch.bfloat16 or torch.backends.cudnn.allow_tf32
        return gpu.kernels_for(self.weight).pack_convolution(self.map, self.weight, digits=2 if rounded else 3)

    @property
    def spike_dtype(self) -> torch.dtype:
        """The dtype in which the map takes spikes on a GPU."""
        return torch.int8 if self.convolves else product_dtype(self.weight)

    @functools.cached_property
    def _factor(self) -> Tensor:
        """The weight, on a GPU laid out and rounded once for all steps."""
        return kernel_layout(self.weight.to(product_dtype(self.weight))) if self.weight.is_cuda else self.weight

    def scaled(self, factor: Tensor) -> "Synapses":
        """The same map times a number, a tensor ()."""
        return Synapses(self.map, self.weight * factor, None if self.bias is None else self.bias * factor, self.input_shape)

    def equilibrium(self, current: Tensor, rates: Tensor, weight: Tensor, mask: Optional[Tensor],
                    neuron: Neuron) -> Optional[Tuple[Tensor, Tensor]]:
        """clamp((current + mask · W a) / V_th, 0, 1) for constant rates a (batch, *input_shape), and its gain in W a.

        That is where the C kernels are the faster way, else None. `weight` is that of the map, with its graph.
        """
        if not self.native or not neuron.has_kernels or native.more_active_than(rates, EVENT_DRIVEN_BELOW):
            return None
        return layer_equilibrium(self.event_driven(0.0), self.map, weight, current, rates, mask, neuron.threshold)

    def event_driven(self, rate: float) -> Optional[EventMap]:
        """The map for the C kernels where they are the faster way at this rate of spiking inputs, else None."""
        if not self.native or rate >= EVENT_DRIVEN_BELOW:
            return None
        if self._events is None:
            self._events = event_map(self.map, self._scaled_filters(), self.bias, self.input_shape)
        return self._events


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with tensors like this one are computed: theirs, or under autocast its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
