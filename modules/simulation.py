"""The simulation: T time steps of L spiking layers in a loop, without a gradient (method sections 1, 2 and 6.1)."""

import math
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from modules import gpu, native
from modules.event_driven import kernel_layout
from modules.neuron import Neuron, NeuronState, rate_normaliser, reached
from modules.synapses import EVENT_DRIVEN_BELOW, Synapses

Observer = Callable[[int, List[Tensor]], None]

# Before this step of a static input, twice that and so on, if as many are still to come, a CPU's layers learn which spikes to expect.
FIRST_EXPECTATION = 3
MOST_COUNTED = 255  # steps, in the uint8 of SpikingLayer.count
# On a CPU the samples are simulated in chunks whose state stays in the processor's cache, or which give each thread two groups of eight.
CHUNK_BYTES = 8 * 2**20
FLOATS_OF_A_UNIT = 4  # about: its potential, its current and what is expected of its source
LEAST_CHUNK_PER_THREAD = 16
# The Triton kernels number a layer's units with 32 bits.
MOST_UNITS = 2**31 - 1


class Masks(NamedTuple):
    """The dropout masks of one pass, (batch, *layer shape) each, or None where nothing is dropped.

    Each is 0 or one scale that all its kept units have. On a CPU others are an error for hidden layers in training; on a GPU results are
    wrong then.
    """

    input: Optional[Tensor] = None
    hidden: Sequence[Optional[Tensor]] = ()
    feedback: Optional[Tensor] = None


class Expected(NamedTuple):
    """The `spikes` that are expected of a layer's source at every step, int8, and the `drive` current + mask · (W s + b) by them."""

    spikes: Tensor
    drive: Tensor


