"""Jobs of several processes compute what one process does; one of them speaks and writes, and a lost one ends the job."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from modules.across_processes import InnerProducts
from modules.implicit import BackwardSolver
from modules.neuron import make_neuron
from modules.solvers import METHODS, solve
from modules.synchronised_norm import SynchronisedBatchNorm, synchronise_batch_norms
from modules.zoo import alexnet_f, f64c5_mnist, f64c5_nmnist, f400
from tests.small_data import command, write_small_data
from utils.batches import Batches, Samples
from utils.errors import UserError
from utils.log import read_log
from utils.processes import check_batches, draw_independently, gathered, joined, parallel, torchrun_command
from utils.training import evaluate, make_optimizer, train_one_epoch

ROOT = Path(__file__).resolve().parents[1]
ARGS = Namespace(optimizer="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4)
TIME_STEPS = 6
# Batches of 6, 6 and 5: shares of 3 and 3, the last of 2 and 3.
COUNT, SIZE = 17, 6


def small(kind, dtype=torch.float64, jacobian_bn="train", method="anderson"):
    """A lively network with 4 classes and samples for it, the same at every call."""
    torch.manual_seed(7)
    settings = dict(classes=4, neuron=make_neuron(0.8, 0.9), time_steps=TIME_STEPS, jacobian_bn=jacobian_bn,
                    solver=BackwardSolver(method, tol=1e-12 if dtype == torch.float64 else 1e-6, max_iterations=300))
    network, shape = {
        "F400": lambda: (f400(12, inputs=9, **settings), (9,)),
        "F64C5": lambda: (f64c5_mnist(4, size=8, **settings), (1, 8, 8)),
        "F64C5 on events": lambda: (f64c5_nmnist(4, size=8, **settings), (2, 8, 8)),
        "AlexNet-F": lambda: (alexnet_f((4, 5, 6, 6, 4), size=16, **settings), (3, 16, 16)),
    }[kind]()
    with torch.no_grad():
        for connection in (network.input, *network.hidden):
            connection.norm.weight.uniform_(0.4, 0.8)
            connection.norm.bias.uniform_(0.1, 0.6)
        network.feedback.g.fill_(0.6)
    inputs = torch.randn(COUNT, *shape)
    prepare = (lambda x: (x[None] > torch.linspace(0, 1, TIME_STEPS).view(-1, 1, *[1] * len(shape))).to(dtype)) \
        if network.events else (lambda x: x)
    return network.to(dtype), Samples(inputs.to(dtype), torch.arange(COUNT) % 4, prepare)


def trained(network, samples):
    """What an epoch of training leaves: its averages, every iteration's gradients, the tensors; and the test's averages."""
    batches, optimizer, model = Batches(samples, SIZE, shuffled=True), make_optimizer(network, ARGS), parallel(network)
    gradients = []
    training = train_one_epoch(network, batches, optimizer, lambda iteration: 0.05, model=model,
                               after_iteration=lambda: gradients.append(gradients_of(network)))
    testing = evaluate(network, Batches(samples, 4, shuffled=False))  # the last batch has one sample
    return {"averages": [training, testing], "gradients": gradients, "tensors": network.state_dict(), "tally": network.solver.tally}


def gradients_of(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


CASES = {
    "F400": dict(kind="F400"), "F64C5": dict(kind="F64C5"), "F64C5 on events": dict(kind="F64C5 on events"),
    "AlexNet-F": dict(kind="AlexNet-F"), "AlexNet-F by Broyden": dict(kind="AlexNet-F", method="broyden"),
    "AlexNet-F, J in evaluation": dict(kind="AlexNet-F", jacobian_bn="eval"),
    **{f"{kind} in float32": dict(kind=kind, dtype=torch.float32) for kind in ("F400", "F64C5", "AlexNet-F")},
}
APART = ("F400", "AlexNet-F")


def in_process(rank, port, folder):
    """What each of two processes of a job does; what it found goes to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    found = {}
    with joined(torch.device("cpu"), ""):
        for name, case in CASES.items():
            network, samples = small(**case)
            synchronise_batch_norms(network)
            torch.manual_seed(rank)  # The order is the first process's all the same.
            found[name] = trained(network, samples)
        for kind in APART:
            network, samples = small(kind)
            model, (x, labels) = parallel(network), next(iter(Batches(samples, SIZE, shuffled=False)))
            F.cross_entropy(model(x), labels).backward()
            found[kind, "apart"] = gradients_of(network)
        found["seen"] = seen_samples()
        torch.manual_seed(3)
        draw_independently(3)
        found["mask"] = dropout_mask((50,), 0.5, torch.zeros(0))
    torch.save(found, folder / f"{rank}.pt")


