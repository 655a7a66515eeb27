"""Writes a trained single-layer network (F400, F64C5) as a graph of the Neuromorphic Intermediate Representation, NIR, in HDF5.

    pip install -r requirements-optional.txt
    python -m utils.export_nir --resume checkpoints/mnist/model_best.pth.tar --out model.nir

NIR's own IF and LIF reset a neuron to a fixed potential; the soft reset here is a loop of standard primitives instead, with one Delay
of a time step dt, before which nothing arrives:

    input → current → membrane → spikes → rate → (flatten →) readout → output
                ↑ reset ← delay ← spikes
                ↑ feedback ← delay

| node | primitive | what it computes in discrete time |
|---|---|---|
| current | Affine or Conv2d | F x(t), batch norm folded in |
| membrane | LI, for IF neurons I | u(t) = λ u(t−1) + what arrives: τ = dt/(1 − λ) and R = τ/dt under forward Euler; for I, R = 1/dt |
| spikes | Threshold | s(t) = 1 if u(t) ≥ V_th: NIR's comparison is >, so its threshold is the next float64 below V_th |
| reset | Scale | −λ V_th s(t−1) |
| feedback | Linear or Conv2d | B s(t−1), the spectrally normalised weight |
| rate | LI or I | after T steps the (weighted) firing rate: R = 1/((1 − λ) Σ λ^k), for I R = 1/(dt T) |
| readout | Affine | the logits, valid after step T |

Times are in seconds, potentials in the network's own unit, in which V_th is --vth. The input is what the network takes: a normalised
image, the same at every step, or a frame of events per step. The graph's metadata holds dt, T, V_th, λ and this in words.
"""

import argparse
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch

from modules.linear_map import LinearMap
from modules.network import FeedbackSNN
from modules.neuron import make_neuron, rate_normaliser
from modules.zoo import f64c5_mnist, f64c5_nmnist, f400
from utils.arguments import real, whole
from utils.checkpoint import Checkpoint, load_checkpoint, restore_network
from utils.errors import UserError, told_in_a_sentence

DT = 1e-4  # Seconds: what most readers of NIR take a step to be.
NO_TRANSPOSED = ("with transposed feedback can't be written as NIR, which has no transposed convolution; "
                 "only single-layer networks (F400, F64C5) can be exported")


@torch.no_grad()
def nir_graph(network: FeedbackSNN, dt: float = DT) -> Any:
    """The network in evaluation mode as a nir.NIRGraph; its nodes are those of this file's table, its weights in the network's dtype.

    Raises UserError for a network with hidden layers or transposed feedback, and for neurons that are neither IF nor LIF.
    """
    nir = import_nir()
    if network.hidden or network.feedback.map.kind == "transposed":
        raise UserError(f"a network of {len(network.layer_shapes)} layers {NO_TRANSPOSED}")
    if not network.neuron.has_kernels:
        raise UserError(f"neurons of the kind {type(network.neuron).__name__} can't be written as NIR; only IF and LIF can be exported")
    network.eval()
    shape, (threshold, leak) = network.layer_shapes[0], network.neuron
    input, feedback = network.input.frozen(network.input_shape), network.feedback.normalised_weight()
    steps_of_rate = rate_normaliser(network.time_steps, leak)

    def integrator(gain: float) -> Any:
        """v(t) = λ v(t−1) + gain · what arrives."""
        if leak == 1.0:
            return nir.I(r=np.full(shape, gain / dt))
        return nir.LI(tau=np.full(shape, dt / (1 - leak)), r=np.full(shape, gain / (1 - leak)), v_leak=np.zeros(shape))

    nodes = {
        "input": nir.Input(np.array(network.input_shape)),
        "current": _linear(nir, input.map, input.weight, input.bias, network.input_shape),
        "membrane": integrator(1.0),
        "spikes": nir.Threshold(np.full(shape, math.nextafter(threshold, -math.inf))),
        "delay": nir.Delay(np.full(shape, dt)),
        "reset": nir.Scale(np.full(shape, -leak * threshold)),
        "feedback": _linear(nir, network.feedback.map, feedback, None, shape),
        "rate": integrator(1 / steps_of_rate),
        "readout": nir.Affine(network.readout.weight.numpy(), network.readout.bias.numpy()),
        "output": nir.Output(np.array([network.readout.out_features])),
    }
    edges = [("input", "current"), ("current", "membrane"), ("membrane", "spikes"), ("spikes", "delay"), ("delay", "reset"),
             ("delay", "feedback"), ("reset", "membrane"), ("feedback", "membrane"), ("spikes", "rate"), ("readout", "output")]
    if len(shape) == 1:
        edges.append(("rate", "readout"))
    else:
        nodes["flatten"] = nir.Flatten(np.array(shape), start_dim=0)
        edges += [("rate", "flatten"), ("flatten", "readout")]
    metadata = {"dt": dt, "time_steps": network.time_steps, "threshold": threshold, "leak": leak, "time_unit": "s",
                "input": "a frame of events per time step" if network.events else "a normalised image, the same at every time step",
                "output": f"logits, valid after time step {network.time_steps}",
                "loop": "the node delay is the loop's only delay; a reader that delays loops by a step itself must pass it through"}
    return nir.NIRGraph(nodes, edges, metadata=metadata)


