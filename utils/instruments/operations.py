"""Synaptic operations and energy of a network's inference, counted from its spikes, beside those of an ANN of the same shape."""

from typing import List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from modules.linear_map import LinearMap
from modules.network import FeedbackSNN
from utils.instruments.observers import UnitSpikes

# Horowitz, "Computing's energy problem", ISSCC 2014: 32-bit floating point in 45 nm, a multiplication 3.7 pJ, an addition 0.9 pJ.
PICOJOULES_MAC, PICOJOULES_AC = 4.6, 0.9

ASSUMPTIONS = (
    "Per sample. A MAC is 4.6 pJ and an AC (an addition) 0.9 pJ: 32-bit floating point in 45 nm (Horowitz, ISSCC 2014).",
    "A spike costs one AC for each weight that it reaches. Exact: weights that fall on padding or that a stride skips don't count. "
    "By formula: firing rate × T × MACs of the dense map, padding included.",
    "Spikes of the last step are not fed back; the readout is taken as driven by every spike of the last layer.",
    "Biases, batch norm (folded into the weights), membrane updates, leak and memory accesses cost nothing here.",
    "The ANN has the same maps, each computed once with MACs; with feedback: that map once too, one lap round the loop.",
)


class Projection(NamedTuple):
    """A linear map from a source, a layer's index or None for the input, and how many weights each of its source's units reaches."""

    name: str
    source: Optional[int]
    fan_out: Tensor
    dense: int

    @property
    def exact(self) -> float:
        """MACs of the map that meet a weight and an input, padding left out."""
        return self.fan_out.sum().item()


def fan_out(map: LinearMap, weight: Tensor, input_shape: Sequence[int]) -> Tensor:
    """The number of weights, or outputs, that each input unit reaches, float64 (*input_shape)."""
    ones = torch.ones_like(weight, dtype=torch.float64)
    output = ones.new_ones((1, *map.output_shape(input_shape, weight)))
    return map.adjoint(output, ones, input_shape)[0]


def dense_macs(map: LinearMap, weight: Tensor, input_shape: Sequence[int]) -> int:
    """Multiply-adds as usually counted: a filter at each output position, a transposed one at each input position."""
    positions = input_shape if map.kind == "transposed" else map.output_shape(input_shape, weight)
    return weight.numel() * torch.Size(positions[1:]).numel()


def projections(network: FeedbackSNN) -> List[Projection]:
    """The input connection, the hidden ones, the feedback and the readout."""
    def of(name: str, source: Optional[int], map: LinearMap, weight: Tensor, shape: Sequence[int]) -> Projection:
        weight = weight.detach()
        return Projection(name, source, fan_out(map, weight, shape), dense_macs(map, weight, shape))

    last = len(network.layer_shapes) - 1
    hidden = [of(f"layer {i + 1} to {i + 2}", i, connection.map, connection.linear.weight, network.layer_shapes[i])
              for i, connection in enumerate(network.hidden)]
    return [of("input to layer 1", None, network.input.map, network.input.linear.weight, network.input_shape), *hidden,
            of(f"feedback, layer {last + 1} to 1", last, network.feedback.map, network.feedback.w, network.layer_shapes[-1]),
            of("readout", last, LinearMap("dense"), network.readout.weight, (network.neuron_counts[last],))]


class Operations(NamedTuple):
    """A projection's ACs per sample, exact and by formula; the MACs of a static input's projection are those of one step."""

    projection: Projection
    exact: float
    formula: float


def count_operations(network: FeedbackSNN, spikes: UnitSpikes, input_spikes: Optional[Tensor] = None) -> List[Operations]:
    """Operations of each projection from the spikes of every unit; `input_spikes` (*input_shape) are an event input's, per sample."""
    counted = []
    for projection in projections(network):
        if projection.source is None and input_spikes is None:
            counted.append(Operations(projection, projection.exact, projection.dense))
            continue
        if projection.source is None:
            fired = total = input_spikes
        else:
            total = spikes.counts[projection.source] / spikes.samples
            fired = spikes.fed_back / spikes.samples if projection.name.startswith("feedback") else total
        exact = (fired.flatten() * projection.fan_out.flatten().to(fired.device)).sum().item()
        counted.append(Operations(projection, exact, total.sum().item() / total.numel() * projection.dense))
    return counted


class Energy(NamedTuple):
    """MACs and ACs per sample of one way to count."""

    name: str
    macs: float
    acs: float

    @property
    def nanojoules(self) -> float:
        return (self.macs * PICOJOULES_MAC + self.acs * PICOJOULES_AC) / 1000


def energies(operations: Sequence[Operations], time_steps: int, events: bool, formula: bool = False) -> List[Energy]:
    """The network's energy, for a static input by both conventions, and that of the ANN of the same shape."""
    def count(entry: Operations) -> float:
        return entry.formula if formula else entry.exact

    def macs(entry: Operations) -> float:
        return entry.projection.dense if formula else entry.projection.exact

    first, *others = operations
    acs = sum(map(count, others))
    if events:
        rows = [Energy("spiking network", 0, count(first) + acs)]
    else:
        rows = [Energy("spiking network, input layer computed once", macs(first), acs),
                Energy(f"spiking network, input layer computed {time_steps} times", macs(first) * time_steps, acs)]
    feedback = next(macs(entry) for entry in operations if entry.projection.name.startswith("feedback"))
    lap = sum(map(macs, operations))
    return [*rows, Energy("ANN without feedback", lap - feedback, 0), Energy("ANN with feedback, one lap", lap, 0)]
