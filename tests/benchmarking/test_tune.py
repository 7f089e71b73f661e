"""What is tried, what wins, and what is told of it; on a made-up GPU, and compiled for one that is not there."""

import ast
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from flash_gsa.benchmarking import tune_kernels
from flash_gsa.benchmarking.tune import Options, tune
from flash_gsa.benchmarking.tune_candidates import WORKLOADS, best, groups, row_text
from flash_gsa.benchmarking.tune_kernels import NO_TIME, Machine
from flash_gsa.errors import UsageError
from flash_gsa.ops.triton import tiles
from flash_gsa.ops.triton.tiles import HOPPER, KERNELS, TABLE, Tile, Tiles, find_row

from .made_up import ABOUT

KIB = 1024
FASTEST = Tile(128, 4, 2)
OLD, NEW = (8, 6), HOPPER


def cut_of(used):
    return used.C, used.BT


def seconds(workload, cut, tile):
    """Kernels like `FASTEST` best, and C 64 as one block."""
    distance = (
        abs(math.log2(tile.BD / FASTEST.BD)) + abs(tile.warps - FASTEST.warps) + abs(tile.stages - FASTEST.stages)
    ) + abs(tile.registers - FASTEST.registers) / 100
    return 1e-4 * (1 + 0.1 * distance) * (1 if cut == (64, 64) else 1.3) * workload.shape.K / 512


class MadeUpMachine:
    """Answers at once, the same time every round but for `noise`: seconds added in every other round.

    `wrong`: tiles whose results are wrong; `compiled`: how many candidates there is time to compile (None: all);
    `asked` and `whole` collect what was timed.
    """

    jobs = 4

    def __init__(self, architecture=NEW, wrong=(), noise=0.0, compiled=None):
        self.architecture, self.wrong, self.noise, self.compiled = architecture, wrong, noise, compiled
        self.asked, self.whole, self.limit = [], [], 227 * KIB if architecture == NEW else 99 * KIB

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        pass

    def describe(self, command, commit):
        return {
            "about": ABOUT | {"command": command, "commit": commit},
            "architecture": list(self.architecture),
            "shared_bytes": self.limit,
            "target": ("cuda", 10 * self.architecture[0] + self.architecture[1], 32),
        }

    def compile(self, tasks, until):
        return [self._compile(i, *task) for i, task in enumerate(tasks)]

    def _compile(self, i, target, workload, used, kernel):
        if self.compiled is not None and i >= self.compiled:
            return {"problem": NO_TIME}
        tile = getattr(used, kernel)
        return {"problem": None, "shared_bytes": 500 * tile.BD * tile.stages, "compile_seconds": 1.0}

    def time_kernel(self, workload, used, kernel, reference, until):
        tile = getattr(used, kernel)
        self.asked.append((workload.name, cut_of(used), kernel, tile, reference))
        record = {"problem": None, "registers": 128, "spills": 0, "shared_bytes": 4096, "distance": 1e-3}
        if tile in self.wrong:
            return record | {"problem": "wrong: 9.9e-01 from the others", "distance": 0.99}
        again = len([a for a in self.asked if a[:4] == self.asked[-1][:4]]) - 1
        return record | {"seconds": seconds(workload, cut_of(used), tile) + again * self.noise}

    def time_whole(self, workload, used, until):
        self.whole.append((workload.name, used))
        total = sum(seconds(workload, cut_of(used), getattr(used, kernel)) for kernel in KERNELS)
        return {"problem": None, "forward": total / 3, "forward_backward": total, "peak_bytes": 2**20}


def tuned(machine, **options):
    lines = []
    result = tune(Options(**options), say=lines.append, machine=machine)
    return result, "\n".join(lines)


def test_there_is_a_shape_for_every_row_of_the_tuned_architecture():
    found = groups((), NEW)
    rows = [row for row in TABLE if row.architecture == HOPPER]
    assert sorted(map(id, (g.model for g in found))) == sorted(map(id, rows))
    assert all(group.before is group.model for group in found)
    assert sum(len(group.workloads) for group in found) == len(WORKLOADS)
    for group in groups((), OLD):
        assert group.before.architecture is None
        for workload in group.workloads:
            assert find_row(OLD, workload.dtype, workload.shape.M, workload.width, workload.group) is group.before


