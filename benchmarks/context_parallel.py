"""One sequence over several GPUs: values beside float64 on one of them, times beside one GPU, memory.

    torchrun --nproc-per-node 2 -m benchmarks.context_parallel --output benchmarks/results/context_parallel.json

The layer of the 1.3B model (4 heads of 512, 64 slots), bfloat16, forward and backward, gates of a model at its start
and slow ones. Errors are ‖x - y‖ / ‖y‖ of o and of the gradients of q, k, v, g, the worst of all ranks, once of
context parallelism and once of one GPU with all tokens.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flash_gsa import gated_slot_attention
from flash_gsa.benchmarking.about import about, write
from flash_gsa.parallel import context_parallel_gated_slot_attention

H, D, M = 4, 512, 64
CHECKED = 16384
TIMED = (65536, 262144, 1048576)
NAMES = ("o", "dq", "dk", "dv", "dg")


def inputs(T: int, divisor: float, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, g and the gradient of o."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(1, T, H, width, generator=generator, device=device)

    q, k, v = (F.silu(normal(D)).bfloat16() for _ in range(3))
    return [q, k, v, F.logsigmoid(normal(M)) / divisor, normal(D).bfloat16()]


def results(operator, x: list[torch.Tensor], **options) -> list[torch.Tensor]:
    leaves = [y.detach().requires_grad_() for y in x[:4]]
    o, _ = operator(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, x[4])]


def mine(x: list[torch.Tensor]) -> list[torch.Tensor]:
    T, rank = x[0].shape[1] // dist.get_world_size(), dist.get_rank()
    return [y[:, rank * T : (rank + 1) * T].contiguous() for y in x]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """The worst of all ranks."""
    each = [(x.double() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)]
    worst = torch.stack(each)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(NAMES, worst.tolist(), strict=True))


def milliseconds(call, calls: int = 10) -> float:
    times = []
    for i in range(3 + calls):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_parallel")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit")
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    command = f"torchrun --nproc-per-node {ranks} -m benchmarks.context_parallel"
    result = {"about": about(command, str(device), options.commit), "ranks": ranks, "values": [], "times": []}
    for divisor, lengths in ((8.0, None), (1e3, None), (8.0, [0, 3000, 11000, CHECKED])):
        x = inputs(CHECKED, divisor, device)
        packed = {} if lengths is None else {"cu_seqlens": torch.tensor(lengths)}
        exact = mine(results(gated_slot_attention, [y.double() for y in x], backend="chunk", **packed))
        record = {
            "T": CHECKED,
            "gates": f"logsigmoid / {divisor:g}",
            "lengths": lengths,
            "context_parallel": errors(results(context_parallel_gated_slot_attention, mine(x), **packed), exact),
            "one_gpu": errors(mine(results(gated_slot_attention, x, **packed)), exact),
        }
        result["values"].append(record)
        if rank == 0:
            print(record, flush=True)
    for T in TIMED:
        x = inputs(T, 8.0, device)
        part = mine(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(context_parallel_gated_slot_attention, part)
        peak = torch.cuda.max_memory_allocated() - before
        record = {
            "T": T,
            "context_parallel_ms": milliseconds(lambda part=part: results(context_parallel_gated_slot_attention, part)),
            "one_stretch_ms": milliseconds(lambda part=part: results(gated_slot_attention, part)),
            "one_gpu_ms": milliseconds(lambda x=x: results(gated_slot_attention, x)),
            "peak_bytes": peak,
        }
        result["times"].append(record)
        if rank == 0:
            print(record, flush=True)
            write(result, options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
