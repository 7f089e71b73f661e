"""Tables of decoding: splits that were tried, beside those of the same run alone."""

from benchmarks import decoding_table

ABOUT = {"command": "sweep", "date": "2026-11-27", "commit": "x", "device": "a GPU", "versions": {"torch": "2"}}


def row(run, microseconds, kernel="step_slots", sequences=64, layer="7B", tile=1024, **more):
    sizes = {"query_heads": 8, "heads": 8, "keys": 128, "values": 128}
    split = {"programs": 1, "tile": tile, "warps": 2, "stages": 4}
    return {
        "run": run,
        "commit": "abc",
        "kernel": kernel,
        "layer": layer,
        **sizes,
        **({"slots": 64} if kernel == "step_slots" else {}),
        "sequences": sequences,
        "state": "float32",
        **(split if tile else {}),
        "microseconds": microseconds,
        **more,
    }


def test_splits():
    rows = [
        row(1, [20.0, 19.0], chosen_before=True),
        row(1, [17.0], tile=512, chosen=True),
        row(1, [16.0], tile=256),
        row(2, [9.0], sequences=8, chosen_before=True),  # a run without the split of now
        row(3, [8.0], sequences=8, chosen=True),  # and one without the split before
        row(1, [30.0], "step_linear", chosen_before=True),
        row(1, [15.0], "step_linear", tile=2048, chosen=True),
        row(1, [40.0], "step_linear", layer="GLA", tile=None),
        row(1, [100.0], "PyTorch", layer="GLA", tile=None),
    ]
    text = decoding_table.splits({"about": ABOUT, "bytes_per_second": 1e12, "rows": rows})
    # Read and written, 64 sequences x 8 heads x 64 slots x 256 numbers of 4 bytes: 67.1 MB.
    cells = ["67.1", "19.0 (1 × 1,024 / 2, 4)", "17.0 (1 × 512 / 2, 4)", "16.0 (1 × 256 / 2, 4)", "3"]
    assert f"| 7B, states in float32 | 64 | {' | '.join(cells)} |" in text
    assert "| 8 |" not in text
    # 64 x 8 heads x 128 x 128 numbers.
    cells = ["67.1", "30.0 (1 × 1,024 / 2, 4)", *["15.0 (1 × 2,048 / 2, 4)"] * 2]
    assert f"| 7B | 64 | {' | '.join(cells)} |" in text
    assert "| GLA | 64 | 67.1 | 100.0 | 40.0 | 2.5× |" in text


def test_instructions_stand_beside_what_each_commit_took():
    counted = {"layer": "7B", "state": "float32", "sequences": 64, "registers": 99, "warps": 8, "bytes": 10**9}
    counted |= {"instructions_a_number": 20.0, "issue_seconds": 1e-4, "triton": "3.6.0"}
    result = {"about": ABOUT, "rows": [counted | {"commit": commit} for commit in ("abc", "now", "none")]}
    record = {"implementation": "auto", "problem": None, "state": "float32", "seconds": 3e-5}
    measured = {
        "about": ABOUT | {"commit": "now"},
        "ceilings": {"copy": {"bytes_per_second": 1e13}},
        "decoding": [record | {"shape": {"name": "7B", "B": 64}}],
    }
    sweeps = {"about": ABOUT, "rows": [row(1, [41.0, 40.0], chosen_before=True), row(1, [20.0], chosen=True)]}
    text = decoding_table.instructions(result, measured, sweeps)
    for commit, took in (("abc", "40"), ("now", "30"), ("none", "")):
        assert f"| `{commit}`, Triton 3.6.0 | 7B, states in float32 | 99 | 8 | 20.0 | 100 | 100 | {took} |" in text
