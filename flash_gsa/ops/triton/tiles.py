"""Tile sizes, by device and by what is computed: one readable table instead of a search at run time.

`flash-gsa bench tune` measures its rows anew on a card. C: tokens a chunk, the granularity of stored states. BT: tokens
a block, the rows of a program; C is BT or twice that. BD: width of a slice of K or V.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

KERNELS = ("states", "outputs", "values_backward", "states_backward", "inputs_backward")


@dataclass(frozen=True)
class Tile:
    """BD, warps, pipeline stages and registers of a thread of one kernel.

    registers: with 255, all that a thread can have, a multiprocessor runs 8 warps at a time; with 168 or 128 it runs 12
    or 16, and what does not fit is spilled: mostly where gates are strong.
    """

    BD: int
    warps: int
    stages: int
    registers: int = 255


@dataclass(frozen=True)
class Tiles:
    """C, BT and the tile of each kernel."""

    C: int
    BT: int
    states: Tile
    outputs: Tile
    values_backward: Tile
    states_backward: Tile
    inputs_backward: Tile

    def __post_init__(self) -> None:
        assert self.C in (self.BT, 2 * self.BT), "a chunk has one or two blocks"

    def cut(self, width: int) -> "Tiles":
        """The same with no BD above `width`."""
        tiles: dict[str, Tile] = {name: getattr(self, name) for name in KERNELS}
        return Tiles(self.C, self.BT, **{name: replace(tile, BD=min(tile.BD, width)) for name, tile in tiles.items()})


@dataclass(frozen=True)
class Row:
    """One row of the table: for which problems, which tiles, and why. None stands for any.

    architecture: CUDA compute capability; precision: of q, k, v; slots, width: up to how many slots, and how many
    numbers of a key or value; grouped: whether there are more query heads than key/value heads.
    """

    architecture: tuple[int, int] | None
    precision: torch.dtype | None
    slots: int
    width: int | None
    grouped: bool | None
    tiles: Tiles
    reason: str

    def covers(self, architecture: tuple[int, int], precision: torch.dtype, M: int, width: int, R: int) -> bool:
        """Whether it is for M slots, heads so wide and R query heads a group in this precision on this device."""
        pairs = ((self.architecture, architecture), (self.precision, precision), (self.grouped, R > 1))
        fits = self.slots >= M and (self.width is None or self.width >= width)
        return fits and all(mine is None or mine == given for mine, given in pairs)


def _tiles(C: int, BT: int, *kernels: tuple[int, ...]) -> Tiles:
    return Tiles(C, BT, *(Tile(*kernel) for kernel in kernels))


HOPPER, ANY = (9, 0), None
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE, GROUPED = False, True

# The first row that covers a problem holds. Times are µs on one H100: of the layer of the 1.3B model (8×2048 tokens,
# 4 heads of 512, 64 slots), up to 256 wide of the 340M model's (the same, heads of 256), for grouped queries of the 7B
# model's (4×4096, 32 and 8 heads of 128, 64 slots).
# KiB are those of shared memory that a program may have: 227 on Hopper, 163 on an A100, 99 on consumer cards.
# fmt: off
TABLE = (
    # C, BT, then (BD, warps, stages[, registers]) of KERNELS in their order:
    # states, outputs, values_backward, states_backward, inputs_backward.
    Row(HOPPER, BF16, 64, ANY, GROUPED,
        _tiles(64, 64, (64, 4, 3), (128, 4, 1, 168), (64, 4, 3), (64, 4, 3), (64, 4, 2)),
        "outputs 300, with all registers 364; values backward 261, with BD 128 399, with 168 registers 600; inputs "
        "backward 595, BD 128 656, with 8 warps 692. Later kernels: walk 66, 2 stages 84; back 232, 306, 4 stages 246"),
    Row(HOPPER, BF16, 64, 256, SINGLE,
        _tiles(128, 64, (128, 4, 3), (64, 4, 3), (64, 4, 3), (64, 4, 3), (64, 4, 2)),
        "340M: walk 43, BD 64 44, 2 stages 48; walk back 52, BD 128 54. Outputs 96, 2 stages 103, 4 stages 120, BD 128 "
        "100 with 1 stage and 127 with 2, 8 warps 131; values backward 71, 72, 87, 76, 89 and 89; inputs backward 243, "
        "1 stage 280, 3 stages 289, BD 128 333, with 8 warps 327"),
    Row(HOPPER, BF16, 64, ANY, SINGLE,
        _tiles(128, 64, (128, 4, 3), (64, 4, 3), (64, 4, 3), (128, 4, 3), (64, 4, 2)),
        "blocks of 64 in chunks of 128 against chunks of 64: walks 82 and 104, backward 108 and 159; outputs 170 and "
        "186, values backward 112 and 124. BT 128 with 8 warps: outputs 187, values backward 222. Later kernels: "
        "outputs 158, 2 stages 173, with 168 registers 169; inputs backward 357, BD 32 384. Walks by chunk: 76 and 98, "
        "with 2 stages 77 and 97, but of 1×16384 80 instead of 71; BD 64 77 and 98"),
    Row(HOPPER, BF16, 128, ANY, ANY,
        _tiles(64, 64, (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 2)),
        "[C, M] as large as with 64 slots and C 128; not measured against others"),
    Row(HOPPER, BF16, 256, ANY, SINGLE,
        _tiles(64, 64, (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 1)),
        "the largest C that fits 227 KiB; not measured against others"),
    Row(HOPPER, BF16, 256, ANY, GROUPED,
        _tiles(32, 32, (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 2), (64, 8, 2)),
        "with C 64 inputs backward takes too much; not measured against others"),
    Row(HOPPER, FP16, 64, ANY, ANY,
        _tiles(64, 64, (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1), (64, 4, 1)),
        "what meets gates is float32, twice as large as in bfloat16; not measured against others"),
    Row(HOPPER, FP16, 128, ANY, ANY,
        _tiles(64, 64, (64, 8, 1), (64, 8, 1), (64, 8, 1), (64, 8, 1), (64, 8, 1)),
        "as for 64 slots, with these over twice the warps; not measured against others"),
    Row(HOPPER, FP16, 256, ANY, ANY,
        _tiles(32, 32, (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1)),
        "the largest C that fits 227 KiB; not measured against others"),
    Row(HOPPER, FP32, 64, ANY, ANY,
        _tiles(32, 32, (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
        "exact products use no tensor cores, and their operands fill registers; not measured against others"),
    Row(HOPPER, FP32, 256, ANY, ANY,
        _tiles(32, 32, (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1), (16, 8, 1)),
        "as for 64 slots, with these over twice the warps; inputs backward BD 16, since 32 takes 228 KiB; not measured "
        "against others"),
    Row(ANY, BF16, 64, ANY, ANY,
        _tiles(64, 64, (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)),
        "fits 96 KiB; not measured"),
    Row(ANY, BF16, 128, ANY, ANY,
        _tiles(32, 32, (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1)),
        "fits 96 KiB; not measured"),
    Row(ANY, ANY, 64, ANY, ANY,
        _tiles(32, 32, (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
        "fits 96 KiB; not measured"),
    Row(ANY, ANY, 128, ANY, SINGLE,
        _tiles(32, 32, (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1), (32, 8, 1)),
        "fits 96 KiB; not measured"),
    Row(ANY, ANY, 256, ANY, ANY,
        _tiles(32, 32, (16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1)),
        "the least there is; what it takes of shared memory goes with the slots, up to 216 KiB; not measured"),
)
# fmt: on

_forced: Tiles | None = None


def narrowest(precision: torch.dtype) -> int:
    """The least BD of blocks of 64 tokens and more.

    Of slices of 16 or 32 numbers in 16 bits, as operands of Hopper's products in shared memory, Triton 3.6 reads what
    lies behind (seen by compute-sanitizer); those of 64 fill the 128 bytes in which such memory is laid out.
    """
    return 16 if precision == FP32 else 64


def choose(dtype: torch.dtype, K: int, V: int, M: int, R: int, device: torch.device) -> Tiles:
    """Tiles for heads of width K and V, M slots, R query heads a group."""
    width = max(narrowest(dtype), 1 << (int(max(K, V)) - 1).bit_length())
    if _forced is not None:
        return _forced.cut(width)
    return _from_table(architecture(device), dtype, width, int(M), int(R))


@functools.cache
def _from_table(architecture: tuple[int, int], precision: torch.dtype, width: int, M: int, R: int) -> Tiles:
    return find_row(architecture, precision, M, width, R).tiles.cut(width)


def find_row(architecture: tuple[int, int], precision: torch.dtype, M: int, width: int, R: int) -> Row:
    """The row that holds for M slots, keys and values of up to `width` numbers and R query heads a group."""
    return next(row for row in TABLE if row.covers(architecture, precision, M, width, R))


def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, of tensors without memory ("meta") that of the current one; elsewhere, as in
    the interpreter, that of the first rows."""
    if device.type not in ("cuda", "meta") or not torch.cuda.is_available():
        return HOPPER
    return _capability(device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Within it, `tiles` hold for every problem instead of the table, in all threads: for tests and measurements.

    A backward must run under the tiles of its forward: what they share lies by chunks.
    """
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


def forced() -> Tiles | None:
    """Those that hold within `using`."""
    return _forced


def shared_bytes(kernel: str, tile: Tile, C: int, BT: int, precision: torch.dtype, M: int, R: int) -> int:
    """Shared memory that a program of `kernel` takes, at most: an estimate that no tile compiled so far exceeds.

    Pipelined loads: of a walk `stages` times [C, M] weights and a [C, BD] slice of inputs; of the other kernels
    `stages` times [BT, BD] slices of queries and keys, their neighbours' too in chunks of two blocks, and of states
    [M, BD], beside a few [BT, M] and [BT, BT] weights. Where gates are strong, several tiles [BT, M] are there at once.
    """
    slots = max(16 if precision == FP32 else 64, 1 << (M - 1).bit_length())
    given = precision.itemsize
    item = 2 if precision == BF16 else 4
    if kernel in ("states", "states_backward"):
        return tile.stages * C * (slots * item + tile.BD * given) + 2 * slots * tile.BD
    inputs = kernel == "inputs_backward"
    slices = (2 if C == BT else 4 if inputs else 3) * BT * tile.BD * given
    states = (2 if inputs else 1) * slots * tile.BD * item
    near, weight = BT * BT * item, BT * slots * item
    if not inputs:
        return max(tile.stages * (slices + states) + 2 * weight, BT * slots * 8 + weight + near)
    # Found by compiling: tiles of weights more for groups, most in float32; there half of one more beside gates.
    halves = 6 + (2 if R > 1 and (slots > 64 or precision == FP32) else 0) + (3 if R > 1 and precision == FP32 else 0)
    gates = BT * slots * 8 + (7 if item == 4 else 4) * weight // 2
    return max(tile.stages * (slices + states) + halves * weight // 2, gates) + near
