"""A training pass of a single dense layer as three calls of the C kernels, with the values and gradients of FeedbackSNN.run.

In a layer as small as F400's, what PyTorch and Python do around each of a pass's many short operations takes as long as these. Where
`serves` says so, all operations before the readout are one call here, the backward solve another, and all after it a third.
"""

from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules import native
from modules.connection import Connection
from modules.event_driven import dense_geometry
from modules.feedback import Feedback
from modules.hooks import has_hooks
from modules.implicit import BackwardSolver, Pass
from modules.jacobian import Link, TransposedJacobian
from modules.neuron import Neuron, rate_normaliser
from modules.simulation import FIRST_EXPECTATION, Masks
from modules.solvers import Anderson

# The fraction of active units below which the products that pass over the others beat dense ones with all that goes on around these.
EVENT_DRIVEN_LAYER_BELOW = 0.7


def serves(connection: Connection, feedback: Feedback, neuron: Neuron, x: Tensor, masks: Masks) -> bool:
    """Whether `run` can take these parts, x (batch, inputs) and masks: in training, in float32 on a CPU, with no part changed.

    The kernels check nothing, so what is refused here runs module by module, and fails there with PyTorch's message where it must.
    """
    linear, norm = connection.linear, connection.norm
    plain = connection.is_plain and type(feedback) is Feedback and not has_hooks(feedback) and type(linear) is nn.Linear
    if not (plain and neuron.has_kernels and feedback.operator_input is None and norm.training and feedback.training
            and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")):
        return False
    weight, w, (batch, inputs) = linear.weight, feedback.w, x.shape
    units = len(weight)
    fitting = weight.shape == (units, inputs) and w.shape == (units, units)
    for vector in (feedback.u, feedback.v):
        fitting = fitting and vector.shape == (units,) and vector.is_contiguous()
    return (fitting and feedback.g.shape == () and batch > 1 and not x.requires_grad and weight.is_contiguous() and w.is_contiguous()
            and all(map(native.serves, (x, weight, w, feedback.u, feedback.v, feedback.g)))
            and all(mask is None or native.serves(mask) and mask.shape == (batch, units) for mask in (masks.input, masks.feedback)))


def run(connection: Connection, feedback: Feedback, neuron: Neuron, x: Tensor, masks: Masks, time_steps: int) -> Optional[Pass]:
    """The pass for a static input x (batch, inputs), with masks (batch, units) or None; running statistics and singular vectors advance.

    None, and nothing advances, where the layer is so active that dense products at every step are faster.
    """
    linear, norm, x = connection.linear, connection.norm, x.contiguous()
    parameters = linear.weight, linear.bias, norm.weight, norm.bias, feedback.w, feedback.g
    (batch, inputs), units = x.shape, linear.out_features
    results = [x.new_empty(batch, units) for _ in range(5)]
    vectors, numbers = x.new_empty(5, units), x.new_empty(2)
    given = [mask if mask is None else mask.contiguous() for mask in (masks.input, masks.feedback)]
    layer = native.LayerStruct(
        batch, inputs, units, time_steps, FIRST_EXPECTATION, EVENT_DRIVEN_LAYER_BELOW, *neuron, rate_normaliser(time_steps, neuron.leak),
        norm.momentum, norm.eps, dense_geometry(units, units).pointer, *native.pointers(
            x, *parameters, *given, norm.running_mean, norm.running_var, feedback.u, feedback.v, norm.num_batches_tracked, *results),
        *native.row_pointers(vectors), *native.row_pointers(numbers))
    if not native.layer_forward(layer):
        return None
    rate, mapped, gain = results[:3]
    link = Link(feedback.map, feedback.w, (units,), gain)
    return DensePass(rate, mapped, _Jacobian(link, layer, (x, *parameters), (given, results, vectors, numbers)))


class DensePass(Pass):
    """Its rate has the gradient by a single function, and `mapped` none: what PyTorch does around two takes longer than a kernel."""

    def with_gradient(self, solver: BackwardSolver) -> Tensor:
        return _Gradient.apply(self.rate, self.jacobian, solver, *self.jacobian.leaves)


class _Jacobian(TransposedJacobian):
    """The pass's Jᵀ, with the solve as one call. The struct points to `leaves`, the input and the parameters, and to `memory`."""

    def __init__(self, link: Link, layer: native.LayerStruct, leaves: Sequence[Tensor], memory: Any):
        super().__init__([link])
        self.layer, self.leaves, self._memory = layer, leaves, memory

    def _solve_layer(self, gradient: Tensor, tol: float, max_iterations: int) -> Tuple[Tensor, float, float]:
        _check_place(self.layer.w, self.links[0].weight)
        return native.layer_solve(self.layer, gradient, tol, max_iterations, Anderson.regularisation)


class _Gradient(torch.autograd.Function):
    """The rate with the gradient of its equilibrium in the parameters."""

    @staticmethod
    def forward(ctx, rate, jacobian, solver, *leaves):
        ctx.jacobian, ctx.solver = jacobian, solver
        ctx.save_for_backward(*leaves)  # It is an error if they have changed by then.
        return rate.view_as(rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        layer, parameters = ctx.jacobian.layer, ctx.saved_tensors[1:]  # Read once: activation checkpointing gives them out no second time.
        weight, _, gamma, _, w, g = parameters
        v = ctx.solver(ctx.jacobian, gradient)
        if v.shape != gradient.shape or not native.serves(v):
            raise RuntimeError(f"a solver is to return v of the gradient's shape {tuple(gradient.shape)} and dtype, float32, not "
                               f"{tuple(v.shape)} and {v.dtype}")
        for place, parameter in zip((layer.weight, layer.gamma, layer.w, layer.g), (weight, gamma, w, g)):
            _check_place(place, parameter)
        gradients = [torch.empty_like(parameter) for parameter in parameters]
        tol = ctx.solver.tol if isinstance(ctx.solver, BackwardSolver) else 0.0  # Of another solver nothing is known.
        native.layer_backward(layer, v.contiguous(), tol, gradients)
        return (None, None, None, None, *gradients)


def _check_place(place: int, parameter: Tensor) -> None:
    """Raises RuntimeError where the parameter has been given other memory, by way of `.data`, than at the forward pass."""
    if parameter.data_ptr() != place:
        raise RuntimeError("a parameter has been given other memory between the forward pass and the backward one, which needs the old")