@pytest.mark.parametrize("architecture", [OLD, NEW])
def test_candidates_begin_with_the_rows_there_are_and_fit_the_device(architecture):
    for group in groups((), architecture):
        assert group.chunks[0] == cut_of(group.before.tiles)
        assert cut_of(group.model.tiles) in group.chunks
        for kernel in KERNELS:
            found, left_out = group.candidates(kernel, group.chunks[0], 99 * KIB)
            assert found[0] == getattr(group.before.tiles, kernel)
            assert getattr(group.model.tiles, kernel) in found[:2]
            assert len(set(found)) == len(found)
            everything, none = group.candidates(kernel, group.chunks[0], 10**9)
            assert none == 0
            assert len(everything) == len(found) + left_out
            for tile in found[2:]:
                for w in group.workloads:
                    taken = tiles.shared_bytes(kernel, tile, *group.chunks[0], w.dtype, w.shape.M, w.group)
                    assert taken <= 2 * 99 * KIB
                    assert max(w.shape.K, w.shape.V) >= tile.BD


def test_the_first_candidates_are_those_nearest_to_the_row():
    (group,) = groups(("7B",), NEW)
    found, _ = group.candidates("states", (64, 64), 227 * KIB)
    assert found[0] == Tile(64, 4, 3)
    sizes = (128, 4, 3), (64, 8, 3), (64, 4, 2), (64, 4, 4), (64, 4, 3, 168)
    assert set(found[1:6]) == {Tile(*size) for size in sizes}


@pytest.mark.parametrize("name", ["7B", "1.3B-fp16"])
def test_what_is_compiled_wrongly_is_not_tried(name):
    """Slices below 64 in 16-bit formats, of blocks of 64 tokens; the check of values would not meet it."""
    (group,) = groups((name,), NEW)
    for cut, least in (((64, 64), 64), ((128, 64), 64), ((32, 32), 16 if name == "1.3B-fp16" else 32)):
        assert min(tile.BD for kernel in KERNELS for tile in group.candidates(kernel, cut, 10**9)[0]) == least


def test_chunks_of_one_and_of_two_blocks_are_tried():
    ((single,), (grouped,)) = (groups((name,), NEW) for name in ("1.3B", "7B"))
    assert single.chunks == ((128, 64), (64, 64), (64, 32))
    assert grouped.chunks == ((64, 64), (64, 32), (128, 64), (32, 32))


def test_the_best_is_fastest_over_all_shapes():
    a, b, c = "abc"
    measured = {a: {"x": [1, 1], "y": [9, 9]}, b: {"x": [2, 2], "y": [4, 4]}, c: {"x": [0.1, 0.1]}}
    # c was not measured on y; a·a is 9, b·b 8.
    assert best(measured) == b
    assert best(measured, before=a) == b
    assert best({a: {"x": [1.0]}}) is None
    assert best({}) is None


def test_what_there_is_stays_unless_something_is_faster_in_every_round():
    a, b, c = "abc"
    measured = {a: {"x": [1.0, 1.1]}, b: {"x": [0.9, 1.01]}, c: {"x": [1.2, 1.3]}}
    assert best(measured, before=a) == a
    assert best(measured | {b: {"x": [0.9, 0.99]}}, before=a) == b
    assert best(measured, before=None) == b


def test_the_fastest_tiles_and_cut_win():
    machine = MadeUpMachine()
    result, told = tuned(machine, shapes=("1.3B", "1.3B-long"))
    (found,) = result["groups"]
    assert (found["chosen"]["C"], found["chosen"]["BT"]) == (64, 64)
    assert all(found["chosen"][kernel] == asdict(FASTEST) for kernel in KERNELS)
    assert (found["before"]["C"], found["before"]["BT"]) == (128, 64)
    assert {(c["C"], c["BT"]) for c in found["candidates"]} == {(128, 64), (64, 64), (64, 32)}
    assert "Paste into TABLE of flash_gsa/ops/triton/tiles.py" in told
    assert told.endswith(found["row"])
    assert "1.3B 8×2048 bfloat16, 1.3B-long 1×16384 bfloat16: C 128 by 64, 64, 64 by 32\n" in told
    assert "the row there is stays" not in told
    assert "100.0 to 100.0 µs   (128, 4, 2)   128 registers, 0 spilled, 4,096 B shared" in told
    assert "the row there is" in told
    # Whole calls decide: what there was, and the best of every cut, on both shapes, twice.
    assert len(machine.whole) == 2 * 2 * len({used for _, used in machine.whole}) == 2 * 2 * 4
    times = [c["seconds"] for c in found["candidates"] if not c["problem"]]
    assert {len(t) for t in times} == {2}
    assert result["about"]["device"] == "made-up GPU"
    assert found["workloads"][0]["workload"] == "1.3B"


