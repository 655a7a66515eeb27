"""CUDA graphs played on a CPU: a stand-in for modules/gpu.py's, so that what is captured can be tested where there is no CUDA device.

While a graph is being captured every operation is noted with the memory that it reads and writes, and a replay does the same operations
on the same memory again. Memory behaves as in the pool of CUDA graphs: what nothing holds any more when a capture begins is free to be
used by it, and what nothing holds when it ends is scratch. A replay overwrites both with NaN, before and after its operations.

Networks run on PyTorch's operations here, not on the C kernels, whose calls would not be noted, or in Triton's interpreter on its kernels.
"""

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from modules import gpu, native


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have networks on the CPU capture their passes."""
    monkeypatch.setattr(gpu, "serves_graphs", lambda tensor: True)
    monkeypatch.setattr(gpu, "memory_pool", Memory)
    monkeypatch.setattr(gpu, "aside", contextlib.nullcontext)
    monkeypatch.setattr(gpu, "refusing_to_wait", _RefusingToWait)
    monkeypatch.setattr(gpu, "capturing", capturing)
    monkeypatch.setattr(gpu, "take_at_once", lambda size: None)
    monkeypatch.setattr(native, "serves", lambda tensor: False)


def stand_in_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in Triton's interpreter, with its kernels."""
    from triton.runtime.interpreter import GridExecutor
    from modules import triton_kernels
    launch = GridExecutor.__call__

    def launch_and_note(kernel, *arguments, **settings):
        mode = _get_current_dispatch_mode()
        with _disable_current_modes():
            note = mode.note if isinstance(mode, _Recorder) else _call
            note(functools.partial(launch, kernel), arguments, settings)

    stand_in(monkeypatch)
    monkeypatch.setattr(GridExecutor, "__call__", launch_and_note)
    monkeypatch.setattr(gpu, "kernels_for", lambda tensor: triton_kernels if tensor.dtype == torch.float32 else None)


def _call(function: Callable, arguments: Any, settings: Any) -> Any:
    return function(*arguments, **settings)


def bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def holders(memory: Tensor) -> int:
    """How many tensors share this one's memory."""
    return torch._C._storage_Use_Count(memory.untyped_storage()._cdata)


class Memory:
    """What graphs of one pool have taken, and all memory that they know."""

    def __init__(self):
        self.taken: List[Tensor] = []
        self._known: Dict[int, Tensor] = {}  # by its storage

    def of(self, tensor: Tensor) -> Tensor:
        """All of the memory in which the tensor lies, always as the same object."""
        return self._known.setdefault(tensor.untyped_storage()._cdata, bytes_of(tensor))

    def knows(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def free(self) -> List[Tensor]:
        """The memory that nobody but this list holds."""
        alone = holders(bytes_of(torch.empty(1)))
        return [memory for memory in self.taken if holders(memory) == alone]


class RecordedGraph:
    """Operations, and the memory that may be overwritten before and after them."""

    def __init__(self):
        self.operations: List[Callable[[], None]] = []
        self.free_before: List[Tensor] = []
        self.free_after: List[Tensor] = []

    def replay(self) -> None:
        with torch.no_grad():
            for memory in self.free_before:
                memory.fill_(255)  # NaN in every floating type
            for operation in self.operations:
                operation()
            for memory in self.free_after:
                memory.fill_(255)


@contextlib.contextmanager
def capturing(pool: Memory) -> Iterator[RecordedGraph]:
    graph = RecordedGraph()
    graph.free_before = pool.free()
    with _Recorder(graph, pool):
        yield graph
    graph.free_after = pool.free()


class _RefusingToWait(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read")
        return function(*arguments, **settings or {})


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph, pool: Memory):
        super().__init__()
        self.graph, self.pool = graph, pool

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read during a capture")
        # What is in memory that is only taken is not the same again.
        return self.note(function, arguments, settings or {}, repeated="empty" not in function.__name__)

    def note(self, function: Callable, arguments: Any, settings: Any, repeated: bool = True) -> Any:
        """Call the function now, and again in every replay."""
        places = tree_map_only(Tensor, self._place, (arguments, settings))
        results = function(*arguments, **settings)
        written = [self._place(result) if isinstance(result, Tensor) and self._is_new(result) else None for result in tree_leaves(results)]
        if repeated:
            self.graph.operations.append(lambda: _again(function, *places, written))
        return results

    def _is_new(self, tensor: Tensor) -> bool:
        if self.pool.knows(tensor):
            return False
        self.pool.taken.append(self.pool.of(tensor))
        return True

    def _place(self, tensor: Tensor) -> "_Place":
        return _Place(self.pool.of(tensor), tensor)


class _Place:
    """Where a tensor lies, without holding the tensor."""

    def __init__(self, memory: Tensor, tensor: Tensor):
        self.memory, self.dtype = memory, tensor.dtype
        self.shape = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(self.memory.untyped_storage(), *self.shape)


def _again(function: Callable, arguments: Any, settings: Any, written: List[Any]) -> None:
    arguments, settings = tree_map_only(_Place, _Place.tensor, (arguments, settings))
    results = tree_leaves(function(*arguments, **settings))
    for result, place in zip(results, written):
        if place is not None:
            place.tensor().copy_(result)