class SpikingLayer:
    """One layer during a simulation: its state, advanced in place step by step, and, if wanted, its firing rate or a count of its spikes.

    The spikes go to the synapses `after`. After T steps `rate()` is Σ_t λ^(T−1−t) s(t) / Σ_t λ^(T−1−t), of the layer's shape (batch, …).
    Where the C kernels serve, `fired` is the fraction of neurons that spiked in the last step. The count is a byte's.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, neuron: Neuron, with_rate: bool = False, with_count: bool = False,
                 after: Optional[Synapses] = None):
        self.neuron, self.steps, self.fired = neuron, 0, 0.0
        self.native = neuron.has_kernels and native.serves(like)
        self.triton = gpu.kernels_for(like) if neuron.has_kernels else None
        layout = torch.channels_last if (self.native or self.triton) and len(shape) == 4 else torch.contiguous_format
        self.potential = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout).zero_()
        # Written by the Triton kernel in the dtype of the next product; the membrane is float32 all the same.
        dtype = torch.int8 if self.native else after.spike_dtype if self.triton and after else None
        self.spikes = torch.zeros_like(self.potential, dtype=dtype)
        self.total = torch.zeros_like(self.potential) if with_rate else None
        self.count = torch.zeros_like(self.spikes, dtype=torch.uint8) if with_count and not with_rate else None
        self.expected: Optional[Expected] = None
        self.state: Optional[NeuronState] = None  # where no kernel serves

    def step(self, current: Optional[Tensor], synapses: Optional[Synapses] = None, source: Optional["SpikingLayer"] = None,
             mask: Optional[Tensor] = None) -> None:
        """Advance by a time step under I = current + mask · synapses(source's spikes), where what is None adds nothing."""
        self.steps += 1
        if self.native:
            self.fired = self._native_step(current, synapses, source, mask) / self.potential.numel()
            return
        if self.triton:
            self._triton_step(current, synapses, source, mask)
            return
        synaptic = None if synapses is None else synapses(source.spikes)
        if synaptic is not None:
            # The membrane is float32 also where the products are not.
            synaptic = synaptic.to(self.potential.dtype) if mask is None else synaptic.to(self.potential.dtype) * mask
            current = synaptic if current is None else current + synaptic
        self.state = self.neuron.step(current, self.neuron.rest(current) if self.state is None else self.state, reached)
        self.potential, self.spikes = self.state.potential, self.state.spikes
        if self.total is not None:
            self.total.mul_(self.neuron.leak).add_(self.spikes)

    def _native_step(self, current, synapses, source, mask) -> int:
        state = (self.potential, self.spikes, self.total, self.count, *self.neuron)
        events = synapses.event_driven(source.fired) if synapses is not None else None
        if events is not None and self.expected:
            return native.spike_step(events._replace(bias=None), source.spikes, *self.expected, mask, *state)
        if events is not None:
            return native.spike_step(events, source.spikes, None, current, mask, *state)
        synaptic = None if synapses is None else kernel_layout(synapses(source.spikes.float()).float())
        return native.neuron_step(current, synaptic, mask, *state)

    def _triton_step(self, current, synapses, source, mask) -> None:
        state = self.triton.State(self.potential, self.spikes, self.total)
        if synapses is None:
            self.triton.neuron_step(None, current, None, mask, state, *self.neuron)
        elif synapses.convolves:
            self.triton.convolution_step(synapses.convolution, source.spikes, current, synapses.bias, mask, state, *self.neuron)
        else:
            self.triton.neuron_step(kernel_layout(synapses.product(source.spikes)), current, synapses.bias, mask, state, *self.neuron)

    def expect(self, current: Optional[Tensor], synapses: Synapses, source: "SpikingLayer", mask: Optional[Tensor]) -> None:
        """Have the C kernels touch, in later steps under the same current, only what departs from the spikes that are expected now.

        Those are of the source's units that `fired_often`. In a trained network most spikes come from units like these, and near the
        equilibrium they go on firing.
        """
        events = synapses.event_driven(source.fired)
        if events is None:
            return
        spikes = source.fired_often()
        if self.expected is None:
            drive = events.empty_output(len(spikes))
            native.spike_drive(events, spikes, None, current, mask, drive)
        else:
            drive = self.expected.drive
            native.spike_drive(events._replace(bias=None), spikes, self.expected.spikes, drive, mask, drive)
        self.expected = Expected(spikes, drive)

    def fired_often(self) -> Tensor:
        """1 for the units that fired in at least half of the steps so far, int8: by the count, or the rate where that is known instead."""
        if self.count is not None:
            return self.count.ge((self.steps + 1) // 2).view(torch.int8)
        return self.total.ge(rate_normaliser(self.steps, self.neuron.leak) / 2).view(torch.int8)

    def silence(self, mask: Tensor) -> None:
        """Have the units whose mask is 0 spike at no step."""
        self.potential.masked_fill_(mask == 0, -math.inf)

    def rate(self) -> Tensor:
        """The firing rate over the steps so far, of the layer's shape (batch, …)."""
        return self.total / rate_normaliser(self.steps, self.neuron.leak)


class StaticInput:
    """The same input current F x (batch, *first layer's shape) at every step, its dropout mask applied."""

    def __init__(self, current: Tensor):
        self.current = kernel_layout(current)

    def at(self, t: int) -> Tensor:
        """The current at step t."""
        return self.current

    def part(self, samples: slice) -> "StaticInput":
        """That of some of the samples."""
        return StaticInput(self.current[samples])

    def __len__(self) -> int:
        return len(self.current)


class EventInput:
    """The current mask · F x(t) of an event input x (T, batch, *input_shape), computed when its step comes."""

    def __init__(self, x: Tensor, synapses: Synapses, mask: Optional[Tensor], rate: Optional[float] = None):
        self.x, self.synapses, self.mask = x, synapses, mask
        self.native = synapses.native and native.serves(x) and not (torch.is_grad_enabled() and x.requires_grad)
        self.rate = x.count_nonzero().item() / x.numel() if rate is None and self.native else rate

    def at(self, t: int) -> Tensor:
        """The current at step t (batch, *first layer's shape)."""
        events = self.synapses.event_driven(self.rate) if self.native else None
        current = self.synapses(self.x[t]) if events is None else native.product(events, kernel_layout(self.x[t]))
        current = kernel_layout(current.to(self.synapses.dtype))
        return current if self.mask is None else current.mul_(self.mask)

    def part(self, samples: slice) -> "EventInput":
        """That of some of the samples."""
        return EventInput(self.x[:, samples], self.synapses, None if self.mask is None else self.mask[samples], self.rate)

    def __len__(self) -> int:
        return self.x.shape[1]


class Loop(NamedTuple):
    """What a simulation needs of a network for one pass: its neuron, layer shapes, fixed connections and dropout masks."""

    neuron: Neuron
    shapes: Sequence[Sequence[int]]
    hidden: Sequence[Synapses]
    feedback: Synapses
    masks: Masks

    def part(self, samples: slice) -> "Loop":
        def of(mask: Optional[Tensor]) -> Optional[Tensor]:
            return None if mask is None else kernel_layout(mask[samples])
        return self._replace(masks=Masks(None, [of(mask) for mask in self.masks.hidden], of(self.masks.feedback)))


def simulate(loop: Loop, input: "StaticInput | EventInput", time_steps: int, observe: Optional[Observer] = None) -> Tensor:
    """The last layer's firing rate (batch, *its shape) after `time_steps` steps.

        layer 1:      I_1(t) = F x(t) + B s_L(t−1)
        layer l > 1:  I_l(t) = W_l s_{l−1}(t)

    `observe(t, spikes)` sees every layer's spikes at every step, all samples at once. If it has a method `potentials(t, potentials)`,
    that sees every layer's membrane potentials u(t), before the reset.
    """
    if observe is None and len(loop.shapes) == 1 and isinstance(input, StaticInput):
        rate = _simulate_layer(loop, input, time_steps)
        if rate is not None:
            return rate
    chunk = len(input)
    if loop.feedback.native and observe is None:
        state_bytes = 4 * FLOATS_OF_A_UNIT * sum(torch.Size(shape).numel() for shape in loop.shapes)
        chunk = max(LEAST_CHUNK_PER_THREAD * torch.get_num_threads(), CHUNK_BYTES // state_bytes)
    elif loop.feedback.weight.is_cuda:
        chunk = min(chunk, MOST_UNITS // max(torch.Size(shape).numel() for shape in loop.shapes))
    parts = [slice(first, min(first + chunk, len(input))) for first in range(0, len(input), chunk)]
    rates = [_simulate_chunk(loop.part(part), input.part(part), time_steps, observe) for part in parts]
    return rates[0] if len(rates) == 1 else torch.cat(rates)


def _simulate_layer(loop: Loop, input: StaticInput, time_steps: int) -> Optional[Tensor]:
    """The same for one layer and a static input, all steps in one call of a C kernel; None where it can't serve or would be slower."""
    events = loop.feedback.event_driven(0.0) if loop.neuron.has_kernels else None
    if events is None:
        return None
    mask = None if loop.masks.feedback is None else kernel_layout(loop.masks.feedback)
    return native.simulate_layer(events, input.current, mask, time_steps, FIRST_EXPECTATION, EVENT_DRIVEN_BELOW,
                                 rate_normaliser(time_steps, loop.neuron.leak), *loop.neuron)


def _simulate_chunk(loop: Loop, input: "StaticInput | EventInput", time_steps: int, observe: Optional[Observer]) -> Tensor:
    last, expectations = len(loop.shapes) - 1, _expectations(loop, input, time_steps)
    layers = [SpikingLayer((len(input), *shape), loop.feedback.weight, loop.neuron, layer == last, bool(expectations), after)
              for layer, (shape, after) in enumerate(zip(loop.shapes, [*loop.hidden, loop.feedback]))]
    if layers[0].triton and observe is None:
        loop = _masks_folded(loop, layers)
    hidden = list(zip([None] * last, loop.hidden, layers, loop.masks.hidden))
    for t in range(time_steps):
        # No spike has been fed back before the first step.
        incoming = [(input.at(t), *((loop.feedback, layers[-1], loop.masks.feedback) if t > 0 else ())), *hidden]
        if t in expectations:
            for layer, source in zip(layers, incoming):
                layer.expect(*source)
            if t == expectations[-1]:
                for layer in layers:
                    layer.count = None
        for layer, source in zip(layers, incoming):
            layer.step(*source)
        if observe is not None:
            observe(t, [layer.spikes.to(layer.potential.dtype, copy=True) for layer in layers])
            if hasattr(observe, "potentials"):
                observe.potentials(t, [layer.potential.clone() for layer in layers])
    return layers[-1].rate()


def _expectations(loop: Loop, input: "StaticInput | EventInput", time_steps: int) -> List[int]:
    """The steps before which layers learn which spikes to expect."""
    if not (isinstance(input, StaticInput) and loop.feedback.native and loop.neuron.has_kernels):
        return []
    steps = (FIRST_EXPECTATION * 2**k for k in range(time_steps.bit_length()))
    return [t for t in steps if 2 * t <= time_steps and t <= MOST_COUNTED]


def _masks_folded(loop: Loop, layers: List[SpikingLayer]) -> Loop:
    """The same simulation without the hidden layers' masks, which need not be read at every step then, and the feedback's in int8.

    What is kept has one scale, the mask's largest value, which goes into the weight. A unit of a hidden layer that was dropped has no
    current, so it can as well be at −∞ from the start.
    """
    folded = []
    for layer, synapses, mask in zip(layers[1:], loop.hidden, loop.masks.hidden):
        if mask is not None:
            layer.silence(mask)
            synapses = synapses.scaled(mask.amax())
        folded.append(synapses)
    feedback, mask = loop.feedback, loop.masks.feedback
    if mask is not None:
        feedback, mask = feedback.scaled(mask.amax()), mask.ne(0).to(torch.int8)
    return loop._replace(hidden=folded, feedback=feedback, masks=Masks(loop.masks.input, [None] * len(folded), mask))
