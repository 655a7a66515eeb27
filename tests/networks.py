"""Small networks of every kind, with lively random batch norms, their inputs, and their dropout masks made explicit."""

import torch

from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.simulation import Masks
from modules.zoo import alexnet_f, f64c5_mnist, f64c5_nmnist, f400

KINDS = ("dense", "convolutional", "events", "multi-layer")
BATCH = 5


def small_network(kind, leak=0.9, time_steps=6, dropout=0.0, threshold=0.8, **solver):
    """A float64 network of a kind in KINDS and an input for it. The threshold is low so that every layer fires."""
    settings = dict(neuron=make_neuron(threshold, leak), time_steps=time_steps, dropout=dropout, solver=BackwardSolver(**solver))
    if kind == "dense":
        network, x = f400(7, inputs=9, classes=4, **settings), torch.randn(BATCH, 9)
    elif kind == "convolutional":
        network, x = f64c5_mnist(2, size=8, classes=4, **settings), torch.randn(BATCH, 1, 8, 8)
    elif kind == "events":
        network, x = f64c5_nmnist(2, size=8, classes=4, **settings), (torch.rand(time_steps, BATCH, 2, 8, 8) < 0.3).float()
    else:
        network, x = alexnet_f((3, 4, 4, 3, 3), size=8, classes=4, **settings), torch.randn(BATCH, 3, 8, 8)
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.linear.bias.uniform_(-0.2, 0.2)
            connection.norm.weight.uniform_(0.5, 1.5)
            connection.norm.bias.uniform_(0.1, 0.6)
            connection.norm.running_mean.uniform_(-0.2, 0.2)
            connection.norm.running_var.uniform_(0.5, 1.5)
        network.feedback.g.fill_(0.7)
    return network.double(), x.double()


def wide_network(device):
    """A float32 multi-layer network wide enough for the GPU's convolution kernel, and an input for it."""
    network = alexnet_f((32, 32, 64, 32, 32), size=8, classes=4, neuron=make_neuron(2.0, 0.9), time_steps=3, dropout=0.3,
                        solver=BackwardSolver(tol=1e-6, max_iterations=100))
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.norm.bias.uniform_(0.5, 1.0)
    return network.to(device), torch.randn(BATCH, 3, 8, 8).to(device)


def explicit_masks(network, masks=None):
    """Fix the network's dropout masks, to given ones or to new ones; returns them as a list: input, hidden …, feedback."""
    shapes = [network.layer_shapes[0], *network.layer_shapes[1:], network.layer_shapes[0]]
    p = network.dropout if network.training else 0.0
    if masks is None:
        masks = [torch.rand(BATCH, *shape, dtype=torch.float64).ge(p).double() / (1 - p) for shape in shapes]
    network.draw_masks = lambda x, seeds=None: Masks(masks[0], masks[1:-1], masks[-1])
    return masks
