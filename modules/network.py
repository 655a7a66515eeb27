"""The feedback spiking network: one class that simulates T time steps and evaluates its equilibrium map."""

import math
from contextlib import nullcontext
from numbers import Integral
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from modules import dense_layer, gpu
from modules.bptt import unroll
from modules.connection import Connection
from modules.dropout import draw_seeds, dropout_mask, masked
from modules.event_driven import kernel_layout
from modules.feedback import Feedback
from modules.graphed import GraphedPasses
from modules.hooks import renew_weights
from modules.implicit import BackwardSolver, Pass
from modules.jacobian import Link, TransposedJacobian
from modules.neuron import Fire, Neuron, rate_weights
from modules.simulation import EventInput, Loop, Masks, Observer, StaticInput, simulate
from modules.synapses import Synapses


class FeedbackSNN(nn.Module):
    """L spiking layers in a loop: input connection F, hidden connections W_2 … W_L, feedback B, and a linear readout.

        layer 1:      I_1(t) = F x(t) + B s_L(t−1)
        layer l > 1:  I_l(t) = W_l s_{l−1}(t)

    A static input is (batch, *input_shape), the same current at each of the T steps; an event input (`events=True`) is
    time first, (T, batch, *input_shape). The readout sees the flattened firing rate of layer L. When gradients are enabled,
    that rate carries the implicit gradient of its equilibrium, solved by `solver`; `jacobian_bn` says whether the batch norms of
    hidden connections stand in J as they do in f ("train") or on their running statistics ("eval"). `bf16_products` rounds the
    factors of convolutions and matrix products to bfloat16; membrane potentials, rates, batch norms and the solve stay in float32.
    With a `surrogate` (modules/bptt.py) the gradient is that of back-propagation through time instead, of the same forward values.
    While `measures_residual` is set, each pass with a gradient leaves its rate's distance from equilibrium in `residual`:
    ‖f(a) − a‖ over the batch, relative to the larger of ‖a‖ and ‖f(a)‖, a tensor () on the network's device.
    On a CUDA device passes are captured in graphs and replayed (modules/graphed.py) unless `uses_graphs` is set to False.
    `feedback_norm` says which norm of the feedback is bounded: that of its weight as a matrix (the paper's) or the "operator"'s.
    Every layer has the same `neuron` and runs for `time_steps` T; `dropout` is the probability that a mask drops a unit, from 0 to below 1;
    the readout has `classes` outputs. Raises ValueError for connections that don't fit together, and for unknown words.
    """

    def __init__(self, input_shape: Sequence[int], input: Connection, hidden: Sequence[Connection], feedback: Feedback,
                 classes: int, neuron: Neuron, time_steps: int, dropout: float = 0.0, events: bool = False,
                 solver: Optional[BackwardSolver] = None, jacobian_bn: str = "train", bf16_products: bool = False,
                 surrogate: Optional[Fire] = None, feedback_norm: str = "matrix"):
        super().__init__()
        self.input, self.hidden, self.feedback = input, nn.ModuleList(hidden), feedback
        self.neuron, self.time_steps, self.dropout, self.events = neuron, time_steps, dropout, events
        self.solver = solver or BackwardSolver()
        if jacobian_bn not in ("train", "eval"):
            raise ValueError(f"jacobian_bn is train or eval, not {jacobian_bn!r}")
        if feedback_norm not in ("matrix", "operator"):
            raise ValueError(f"feedback_norm is matrix or operator, not {feedback_norm!r}")
        self.jacobian_bn, self.bf16_products, self.surrogate = jacobian_bn, bf16_products, surrogate
        self._graphed, self.uses_graphs = GraphedPasses(), True
        self.measures_residual, self.residual = False, None
        self.input_shape = tuple(input_shape)
        self.layer_shapes = [self.input.output_shape(self.input_shape)]
        for connection in self.hidden:
            self.layer_shapes.append(connection.output_shape(self.layer_shapes[-1]))
        fed_back = self.feedback.map.output_shape(self.layer_shapes[-1], self.feedback.w)
        if fed_back != self.layer_shapes[0]:
            raise ValueError(f"the feedback must lead from the last layer, of shape {self.layer_shapes[-1]}, to the first one, of shape "
                             f"{self.layer_shapes[0]}: its output has the shape {fed_back}")
        if feedback_norm == "operator":
            self.feedback.bound_operator(self.layer_shapes[-1])
        self.readout = nn.Linear(torch.Size(self.layer_shapes[-1]).numel(), classes)

    @property
    def neuron_counts(self) -> List[int]:
        """Neurons in each layer."""
        return [torch.Size(shape).numel() for shape in self.layer_shapes]

    def forward(self, x: Tensor, observe: Optional[Observer] = None) -> Tensor:
        """Logits (batch, classes). `observe` is passed on to the simulation.

        Raises ValueError where the input is empty, of another shape or not of floating-point numbers, or a setting of the network makes
        no sense, and RuntimeError under torch.jit.trace.
        """
        if torch.jit.is_tracing():
            raise RuntimeError("a feedback network can't be traced: how long it is simulated and solved depends on values")
        self._check_settings()
        self._check_input(x)
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            graphed = gpu.serves_graphs(x) and self.uses_graphs and observe is None and not self._unrolled
            rate = self._graphed(self, x) if graphed else self.rate(x, self.draw_masks(x), observe)
            with self._rounded_products(x):
                return self.readout(rate.flatten(1)).to(rate.dtype)

    def rate(self, x: Tensor, masks: Masks, observe: Optional[Observer] = None) -> Tensor:
        """The last layer's firing rate, with its gradient if gradients are enabled, kernel by kernel."""
        passed = self.run(x, masks, observe)
        self.measure(passed)
        return passed.with_gradient(self.solver)

    def run(self, x: Tensor, masks: Masks, observe: Optional[Observer] = None) -> Pass:
        """Simulate T steps under the given dropout masks and, when gradients are enabled, evaluate what the gradient needs.

        With a surrogate the rate itself carries the gradient then. Raises ValueError where a mask is of another shape.
        """
        masks = self._ready(masks, x)
        if observe is None and self._is_one_dense_layer and dense_layer.serves(self.input, self.feedback, self.neuron, x, masks):
            passed = dense_layer.run(self.input, self.feedback, self.neuron, x, masks, self.time_steps)
            if passed is not None:
                return passed
        renew_weights(self.feedback, *self.hidden)  # They are read without a call.
        weight, mean_input = self.feedback.normalised_weight(), self._mean_input(x)
        with self._rounded_products(x):
            # The membrane has the weights' dtype, whatever the input's; f's convolutions are faster channels last, on every device.
            current = kernel_layout(self.input(mean_input, masks.input).to(weight.dtype))
            if self._unrolled:
                return Pass(self._unroll(x, mean_input, current, weight, masks, observe))
            rate, feedback = self._simulated(x, mean_input, current.detach(), weight.detach(), masks, observe)
            if not torch.is_grad_enabled():
                if any(connection.norm.training for connection in self.hidden):
                    self.equilibrium_map(rate, current, weight, masks)  # The running statistics advance, as always in training mode.
                return Pass(rate)
            return Pass(rate, *self._equilibrium(rate, current, weight, masks, feedback))

    @torch.no_grad()
    def _simulated(self, x: Tensor, mean_input: Tensor, current: Tensor, weight: Tensor, masks: Masks,
                   observe: Optional[Observer]) -> Tuple[Tensor, Synapses]:
        """The last layer's rate, and the simulation's feedback, the one of its connections that is needed again."""
        loop, source = self._loop(x, mean_input, current, weight, masks)
        return simulate(loop, source, self.time_steps, observe), loop.feedback

    @property
    def _is_one_dense_layer(self) -> bool:
        return len(self.input_shape) == 1 and not (self.hidden or self.events or self.bf16_products or self._unrolled)

    @property
    def _unrolled(self) -> bool:
        return self.surrogate is not None and torch.is_grad_enabled()

    def _rounded_products(self, x: Tensor) -> "torch.autocast | nullcontext":
        return torch.autocast(x.device.type, torch.bfloat16) if self.bf16_products else nullcontext()

    def equilibrium_map(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks = Masks()) -> Tensor:
        """f: one lap round the loop, from the last layer's rate to itself (method section 5).

            a_1 = clamp((B a_L + F x̄) / V_th, 0, 1),    a_l = clamp(W_l a_{l−1} / V_th, 0, 1)

        `rate` is (batch, *last layer's shape), `current` = F x̄ (batch, *first layer's shape) and `weight` the normalised
        feedback. Batch norms follow the module's mode.
        """
        return self.lap(rate, current, weight, masks)[-1]

    def lap(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks = Masks()) -> List[Tensor]:
        """The rates of all layers on the lap of `equilibrium_map`, whose value is the last of them."""
        rates, source = [self.neuron.equilibrium(self.feedback(current, rate, weight, masks.feedback))[0]], None
        for connection, mask in zip(self.hidden, masks.hidden or [None] * len(self.hidden)):
            following, source = connection.rate(rates[-1], self.neuron, mask, source)
            rates.append(following)
        return rates

    def _equilibrium(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks,
                     synapses: Synapses) -> Tuple[Tensor, TransposedJacobian]:
        """f(rate) with its graph in θ, and Jᵀ, taken at the rate for one layer, at f(rate) with hidden layers.

        `synapses` are those of the feedback in the simulation, packed already.
        """
        if self.hidden:
            mapped = self.equilibrium_map(rate, current, weight, masks)
            return mapped, self.transposed_jacobian(mapped, current, weight, masks)
        # The one evaluation of f, at the rate, gives the value and the gain.
        found = synapses.equilibrium(current, rate, weight, masks.feedback, self.neuron)
        if found is None:
            mapped, slope = self.neuron.equilibrium(self.feedback(current, rate, weight, masks.feedback))
            found = mapped, masked(slope, masks.feedback)
        return found[0], TransposedJacobian([Link(self.feedback.map, synapses.weight, rate.shape[1:], found[1])])

    def measure(self, passed: Pass) -> None:
        """Leave the pass's distance from equilibrium in `residual`, if it is wanted and known."""
        if not self.measures_residual or passed.mapped is None:
            return
        with torch.no_grad():
            rate, mapped = passed.rate, passed.mapped
            # Relative to the larger of the two: a network that is still silent is 1 away, not infinitely far.
            size = torch.maximum(torch.linalg.vector_norm(rate), torch.linalg.vector_norm(mapped))
            self.residual = torch.linalg.vector_norm(mapped - rate) / size.clamp_min(torch.finfo(size.dtype).tiny)

    @torch.no_grad()
    def transposed_jacobian(self, rate: Tensor, current: Tensor, weight: Tensor, masks: Masks = Masks()) -> TransposedJacobian:
        """Jᵀ of f at `rate`; the batch norms of hidden connections as in f, or on running statistics for jacobian_bn "eval"."""
        # The lap's values lie as the products with Jᵀ want them.
        layer_rate, slope = self.neuron.equilibrium(self.feedback(kernel_layout(current), kernel_layout(rate), weight, masks.feedback))
        links = [Link(self.feedback.map, weight, rate.shape[1:], masked(slope, masks.feedback))]
        for connection, mask in zip(self.hidden, masks.hidden or [None] * len(self.hidden)):
            training = connection.norm.training and self.jacobian_bn == "train"
            layer_rate, link = connection.rate_and_link(layer_rate, self.neuron, mask, training)
            links.append(link)
        return TransposedJacobian(links)

    def _unroll(self, x: Tensor, mean_input: Tensor, current: Tensor, weight: Tensor, masks: Masks,
                observe: Optional[Observer]) -> Tensor:
        """The same rate with the gradient of back-propagation through time; running statistics advance as they do without."""
        loop, source = self._loop(x, mean_input, current, weight, masks)
        rate = unroll(loop, source, self.time_steps, self.surrogate, observe)
        if self.hidden:
            with torch.no_grad():
                self.equilibrium_map(rate, current, weight, masks)
        return rate

    def _loop(self, x: Tensor, mean_input: Tensor, current: Tensor, weight: Tensor,
              masks: Masks) -> Tuple[Loop, "StaticInput | EventInput"]:
        """What the simulation takes, its connections frozen for this pass."""
        if current.shape[1:] != self.layer_shapes[0]:
            raise ValueError(f"the input connection gives {tuple(current.shape[1:])} and the first layer is {tuple(self.layer_shapes[0])}: "
                             "parts of another size make another network")
        source = StaticInput(current)
        if self.events:
            frozen = self.input.frozen(self.input_shape, statistics_of=mean_input if self.input.norm.training else None)
            source = EventInput(x, frozen, masks.input)
        hidden = [connection.frozen(shape) for connection, shape in zip(self.hidden, self.layer_shapes)]
        feedback = Synapses(self.feedback.map, weight, None, self.layer_shapes[-1])
        return Loop(self.neuron, self.layer_shapes, hidden, feedback, masks), source

    def _mean_input(self, x: Tensor) -> Tensor:
        """x̄: the input itself if static, else its mean over time with the weights of the firing rate."""
        if not self.events:
            return kernel_layout(x) if x.is_cuda else x
        weights = rate_weights(self.time_steps, self.neuron.leak, dtype=x.dtype, device=x.device)
        return torch.tensordot(weights, x, dims=1)

    def batch_size(self, x: Tensor) -> int:
        """The samples in an input."""
        return x.shape[1] if self.events else x.shape[0]

    @property
    def mask_count(self) -> int:
        """How many dropout masks a pass has: none in evaluation, else one for each connection, the feedback included."""
        return len(self.layer_shapes) + 1 if self.training and self.dropout > 0 else 0

    def draw_seeds(self) -> Tensor:
        """For the dropout masks of one pass, int64 (mask_count,)."""
        return draw_seeds(self.mask_count)

    def draw_masks(self, x: Tensor, seeds: Optional[Tensor] = None) -> Masks:
        """The dropout masks of a pass with the input x, of `seeds` from `draw_seeds` on x's device, by default new ones."""
        if self.mask_count == 0:
            return Masks(None, [None] * len(self.hidden), None)
        seeds = gpu.sent(self.draw_seeds(), x.device) if seeds is None else seeds
        seeds = seeds if gpu.serves_graphs(x) else seeds.tolist()
        first, *others, last = [dropout_mask((self.batch_size(x), *shape), self.dropout, x, seed)
                                for shape, seed in zip([*self.layer_shapes, self.layer_shapes[0]], seeds)]
        return Masks(first, others, last)

    def _ready(self, masks: Masks, x: Tensor) -> Masks:
        """In the dtype and the layout that kernels read. Raises ValueError where one is missing or of another shape."""
        def ready(mask: Optional[Tensor], shape: Sequence[int]) -> Optional[Tensor]:
            if mask is None:
                return None
            shape = (self.batch_size(x), *shape)
            if mask.shape != shape:
                raise ValueError(f"a dropout mask of shape {shape} is wanted here, not {tuple(mask.shape)}")
            return kernel_layout(mask.to(self.feedback.w.dtype))

        first, *others = self.layer_shapes
        hidden = masks.hidden or [None] * len(others)
        if len(hidden) != len(others):
            raise ValueError(f"{len(others)} dropout masks of hidden layers are wanted, not {len(hidden)}")
        return Masks(ready(masks.input, first), list(map(ready, hidden, others)), ready(masks.feedback, first))

    def _check_settings(self) -> None:
        """They may have been changed since the last pass."""
        if not isinstance(self.time_steps, Integral) or self.time_steps < 1:
            raise ValueError(f"time_steps is a whole number of at least 1, not {self.time_steps}")
        if not 0 <= round(self.dropout * 65536) < 65536:
            raise ValueError(f"dropout is the fraction of units that is dropped, from 0 to below 1, not {self.dropout}")
        if not (0 < self.neuron.threshold < math.inf and 0 <= self.neuron.leak <= 1):
            raise ValueError(f"a neuron's threshold is above 0 and finite and its leak from 0 to 1, not {self.neuron.threshold} and "
                             f"{self.neuron.leak}")

    def _check_input(self, x: Tensor) -> None:
        leading = 2 if self.events else 1
        wrong_shape = x.dim() != leading + len(self.input_shape) or tuple(x.shape[leading:]) != self.input_shape
        if wrong_shape or (self.events and x.shape[0] != self.time_steps):
            expected = (f"(T={self.time_steps}, batch" if self.events else "(batch") + "".join(f", {n}" for n in self.input_shape) + ")"
            raise ValueError(f"the network takes an input of shape {expected}, not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"the network takes an input of floating-point numbers, not of {x.dtype}: call x.float() first")
        if self.batch_size(x) == 0:
            raise ValueError("the network takes a batch of at least one sample")
