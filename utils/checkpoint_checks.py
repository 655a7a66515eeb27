"""What a checkpoint must hold before a run may go on from it. Each check raises ValueError with the reason."""

from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn

from utils.log import COLUMNS

MOST_EPOCHS = 10**9
MOST_SAMPLES = 2**40


def checked_epoch(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_EPOCHS:
        raise ValueError(f"its epoch is {value!r:.40}, not a whole number from 0 to {MOST_EPOCHS}")
    return value


def checked_accuracy(value: Any) -> float:
    """In percent; the published code keeps it as a number or as a tensor of one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) not in (int, float) or not 0 <= value <= 100 + 1e-3:
        raise ValueError("its accuracy is no number from 0 to 100")
    return float(value)


def checked_tensors(value: Any) -> Dict[str, Tensor]:
    if not isinstance(value, dict) or not all(type(name) is str and isinstance(tensor, Tensor) for name, tensor in value.items()):
        raise ValueError("its state_dict holds something other than named tensors")
    return dict(value)


def check_fits(name: str, there: Tensor, here: Tensor) -> None:
    """A tensor of the file can take the place of the network's: its type, and finite values. The shape is known to be right."""
    if there.dtype != here.dtype:
        raise ValueError(f"{name} is of {there.dtype} in the file and of {here.dtype} in this network")
    if not torch.isfinite(there).all():
        raise ValueError(f"{name} holds NaN or infinity; resume from an earlier checkpoint")


def check_optimizer(state: Any, parameters: Mapping[Any, nn.Parameter]) -> None:
    """The optimizer's state by parameter (number or name): buffers of the parameter's shape, finite, and counts of steps."""
    if not isinstance(state, dict) or not all(isinstance(buffers, dict) for buffers in state.values()):
        raise ValueError("its optimizer's state is not a table of buffers")
    for key, buffers in state.items():
        if key not in parameters:
            raise ValueError(f"its optimizer's state is of another network: it has a parameter {key!r:.40}")
        for name, buffer in buffers.items():
            shape = () if name == "step" else parameters[key].shape
            if buffer is None and name == "momentum_buffer":  # SGD without momentum
                continue
            if not isinstance(buffer, Tensor) or getattr(buffer, "shape", ()) != shape:
                raise ValueError(f"its optimizer's state is of another network: {name!r:.40} of parameter {key} does not fit")
            if name != "step" and getattr(buffer, "dtype", None) != parameters[key].dtype:
                raise ValueError(f"{name!r:.40} of parameter {key} in its optimizer's state is of another type of numbers")
            if not torch.isfinite(buffer).all():
                raise ValueError(f"{name!r:.40} of parameter {key} holds NaN or infinity in its optimizer's state")


def check_published_optimizer(optimizer: Any) -> None:
    """None, or groups of parameters by number and a state by number: the layout of every PyTorch optimizer's state_dict()."""
    if optimizer is None or optimizer == {}:
        return
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    sound = isinstance(groups, list) and isinstance(optimizer.get("state"), dict) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) and all(type(key) is int for key in group["params"])
        for group in groups)
    if not sound or not all(isinstance(buffers, dict) for buffers in optimizer["state"].values()):
        raise ValueError("its optimizer's state is not a table of buffers")


def check_random_state(state: Any) -> None:
    """None, or the states of PyTorch's generators, of which the CPU's is one here too."""
    if state is None:
        return
    if not isinstance(state, dict) or not isinstance(state.get("cuda"), list):
        raise ValueError("its random_state is not a table of generators' states")
    check_generator_state(state.get("cpu"))
    others = state.get("others", [])
    if not isinstance(others, list) or any(other is None or "others" in other for other in others):
        raise ValueError("its random_state is not a table of generators' states")
    for other in others:
        check_random_state(other)


def check_generator_state(state: Any) -> None:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError("its random_state is not one of PyTorch's") from error


def checked_rows(value: Any) -> Optional[List[List[float]]]:
    """The rows of a log, or None."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == len(COLUMNS)
                                              and all(type(cell) in (int, float) for cell in row) for row in value):
        raise ValueError("its log_rows are no rows of a log")
    return [[*map(float, row)] for row in value]


def check_partial_epoch(state: Any) -> None:
    """None, or the state of an epoch that is part done (utils/epoch_state.py)."""
    if state is None:
        return
    counts = [state["iteration"], state["skipped"], *state["shape"]]
    if any(type(count) is not int or not 0 <= count <= MOST_SAMPLES for count in counts) or state["iteration"] < 1:
        raise ValueError("its epoch's counts are not whole numbers")
    losses, hits = state["metrics"]["losses"], state["metrics"]["hits"]
    sums = [*state["tally"].values(), *state["residuals"], state["metrics"]["count"]]
    if losses.dim() != 1 or hits.shape != (2,) or not all(type(number) in (int, float) for number in sums):
        raise ValueError("its epoch's sums are no numbers")
    check_generator_state(state["order_state"])
