"""What `flash-gsa bench tune` tries, and how it decides: workloads, candidates, the choice, the row for the table."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch

from flash_gsa.errors import UsageError, did_you_mean
from flash_gsa.ops.triton.tiles import (
    BF16,
    FP16,
    FP32,
    HOPPER,
    KERNELS,
    TABLE,
    Row,
    Tile,
    Tiles,
    find_row,
    narrowest,
    shared_bytes,
)

from .shapes import SUITES, Shape

REGISTERS = (255, 168, 128)
"""Of a thread: for 8, 12 and 16 warps at a time on a multiprocessor."""
Architecture = tuple[int, int]
Cut = tuple[int, int]
"""(C, BT) of tiles."""
Option = TypeVar("Option", bound=Hashable)


@dataclass(frozen=True)
class Workload:
    """One call that tiles are measured with. `name` is what `--shape` calls it.

    linear: gated linear attention, whose keys take the slots' part: K = M.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    linear: bool = False

    @property
    def label(self) -> str:
        """For tables: "1.3B 8×2048 bfloat16"."""
        return f"{self.name} {self.shape.B}×{self.shape.T} {self.precision}"

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.shape.HQ // self.shape.H

    @property
    def width(self) -> int:
        """Numbers of its widest keys or values."""
        return max(0 if self.linear else self.shape.K, self.shape.V)

    def row(self, architecture: Architecture) -> Row:
        """The row of the table that holds for it."""
        return find_row(architecture, self.dtype, self.shape.M, self.width, self.group)

    def tiles(self, tiles: Tiles) -> Tiles:
        """The same tiles, no wider than its heads."""
        return tiles.cut(1 << (max(16, self.width) - 1).bit_length())


def _layer(name: str, **changes: Any) -> Shape:
    return replace(next(shape for shape in SUITES["gpu"].shapes if shape.name == name), **changes)


_GLA: dict[str, Any] = {"K": 256, "M": 256}
WORKLOADS = (
    Workload("1.3B", _layer("1.3B"), BF16),
    Workload("1.3B-long", _layer("1.3B", B=1, T=16384), BF16),
    Workload("7B", _layer("7B"), BF16),
    Workload("340M", _layer("340M"), BF16),
    Workload("GLA-1.3B", _layer("1.3B", **_GLA), BF16, linear=True),
    Workload("1.3B-128", _layer("1.3B", M=128), BF16),
    Workload("7B-256", _layer("7B", M=256), BF16),
    Workload("1.3B-fp16", _layer("1.3B"), FP16),
    Workload("1.3B-128-fp16", _layer("1.3B", M=128), FP16),
    Workload("GLA-1.3B-fp16", _layer("1.3B", **_GLA), FP16, linear=True),
    Workload("340M-fp32", _layer("340M", B=2), FP32),
    Workload("GLA-1.3B-fp32", _layer("1.3B", B=2, **_GLA), FP32, linear=True),
)
"""At least one for every row that Hopper has; numbers after a name are its slots, else 64 (256 in GLA)."""


@dataclass(frozen=True)
class Group:
    """The workloads that one row is for.

    before: the row that holds for them on this device; model: Hopper's, whose precision, slots and heads are kept.
    """

    before: Row
    model: Row
    workloads: tuple[Workload, ...]

    @property
    def chunks(self) -> tuple[Cut, ...]:
        """Values of (C, BT) worth trying: those of both rows, then what is near the first: C at most half or twice."""
        first = tuple((row.tiles.C, row.tiles.BT) for row in (self.before, self.model))
        more = ((C, BT) for C in (64, 128, 32) for BT in (64, 32) if C in (BT, 2 * BT))
        near = (cut for cut in more if max(cut[0], first[0][0]) <= 2 * min(cut[0], first[0][0]))
        return tuple(dict.fromkeys((*first, *near)))

    def candidates(self, kernel: str, cut: Cut, limit: int) -> tuple[list[Tile], int]:
        """Tiles worth trying, the likeliest first, and how many were left out.

        Those of both rows, then what is near them. Left out is what takes more than twice `limit` bytes of shared
        memory by the estimate, which is never that far off; what takes too much after all is found by compiling it.
        """
        rows = list(dict.fromkeys(getattr(row.tiles, kernel) for row in (self.before, self.model)))
        half = self.workloads[0].dtype == BF16
        widths, stages = ((32, 64, 128), (1, 2, 3, 4)) if half else ((16, 32, 64), (1, 2, 3))
        wide = Tiles(*cut, *[Tile(512, 4, 1)] * len(KERNELS))
        widest = max(getattr(w.tiles(wide), kernel).BD for w in self.workloads)
        least = narrowest(self.workloads[0].dtype) if cut[1] >= 64 else 0
        near = [Tile(*sizes) for sizes in product(widths, (4, 8), stages, REGISTERS) if least <= sizes[0] <= widest]
        near.sort(key=lambda tile: min(_distance(tile, row) for row in rows))
        every = list(dict.fromkeys((*rows, *near)))
        fits = [tile for tile in every if tile in rows or self._shared(kernel, tile, *cut) <= 2 * limit]
        return fits, len(every) - len(fits)

    def _shared(self, kernel: str, tile: Tile, C: int, BT: int) -> int:
        return max(shared_bytes(kernel, tile, C, BT, w.dtype, w.shape.M, w.group) for w in self.workloads)


