"""Passes on a CUDA device against the CPU's."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.marks import needs_cuda
from tests.networks import KINDS, explicit_masks, small_network


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