def test_a_printed_row_is_a_row_of_the_table():
    result, _ = tuned(MadeUpMachine(OLD), shapes=("7B", "GLA-1.3B"))
    assert len(result["groups"]) == 2
    for found, group in zip(result["groups"], groups(("7B", "GLA-1.3B"), OLD), strict=True):
        (row,) = eval(f"({found['row']})", vars(tiles))
        assert row.architecture == OLD
        kept = ("precision", "slots", "width", "grouped")
        assert [vars(row)[name] for name in kept] == [vars(group.model)[name] for name in kept]
        assert {name: vars(row.tiles)[name] for name in KERNELS} == {
            name: Tile(**found["chosen"][name]) for name in KERNELS
        }
        assert (found["chosen"]["C"], found["chosen"]["BT"]) == cut_of(row.tiles)
        assert "made-up GPU" in row.reason
        assert group.workloads[0].name in row.reason


@pytest.mark.parametrize("row", TABLE[:3])
def test_rows_are_printed_as_the_table_has_them(row):
    (again,) = eval(f"({row_text(HOPPER, row, row.tiles, row.reason)})", vars(tiles))
    assert again == row


def test_a_kernel_alone_keeps_the_cut_and_all_else():
    machine = MadeUpMachine()
    result, _ = tuned(machine, shapes=("1.3B",), kernels=("outputs",))
    (found,) = result["groups"]
    assert {(cut, kernel) for _, cut, kernel, _, _ in machine.asked} == {((128, 64), "outputs")}
    assert found["chosen"] == found["before"] | {"outputs": asdict(FASTEST)}


def test_noise_moves_nothing():
    """Every second round is slower than what the best could gain."""
    result, told = tuned(MadeUpMachine(noise=1e-3), shapes=("7B",))
    assert result["groups"][0]["chosen"] == result["groups"][0]["before"]
    assert result["groups"][0]["row"] is None
    assert "the row there is stays" in told
    assert "Paste" not in told


def test_a_new_card_gets_a_row_even_if_nothing_is_faster():
    result, _ = tuned(MadeUpMachine(OLD, noise=1e-3), shapes=("7B",))
    (found,) = result["groups"]
    assert found["chosen"] == found["before"]
    assert found["row"].startswith("    Row((8, 6), BF16, 64, ANY, GROUPED,")


def test_what_is_wrong_or_too_large_is_listed_and_does_not_win():
    machine = MadeUpMachine(wrong=[FASTEST])
    machine.limit = 150_000
    result, told = tuned(machine, shapes=("7B",))
    (found,) = result["groups"]
    assert all(found["chosen"][kernel] != asdict(FASTEST) for kernel in KERNELS)
    assert "failed: (128, 4, 2): wrong: 9.9e-01 from the others" in told
    too_large = "out of shared memory: 192,000 of 150,000 B"
    lines = {line for line in told.splitlines() if line.strip().startswith("failed: (128, 4, 3) ")}
    (line,) = (line for line in lines if too_large in line)
    assert "(128, 8, 3)" in line
    assert any(c["problem"] == too_large and not c["seconds"] for c in found["candidates"])
    assert not any(tile == Tile(128, 4, 3) for _, _, _, tile, _ in machine.asked)


def test_candidates_stand_among_tiles_that_run_and_are_compared_with_one_reference():
    machine, row = MadeUpMachine(), groups(("7B",), NEW)[0].before
    machine.limit = 90_000  # the row's own walks do not run
    assert 500 * row.tiles.states.BD * row.tiles.states.stages > machine.limit
    tuned(machine, shapes=("7B",))
    references = {reference for *_, reference in machine.asked}
    assert len(references) == 1
    (reference,) = references
    assert isinstance(reference, Tiles)
    assert all(500 * getattr(reference, k).BD * getattr(reference, k).stages <= machine.limit for k in KERNELS)


def test_what_time_leaves_decides():
    result, told = tuned(MadeUpMachine(compiled=40), shapes=("7B",))
    (found,) = result["groups"]
    assert sum(c["problem"] == NO_TIME for c in found["candidates"]) == len(found["candidates"]) - 40
    # Each kernel and cut got its likeliest tiles first.
    first = found["candidates"][:20]
    assert len({(c["kernel"], c["C"], c["BT"]) for c in first}) == 20
    assert found["chosen"] is not None
    assert f"{len(found['candidates']) - 40} not compiled in time" in told


def test_nothing_in_time_is_no_row():
    result, told = tuned(MadeUpMachine(compiled=0), shapes=("7B",))
    assert all(not c["seconds"] for c in result["groups"][0]["candidates"])
    assert "the row there is stays" in told


