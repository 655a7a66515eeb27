"""The feedback spiking network: one class that simulates T time steps and evaluates its equilibrium map."""

from typing import Callable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from modules import native
from modules.connection import Connection, dropout_mask, masked
from modules.feedback import Feedback
from modules.implicit import BackwardSolver, DenseProduct, attach_gradient, autograd_vjp
from modules.neuron import Neuron, SpikingLayer, equilibrium_rate, rate_normaliser, rate_weights

Observer = Callable[[int, List[Tensor]], None]


class Masks(NamedTuple):
    """The dropout masks of one pass, (batch, *layer shape) each, or None where nothing is dropped."""

    input: Optional[Tensor] = None
    hidden: Sequence[Optional[Tensor]] = ()
    feedback: Optional[Tensor] = None


class FeedbackSNN(nn.Module):
    """L spiking layers in a loop: input connection F, hidden connections W_2 … W_L, feedback B, and a linear readout.

        layer 1:      I_1(t) = F x(t) + B s_L(t−1)
        layer l > 1:  I_l(t) = W_l s_{l−1}(t)

    A static input is (batch, *input_shape), the same current at each of the T steps; an event input (`events=True`) is
    time first, (T, batch, *input_shape). The readout sees the flattened firing rate of layer L. When gradients are enabled,
    that rate carries the implicit gradient of its equilibrium, solved by `solver`.
    """

    def __init__(self, input_shape: Sequence[int], input: Connection, hidden: Sequence[Connection], feedback: Feedback,
                 classes: int, neuron: Neuron, time_steps: int, dropout: float = 0.0, events: bool = False,
                 solver: Optional[BackwardSolver] = None):
        super().__init__()
        self.input, self.hidden, self.feedback = input, nn.ModuleList(hidden), feedback
        self.neuron, self.time_steps, self.dropout, self.events = neuron, time_steps, dropout, events
        self.solver = solver or BackwardSolver()
        self.input_shape = tuple(input_shape)
        self.layer_shapes = [self.input.output_shape(self.input_shape)]
        for connection in self.hidden:
            self.layer_shapes.append(connection.output_shape(self.layer_shapes[-1]))
        self.readout = nn.Linear(torch.Size(self.layer_shapes[-1]).numel(), classes)

    @property
    def neuron_counts(self) -> List[int]:
        """Neurons in each layer."""
        return [torch.Size(shape).numel() for shape in self.layer_shapes]

    def forward(self, x: Tensor, observe: Optional[Observer] = None) -> Tensor:
        """Logits (batch, classes). `observe` is passed on to the simulation."""
        self._check_input(x)
        weight = self.feedback.normalised_weight()
        masks = self._draw_masks(x)
        mean_input = self._mean_input(x)
        current = self.input(mean_input, masks.input)
        rate = self._simulate(x, mean_input, current.detach(), weight.detach(), masks, observe)
        if torch.is_grad_enabled():
            rate = self._with_gradient(rate, current, weight, masks)
        return self.readout(rate.flatten(1))

    def equilibrium_map(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks = Masks(), track: bool = True) -> Tensor:
        """f: one lap round the loop, from the last layer's rate to itself (method section 5).

            a_1 = clamp((B a_L + F x̄) / V_th, 0, 1),    a_l = clamp(W_l a_{l−1} / V_th, 0, 1)

        `rate` is (batch, *last layer's shape), `current` = F x̄ (batch, *first layer's shape) and `weight` the normalised
        feedback. Batch norms follow the module's mode; `track=False` leaves their running statistics alone.
        """
        rate, _ = equilibrium_rate(current + self.feedback(rate, weight, masks.feedback), self.neuron)
        for connection, mask in zip(self.hidden, masks.hidden or [None] * len(self.hidden)):
            rate, _ = equilibrium_rate(connection(rate, mask, track), self.neuron)
        return rate

    def _with_gradient(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks) -> Tensor:
        """`rate` with the implicit gradient; J is taken at the rate for one layer, at f(rate) with hidden layers."""
        if not self.hidden:
            mapped, slope = equilibrium_rate(current + self.feedback(rate, weight, masks.feedback), self.neuron)
            gain, weight = masked(slope, masks.feedback), weight.detach()
            vjp = DenseProduct(weight, gain) if self.feedback.is_dense else lambda v: self.feedback.adjoint(v * gain, weight)
            return attach_gradient(rate, mapped, vjp, self.solver)
        mapped = self.equilibrium_map(rate, current, weight, masks)
        # The running statistics have seen this batch in f's first evaluation.
        vjp = autograd_vjp(lambda a: self.equilibrium_map(a, current.detach(), weight.detach(), masks, track=False), mapped)
        return attach_gradient(rate, mapped, vjp, self.solver)

    @torch.no_grad()
    def _simulate(self, x: Tensor, mean_input: Tensor, current: Tensor, weight: Tensor, masks: Masks,
                  observe: Optional[Observer]) -> Tensor:
        """Firing rate of the last layer after T steps; `observe(t, spikes)` sees every layer's spikes at every step."""
        if self.feedback.is_dense and not self.hidden and not self.events and native.serves(current):
            return self._simulate_dense(current, weight, masks, observe)
        hidden = [connection.frozen() for connection in self.hidden]
        if self.events:
            input_current = self.input.frozen(masks.input, statistics_of=mean_input if self.training else None)
        last = len(hidden)
        layers = [SpikingLayer((len(current), *shape), current, self.neuron, with_rate=layer == last)
                  for layer, shape in enumerate(self.layer_shapes)]
        for t in range(self.time_steps):
            feedback = self.feedback(layers[-1].spikes, weight) if t > 0 else None
            layers[0].step(input_current(x[t]) if self.events else current, feedback, masks.feedback)
            for layer, before, connection, mask in zip(layers[1:], layers, hidden, masks.hidden):
                layer.step(None, connection(before.spikes), mask)
            if observe is not None:
                observe(t, [layer.spikes.clone() for layer in layers])
        return layers[-1].rate()

    def _simulate_dense(self, current: Tensor, weight: Tensor, masks: Masks, observe: Optional[Observer]) -> Tensor:
        """The same for one dense layer under a static input, whose samples are independent, by a C kernel."""
        total, spikes = native.simulate_dense(current, weight, masks.feedback, self.time_steps, *self.neuron, observe is not None)
        for t in range(self.time_steps if observe is not None else 0):
            observe(t, [spikes[t]])
        return total / rate_normaliser(self.time_steps, self.neuron.leak)

    def _mean_input(self, x: Tensor) -> Tensor:
        """x̄: the input itself if static, else its mean over time with the weights of the firing rate."""
        if not self.events:
            return x
        weights = rate_weights(self.time_steps, self.neuron.leak, dtype=x.dtype, device=x.device)
        return torch.tensordot(weights, x, dims=1)

    def _draw_masks(self, x: Tensor) -> Masks:
        if not self.training or self.dropout == 0:
            return Masks(None, [None] * len(self.hidden), None)
        batch = x.shape[1] if self.events else x.shape[0]
        first, *others = [(batch, *shape) for shape in self.layer_shapes]
        return Masks(dropout_mask(first, self.dropout, x), [dropout_mask(shape, self.dropout, x) for shape in others],
                     dropout_mask(first, self.dropout, x))

    def _check_input(self, x: Tensor) -> None:
        expected = (f"(T={self.time_steps}, batch" if self.events else "(batch") + "".join(f", {n}" for n in self.input_shape) + ")"
        leading = 2 if self.events else 1
        wrong_shape = x.dim() != leading + len(self.input_shape) or tuple(x.shape[leading:]) != self.input_shape
        if wrong_shape or (self.events and x.shape[0] != self.time_steps):
            raise ValueError(f"the network takes an input of shape {expected}, not {tuple(x.shape)}")
