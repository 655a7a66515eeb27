"""The project's SGD against its equations and against checkpoints of PyTorch's own."""

from argparse import Namespace
from functools import partial

import pytest
import torch

from utils.optimizer import SGD, make_optimizer

SHAPES = ((30, 20), (30,), ())


def parameters_and_gradients(steps):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES], torch.randn(steps, len(SHAPES), 600)


def give(parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient[:parameter.numel()].view_as(parameter).clone()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_follow_the_equations(momentum):
    parameters, gradients = parameters_and_gradients(4)
    values, velocities = [parameter.detach().double() for parameter in parameters], [0.0] * len(parameters)
    optimizer = SGD(parameters, 0.1, momentum, weight_decay=0.01)
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = rate = 0.1 / (step + 1)
        give(parameters, gradient)
        optimizer.step()
        for i, parameter in enumerate(parameters):
            velocities[i] = momentum * velocities[i] + parameter.grad.double() + 0.01 * values[i]
            values[i] = values[i] - rate * velocities[i]
            torch.testing.assert_close(parameter.detach().double(), values[i], rtol=0, atol=1e-6)


def test_goes_on_from_pytorchs_state_and_pytorch_from_its():
    results = []
    pytorchs = partial(torch.optim.SGD, fused=True)
    for first, second in ((SGD, pytorchs), (pytorchs, SGD)):
        parameters, gradients = parameters_and_gradients(4)
        optimizer = first(parameters, 0.1, 0.9)
        for step, gradient in enumerate(gradients):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = second(parameters, 0.1, 0.9)
                optimizer.load_state_dict(state)
            give(parameters, gradient)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_a_parameter_without_a_gradient_stays():
    parameters, gradients = parameters_and_gradients(3)
    optimizer, start = SGD(parameters, 0.1, 0.9), parameters[1].detach().clone()
    for gradient in gradients:
        give(parameters, gradient)
        parameters[1].grad = None
        optimizer.step()
    assert torch.equal(parameters[1].detach(), start)
    assert not torch.equal(parameters[0].detach(), parameters_and_gradients(1)[0][0].detach())


def test_a_step_without_any_gradient_changes_nothing():
    parameters, _ = parameters_and_gradients(1)
    before = [parameter.detach().clone() for parameter in parameters]
    SGD(parameters, 0.1, 0.9).step()
    assert all(map(torch.equal, before, parameters))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_optimizer_is_the_command_lines(name):
    network = torch.nn.Linear(3, 2)
    settings = make_optimizer(network, Namespace(optimizer=name, lr=0.3, momentum=0.8, weight_decay=0.01)).param_groups[0]
    assert (settings["lr"], settings["weight_decay"], settings["params"]) == (0.3, 0.01, list(network.parameters()))
    assert settings["momentum"] == 0.8 if name == "SGD" else settings["betas"] == (0.9, 0.999)
