"""What the operator's kernels move and what lies in memory: `python -m benchmarks.operator_bytes --output FILE`.

Counted, not measured. A forward and backward runs on tensors without memory: what it allocates and which tensors it
hands to which kernel is what the GPU would see, tiles are those of Hopper. `MOVED` says which of these a kernel reads
and writes. Each counts once a launch, however many of its programs read it: what must pass if the L2 cache keeps
nothing from one launch to the next, and everything within one. Gates are weak, as a model's are: what is only read
where they are strong (levels above 0) does not count. Needs Triton, but no GPU.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_gsa.benchmarking.about import about, write
from flash_gsa.benchmarking.gate import with_gradients
from flash_gsa.benchmarking.shapes import SUITES, Shape
from flash_gsa.ops.triton import launching
from flash_gsa.ops.triton.library import attention

LABELS = ("1.3B-8x2048", "340M-8x2048")
DTYPE = torch.bfloat16
FORWARD = ("prepare", "states_forward", "outputs")


@dataclass(frozen=True)
class Moved:
    """Arguments that a kernel `reads` and `writes`, by its own names: for every chunk whole.

    walked: of these all but one chunk of each sequence is read: what the last chunk writes, or in a backward the first
    one reads, no other asks for. before: of these, states between chunks, all but the one before the last chunk is
    read. ends: of these only the last row of each block is read.
    """

    reads: str
    writes: str
    walked: str = ""
    before: str = ""
    ends: str = ""

    def read_shares(self, rows: int, chunks: float) -> dict[str, float]:
        """{argument: which part of it is read} with so many `rows` a block and `chunks` a sequence."""
        shares = (
            (self.reads, 1.0),
            (self.walked, 1 - 1 / chunks),
            (self.before, 1 - 1 / (chunks - 1)),
            (self.ends, 1 / rows),
        )
        return {name: share * _inner(name, chunks) for names, share in shares for name in names.split()}

    def write_shares(self, chunks: float) -> dict[str, float]:
        """{argument: which part of it is written} with so many `chunks` a sequence."""
        return {name: _inner(name, chunks) for name in self.writes.split()}


def _inner(name: str, chunks: float) -> float:
    """Of what passes a chunk whole there is something for chunks with a state on both sides alone."""
    return 1 - 2 / chunks if name == "passed" else 1.0


MOVED = {
    "prepare": Moved("g", "until scaled levels"),
    "states_forward": Moved("", "hk hv", walked="k v scaled", ends="until"),
    "outputs": Moved("q k v until scaled levels hk hv", "o p_out lse_out"),
    "values_backward": Moved("v until scaled levels hv p lse do", "read_p read_dl reached"),
    "states_backward": Moved("", "dhk dhv passed", walked="q do read_p read_dl", before="hk hv", ends="until"),
    "inputs_backward": Moved(
        "y x h dh read until scaled levels written_sum carried_sum", "dy dx written_sum carried_sum"
    ),
    "gates_backward": Moved("g passed written carried dg", "dg", ends="until"),
}
"""Of sequences whose tokens fill their chunks, several of them, walked in one segment, without s of their own, states
before or gradients of states behind."""


@dataclass
class Launch:
    """A kernel, its arguments by name, its constants, and what was `alive` then: {storage: (its bytes)}."""

    kernel: str
    arguments: dict[str, Any]
    constants: dict[str, Any]
    alive: dict[int, int] = field(default_factory=dict)

    @property
    def reads(self) -> dict[str, int]:
        """{argument: bytes that are read of it}."""
        shares = MOVED[self.kernel].read_shares(self.constants["BT"], self._chunks)
        if self.kernel == "inputs_backward":
            # The first pass begins the sums, the second has no use for the states before chunks.
            unread = ("written_sum", "carried_sum") if self.constants["FIRST"] else ("h",)
            shares = {name: share for name, share in shares.items() if name not in unread}
        return {name: round(share * self.arguments[name].nbytes) for name, share in shares.items()}

    @property
    def writes(self) -> dict[str, int]:
        """{argument: bytes that are written to it}."""
        shares = MOVED[self.kernel].write_shares(self._chunks)
        there = {name: self.arguments[name] for name in shares}
        return {name: round(shares[name] * x.nbytes) for name, x in there.items() if x is not None}

    @property
    def _chunks(self) -> float:
        return self.arguments["T"] / self.constants["C"]

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes read and written."""
        return sum(self.reads.values()), sum(self.writes.values())


