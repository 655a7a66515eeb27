"""The device to compute on: its choice and its name."""

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Iterator

import torch
from termcolor import cprint

from modules import gpu
from utils.errors import UserError
from utils.processes import local_rank, started_by_torchrun, torchrun_command

# The environment variable for the memory that cuBLAS may work in, which is read when it is first used; some sizes give the same bits.
WORKSPACE, DETERMINISTIC_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def choose_device(name: str, gpu_id: str) -> torch.device:
    """The device for `--device name --gpu-id gpu_id`; auto takes CUDA, else Apple's MPS, else the CPU.

    Raises UserError where the device that was asked for is not there. Under auto on a machine without any CUDA device
    --gpu-id is ignored with a warning, so that the published command lines, which all name a GPU, run there too. A process that
    torchrun started has the GPU of its number on the machine.
    """
    if started_by_torchrun():
        return _device_of_process(name)
    gpus = gpu_id.split(",")
    if len(gpus) > 1 and all(gpu.isdecimal() for gpu in gpus):
        raise UserError(f"--gpu-id {gpu_id}: every GPU takes a process of its own; start them with: {torchrun_command(gpus, sys.argv)}")
    if not gpu_id.isdecimal():
        raise UserError(f"--gpu-id: give the number of one GPU, not {gpu_id!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if count else "mps" if mps else "cpu"
        if name == "cpu" and gpu_id != "0":
            cprint(f"No CUDA device is there: --gpu-id {gpu_id} is ignored and the CPU used.", "yellow")
    if name == "cuda":
        if count == 0:
            raise UserError("--device cuda: PyTorch finds no CUDA device on this machine; use --device cpu")
        if int(gpu_id) >= count:
            raise UserError(f"--gpu-id {gpu_id}: this machine has {count} CUDA device(s), numbered from 0")
        return torch.device("cuda", int(gpu_id))
    if name == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no MPS device on this machine; use --device cpu")
    return torch.device(name)


def _device_of_process(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "mps":
        raise UserError("--device mps: one process alone can use it; start the script without torchrun, or use --device cpu")
    if name == "cpu" or name == "auto" and count == 0:
        return torch.device("cpu")
    if local_rank() >= count:
        raise UserError(f"--device {name}: process {local_rank()} of this machine finds {count} CUDA device(s), and each process needs "
                        f"its own; lower torchrun's --nproc_per_node, or use --device cpu")
    return torch.device("cuda", local_rank())


@contextlib.contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """Have the block's work on a CUDA device done in one stream, in which graphs can be captured too, and by one thread.

    cuBLAS takes memory for each stream and thread that it works in, 32 MB on a Hopper: here once, and the 8 MB that it takes on older GPUs.
    A small network's backward pass is faster without a thread of its own.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:2:16:8")
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.autograd.set_multithreading_enabled(False), torch.cuda.stream(gpu.stream_aside(index)):
        yield


def set_precision(name: str) -> bool:
    """Have CUDA's products rounded as `--precision name` says; whether they are to be bfloat16, which is the network's to do.

    fp32 is float32 throughout, but that the backward solve may begin with tf32 products; tf32 rounds the factors to 10 bits of mantissa
    on the GPUs that can, bf16 to 7. The simulation's own kernel has weights of 24 bits under fp32 and of 16 under the others.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return name == "bf16"


def set_deterministic(wanted: bool) -> None:
    """Have PyTorch choose only algorithms that give the same bits in every run, and refuse what has none."""
    if wanted:
        if os.environ.get(WORKSPACE) not in DETERMINISTIC_WORKSPACES:
            os.environ[WORKSPACE] = DETERMINISTIC_WORKSPACES[0]
        torch.backends.cudnn.benchmark = False
    if wanted != torch.are_deterministic_algorithms_enabled():  # The call imports torch.compile, which takes a second and 70 MB.
        torch.use_deterministic_algorithms(wanted)


def describe_device(device: torch.device) -> str:
    """The name of the GPU or the CPU model, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"
