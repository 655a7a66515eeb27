"""Shows where a training step's time goes: python -m benchmarks.profile [--network F64C5] [--device cpu|cuda] [--rows 20]

PyTorch's operations by their own time, after some steps of warm-up; the C kernels' time is in the autograd nodes and steps that call them.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.steps import CASES, NETWORKS, WARM_STEPS, build, load_images
from utils.data.batches import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="F64C5", help="network of the training step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--path", default="./data", help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=20, help="operations to list")
    args = parser.parse_args()
    torch.manual_seed(0)
    case = next(case for case in CASES if case.network == args.network)
    network = build(case).to(args.device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = iter(Batches(load_images(args.network, args.path), case.batch, shuffled=True))

    def step() -> None:
        x, labels = (tensor.to(args.device) for tensor in next(batches))
        optimizer.zero_grad()
        with record_function("## forward: simulation and f"):
            loss = F.cross_entropy(network(x), labels)
        with record_function("## backward: solve and parameters"):
            loss.backward()
        with record_function("## optimiser"):
            optimizer.step()

    for _ in range(WARM_STEPS[args.network] // 4):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for _ in range(3):
            step()
    order = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=args.rows, max_name_column_width=50))


if __name__ == "__main__":
    main()
