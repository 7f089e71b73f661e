"""The table of tiles: a row for every problem, sizes that kernels and devices can take, and right results with each.

The operator runs with every row's tiles in Triton's interpreter, in a process of its own (see
test_triton_interpreter.py), and on a GPU with those that are meant for it.
"""

import os
import threading
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from flash_gsa.ops.triton import tiles
from flash_gsa.ops.triton.backend import MAX_SLOTS
from flash_gsa.ops.triton.tiles import BF16, FP16, FP32, HOPPER, KERNELS, TABLE, Row, Tile, Tiles, find_row

from .helpers import Case, check, make, rounded, run
from .interpreter import run_in_interpreter

CAPABILITIES = [(7, 5), (8, 0), (8, 6), HOPPER, (10, 0), (12, 0)]
PRECISIONS = [BF16, FP16, FP32]
KIB = 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDTHS = (64, 256, 257, 512)
SOME = Tiles(64, 64, *[Tile(32, 4, 1)] * len(KERNELS))


def name_of(row: Row) -> str:
    """ "any-bfloat16-64-any-grouped"."""
    architecture = "any" if row.architecture is None else f"sm{row.architecture[0]}{row.architecture[1]}"
    precision = "any" if row.precision is None else str(row.precision).removeprefix("torch.")
    grouped = {None: "any", True: "grouped", False: "single"}[row.grouped]
    return f"{architecture}-{precision}-{row.slots}-{row.width or 'any'}-{grouped}"


def problems():
    """(architecture, precision, slots, width, query heads a group) of everything the backend takes, at every limit."""
    return product(CAPABILITIES, PRECISIONS, range(1, MAX_SLOTS + 1), WIDTHS, (1, 2, 8))


def most_shared(row: Row, precision: torch.dtype, M: int, R: int) -> int:
    cut = row.tiles.C, row.tiles.BT
    return max(tiles.shared_bytes(name, getattr(row.tiles, name), *cut, precision, M, R) for name in KERNELS)