def _linear(nir: ModuleType, map: LinearMap, weight: torch.Tensor, bias: Optional[torch.Tensor], input_shape: Sequence[int]) -> Any:
    weight = weight.numpy()
    if map.kind == "dense":
        return nir.Linear(weight) if bias is None else nir.Affine(weight, bias.numpy())
    bias = np.zeros(len(weight), weight.dtype) if bias is None else bias.numpy()
    return nir.Conv2d(tuple(input_shape[1:]), weight, map.stride, map.padding, dilation=1, groups=1, bias=bias)


def import_nir() -> ModuleType:
    """The package nir; raises UserError where it is missing."""
    try:
        import nir
    except ImportError as error:
        raise UserError("NIR graphs need the packages nir and h5py; install them: pip install -r requirements-optional.txt") from error
    return nir


def single_layer_network(checkpoint: Checkpoint, path: Path, settings: Dict[str, Any]) -> FeedbackSNN:
    """The F400 or F64C5 that the checkpoint's tensors belong to. Raises UserError where they belong to neither."""
    state = checkpoint.state_dict
    if any(name.startswith("hidden.") for name in state):
        raise UserError(f"--resume {path}: a network of several layers {NO_TRANSPOSED}")
    try:
        (width, inputs), (classes, features) = state["input.linear.weight"].shape[:2], state["readout.weight"].shape
        if state["input.linear.weight"].dim() == 2:
            network = f400(width, inputs, classes, **settings)
        else:
            side = math.isqrt(features // width)
            network = (f64c5_mnist(width, 2 * side, classes, **settings) if inputs == 1
                       else f64c5_nmnist(width, 2 * side + 2, classes, **settings))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume {path}: the file holds neither F400 nor F64C5") from error
    restore_network(network, checkpoint, path)
    return network


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument("--out", required=True, metavar="FILE", help="the HDF5 file to write, conventionally *.nir")
    parser.add_argument("--dt", type=real(above=0), default=DT, help=f"seconds of a time step (default: {DT})")
    trained = "(default: what the checkpoint was trained with)"
    parser.add_argument("-t", "--time_step", "--time-step", type=whole(1), help=f"time steps T {trained}")
    parser.add_argument("--vth", type=real(above=0), help=f"firing threshold {trained}")
    parser.add_argument("--leaky", type=real(), help=f"leak λ {trained}")
    args = parser.parse_args(argv)
    with told_in_a_sentence():
        export(args)


def export(args: argparse.Namespace) -> None:
    nir, out = import_nir(), Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    checkpoint = load_checkpoint(Path(args.resume))
    used = {name: getattr(args, name) if getattr(args, name) is not None else checkpoint.arguments.get(name)
            for name in ("time_step", "vth", "leaky")}
    missing = [f"--{name}" for name, value in used.items() if value is None]
    if missing:
        raise UserError(f"--resume {args.resume}: the file does not say what it was trained with; give {', '.join(missing)}")
    settings = dict(neuron=make_neuron(used["vth"], used["leaky"]), time_steps=used["time_step"])
    network = single_layer_network(checkpoint, Path(args.resume), settings)
    graph = nir_graph(network, args.dt)
    try:
        nir.write(str(out), graph)
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from error
    print(f"{out}: {network.neuron.name} neurons, T = {network.time_steps}, dt = {args.dt:g} s, {len(graph.nodes)} nodes, "
          f"{len(graph.edges)} edges")


if __name__ == "__main__":
    main()
