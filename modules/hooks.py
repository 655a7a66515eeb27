"""Hooks of PyTorch modules, for the fast ways through a network that call its modules' parts without calling them."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
