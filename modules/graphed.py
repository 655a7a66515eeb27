"""The simulation captured once per shape in a CUDA graph and replayed, so that no launch of its thousands of kernels costs host time."""

import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from modules.simulation import EventInput, Loop, StaticInput, simulate

WARM_UP_RUNS = 3
MOST_GRAPHS = 4  # Each holds the simulation's memory: a training batch, a test batch, and the last, smaller one of either.


class GraphedSimulations:
    """`simulate` on a CUDA device; a first call with new shapes captures, later ones copy their tensors in and replay."""

    def __init__(self):
        self._graphs: Dict[Tuple, "_Graph"] = {}

    def __call__(self, loop: Loop, input: "StaticInput | EventInput", time_steps: int) -> Tensor:
        key = (time_steps, loop.neuron, torch.is_autocast_enabled("cuda"), torch.is_inference_mode_enabled(), type(input),
               tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride()) for tensor in _tensors(loop, input)))
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = _Graph(loop, input, time_steps)
        return self._graphs[key](loop, input)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GraphedSimulations":
        return GraphedSimulations()


class _Graph:
    def __init__(self, loop: Loop, input: "StaticInput | EventInput", time_steps: int):
        self.loop, self.input = copy.deepcopy((loop, input))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                simulate(self.loop, self.input, time_steps)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.rate = simulate(self.loop, self.input, time_steps)

    def __call__(self, loop: Loop, input: "StaticInput | EventInput") -> Tensor:
        for own, given in zip(_tensors(self.loop, self.input), _tensors(loop, input)):
            if own is not None:
                own.copy_(given)
        self.graph.replay()
        return self.rate.clone()


def _tensors(loop: Loop, input: "StaticInput | EventInput") -> List[Optional[Tensor]]:
    """Everything that a simulation reads, in a fixed order."""
    synapses = [*loop.hidden, loop.feedback]
    given = [input.current] if isinstance(input, StaticInput) else [input.x, input.synapses.weight, input.synapses.bias, input.mask]
    return [*given, *loop.masks.hidden, loop.masks.feedback, *(s.weight for s in synapses), *(s.bias for s in synapses)]