def _distance(a: Tile, b: Tile) -> float:
    registers = abs(REGISTERS.index(a.registers) - REGISTERS.index(b.registers))
    return abs(math.log2(a.BD / b.BD)) + abs(math.log2(a.warps / b.warps)) + abs(a.stages - b.stages) + registers


def groups(names: Sequence[str], architecture: Architecture) -> list[Group]:
    """The workloads called `names` (empty: all), by the row that they are for.

    Raises:
        UsageError: there is none of a name.
    """
    known = [workload.name for workload in WORKLOADS]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no shape {name!r}; choose of {', '.join(known)}.{did_you_mean(name, known)}")
    found: dict[int, Group] = {}
    for workload in WORKLOADS:
        if not names or workload.name in names:
            model = workload.row(HOPPER)
            group = found.get(id(model), Group(workload.row(architecture), model, ()))
            found[id(model)] = replace(group, workloads=(*group.workloads, workload))
    return list(found.values())


Rounds = Mapping[str, Sequence[float]]
"""Seconds of one option in every round, by workload."""


def best(measured: Mapping[Option, Rounds], before: Option | None = None) -> Option | None:
    """The fastest option, over all workloads together; None if none was measured twice on each.

    `before` is kept unless an option is faster than it even in its slowest rounds.
    """
    workloads = {workload for rounds in measured.values() for workload in rounds}
    whole = {
        option: rounds
        for option, rounds in measured.items()
        if workloads and all(len(rounds.get(workload, ())) > 1 for workload in workloads)
    }
    if not whole:
        return None
    if before in whole:
        lowest = _together(min(rounds) for rounds in whole[before].values())
        slowest = {option: _together(max(r) for r in rounds.values()) for option, rounds in whole.items()}
        faster = [option for option in whole if slowest[option] < lowest]
        return min(faster, key=slowest.__getitem__, default=before)
    return min(whole, key=lambda option: _together(sum(r) / len(r) for r in whole[option].values()))


def _together(seconds: Iterable[float]) -> float:
    """Grows with each of them by its share: a workload counts as much as another that takes longer."""
    return sum(math.log(x) for x in seconds)


def row_text(architecture: Architecture, model: Row, tiles: Tiles, reason: str) -> str:
    """A row as it stands in `TABLE`."""
    precision = {BF16: "BF16", FP16: "FP16", FP32: "FP32", None: "ANY"}[model.precision]
    heads = {True: "GROUPED", False: "SINGLE", None: "ANY"}[model.grouped]
    place = "HOPPER" if architecture == HOPPER else str(tuple(architecture))
    sizes = ", ".join(str(sizes_of(getattr(tiles, kernel))) for kernel in KERNELS)
    return (
        f"    Row({place}, {precision}, {model.slots}, {model.width or 'ANY'}, {heads},\n"
        f"        _tiles({tiles.C}, {tiles.BT}, {sizes}),\n"
        f'        "{reason}"),'
    )


def sizes_of(tile: Tile) -> tuple[int, ...]:
    """(BD, warps, stages), and registers where they are limited."""
    return (tile.BD, tile.warps, tile.stages, *([tile.registers] if tile.registers < 255 else []))


def stands_in_table(architecture: Architecture, row: Row) -> bool:
    """Whether `row` is one of the table's own for this architecture, not one for any."""
    return row in TABLE and row.architecture == architecture