def seen_samples():
    """The numbers of the samples that this process gets, batch by batch: in an epoch of training, then in the test."""
    network, seen = f400(3, inputs=1, classes=2, neuron=make_neuron(0.8, 0.9), time_steps=2), []
    numbers = torch.arange(COUNT).float()[:, None]
    samples = Samples(numbers, torch.zeros(COUNT, dtype=torch.int64), lambda x: (seen.append(x[:, 0].int().tolist()), x)[1])
    train_one_epoch(network, Batches(samples, SIZE, shuffled=True), make_optimizer(network, ARGS), lambda iteration: 0.0,
                    model=parallel(network))
    evaluate(network, Batches(samples, 4, shuffled=False))
    return seen[:3], seen[3:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(in_process, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(found, expected, tolerance, scale=None):
    """In the L2 norm, relative to the larger of the expected norm and `scale`."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.isfinite().all()
    assert (found - expected).norm() <= tolerance * max(expected.norm().item(), scale or 0), (found, expected)


@pytest.mark.parametrize("name", CASES)
def test_with_synchronised_batch_norms_two_processes_compute_what_one_does(two, name):
    network, samples = small(**CASES[name])
    torch.manual_seed(0)
    one = trained(network, samples)
    assert one["tally"].not_converged == 0 and one["tally"].mean_iterations > 5 and len(one["gradients"]) == 3
    for process in two:
        found = process[name]
        for averages, expected in zip(found["averages"], one["averages"]):
            assert averages.loss == pytest.approx(expected.loss, rel=1e-5) and averages[1:] == pytest.approx(expected[1:], rel=1e-12)
        for gradients, expected in zip(found["gradients"], one["gradients"]):
            # A bias before a batch norm has no gradient but rounding errors.
            largest = max(gradient.norm() for gradient in expected.values())
            for key, gradient in expected.items():
                error = (gradients[key] - gradient).norm()
                assert error <= 1e-5 * (largest if key.endswith("linear.bias") else gradient.norm()), key
        for key, tensor in one["tensors"].items():
            torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ("F400", "AlexNet-F", "AlexNet-F, J in evaluation"))
def test_a_joint_solve_counts_once_and_separate_ones_each(two, name):
    network, samples = small(**CASES[name])
    found = two[0][name]["tally"], two[1][name]["tally"]
    assert [tally.solves for tally in found] == ([3, 0] if name == "AlexNet-F" else [3, 3])


@pytest.mark.parametrize("kind", APART)
def test_without_them_the_gradient_is_the_mean_of_the_shares_own(two, kind):
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        network, (inputs, labels, _) = small(kind)
        F.cross_entropy(network(inputs[part]), labels[part]).backward()
        halves.append(gradients_of(network))
    for process in two:
        for name, gradient in process[kind, "apart"].items():
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-9, atol=1e-12)


def test_each_sample_has_one_place_in_an_epoch_and_one_in_the_test(two):
    torch.manual_seed(0)
    order = torch.randperm(COUNT).tolist()
    (first, first_tested), (second, second_tested) = (process["seen"] for process in two)
    assert [len(share) for share in first + second] == [3, 3, 2, 3, 3, 3]
    assert sorted(sum(first + second, [])) == list(range(COUNT))
    for number, shares in enumerate(zip(first, second)):
        assert sorted(sum(shares, [])) == sorted(range(COUNT) if False else sum(shares, [])) and len(set(sum(shares, []))) == sum(map(len, shares))
    assert sum(first_tested + second_tested, []) != [] and sorted(sum(first_tested + second_tested, [])) == list(range(COUNT))
