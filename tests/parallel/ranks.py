"""One of several processes of a test: `python -m tests.parallel.ranks FOLDER RANK RANKS`.

It takes its part in every case, those for fewer ranks in a group of the first of them, and leaves what it found in
FOLDER.
"""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from flash_gsa import gated_linear_attention, gated_slot_attention
from flash_gsa.parallel import context_parallel_gated_linear_attention, context_parallel_gated_slot_attention


@dataclass(frozen=True)
class Case:
    """tokens: of each rank; lengths: of packed sequences; gates: factor on log gates, 0 for slots that keep all;
    linear: gated linear attention, whose one state is called hv here."""

    name: str
    tokens: tuple[int, ...]
    B: int = 2
    HQ: int = 4
    H: int = 2
    K: int = 5
    V: int = 6
    M: int = 3
    strength: bool = False
    state: bool = False
    lengths: tuple[int, ...] | None = None
    gates: float = 0.3
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    backend: str = "chunk"
    states: str = "keep"
    autocast: bool = False
    linear: bool = False


def packed(name: str, ranks: int, *lengths: int, **more) -> Case:
    return Case(name, (sum(lengths) // ranks,) * ranks, B=1, lengths=lengths, **more)


CASES = {
    2: [
        Case("even", (40, 40)),
        Case("of different lengths", (70, 3), strength=True, scale=0.4),
        Case("initial and final states", (20, 33), state=True),
        Case("gates that keep everything", (30, 30), gates=0.0, strength=True),
        Case("gates that erase everything", (30, 30), gates=1e4),
        Case("in float32", (40, 40), dtype=torch.float32),
        Case("in float32 under autocast", (40, 40), dtype=torch.float32, autocast=True),
        Case("in bfloat16", (40, 40), dtype=torch.bfloat16, K=16, V=16, M=8),
        Case("linear, all states", (20, 33), linear=True, state=True, scale=0.4),
        Case("linear, in bfloat16", (40, 40), linear=True, dtype=torch.bfloat16, K=16, V=16),
        packed("linear, packed", 2, 10, 30, 24, linear=True),
        Case("by the recurrence", (9, 8), backend="reference", state=True),
        packed("packed, one across", 2, 10, 30, 24),
        packed("packed, none across", 2, 10, 22, 0, 32, strength=True),
    ],
    3: [
        Case("three", (20, 1, 30), state=True, strength=True),
        packed("packed, one across all", 3, 5, 50, 5),
        Case("linear, three", (20, 1, 30), linear=True, state=True),
        packed("packed, one begins with the second rank", 3, 20, 40),
        packed("packed, one ends with the second rank", 3, 10, 30, 20, dtype=torch.float32),
        packed("packed, many", 3, 3, 0, 4, 25, 1, 0, 9, 18),
    ],
}


# In Triton's interpreter: TRITON_INTERPRET=1.
SMALL = {"B": 1, "HQ": 2, "H": 1, "K": 8, "V": 5, "M": 3, "dtype": torch.float32, "backend": "triton"}
INTERPRETED = {
    2: [
        Case("kernels", (40, 33), **SMALL),
        Case("kernels that compute states again", (20, 9), **SMALL, strength=True, states="recompute", scale=0.4),
        packed("kernels, packed", 2, 9, 20, 11, **{name: x for name, x in SMALL.items() if name != "B"}),
    ],
    3: [
        Case("kernels, strong gates, all states", (17, 1, 10), **SMALL, state=True, gates=30.0),
        Case("kernels, weak gates, all states", (9, 20, 8), **SMALL, state=True, strength=True, gates=0.01),
    ],
}


# Each rank on a GPU of its own; more ranks than there are GPUs, and their cases, are left out.
LARGE = {"K": 64, "V": 64, "M": 32, "dtype": torch.bfloat16, "backend": "triton"}
ON_GPUS = {
    2: [
        Case("kernels on GPUs", (300, 213), K=64, V=64, M=32, dtype=torch.bfloat16, backend="triton", gates=0.1),
        Case(
            "kernels on GPUs, all states",
            (100, 70),
            K=64,
            V=128,
            M=64,
            dtype=torch.bfloat16,
            backend="triton",
            state=True,
        ),
        Case(
            "kernels on GPUs, float32",
            (130, 40),
            K=16,
            V=16,
            M=16,
            dtype=torch.float32,
            backend="triton",
            strength=True,
        ),
        packed("kernels on GPUs, packed", 2, 50, 150, 0, 40, K=64, V=64, M=32, dtype=torch.bfloat16, backend="triton"),
    ],
    4: [
        Case("kernels on four GPUs", (90, 1, 200, 60), state=True, strength=True, **LARGE),
        packed("kernels on four GPUs, one across all", 4, 30, 420, 30, **LARGE),
        packed("kernels on four GPUs, many", 4, 100, 3, 0, 200, 1, 96, **LARGE),
    ],
}


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """All tokens, and the gradients that come back."""
    generator = torch.Generator().manual_seed(3)
    T, slots = sum(case.tokens), case.K if case.linear else case.M

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    x = {
        "q": normal(case.B, T, case.HQ, case.K).to(case.dtype),
        "k": normal(case.B, T, case.H, case.K).to(case.dtype),
        "v": normal(case.B, T, case.H, case.V).to(case.dtype),
        "g": -case.gates * normal(case.B, T, case.H, slots).abs().to(wide),
        "do": normal(case.B, T, case.HQ, case.V).to(case.dtype),
    }
    if case.strength:
        x["s"] = normal(case.B, T, case.H, case.M).sigmoid().to(wide)
    if case.state:
        for name in () if case.linear else ("hk", "dhk"):
            x[name] = normal(case.B, case.H, case.K, slots).to(wide)
        for name in ("hv", "dhv"):
            x[name] = normal(case.B, case.H, slots, case.V).to(wide)
    return x


def boundaries(case: Case) -> torch.Tensor | None:
    return None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0)


def results(case: Case, x: dict[str, torch.Tensor], first: bool, last: bool, operator):
    """o, the final states and all gradients, of the tokens in x; `first` and `last`: whether the whole's are."""
    leaves = {n: y.clone().requires_grad_() for n, y in x.items() if n in ("q", "k", "v", "g", "s", "hk", "hv")}
    state = None
    if case.state and first:
        state = leaves["hv"] if case.linear else (leaves["hk"], leaves["hv"])
    options = {} if case.linear else {"s": leaves.get("s"), "states": case.states}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
        o, final = operator(
            leaves["q"], leaves["k"], leaves["v"], leaves["g"], scale=case.scale, initial_state=state,
            output_final_state=case.state, cu_seqlens=boundaries(case), backend=case.backend, **options,
        )  # fmt: skip
    found, ends, gradients = {"o": o}, [o], [x["do"]]
    if case.state:
        # Of the states between two ranks nothing is asked back; they are in the graph all the same.
        weight = 1.0 if last else 0.0
        finals = {"hv": final} if case.linear else dict(zip(("hk", "hv"), final, strict=True))
        found |= {f"final {name}": y for name, y in finals.items()}
        ends += finals.values()
        gradients += [weight * x[f"d{name}"] for name in finals]
    wanted = {n: y for n, y in leaves.items() if first or n not in ("hk", "hv")}
    back = torch.autograd.grad(ends, list(wanted.values()), gradients)
    return {n: y.detach() for n, y in found.items()} | {f"d{n}": y for n, y in zip(wanted, back, strict=True)}


def whole(case: Case) -> dict[str, torch.Tensor]:
    """What one process finds."""
    return results(case, inputs(case), True, True, gated_linear_attention if case.linear else gated_slot_attention)


def mine(case: Case, rank: int, group) -> dict[str, torch.Tensor]:
    """What this process finds of its tokens."""
    begin = sum(case.tokens[:rank])
    x = {
        name: y if name in ("hk", "hv", "dhk", "dhv") else y[:, begin : begin + case.tokens[rank]]
        for name, y in inputs(case).items()
    }
    x = {name: y.to(place(rank)) for name, y in x.items()}
    last = rank == len(case.tokens) - 1
    operator = context_parallel_gated_linear_attention if case.linear else context_parallel_gated_slot_attention
    found = results(case, x, rank == 0, last, partial(operator, group=group))
    return {name: y.cpu() for name, y in found.items()}


def place(rank: int) -> torch.device:
    return torch.device("cuda", rank) if os.environ.get("RANKS_ON") == "gpus" else torch.device("cpu")


def main(folder: Path, rank: int, ranks: int) -> None:
    on_gpus = place(rank).type == "cuda"
    cases = ON_GPUS if on_gpus else INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else CASES
    of_models: dict = {}
    if cases is not INTERPRETED:
        from tests.parallel import models  # transformers takes its time

        of_models = models.MODELS_ON_GPUS if on_gpus else models.MODELS
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(place(rank))
    store = dist.FileStore(str(folder / "store"), ranks)
    name = "nccl" if on_gpus else "gloo"
    dist.init_process_group(name, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=500))
    found = {}
    for size, several in cases.items():
        if size > ranks:
            continue
        group = None if size == ranks else dist.new_group(list(range(size)))
        if rank < size:
            found |= {case.name: mine(case, rank, group) for case in several}
            for case in several[:2]:
                again = mine(case, rank, group)
                assert all(torch.equal(y, found[case.name][n]) for n, y in again.items()), case.name
            for case in of_models.get(size, []):
                found[case.name] = models.mine(case, rank, size, group, place(rank))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
