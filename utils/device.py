"""The device to compute on: its choice and its name."""

import os
import platform
from pathlib import Path

import torch
from termcolor import cprint

from utils.errors import UserError


def choose_device(name: str, gpu_id: str) -> torch.device:
    """The device for `--device name --gpu-id gpu_id`; auto takes CUDA, else Apple's MPS, else the CPU.

    Raises UserError where the device that was asked for is not there. Under auto on a machine without any CUDA device
    --gpu-id is ignored with a warning, so that the published command lines, which all name a GPU, run there too.
    """
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


def set_precision(name: str) -> bool:
    """Have CUDA's products rounded as `--precision name` says; whether they are to be bfloat16, which is the network's to do.

    fp32 is float32 throughout, tf32 rounds the factors to 10 bits of mantissa on the GPUs that can, bf16 to 7.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return name == "bf16"


def set_deterministic(wanted: bool) -> None:
    """Have PyTorch choose only algorithms that give the same bits in every run, and refuse what has none."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def describe_device(device: torch.device) -> str:
    """The name of the GPU or the CPU model, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"