if not INTERPRETED:

    def test_every_problem_has_a_row_and_every_row_a_problem():
        used = [find_row(*problem) for problem in problems()]
        assert {id(row) for row in used} == {id(row) for row in TABLE}
        for row, (architecture, precision, M, width, R) in zip(used, problems(), strict=True):
            assert row.architecture in (None, architecture)
            assert row.precision in (None, precision)
            assert row.slots >= M
            assert row.width is None or row.width >= width
            assert row.grouped in (None, R > 1)

    def test_a_row_of_an_architecture_comes_before_those_of_any():
        known = [row.architecture is not None for row in TABLE]
        assert known == sorted(known, reverse=True)

    @pytest.mark.parametrize("row", TABLE, ids=name_of)
    def test_sizes_are_those_that_kernels_can_take(row):
        # References for strong gates are those of groups of 32 tokens; a product on tensor cores at least 16 rows.
        assert row.tiles.BT in (32, 64, 128)
        for kernel in KERNELS:
            tile = getattr(row.tiles, kernel)
            assert tile.BD in (16, 32, 64, 128, 256)
            assert tile.warps in (1, 2, 4, 8)
            assert 1 <= tile.stages <= 5
            assert tile.registers in (128, 168, 255)
            # Narrower operands of Hopper's products, of 64 rows and 16 bits, are compiled wrongly: see `choose`.
            if row.architecture == HOPPER and row.precision != FP32 and row.tiles.BT >= 64:
                assert tile.BD >= 64
        assert row.reason

    @pytest.mark.parametrize("precision", PRECISIONS, ids=str)
    def test_shared_memory_suffices(precision):
        for M, width, R in product((1, 16, 17, 64, 65, 128, 129, MAX_SLOTS), WIDTHS, (1, 2, 8)):
            assert most_shared(find_row(HOPPER, precision, M, width, R), precision, M, R) <= 227 * KIB, (M, width, R)
            elsewhere = most_shared(find_row((8, 6), precision, M, width, R), precision, M, R)
            fits_consumer_cards = M <= 64 or (M <= 128 and (precision == BF16 or R == 1))
            assert elsewhere <= (96 if fits_consumer_cards else 216) * KIB, (M, R)

    def test_the_estimate_of_shared_memory_covers_what_compilers_take():
        """Bytes that Triton 3.6 reported for capability 9.0."""
        for kernel, cut, tile, precision, M, R, taken in [
            ("states", (128, 64), Tile(128, 4, 3), BF16, 64, 1, 155_648),
            ("states", (64, 64), Tile(64, 8, 2), BF16, 256, 1, 98_304),
            ("states_backward", (64, 64), Tile(64, 4, 3), BF16, 64, 4, 49_152),
            ("outputs", (128, 64), Tile(64, 4, 3), BF16, 64, 1, 114_688),
            ("outputs", (64, 64), Tile(128, 4, 1, 168), BF16, 64, 2, 57_344),
            ("outputs", (64, 64), Tile(64, 8, 2), BF16, 256, 1, 163_840),
            ("values_backward", (128, 64), Tile(64, 4, 3), BF16, 64, 1, 114_688),
            ("inputs_backward", (128, 64), Tile(64, 4, 2), BF16, 64, 1, 114_688),
            ("inputs_backward", (64, 64), Tile(64, 4, 2), BF16, 64, 2, 90_112),
            ("inputs_backward", (64, 64), Tile(64, 8, 2), BF16, 128, 2, 147_456),
            ("inputs_backward", (64, 64), Tile(64, 8, 1), BF16, 256, 1, 163_840),
            ("inputs_backward", (32, 32), Tile(32, 8, 1), FP32, 256, 2, 233_472),
            ("inputs_backward", (32, 32), Tile(16, 8, 1), FP32, 256, 2, 215_040),
            ("inputs_backward", (32, 32), Tile(32, 4, 1), FP32, 64, 2, 61_440),
        ]:
            estimate = tiles.shared_bytes(kernel, tile, *cut, precision, M, R)
            assert taken <= estimate <= 1.5 * taken, (kernel, cut, tile, estimate)

    @pytest.mark.parametrize(("K", "V", "width"), [(512, 512, 128), (100, 3, 128), (0, 33, 64), (1, 1, 64)])
    def test_no_slice_is_wider_than_heads(K, V, width):
        chosen = tiles.choose(BF16, K, V, 64, 1, torch.device("cpu"))
        assert max(getattr(chosen, kernel).BD for kernel in KERNELS) == width
        assert chosen.C == find_row(HOPPER, BF16, 64, max(K, V), 1).tiles.C

    def test_tiles_in_use_hold_for_all_problems_and_threads_until_the_end():
        def found():
            return tiles.choose(BF16, 512, 512, 64, 1, torch.device("cpu"))

        before, there = found(), []
        with tiles.using(SOME):
            with tiles.using(before):
                assert found() == before
            # Backward passes run in threads of autograd's.
            thread = threading.Thread(target=lambda: there.append(found()))
            thread.start()
            thread.join()
        assert there == [SOME]
        with pytest.raises(ZeroDivisionError), tiles.using(SOME):
            raise ZeroDivisionError
        assert found() == before != SOME

    @pytest.fixture
    def asked(monkeypatch):
        """A machine with an old and a new GPU, and what was asked of it."""
        asked = []

        def capability(device):
            asked.append(str(device))
            return {0: (8, 6), 1: HOPPER}[device.index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        tiles._capability.cache_clear()
        yield asked
        tiles._capability.cache_clear()

    def test_each_device_is_asked_for_its_architecture_once(asked):
        for _ in range(3):
            chosen = [tiles.choose(FP32, 64, 64, 100, 1, torch.device(f"cuda:{i}")) for i in (0, 1)]
        assert chosen == [find_row((8, 6), FP32, 100, 64, 1).tiles, find_row(HOPPER, FP32, 100, 64, 1).tiles]
        assert asked == ["cuda:0", "cuda:1"]
        # Without memory: what is compiled for the current device.
        assert tiles.architecture(torch.device("meta")) == (8, 6)
        assert tiles.architecture(torch.device("cpu")) == HOPPER

    def test_tensors_without_memory_get_the_tiles_of_their_device(asked):
        """torch.compile sizes what kernels share by them."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            q = torch.empty(1, device="cuda:0", dtype=BF16)
            assert tiles.choose(q.dtype, 64, 64, 64, 1, q.device) == find_row((8, 6), BF16, 64, 64, 1).tiles

    @pytest.mark.timeout(1800)
    def test_in_the_interpreter():
        run_in_interpreter(__file__)

    def on_gpu():
        """Every row in its precisions, with its most slots, and with grouped queries if it is for them."""
        for row, precision in product(TABLE, PRECISIONS):
            R = 1 if row.grouped is False else 2
            if find_row(row.architecture or (8, 6), precision, row.slots, row.width or 512, R) is row:
                yield pytest.param(row, precision, R, id=f"{name_of(row)}-{str(precision).removeprefix('torch.')}")

    @pytest.mark.gpu
    @pytest.mark.parametrize(("row", "precision", "R"), on_gpu())
    def test_right_on_a_gpu(row, precision, R):
        from flash_gsa.benchmarking.tune_kernels import FIELDS, recorded

        from .judge import verdict

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if row.architecture not in (None, tiles.architecture(torch.device("cuda:0"))):
            pytest.skip(f"for devices of capability {row.architecture}")
        case = Case(T=2 * row.tiles.C + 5, B=1, HQ=R, H=1, K=256, V=row.width or 264, M=row.slots)
        x = rounded(make(case), precision)
        with tiles.using(row.tiles), recorded() as launches:
            result = run("triton", x, case, "cuda")
        verdict(result, x, case)
        for launch in launches:
            if kernel := FIELDS.get(launch.name):
                tile = getattr(row.tiles, kernel)
                estimate = tiles.shared_bytes(kernel, tile, row.tiles.C, row.tiles.BT, precision, row.slots, R)
                assert launch.compiled.metadata.shared <= estimate, kernel

else:

    def sizes(row: Row) -> tuple:
        """What of a row matters in the interpreter."""
        widths = (getattr(row.tiles, kernel).BD for kernel in KERNELS)
        return row.tiles.C, row.tiles.BT, bool(row.grouped), *widths

    @pytest.mark.parametrize("row", {sizes(row): row for row in TABLE}.values(), ids=name_of)
    def test_right_with_its_tiles(row):
        widest = max(getattr(row.tiles, kernel).BD for kernel in KERNELS)
        # V takes two slices, K one; the second chunk is a short one, of less than a block.
        case = Case(T=row.tiles.C + 3, B=1, HQ=1 if row.grouped is False else 2, H=1, K=9, V=widest + 4, M=5)
        x = make(case)
        with tiles.using(row.tiles):
            result = run("triton", x, case)
        check(result, x, case)
