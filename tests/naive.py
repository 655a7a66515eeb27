"""The method written once more, as naively as it can be: the oracle that the fast code is held against.

Everything works on a FeedbackSNN's parameters and on explicit masks, but shares no code with it: batch norm is applied step by
step from its definition, the weighted mean and the rate are sums over time.
"""

import torch
import torch.nn.functional as F
from torch import nn


def batch_norm(y, norm, mean, variance):
    shape = (1, -1) + (1,) * (y.dim() - 2)
    return (y - mean.view(shape)) / torch.sqrt(variance.view(shape) + norm.eps) * norm.weight.view(shape) + norm.bias.view(shape)


def batch_statistics(y):
    dims = [0, *range(2, y.dim())]
    return y.mean(dims), y.var(dims, unbiased=False)


def feedback_weight(network):
    """clamp(g) w / σ with σ = uᵀ W v from u and v as they are stored, advanced once; returns the weight, u and v."""
    w = network.feedback.w
    matrix = w.detach().flatten(1)
    v = matrix.t() @ network.feedback.u
    v = v / v.norm()
    u = matrix @ v
    u = u / u.norm()
    return network.feedback.g.clamp(-1, 1) * w / (u @ w.flatten(1) @ v), u, v


def apply_feedback(weight, a, dense):
    if dense:
        return a @ weight.t()
    if weight.shape[2] == 5:
        return F.conv2d(a, weight, padding=2)
    return F.conv_transpose2d(a, weight, stride=2, padding=1, output_padding=1)


def is_dense(network):
    return isinstance(network.input.linear, nn.Linear)


def mean_input(network, x):
    if not network.events:
        return x
    leak, T = network.neuron.leak, len(x)
    weights = [leak ** (T - 1 - t) for t in range(T)]
    return sum(weight * x[t] for t, weight in enumerate(weights)) / sum(weights)


def simulate(network, x, masks, potentials=None):
    """Spikes of every step and layer, and the last layer's rate: method sections 1, 2, 4 and 6.1.

    Every step's membrane potentials, a list over layers, are appended to `potentials` if it is given.
    """
    with torch.no_grad():
        weight, _, _ = feedback_weight(network)
        connections = [network.input, *network.hidden]
        statistics = [(connection.norm.running_mean, connection.norm.running_var) for connection in connections]
        if network.training:
            statistics[0] = batch_statistics(network.input.linear(mean_input(network, x)))
        T, leak, threshold = network.time_steps, network.neuron.leak, network.neuron.threshold
        u, s = [0.0] * len(connections), [0.0] * len(connections)
        history = []
        for t in range(T):
            before = s[-1]
            for layer, connection in enumerate(connections):
                source = (x[t] if network.events else x) if layer == 0 else s[layer - 1]
                current = batch_norm(connection.linear(source), connection.norm, *statistics[layer]) * masks[layer]
                if layer == 0 and t > 0:
                    current = current + apply_feedback(weight, before, is_dense(network)) * masks[-1]
                u[layer] = leak * (u[layer] - threshold * s[layer]) + current
                s[layer] = (u[layer] >= threshold).to(current.dtype)
            history.append(list(s))
            if potentials is not None:
                potentials.append(list(u))
        weights = [leak ** (T - 1 - t) for t in range(T)]
        rate = sum(w * spikes[-1] for w, spikes in zip(weights, history)) / sum(weights)
    return history, rate


def equilibrium_map(network, a, x, weight, masks):
    """f with every batch norm on the statistics of the batch: method section 5."""
    def normed(connection, source):
        y = connection.linear(source)
        return batch_norm(y, connection.norm, *batch_statistics(y))

    drive = normed(network.input, mean_input(network, x)) * masks[0]
    drive = drive + apply_feedback(weight, a, is_dense(network)) * masks[-1]
    a = torch.clamp(drive / network.neuron.threshold, 0, 1)
    for connection, mask in zip(network.hidden, masks[1:-1]):
        a = torch.clamp(normed(connection, a) * mask / network.neuron.threshold, 0, 1)
    return a


def solve_dense(network, a, x, weight, masks, gradient):
    """(I − Jᵀ) v = gradient by a dense solve in the tensors' precision, J over the whole batch, at a (one layer) or f(a)."""
    point = equilibrium_map(network, a, x, weight, masks).detach() if network.hidden else a
    jacobian = torch.autograd.functional.jacobian(lambda z: equilibrium_map(network, z, x, weight.detach(), masks), point)
    n = a.numel()
    return torch.linalg.solve(torch.eye(n, dtype=a.dtype) - jacobian.reshape(n, n).t(), gradient.flatten()).view_as(a)
