"""What runs on a CUDA device only, against the CPU; and its Triton kernel in Triton's interpreter, where that is installed."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modules import triton_neuron
from modules.graphed import GraphedSimulations
from modules.neuron import NeuronState, make_neuron, neuron_step, resting_state
from tests.networks import KINDS, explicit_masks, small_network

# Where the Makefile puts Triton beside a CPU build of PyTorch.
APART = Path(sys.prefix) / "triton"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def compare_kernel_with_pytorch(device):
    torch.manual_seed(0)
    shape = (3, 700)
    for leak in (0.95, 1.0):
        neuron = make_neuron(2.0, leak)
        potential, spikes, total, expected_total = (torch.zeros(shape, device=device) for _ in range(4))
        state = resting_state(potential)
        for parts in 2 * ("current synaptic mask", "current", "synaptic", "synaptic mask", "current synaptic"):
            given = {"current": torch.randn(shape) + 0.5, "synaptic": torch.randn(shape) + 0.5, "mask": torch.rand(shape).ge(0.2) / 0.8}
            given = {name: tensor.to(device) if name in parts else None for name, tensor in given.items()}
            triton_neuron.neuron_step(**given, potential=potential, spikes=spikes, total=total, threshold=neuron.threshold, leak=neuron.leak)
            drive = torch.zeros(shape, device=device) if given["current"] is None else given["current"]
            if given["synaptic"] is not None:
                drive = drive + (given["synaptic"] if given["mask"] is None else given["synaptic"] * given["mask"])
            state = NeuronState(*neuron_step(drive, state, neuron))
            expected_total = expected_total * neuron.leak + state.spikes
            torch.testing.assert_close(potential, state.potential, atol=1e-6, rtol=1e-6)
            assert torch.equal(spikes, state.spikes)
            torch.testing.assert_close(total, expected_total)
        assert 0 < spikes.mean() < 1


@pytest.mark.skipif(not (APART / "triton").exists() and importlib.util.find_spec("triton") is None,
                    reason="Triton is not installed: make test does that on Linux")
def test_triton_kernel_in_the_interpreter():
    code = "from tests.test_gpu import compare_kernel_with_pytorch as compare; compare('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1],
                   env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(APART), "PATH": ""})


@needs_cuda
def test_triton_kernel_equals_pytorch():
    compare_kernel_with_pytorch("cuda")


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
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_what_the_loop_computes(kind):
    network, x = small_network(kind)
    network, x = network.float().cuda().eval(), x.float().cuda()
    with torch.no_grad():
        stepwise = network(x, observe=lambda t, spikes: None)
        for _ in range(2):
            torch.testing.assert_close(network(x), stepwise, atol=1e-5, rtol=1e-5)


def test_a_network_can_be_copied_with_its_graphs():
    network, x = small_network("dense")
    copied = copy.deepcopy(network)
    assert isinstance(copied._graphed, GraphedSimulations) and copied._graphed is not network._graphed
    torch.testing.assert_close(copied.eval()(x), network.eval()(x))
