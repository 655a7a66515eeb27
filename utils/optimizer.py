"""The optimisers: SGD with momentum and Adam, in PyTorch's fused implementations."""

import inspect
from argparse import Namespace

import torch
from torch import nn


class SGD(torch.optim.SGD):
    """PyTorch's fused SGD, whose step is the kernel alone: in a small network's step, what PyTorch does around it takes as long.

    PyTorch has its optimisers import torch.compile, which takes a second and 70 MB. As nothing is compiled here, this one does not.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(parameters, lr, momentum, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            momenta = [self._momentum(parameter) for parameter in parameters] if group["momentum"] else []
            torch._fused_sgd_(parameters, [parameter.grad for parameter in parameters], momenta, weight_decay=group["weight_decay"],
                              momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"], nesterov=group["nesterov"],
                              maximize=group["maximize"], is_first_step=False)

    step.hooked = True  # Otherwise PyTorch wraps it in its hooks, of which there are none here.
    add_param_group, state_dict, load_state_dict, zero_grad = map(inspect.unwrap, (
        torch.optim.SGD.add_param_group, torch.optim.SGD.state_dict, torch.optim.SGD.load_state_dict, torch.optim.SGD.zero_grad))

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def make_optimizer(network: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """The one that --optimizer names, of the network's parameters."""
    if args.optimizer == "Adam":
        return torch.optim.Adam(network.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)
    return SGD(network.parameters(), args.lr, args.momentum, args.weight_decay)
