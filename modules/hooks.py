"""Hooks of PyTorch modules, for the ways through a network that read its modules' weights without calling the modules."""

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def renew_weights(network: nn.Module) -> None:
    """Have the weights of pruned parts, and those under PyTorch's older weight and spectral norms, made anew as a call of each part would."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
                hook(module, ())
