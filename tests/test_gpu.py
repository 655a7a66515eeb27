"""Passes on a CUDA device against the CPU's."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

from tests.marks import needs_cuda
from tests.networks import KINDS, explicit_masks, small_network
from utils.device import WORKSPACE, working_on


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", [0.9, 1.0])
def test_a_training_step_equals_the_cpus(kind, leak):
    """Twice, as the second step replays the graph that the first one captured."""
    network, x = small_network(kind, leak, dropout=0.3, tol=1e-6, max_iterations=100)
    masks = [mask.float() for mask in explicit_masks(network)]
    cpu, gpu = network.float(), copy.deepcopy(network).float().cuda()
    explicit_masks(cpu, masks)
    explicit_masks(gpu, [mask.cuda() for mask in masks])
    labels = torch.arange(x.shape[1 if network.events else 0]) % 4
    for scale in (1.0, 0.8):
        results = []
        for own, device in ((cpu, "cpu"), (gpu, "cuda")):
            own.zero_grad()
            logits = own(x.float().to(device) * scale)
            F.cross_entropy(logits, labels.to(device)).backward()
            results.append((logits.cpu(), {name: parameter.grad.cpu() for name, parameter in own.named_parameters()}))
        (logits, gradients), (on_gpu, gpu_gradients) = results
        torch.testing.assert_close(on_gpu, logits, atol=1e-4, rtol=1e-4)
        largest = max(gradient.norm() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert (gpu_gradients[name] - gradient).norm() <= 1e-3 * largest, name


@needs_cuda
def test_training_in_the_stream_of_the_captures_gives_the_same_gradients(monkeypatch):
    """Within it, graphs are captured where the passes are, and cuBLAS has one workspace; afterwards all is as before."""
    monkeypatch.setenv(WORKSPACE, ":4096:8")  # which the test process has, and keeps
    outside, results = torch.cuda.current_stream(), []
    original, x = small_network(KINDS[-1], 0.9, tol=1e-6, max_iterations=100)
    x = x.float().cuda()
    for context in (contextlib.nullcontext(), working_on(torch.device("cuda"))):
        network = copy.deepcopy(original).float().cuda()
        with context:
            for scale in (1.0, 0.8):
                network.zero_grad()
                network(x * scale).square().sum().backward()
                results.append([parameter.grad.cpu() for parameter in network.parameters()])
            assert all(network._graphed._captured.values()) and len(network._graphed._captured) == 1
        torch.cuda.synchronize()
        assert torch.cuda.current_stream() == outside and torch._C._is_multithreading_enabled()
    for first, second in zip(results[:2], results[2:]):
        for own, other in zip(first, second):
            torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
