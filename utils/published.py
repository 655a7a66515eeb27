"""Checkpoints in the published code's format: their tensors and momentum under this project's names.

The same tensors stand there under several names; the groups network_x, network_s (or network_s1 … s5) and classifier are
the ones to read. Their optimizer state counts parameters in the order of that table, except that the readout's two come
last of all, behind the frozen copies.
"""

import re
from typing import Dict, List, Optional

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
