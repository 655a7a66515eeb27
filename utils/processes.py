"""A job of several processes, started by torchrun: each has a device and a share of every batch, and the first one speaks and writes.

Without torchrun there is one process, and everything here does nothing.
"""

import gc
import os
import shlex
import sys
from argparse import Namespace
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Optional, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.across_processes import process_count, process_rank
from utils.errors import RunFailed, UserError

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

# Longer than the first process prepares data or writes files. A process that dies is noticed at once, one that hangs after this.
TIMEOUT = timedelta(minutes=10)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN)


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ["LOCAL_RANK"]) if started_by_torchrun() else 0


def is_first() -> bool:
    return int(os.environ["RANK"]) == 0 if started_by_torchrun() else process_rank() == 0


@contextmanager
def silent_unless_first(errors_too: bool = False) -> Iterator[None]:
    """What is printed, by the first process alone; errors are everybody's, unless all have the same."""
    with ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors_too:
                stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def joined(device: torch.device, how_to_go_on: str) -> Iterator[None]:
    """Be one of the job's processes on `device`. Raises RunFailed, with `how_to_go_on`, where another process is lost."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not started_by_torchrun():
        yield
        return
    # When it is first imported, otherwise by an optimizer, this module takes the process group for default arguments and so keeps
    # it for ever (PyTorch 2.13). Here there is none yet.
    from torch.distributed.nn import functional  # noqa: F401
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        yield
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise RunFailed(f"another process of the job has died, or has not answered for {TIMEOUT.seconds // 60} minutes, so process "
                        f"{os.environ['RANK']} stops too. {how_to_go_on}") from error
    except BaseException as error:
        if _is_known_to_all(error):  # Else the others go on or are lost, and NCCL might wait for them.
            _leave()
        raise
    _leave()


def _leave() -> None:
    """End the process group and its threads: one that lets go of a tensor after the interpreter's end would abort the process."""
    dist.destroy_process_group()
    # The threads end with the last reference to the group, which a cycle may hold, be it spared (utils/training.py) or not.
    gc.unfreeze()
    gc.collect()


def _is_of_communication(error: RuntimeError) -> bool:
    # Gloo raises plain RuntimeErrors, which it signs with its name or source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def gathered(value: Any) -> List[Any]:
    """Every process's value, in every process."""
    if process_count() == 1:
        return [value]
    values = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def from_the_first(action: Callable[[], T]) -> T:
    """What `action` gives in the first process, in every one; what it raises for the user there, all raise and the first one tells."""
    if process_count() == 1:
        return action()
    outcome: List[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = action()
        except (UserError, RunFailed) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise known_to_all(outcome[1])
    return outcome[0]


def known_to_all(error: E) -> E:
    """The error, marked as one that every process raises, so that one need tell it."""
    error.known_to_all = True
    return error


def tells(error: Exception) -> bool:
    """Whether this process tells the user of `error`."""
    return is_first() or not _is_known_to_all(error)


def _is_known_to_all(error: BaseException) -> bool:
    return getattr(error, "known_to_all", False)


@contextmanager
def first_of_each_machine_ahead() -> Iterator[None]:
    """The block runs in the first process of every machine, then in the others: what one fetches, the others find."""
    if local_rank() > 0:
        largest(0)
    yield
    if local_rank() == 0:
        largest(0)


def largest(value: int) -> int:
    """The largest of all processes' values."""
    if process_count() == 1:
        return value
    value = torch.tensor(value)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def share_network(network: nn.Module) -> None:
    """Give every process the first one's parameters and buffers: from there the same gradients keep the parameters the same."""
    if process_count() > 1:
        _exchange([*network.parameters(), *network.buffers()], _take_the_first)


def share_buffers(network: nn.Module) -> None:
    """Give every process the first one's buffers: without --sync-bn each has running statistics of its own share."""
    if process_count() > 1:
        _exchange([*network.buffers()], _take_the_first)


def average_gradients(network: nn.Module) -> None:
    """Give every parameter the mean of all processes' gradients; one that has none here has none in any process."""
    if process_count() > 1:
        _exchange([parameter.grad for parameter in network.parameters() if parameter.grad is not None], _take_the_mean)


def _take_the_first(values: Tensor) -> None:
    dist.broadcast(values, 0)


def _take_the_mean(values: Tensor) -> None:
    dist.all_reduce(values)
    values /= process_count()


@torch.no_grad()
def _exchange(tensors: Sequence[Tensor], change: Callable[[Tensor], None]) -> None:
    """Change the tensors in place: `change` gets the values of all those of one dtype in a row (count,), and changes them.

    For a small tensor a message of its own would take longer than its values.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # Unlike a set, in the same order in every process.
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        values = torch.cat([tensor.flatten() for tensor in alike])
        change(values)
        for tensor, part in zip(alike, values.split([tensor.numel() for tensor in alike])):
            tensor.copy_(part.view_as(tensor))


def draw_independently(seed: int) -> None:
    """From now on the processes after the first draw random numbers of their own, for dropout."""
    if process_rank() > 0:
        seeds = torch.randint(2**31, (process_count(),), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seeds[process_rank()].item())


def check_batches(args: Namespace, samples: Optional[int] = None, least_alone: int = 1) -> None:
    """Raises UserError where --train-batch, or the last batch of `samples`, can't be shared out, or is below what one process needs."""
    processes = process_count()
    if args.train_batch % processes:
        raise known_to_all(UserError(f"--train-batch {args.train_batch}: it is the samples of all processes together and is shared out "
                                     f"evenly; give a multiple of {processes}, the number of processes"))
    # A batch norm needs two values of each channel.
    least = least_alone if processes == 1 else processes if args.sync_bn else 2 * processes
    last = (samples or 0) % args.train_batch or args.train_batch
    if last < least:
        of = f"for {processes} processes" if processes > 1 else "for a batch norm's statistics"
        raise known_to_all(UserError(f"--train-batch {args.train_batch}: an epoch's smallest batch has {last} samples, too few {of}; at "
                                     f"least {least} are needed. Choose another --train-batch or --train-limit"))


def torchrun_command(gpu_ids: Sequence[str], argv: Sequence[str]) -> str:
    """The command that starts `argv`, the program with its arguments, with a process on each of the GPUs."""
    kept, words = [], iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if not (len(flag) > len("--g") and "--gpu-id".startswith(flag)):  # argparse takes --gpu too
            kept.append(word)
        elif not equals:
            next(words, None)
    return (f"CUDA_VISIBLE_DEVICES={','.join(gpu_ids)} {shlex.quote(sys.executable)} -m torch.distributed.run "
            f"--nproc_per_node {len(gpu_ids)} {shlex.join(kept)}")