class _Storages(TorchDispatchMode):
    """Storages that were made within it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        # Views and results in place have a storage that is another argument's.
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _storage(x) not in given:
                storage = x.untyped_storage()
                self._made[_storage(x)] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> dict[int, int]:
        """{storage: its bytes}."""
        return {key: size for key, (storage, size) in self._made.items() if not storage.expired()}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Within it, launches are noted instead of done."""
    own, launches, storages = launching.launch, [], _Storages()

    def note(variant: launching.Variant, programs: int, arguments: tuple) -> None:
        named = dict(zip(variant.kernel.arg_names, arguments, strict=False))
        launches.append(Launch(variant.kernel.fn.__name__, named, variant.constants, storages.alive()))

    launching.launch = note
    try:
        with storages:
            yield launches
    finally:
        launching.launch = own


def count(shape: Shape, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Bytes of every kernel of a forward and backward, of a forward alone, and of the memory at the worst moment; and
    what lies in memory between forward and backward, by the policy for states."""
    x, do = _inputs(shape, dtype)
    with noted() as alone, torch.no_grad():
        _forward(x)
    with noted() as launches:
        results = with_gradients(_forward, x, do)
    worst = max(launches, key=lambda launch: sum(launch.alive.values()))
    read, written = (sum(moved) for moved in zip(*(launch.moved for launch in alone), strict=True))
    C, BT = (launches[0].constants[name] for name in ("C", "BT"))
    assert shape.T % C == 0, "chunks are not full"
    assert not any(launch.constants.get("SPLIT") for launch in launches), "more than one segment"
    return {
        "shape": asdict(shape) | {"label": shape.label},
        "dtype": str(dtype).removeprefix("torch."),
        "C": C,
        "BT": BT,
        "kernels": [
            {"kernel": launch.kernel, "read": launch.moved[0], "written": launch.moved[1]} for launch in launches
        ],
        "forward_alone": {"read": read, "written": written},
        "once": {"forward": shape.forward_bytes(dtype.itemsize), "forward_backward": shape.both_bytes(dtype.itemsize)},
        "memory": {"kernel": worst.kernel, "tensors": _named(worst, launches, results)},
        "kept": {policy: _kept(x, policy == "recompute") for policy in ("keep", "recompute")},
    }


def _kept(x: dict[str, Tensor], recompute: bool) -> int:
    """Bytes that a forward leaves for its backward, beside its inputs; o, which it returns, is one of them."""
    storages = _Storages()
    with noted() as launches, storages:
        o = _forward({name: tensor.detach().requires_grad_() for name, tensor in x.items()}, recompute)
        launches.clear()  # they hold their arguments
        left = sum(storages.alive().values())
    assert o.requires_grad
    return left


def _named(worst: Launch, launches: list[Launch], results: dict[str, Tensor]) -> dict[str, int]:
    """{tensor: its bytes} of what is alive at the worst moment, by the names of results and of kernels' arguments."""
    names = {_storage(x): name for name, x in results.items()}
    for launch in launches:
        for name, x in launch.arguments.items():
            if isinstance(x, Tensor):
                names.setdefault(_storage(x), name.removesuffix("_out").removesuffix("_sum"))
    return {names[key]: size for key, size in worst.alive.items()}


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v, g and the gradient of o, without memory."""

    def empty(heads: int, width: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape.B, shape.T, heads, width, dtype=dtype, device="meta")

    sizes = {"q": (shape.HQ, shape.K), "k": (shape.H, shape.K), "v": (shape.H, shape.V)}
    x = {name: empty(*size) for name, size in sizes.items()}
    return x | {"g": empty(shape.H, shape.M, torch.float32)}, empty(shape.HQ, shape.V)


def _forward(x: dict[str, Tensor], recompute: bool = False) -> Tensor:
    q, k, v, g = (x[name] for name in "qkvg")
    return attention(q, k, v, g, None, None, None, None, 1.0, False, recompute)[0]


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Count, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator_bytes", description="bytes of the operator")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="result file (JSON)")
    parser.add_argument("--commit", help="the commit of the code, where git cannot say it")
    options = parser.parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.operator_bytes", *typed])
    counted = [count(shape) for shape in SUITES["gpu"].shapes if shape.label in LABELS]
    write({"about": about(command, "cpu", options.commit), "shapes": counted}, options.output)
    for found in counted:
        moved = sum(kernel["read"] + kernel["written"] for kernel in found["kernels"])
        held = sum(found["memory"]["tensors"].values())
        say(f"{found['shape']['label']}: {moved / 1e6:,.0f} MB moved, {held / 2**20:,.0f} MiB held")


if __name__ == "__main__":
    main()