def test_the_budget_is_shared_among_rows():
    class Watched(MadeUpMachine):
        def compile(self, tasks, until):
            self.left.append(until - time.monotonic())
            return super().compile(tasks, until)

    machine = Watched(compiled=0)
    machine.left = []
    tuned(machine, shapes=("7B", "1.3B"), budget=100)
    assert machine.left[0] == pytest.approx(25, abs=3)
    assert machine.left[1] == pytest.approx(50, abs=3)


def test_the_result_is_written(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    result = tune(
        Options(shapes=("7B",), command="flash-gsa bench tune --shape 7B", commit="0123abc"),
        path,
        lambda line: None,
        MadeUpMachine(),
    )
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["about"]["command"] == "flash-gsa bench tune --shape 7B"
    assert written["about"]["commit"] == "0123abc"
    assert written["architecture"] == [9, 0]
    assert written["groups"][0]["row"] == result["groups"][0]["row"]
    assert written["groups"][0]["candidates"][0]["seconds"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernels": ("output",)}, "Did you mean 'outputs'?"),
        ({"budget": 0}, "budget is 0"),
        ({"jobs": 0}, "jobs is 0"),
        ({"shapes": ("1.2B",)}, "Did you mean '1.3B'?"),
    ],
)
def test_mistakes_are_told(options, words):
    with pytest.raises(UsageError) as told:
        tune(Options(**options), say=print, machine=MadeUpMachine())
    assert words in str(told.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UsageError, match="on a CUDA device and found none; run it where there is one"):
        tune(Options())


def test_distances_tell_what_is_not_a_number():
    one, nan = {"o": torch.ones(3)}, {"o": torch.tensor([1.0, math.nan, 1.0])}
    assert tune_kernels._distance(one, one) == 0
    assert tune_kernels._distance({"o": 2 * torch.ones(3)}, one) == 1
    assert math.isnan(tune_kernels._distance(nan | {"dq": one["o"]}, one | {"dq": one["o"]}))


# Compiled for a GPU that is not there, in processes as the command starts them.
PROGRAM = """
import time, torch
from dataclasses import replace
from flash_gsa.benchmarking.tune_candidates import WORKLOADS
from flash_gsa.benchmarking.tune_kernels import Machine
from flash_gsa.ops.triton.tiles import Tile

if __name__ == "__main__":
    torch.cuda.is_available = lambda: True
    with Machine(1) as machine:
        (workload,) = (w for w in WORKLOADS if w.name == "1.3B")
        good = workload.row((8, 0)).tiles
        bad = replace(good, outputs=Tile(48, 4, 1))
        tasks = [
            (("cuda", 80, 32), workload, used, kernel)
            for kernel, used in (("outputs", bad), ("states", good), ("inputs_backward", replace(good, C=128)))
        ]
        print(machine.compile(tasks, time.monotonic() + 100))
        print(machine.compile(tasks, time.monotonic() - 1))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")
    folder = tmp_path_factory.mktemp("tune")
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(folder / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()], folder / "cache"


def test_kernels_are_compiled_without_a_gpu_and_left_in_the_cache(compiled):
    (failed, states, inputs), cache = compiled[0][0], compiled[1]
    # Slices are powers of two wide; a failure costs nothing but itself.
    assert failed["problem"].startswith("CompilationError")
    for record, kernel, cut in ((states, "states", (64, 64)), (inputs, "inputs_backward", (128, 64))):
        assert record["problem"] is None
        assert 0 < record["shared_bytes"] <= tiles.shared_bytes(kernel, Tile(64, 4, 2), *cut, torch.bfloat16, 64, 1)
    for name in ("states_forward", "inputs_backward"):
        assert list(cache.rglob(f"{name}.cubin"))


def test_nothing_is_compiled_after_the_end(compiled):
    assert [record["problem"] for record in compiled[0][1]] == [NO_TIME] * 3


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Two candidates of one kernel, through processes, checks, timing and the final decision."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lines = []
    options = Options(shapes=("340M",), kernels=("states",), budget=90, jobs=4)
    result = tune(options, tmp_path / "tiles.json", lines.append, Machine(4))
    (found,) = result["groups"]
    timed = [c for c in found["candidates"] if len(c["seconds"]) == 2]
    assert len(timed) > 1
    for candidate in timed:
        assert candidate["distance"] < tune_kernels.TOLERANCE["bfloat16"]
        assert 0 < candidate["registers"] <= 255
    assert found["chosen"] is not None
