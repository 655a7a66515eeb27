"""A reference runner of NIR graphs: discrete time, NumPy alone, in float64. It is there to be read and to be compared with.

What arrives at a node is the sum over its edges. Within a time step dt every node sees what its sources give in the same step; a loop
must hold a Delay of at least one step. Batches come second: time, batch, then the shape that the graph states.

    I          v(t) = v(t−1) + dt R i(t)
    LI         v(t) = v(t−1) + dt/τ (v_leak − v(t−1) + R i(t))        forward Euler
    Threshold  1 where the input is > the threshold, else 0
    Delay      the input of round(delay/dt) steps ago, 0 before there was one
    Affine, Linear, Conv2d, Scale, Flatten, Input, Output as NIR defines them
"""

from collections import deque
from graphlib import CycleError, TopologicalSorter
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from utils.errors import UserError


def run(graph: Any, x: np.ndarray, watch: Sequence[str] = ("output",)) -> Dict[str, np.ndarray]:
    """What the nodes named in `watch` give over time, (T, batch, *shape) each, for the input x (T, batch, *shape).

    Raises UserError for a primitive that it does not know, a graph without dt in its metadata and a loop without a delay.
    """
    if "dt" not in graph.metadata:
        raise UserError("the NIR graph's metadata has no dt, the seconds of a time step")
    dt = float(graph.metadata["dt"])
    sources: Dict[str, List[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    kinds = {name: type(node).__name__ for name, node in graph.nodes.items()}
    delays = {name: _delay_line(node, dt, x.shape[1]) for name, node in graph.nodes.items() if kinds[name] == "Delay"}
    steps = {name: _step_of(kinds[name], node, dt) for name, node in graph.nodes.items() if name not in delays}
    try:
        order = list(TopologicalSorter({name: [] if name in delays else sources[name] for name in sources}).static_order())
    except CycleError as error:
        raise UserError(f"the NIR graph has a loop without a delay: {' → '.join(error.args[1])}") from error
    seen: Dict[str, List[np.ndarray]] = {name: [] for name in watch}
    for frame in np.asarray(x, dtype=np.float64):
        given: Dict[str, np.ndarray] = {}
        for name in order:
            if name in delays:
                given[name] = delays[name].popleft()
            else:
                given[name] = steps[name](frame if kinds[name] == "Input" else sum(given[source] for source in sources[name]))
        for name, line in delays.items():
            line.append(sum(given[source] for source in sources[name]))
        for name in watch:
            seen[name].append(given[name])
    return {name: np.stack(values) for name, values in seen.items()}


def _delay_line(node: Any, dt: float, batch: int) -> deque:
    steps = np.unique(np.round(node.delay / dt).astype(int))
    if len(steps) != 1 or steps[0] < 1:
        raise UserError("a Delay of a NIR graph must be the same for all its units, and at least a time step")
    return deque([np.zeros((batch, *node.delay.shape))] * steps[0])


def _step_of(kind: str, node: Any, dt: float) -> Callable[[np.ndarray], np.ndarray]:
    """The function that a node applies once per time step; integrators keep their state in it."""
    if kind in ("Input", "Output"):
        return lambda i: i
    if kind == "Scale":
        return lambda i: i * node.scale
    if kind == "Threshold":
        return lambda i: (i > node.threshold).astype(np.float64)
    if kind == "Flatten":
        return lambda i: i.reshape(len(i), *np.atleast_1d(node.output_type["output"]).astype(int))
    if kind in ("Linear", "Affine"):
        return lambda i: i @ node.weight.T.astype(np.float64) + (node.bias if kind == "Affine" else 0.0)
    if kind == "Conv2d":
        return lambda i: _convolve(i, node)
    if kind in ("I", "LI"):
        potential = 0.0

        def integrate(i: np.ndarray) -> np.ndarray:
            nonlocal potential
            change = dt * node.r * i if kind == "I" else dt / node.tau * (node.v_leak - potential + node.r * i)
            potential = potential + change
            return potential
        return integrate
    raise UserError(f"the reference runner does not know the NIR primitive {kind}")


def _convolve(x: np.ndarray, node: Any) -> np.ndarray:
    if np.any(np.asarray(node.dilation) != 1) or int(node.groups) != 1 or isinstance(node.padding, str):
        raise UserError("the reference runner knows convolutions without dilation and groups, their padding in pixels")
    (pad_y, pad_x), (stride_y, stride_x) = (np.broadcast_to(value, 2) for value in (node.padding, node.stride))
    padded = np.pad(x, ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    windows = sliding_window_view(padded, node.weight.shape[2:], axis=(2, 3))[:, :, ::stride_y, ::stride_x]
    product = np.tensordot(windows, node.weight.astype(np.float64), axes=((1, 4, 5), (1, 2, 3)))
    return product.transpose(0, 3, 1, 2) + node.bias[:, None, None]
