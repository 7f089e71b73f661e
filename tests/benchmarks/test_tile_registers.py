"""What rows of the tile table compile to: which are asked for, and how it is told. Compiling all takes minutes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make installs it for the tests)")

from benchmarks import render
from benchmarks.hopper import spills
from benchmarks.tile_registers import OTHERS, workloads
from flash_gsa.ops.triton import tiles


def test_every_row_is_compiled_where_it_holds():
    asked = [row for architecture in (tiles.HOPPER, *OTHERS) for row, _ in workloads(architecture)]
    assert {id(row) for row in asked} == {id(row) for row in tiles.TABLE}
    for architecture in (tiles.HOPPER, *OTHERS):
        assert all(workload.row(architecture) is row for row, workload in workloads(architecture))


def test_the_table():
    about = {"command": "compile", "date": "2026-11-27", "commit": "x", "device": "none", "versions": {"triton": "3"}}
    kernel = {"kernel": "outputs", "registers": 255, "spills": 1160, "shared_bytes": 8192, "warps": 4}
    kernel["spills_under_strong_gates"] = 7
    row = {"architecture": [8, 9], "workload": "7B", "precision": str(torch.float16), "slots": 64, "C": 128, "BT": 64}
    other = kernel | {"kernel": "states_forward", "spills": 0}
    kernels = [kernel | {"kernel": "prepare"}, kernel, other]
    text = render.tile_registers(
        {
            "about": about,
            "rows": [
                row | {"measured": True, "kernels": kernels},
                row | {"measured": False, "kernels": kernels[:2], "workload": "GLA"},
            ],
        }
    )
    assert "prepare" not in text
    start = "| 8.9 | 7B, torch.float16, up to 64 slots | 128 / 64 | yes |"
    assert f"{start} 255, 1,160 / 7, 8 KiB | 255, 0 / 7, 8 KiB |" in text
    assert text.count("| no | 255, 1,160 / 7, 8 KiB | – |") == 1


def test_spills_of_a_kernel_and_of_what_it_calls():
    lines = ("STL [R1], R2", "CALL.REL.NOINC 0x40", "LDL R2, [R1]", "EXIT", "STL.64 [R1], R4", "LDG.E R1, [R2]", "RET")
    found = [(16 * i, text) for i, text in enumerate(lines)]
    assert spills(found) == (2, 1)
    assert spills(found[2:4]) == (1, 0)
