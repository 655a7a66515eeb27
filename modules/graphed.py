"""A network's passes on a CUDA device, captured in CUDA graphs and replayed, so that none of their thousands of kernels costs host time."""

import weakref
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from modules.gpu import capturing, not_captured
from modules.graphed_solve import GraphedJacobian
from modules.implicit import Pass
from modules.simulation import Masks
from modules.synchronised_norm import SynchronisedBatchNorm

if TYPE_CHECKING:
    from modules.network import FeedbackSNN

WARM_UP_RUNS = 3
MOST_GRAPHS = 6  # Each holds a pass's memory: a training batch, a test batch, the last, smaller one of either, and a few more.


class GraphedPasses:
    """`FeedbackSNN.run` on a CUDA device: a first call of a kind captures, later ones copy their input and masks in and replay.

    The graphs read the network's parameters and buffers where they lie. One set of memory serves all passes with a gradient, so while
    one of them may still be propagated back through, another runs without a graph. So does what can't be captured, and a network with
    hooks on its connections, which a graph would not call.
    """

    def __init__(self):
        self._captured: Dict[Tuple, Optional["_Graph"]] = {}
        self._latest: Optional["weakref.ref[_Turn]"] = None
        self._pools: Dict[bool, Any] = {}

    def __call__(self, network: "FeedbackSNN", x: Tensor, masks: Masks) -> Tensor:
        """The last layer's rate, with its gradient if gradients are enabled."""
        with_gradient = torch.is_grad_enabled()
        graph = None if with_gradient and self._busy else self._graph(network, x, masks, with_gradient)
        if graph is None:
            return network.rate(x, masks)
        graph.run(x, masks)
        network.measure(graph.passed)
        if not with_gradient:
            return graph.passed.rate.clone()
        turn = _Turn()
        self._latest = weakref.ref(turn)
        return _Replayed.apply(graph, network.solver, turn, self, *graph.parameters)

    @property
    def _busy(self) -> bool:
        turn = self._latest and self._latest()
        return turn is not None and not turn.done

    def is_latest(self, turn: "_Turn") -> bool:
        return self._latest is not None and self._latest() is turn

    def _graph(self, network: "FeedbackSNN", x: Tensor, masks: Masks, with_gradient: bool) -> "Optional[_Graph]":
        key = _kind(network, x, masks)
        if key is None:
            return None
        if key not in self._captured:
            if len(self._captured) >= MOST_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            self._captured[key] = self._capture(network, x, masks, with_gradient)
        return self._captured[key]

    def _capture(self, network: "FeedbackSNN", x: Tensor, masks: Masks, with_gradient: bool) -> "Optional[_Graph]":
        if any(isinstance(module, SynchronisedBatchNorm) for module in network.modules()):
            return None  # Processes that exchange statistics do so without a graph.
        pool = self._pools.setdefault(with_gradient, torch.cuda.graph_pool_handle())
        try:
            return _Graph(network, x, masks, with_gradient, pool)
        except RuntimeError as error:
            return not_captured("the network's passes", error)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GraphedPasses":
        return GraphedPasses()

    def __getstate__(self) -> Dict[str, Any]:
        return GraphedPasses().__dict__


class _Turn:
    """One pass with a gradient; `done` once it has been propagated back through."""

    done = False


class _Graph:
    """Passes of one kind: a graph of the forward pass and, with a gradient, one from v to the gradients of the parameters."""

    def __init__(self, network: "FeedbackSNN", x: Tensor, masks: Masks, with_gradient: bool, pool: Any):
        self.x, self.masks = x.clone(), Masks(*(_cloned(mask) for mask in masks))
        self.parameters = [parameter for name, parameter in network.named_parameters()
                           if with_gradient and parameter.requires_grad and not name.startswith("readout.")]
        buffers = list(network.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP_RUNS):
                    passed = network.run(self.x, self.masks)
                    if with_gradient:
                        self._gradients(passed, torch.zeros_like(passed.mapped))
                    del passed
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.empty_cache()  # The graphs take their memory from a pool of their own.
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capturing(self.forward, pool):
                self.passed = network.run(self.x, self.masks)
                if with_gradient:
                    self.passed.jacobian.adjoints  # made in here, once for all products
            if with_gradient:
                self.v = torch.zeros_like(self.passed.mapped)
                with capturing(self.backward, pool):
                    gradients = self._gradients(self.passed, self.v)
                    self.missing = [gradient is None for gradient in gradients]
                    self.gradients = torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])
                # Nothing is left to do for what autograd has noted.
                self.passed = self.passed._replace(mapped=self.passed.mapped.detach(), jacobian=GraphedJacobian(self.passed.jacobian))
        finally:
            with torch.no_grad():
                for buffer, old in zip(buffers, before):
                    buffer.copy_(old)

    def _gradients(self, passed: Pass, v: Tensor) -> List[Optional[Tensor]]:
        return torch.autograd.grad(passed.mapped, self.parameters, v, allow_unused=True)

    def run(self, x: Tensor, masks: Masks) -> None:
        self.x.copy_(x)
        for own, given in zip(_each(self.masks), _each(masks)):
            own.copy_(given)
        self.forward.replay()

    def propagate_back(self, v: Tensor) -> List[Optional[Tensor]]:
        self.v.copy_(v)
        self.backward.replay()
        # The next pass overwrites what the graph has written, and the gradients may be kept and added to.
        kept, at, gradients = self.gradients.clone(), 0, []
        for parameter, missing in zip(self.parameters, self.missing):
            gradients.append(None if missing else kept[at:at + parameter.numel()].view(parameter.shape))
            at += 0 if missing else parameter.numel()
        return gradients


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, solver, turn, passes, *parameters):
        ctx.graph, ctx.solver, ctx.turn, ctx.passes = graph, solver, turn, passes
        return graph.passed.rate.clone()

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.passes.is_latest(ctx.turn):
            raise RuntimeError("a later pass has overwritten what this one left for its gradient; propagate back through each pass before "
                               "the next one, or set network.uses_graphs = False")
        gradients = ctx.graph.propagate_back(ctx.solver(ctx.graph.passed.jacobian, gradient))
        ctx.turn.done = True
        return None, None, None, None, *gradients


def _kind(network: "FeedbackSNN", x: Tensor, masks: Masks) -> Optional[Tuple]:
    """Everything that a captured pass takes for granted; None where connections have hooks."""
    modules = []
    for module in network.modules():
        if (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks) \
                and module not in (network, network.readout):
            return None
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        modules.append((module.training, getattr(module, "momentum", None), getattr(module, "eps", None),
                        *((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors)))
    return (x.shape, x.dtype, x.device, tuple(mask.shape for mask in _each(masks)), tuple(modules), network.time_steps, network.neuron,
            network.jacobian_bn, network.bf16_products, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cuda"), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled())


def _each(masks: Masks) -> List[Tensor]:
    return [mask for mask in (masks.input, *masks.hidden, masks.feedback) if mask is not None]


def _cloned(value: Any) -> Any:
    """A tensor, None, or a sequence of them."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.clone()
    return [_cloned(each) for each in value]
