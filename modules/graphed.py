"""A network's passes on a CUDA device, captured in CUDA graphs and replayed, so that none of their thousands of kernels costs host time."""

import weakref
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from modules import gpu
from modules.graphed_solve import GraphedJacobian
from modules.hooks import has_hooks
from modules.implicit import Pass
from modules.synchronised_norm import SynchronisedBatchNorm

if TYPE_CHECKING:
    from modules.network import FeedbackSNN

WARM_UP_RUNS = 3
# How many float32 tensors of every layer a simulation holds, about, and a training pass with what it leaves for its gradient.
LAYERS_SIMULATED, LAYERS_TRAINED = 2, 4
MOST_GRAPHS = 6  # Each holds a pass's memory: a training batch, a test batch, the last, smaller one of either, and a few more.


class GraphedPasses:
    """`FeedbackSNN.rate` on a CUDA device: a first call of a kind captures, later ones copy their input and the masks' seeds in and replay.

    The graphs read the network's parameters and buffers where they lie. One set of memory serves all passes with a gradient, so while
    one of them may still be propagated back through, another runs without a graph. So does what can't be captured, and a network with
    hooks on its connections, which a graph would not call, or under the caller's own autocast.
    """

    def __init__(self):
        self._captured: Dict[Tuple, Optional["_Graph"]] = {}
        self._latest: Optional["weakref.ref[_Turn]"] = None
        self._pools: Dict[bool, Any] = {}

    def __call__(self, network: "FeedbackSNN", x: Tensor) -> Tensor:
        """The last layer's rate, with its gradient if gradients are enabled and something but the readout is trained."""
        graph = None if torch.is_grad_enabled() and self._busy else self._graph(network, x)
        if graph is None:
            return network.rate(x, network.draw_masks(x))
        graph.run(x, network.draw_seeds())
        network.measure(graph.passed)
        if not graph.parameters:
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

    def _graph(self, network: "FeedbackSNN", x: Tensor) -> "Optional[_Graph]":
        key = _kind(network, x)
        if key is None:
            return None
        if key not in self._captured:
            if len(self._captured) >= MOST_GRAPHS:
                self._captured.pop(next(iter(self._captured)))
            self._captured[key] = self._capture(network, x)
        return self._captured[key]

    def _capture(self, network: "FeedbackSNN", x: Tensor) -> "Optional[_Graph]":
        if any(isinstance(module, SynchronisedBatchNorm) for module in network.modules()):
            return None  # Processes that exchange statistics do so without a graph.
        parameters = {name: parameter for name, parameter in network.named_parameters()
                      if torch.is_grad_enabled() and parameter.requires_grad and not name.startswith("readout.")}
        pool = self._pools.setdefault(bool(parameters), gpu.memory_pool())
        try:
            return _Graph(network, x, parameters, pool)
        except RuntimeError as error:
            return gpu.not_captured("the network's passes", error)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GraphedPasses":
        return GraphedPasses()

    def __getstate__(self) -> Dict[str, Any]:
        return GraphedPasses().__dict__


class _Pass(nn.Module):
    """A network's `run` as a module, whose parameters can be replaced for one call."""

    def __init__(self, network: "FeedbackSNN"):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, seeds: Tensor) -> Pass:
        return self.network.run(x, self.network.draw_masks(x, seeds))


class _Turn:
    """One pass with a gradient; `done` once it has been propagated back through."""

    done = False


class _Graph:
    """Passes of one kind: a graph of the forward pass and, where there are `parameters` to train, one from v to their gradients."""

    def __init__(self, network: "FeedbackSNN", x: Tensor, parameters: Dict[str, nn.Parameter], pool: Any):
        # Not drawn: a run that goes on from a checkpoint captures once more, and must draw no more than one without a stop.
        self.x, self.seeds = x.clone(), torch.zeros(network.mask_count, dtype=torch.int64, device=x.device)
        self.parameters = list(parameters.values())
        # Autograd's node of a parameter that an earlier loss keeps alive belongs to another stream, on which a capture must not wait.
        self._aliases = {f"network.{name}": parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        buffers = list(network.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            with gpu.aside():
                for _ in range(WARM_UP_RUNS - 1):
                    self._rehearse(network)
                with gpu.refusing_to_wait():
                    self._rehearse(network)
            with gpu.capturing(pool) as self.forward:
                layers = LAYERS_TRAINED if parameters else LAYERS_SIMULATED
                gpu.take_at_once(layers * x.element_size() * network.batch_size(x) * sum(network.neuron_counts))
                self.passed = self._pass(network)
                if parameters:
                    self.passed.jacobian.adjoints  # made in here, once for all products
                    self.v = torch.zeros_like(self.passed.mapped)
            if parameters:
                # The solve comes after the forward pass and before the backward one. Captured last, it works where the other two keep
                # what they need on the way only, and leaves alone what lies there from one to the other.
                with gpu.capturing(pool) as self.backward:
                    self.gradients, self.missing = self._joint_gradients()
                    jacobian = GraphedJacobian(self.passed.jacobian, network.solver, like=self.v)
                jacobian.capture(pool)
                # Nothing is left to do for what autograd has noted.
                self.passed = self.passed._replace(mapped=self.passed.mapped.detach(), jacobian=jacobian)
        finally:
            with torch.no_grad():
                for buffer, old in zip(buffers, before):
                    buffer.copy_(old)

    def _rehearse(self, network: "FeedbackSNN") -> None:
        """All that will be captured, where what it takes is free again before the first capture."""
        passed = self._pass(network)
        if self.parameters:
            self._gradients(passed.mapped, torch.zeros_like(passed.mapped))
            GraphedJacobian(passed.jacobian, network.solver, like=passed.mapped).rehearse()

    def _pass(self, network: "FeedbackSNN") -> Pass:
        return torch.func.functional_call(_Pass(network), self._aliases, (self.x, self.seeds))

    def _gradients(self, mapped: Tensor, v: Tensor, retain_graph: bool = False) -> List[Optional[Tensor]]:
        with torch.autograd.set_multithreading_enabled(False):  # cuBLAS takes a workspace for each thread, too.
            return torch.autograd.grad(mapped, list(self._aliases.values()), v, retain_graph, allow_unused=True)

    def _joint_gradients(self) -> Tuple[Tensor, List[bool]]:
        """Those for v one after the other, and which parameters have none."""
        gradients = self._gradients(self.passed.mapped, self.v, retain_graph=True)
        return (torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None]),
                [gradient is None for gradient in gradients])

    def run(self, x: Tensor, seeds: Tensor) -> None:
        self.x.copy_(x)
        self.seeds.copy_(gpu.sent(seeds, self.seeds.device))
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


def _kind(network: "FeedbackSNN", x: Tensor) -> Optional[Tuple]:
    """Everything that a captured pass takes for granted; None where connections have hooks, and under an autocast of the caller's.

    That keeps rounded copies of the weights, from which a graph would go on reading. No graph gives a gradient in the input either.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.is_grad_enabled() and x.requires_grad:
        return None
    modules = []
    for module in network.modules():
        if has_hooks(module) and module not in (network, network.readout):
            return None
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        # Gradients go to the parameters as objects, which others may stand for in the same memory.
        own = vars(module).get  # A module takes long to say that it has no such attribute.
        modules.append((module.training, own("momentum"), own("eps"),
                        *map(id, module._parameters.values()), *((tensor.data_ptr(), tensor.requires_grad) for tensor in tensors)))
    return (x.shape, x.dtype, x.device, tuple(modules), network.time_steps, network.dropout,
            type(network.neuron), network.neuron,
            network.jacobian_bn, network.bf16_products, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled())
