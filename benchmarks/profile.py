"""Shows where a training step's time goes.

    python -m benchmarks.profile [--network F64C5] [--device cpu|cuda] [--precision fp32] [--rows 20]

PyTorch's operations by their own time, after some steps of warm-up; the C kernels' time is in the autograd nodes and steps that call them.
On a GPU, also the share of the time for which it is busy, from the steps' time without the profiler, and how long it waits in between.
"""

import argparse
import time
from typing import Iterable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.steps import CASES, GPU_CASES, NETWORKS, WARM_STEPS, build, load_images
from utils.data.batches import Batches
from utils.device import set_precision, working_on
from utils.optimizer import SGD

STEPS = 3
LONG_WAIT_US = 10  # Between two kernels of one graph it is shorter.


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
    prepared = [next(batches)]

    def step() -> None:
        x, labels = prepared.pop()
        for parameter in network.parameters():
            parameter.grad = None
        with record_function("## forward: simulation and f"):
            loss = F.cross_entropy(network(x), labels)
        prepared.append(next(batches))
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
        describe_gpu(profiled.events(), usual)


def describe_gpu(events: Iterable, usual: float) -> None:
    """Print how busy `events` kept the GPU in STEPS steps, which take `usual` seconds without a profiler, and how it waited in between."""
    # What an operation launches is listed under the operation too, and is counted once.
    kernels = sorted((event.time_range.start, event.time_range.end) for event in events
                     if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    busy, waits, end = sum(end - start for start, end in kernels), [], kernels[0][1]
    for start, this_end in kernels:
        waits.append(max(0, start - end))
        end = max(end, this_end)
    long = [wait for wait in waits if wait > LONG_WAIT_US]
    print(f"a step takes {1e3 * usual / STEPS:.2f} ms, the GPU's work in it {busy / 1e3 / STEPS:.2f} ms: {busy / 1e4 / usual:.0f} % busy\n"
          f"its waits of more than {LONG_WAIT_US} us under the profiler: {len(long) / STEPS:.1f} a step, {sum(long) / 1e3 / STEPS:.2f} ms, "
          f"the longest {max(waits):.0f} us; its shorter ones {(sum(waits) - sum(long)) / 1e3 / STEPS:.2f} ms")


if __name__ == "__main__":
    main()
