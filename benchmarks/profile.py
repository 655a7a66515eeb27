"""Shows where a training step's time goes.

    python -m benchmarks.profile [--network F64C5] [--device cpu|cuda] [--precision fp32] [--rows 20]

PyTorch's operations by their own time, after some steps of warm-up; the C kernels' time is in the autograd nodes and steps that call them.
On a GPU, also the share of the time for which it is busy, from the steps' time without the profiler.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.steps import CASES, GPU_CASES, NETWORKS, WARM_STEPS, build, load_images
from utils.data.batches import Batches
from utils.device import set_precision, working_on
from utils.optimizer import SGD

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="F64C5", help="network of the training step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="rounding of products on a GPU")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=20, help="operations to list")
    args = parser.parse_args()
    with working_on(torch.device(args.device)):
        profile_steps(args)


def profile_steps(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    case = next(case for case in (GPU_CASES if args.device == "cuda" else CASES) if case.network == args.network)
    network = build(case).to(args.device)
    network.bf16_products = set_precision(args.precision)
    optimizer = SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    batches = iter(Batches(load_images(args.network, args.path).to(args.device), case.batch, shuffled=True))

    def step() -> None:
        x, labels = next(batches)
        optimizer.zero_grad()
        with record_function("## forward: simulation and f"):
            loss = F.cross_entropy(network(x), labels)
        with record_function("## backward: solve and parameters"):
            loss.backward()
        with record_function("## optimiser"):
            optimizer.step()

    def seconds(steps: int) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(WARM_STEPS[args.network] // 4)
    usual = seconds(STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        seconds(STEPS)
    order = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=args.rows, max_name_column_width=50))
    if args.device == "cuda":
        # What an operation launches is listed under the operation too, and is counted once.
        kernels = [event for event in profiled.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1e6
        print(f"a step takes {1e3 * usual / STEPS:.2f} ms, the GPU's work in it {1e3 * busy / STEPS:.2f} ms: "
              f"{100 * busy / usual:.0f} % busy")


if __name__ == "__main__":
    main()