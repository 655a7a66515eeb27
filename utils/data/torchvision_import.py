"""The one place that imports torchvision, late and only where something needs it."""

import importlib
import re
import sys
from types import ModuleType

import torch

from utils.errors import UserError

_declared = []


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators don't fit the installed PyTorch.

    Beside a CPU-only PyTorch the common wheel fails at import with "operator torchvision::nms does not exist", then with
    "…::qnms". What is missing is their declaration alone: declared here, the import works, and only a call of them would
    fail. Raises UserError where torchvision can't be imported for another reason.
    """
    for _ in range(10):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise UserError(f"torchvision can't be imported ({error}); reinstall it with PyTorch: "
                                "pip install --force-reinstall torch torchvision") from error
            _declare(missing[1])
        except ImportError as error:
            raise UserError(f"torchvision can't be imported ({error}); install it with: pip install torchvision") from error
    raise UserError("torchvision can't be imported: too many of its operators are missing; reinstall it with PyTorch")


def _declare(operator: str) -> None:
    """Declare an operator with nms's schema, and forget the half-imported package. The Library must outlive this call."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
