"""Hooks of PyTorch modules, for the ways through a network that read its modules' weights without calling the modules."""

import itertools

from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls others too, be they its own or those of all modules."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks
                or everywhere._global_backward_pre_hooks)


def renew_weights(*modules: nn.Module) -> None:
    """Make anew, as a call would, the weights of pruned parts and of those under PyTorch's older weight and spectral norms."""
    for part in itertools.chain.from_iterable(module.modules() for module in modules):
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
                hook(part, ())
