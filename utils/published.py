"""Checkpoints in the published code's format: their tensors and momentum under this project's names.

The same tensors stand there under several names; the groups network_x, network_s (or network_s1 … s5) and classifier are
the ones to read. Their optimizer state counts parameters in the order of that table, except that the readout's two come
last of all, behind the frozen copies.
"""

import re
from typing import Dict, Optional

from torch import Tensor

_RULES = [
    (r"network_x\.(?:fc|conv)\.(weight|bias)", r"input.linear.\1"),
    (r"network_x\.bn\.(\w+)", r"input.norm.\1"),
    (r"network_s\.(?:fc|conv)\.weight_([gwuv])", r"feedback.\1"),
    (r"network_s5\.convT\.weight_([gwuv])", r"feedback.\1"),
    (r"network_s([1-4])\.conv\.(weight|bias)", lambda m: f"hidden.{int(m[1]) - 1}.linear.{m[2]}"),
    (r"network_s([1-4])\.bn\.(\w+)", lambda m: f"hidden.{int(m[1]) - 1}.norm.{m[2]}"),
    (r"classifier\.(weight|bias)", r"readout.\1"),
]


def is_published(state_dict: Dict[str, Tensor]) -> bool:
    return any(translate_name(name) for name in state_dict)


def translate_name(name: str) -> Optional[str]:
    """This project's name for a published tensor name, or None for one of the repeated copies."""
    for pattern, replacement in _RULES:
        match = re.fullmatch(r"(?:module\.)?" + pattern, name)
        if match:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def translate_state_dict(published: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The network's tensors under this project's names; shapes are as published (g may be stored as a scalar or (1,))."""
    names = {name: translate_name(name) for name in published}
    return {new: published[old].reshape(()) if new == "feedback.g" else published[old] for old, new in names.items() if new}


def translate_momentum(published: Dict[str, Tensor], optimizer: Optional[dict]) -> Dict[str, Dict[str, Tensor]]:
    """The optimizer's state (SGD's momentum buffers, Adam's moments) by this project's parameter names.

    Integer keys follow the registration order: connection by connection, the frozen copies, then the readout's two.
    """
    if not optimizer or not optimizer["state"]:
        return {}
    order = [name for name in sorted(filter(None, map(translate_name, published)), key=_registration_rank) if _is_parameter(name)]
    keys = sorted(key for group in optimizer["param_groups"] for key in group["params"])
    connections, readout = order[:-2], order[-2:]
    positions = [*zip(connections, keys), *zip(readout, keys[-2:])]
    return {name: {k: v for k, v in optimizer["state"][key].items() if v is not None}
            for name, key in positions if key in optimizer["state"]}


_WITHIN_CONNECTION = ["linear.weight", "linear.bias", "norm.weight", "norm.bias", "g", "w", "weight", "bias"]


def _is_parameter(name: str) -> bool:
    return _within(name) in _WITHIN_CONNECTION


def _within(name: str) -> str:
    return re.sub(r"^(input|feedback|readout|hidden\.\d+)\.", "", name)


def _registration_rank(name: str) -> tuple:
    """input, hidden 0…3, feedback, readout; within a connection as in `_WITHIN_CONNECTION`."""
    module = name.split(".")[0]
    layer = int(name.split(".")[1]) if module == "hidden" else 0
    within = _WITHIN_CONNECTION.index(_within(name)) if _is_parameter(name) else len(_WITHIN_CONNECTION)
    return ["input", "hidden", "feedback", "readout"].index(module), layer, within
