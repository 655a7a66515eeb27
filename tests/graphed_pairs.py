"""Pairs of networks with and without graphs, on a CUDA device or with the stand-in for its graphs on a CPU."""

import copy

import pytest
import torch

from modules.graphed_solve import _GraphedIteration
from tests.marks import needs_cuda
from tests.networks import explicit_masks, small_network
from tests.recorded_graphs import stand_in


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request, monkeypatch):
    # The solves here are more accurate than rounded products can be.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(_GraphedIteration, "_precisions", (False,))
    if request.param == "cpu":
        stand_in(monkeypatch)
    return request.param


def graphed_and_not(kind, device, dropout=0.3, **solver):
    """The same network twice, the second without graphs, with fixed masks, and an input."""
    network, x = small_network(kind, dropout=dropout, **{"tol": 1e-5, "max_iterations": 100, **solver})
    masks = [mask.float().to(device) for mask in explicit_masks(network)]
    graphed, plain = (copy.deepcopy(network).float().to(device) for _ in range(2))
    plain.uses_graphs = False
    for own in (graphed, plain):
        explicit_masks(own, masks)
    return (graphed, plain), x.float().to(device)


def assert_same_tensors(graphed, plain):
    """Parameters, buffers and gradients; and the solves, but that roundings may end one of them an iteration sooner."""
    for (name, own), other in zip(graphed.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4, msg=name)
    for (name, own), other in zip(graphed.named_parameters(), plain.parameters()):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)
    own, other = graphed.solver.tally, plain.solver.tally
    assert (own.solves, own.not_converged) == (other.solves, other.not_converged)
    assert abs(own.iterations - other.iterations) <= own.solves
