"""The table of the operator says what the result file says, and names what has no figures."""

import json

from benchmarks import render
from benchmarks.operator_table import lengths, operator, summary
from flash_gsa.benchmarking.report import combined
from tests.benchmarking.made_up import made_up_result


def rows(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if "---" not in row[0]]


def test_times_memory_and_ratios(monkeypatch):
    text = operator(made_up_result(monkeypatch, command="flash-gsa bench op"))
    heading, forward, backward, *rest = rows(text)
    assert heading == [
        *("ms", "", "least", "flash-gsa", "FLA", "softmax, cuDNN", "softmax, flash", "faster than FLA"),
        *("MiB, flash-gsa", "MiB, FLA"),
    ]
    # 16384 tokens at 10 ns each, and 1000 bytes each at 1 TB/s.
    assert forward == ["1.3B-8x2048", "forward", "0.0164", "0.164", "0.819", "0.328", "0.0819", "**5.0×**", "1", "1"]
    assert backward[1:5] == ["+ backward", "0.0492", "0.492", "2.46"]
    assert backward[8:] == ["4", "4"]
    assert "in a CUDA graph:" not in text
    graphs = next(i for i, row in enumerate(rest) if row[0] == "ms, in a CUDA graph")
    softmax = ["softmax, cuDNN", "softmax, flash"]
    assert rest[graphs] == ["ms, in a CUDA graph", "", "flash-gsa", "FLA", *softmax, "faster than FLA"]
    assert rest[graphs + 1] == ["1.3B-8x2048", "forward", "0.164", "0.819", "0.328", "0.0819", "**5.0×**"]
    (first, second), *_ = [rest[i : i + 2] for i, row in enumerate(rest) if i > graphs and row[0] == "340M-8x2048"]
    assert first == ["340M-8x2048", "forward", "0.164", "–", "0.328", "0.0819", "–"]  # FLA's values were wrong there
    assert second[1:] == ["+ backward", "0.492", "–", "0.983", "0.246", "–"]
    by_name = {row[0]: row for row in reversed(rest) if row[0]}
    assert by_name["7B-4x4096"][6] == "failed"
    assert by_name["340M-8x2048"][4] == "wrong"
    assert by_name["340M-8x2048"][7] == "–"
    assert "softmax, flash at 7B-4x4096: failed: out of memory." in text
    assert "FLA at 340M-8x2048: wrong: dg is off by 2.0e-01" in text
    steps = {tuple(row[:2]): row[2:] for row in rest if "states in" in row[0]}
    assert len(steps) == 2 * 2 * 5
    # 64 sequences of 4 heads with 64 slots of 1024 numbers, read and written at 1 TB/s.
    assert steps["1.3B, states in float32", "64"] == ["57.6", "64.0", "320.0", "134.2", "0.48"]
    assert steps["1.3B, states in bfloat16", "64"] == ["57.6", "64.0", "–", "67.1", "0.95"]
    assert "takes 20 s with empty caches and 5 s with filled ones" in text
    assert "1,000 GB/s" in text
    assert text.splitlines()[-1].startswith("`flash-gsa bench op` · made-up GPU")


def test_what_no_graph_could_be_made_of_is_told(monkeypatch):
    result = made_up_result(monkeypatch)
    for record in result["shapes"]:
        if record["implementation"] == "fla" and record.pop("in_graph", None):
            record["graph_problem"] = "it waits"
        elif record["implementation"].startswith("sdpa"):
            record.pop("in_graph", None)
    text = operator(result)
    assert "FLA at 7B-4x4096 in a CUDA graph: it waits." in text
    assert "| ms, in a CUDA graph |  | flash-gsa | faster than FLA |" in text  # a column for those that have times


def test_the_summary_is_one_line_a_shape(monkeypatch):
    heading, first, *rest = rows(summary(made_up_result(monkeypatch)))
    assert heading == [
        *("forward + backward, ms", "flash-gsa", "FLA", "", "softmax, cuDNN", "", "softmax, flash", ""),
        *("flash-gsa, in a CUDA graph", "FLA, in a CUDA graph", "", "MiB"),
    ]
    eager = ["1.3B-8x2048", "0.492", "2.46", "**5.0×**", "0.983", "**2.0×**", "0.246", "**0.5×**"]
    assert first == [*eager, "0.492", "2.46", "**5.0×**", "4"]
    by_name = {row[0]: row for row in rest}
    assert by_name["7B-4x4096"][6:8] == ["failed", "–"]
    assert by_name["340M-8x2048"][2:4] == ["wrong", "–"]


def test_what_another_command_measured_takes_its_place(monkeypatch):
    whole = made_up_result(monkeypatch, command="the first")
    later = made_up_result(monkeypatch, command="the second")
    later["shapes"] = [r for r in later["shapes"] if r["shape"]["label"] == "7B-4x4096"]
    for record in later["shapes"]:
        cost = {"seconds": 7e-3, "peak_bytes": 3 * 2**20, "least_seconds": 1e-3}
        record |= {"forward": cost, "forward_backward": cost, "problem": None}
        record.pop("in_graph", None)
    later["cold_start"][0]["first"]["seconds"] = 3.0
    first_length = later["lengths"][0]["shape"]["label"]
    later["lengths"] = later["lengths"][:1]
    later["decoding"] = [later["decoding"][0] | {"seconds": 123e-6}]
    found = combined(whole, later)
    assert [r["shape"]["label"] for r in found["lengths"]] == [first_length]
    by_name = {row[0]: row for row in rows(summary(found))}
    assert by_name["1.3B-8x2048"][1] == "0.492"
    assert by_name["7B-4x4096"][1:4] == ["7.00", "7.00", "**1.0×**"]
    assert by_name["7B-4x4096"][-4:] == ["–", "–", "–", "3"]
    text = operator(found)
    assert "takes 3 s with empty caches" in text
    assert [r["seconds"] for r in found["decoding"]] == [123e-6]
    assert "| 123.0 |" in text
    assert [line.split("`")[1] for line in text.splitlines()[-3:] if line] == ["the first", "the second"]
    # A later one in which there was no time left says nothing of the start.
    later["cold_start"] = [later["cold_start"][0] | {"problem": "not run: no time left"}]
    later["lengths"] = [later["lengths"][0] | {"problem": "not run: no time left"}]
    assert combined(whole, later)["lengths"] == whole["lengths"]
    assert "takes 20 s with empty caches" in operator(combined(whole, later))
    assert whole["shapes"] != found["shapes"], "the first is left as it was"


def test_layers_beside_their_projections_and_what_surrounds_the_operator(monkeypatch):
    text = operator(made_up_result(monkeypatch, only=("ceilings", "layer")))
    heading, forward, backward, *rest = rows(text)
    assert heading == [
        *("ms", "", "projections", "flash-gsa", "flash-gsa, separate", "FLA"),
        *("MiB, flash-gsa", "MiB, flash-gsa, separate", "MiB, FLA"),
    ]
    assert forward == ["1.3B-8x2048, the layer", "forward", "0.0410", "0.164", "0.246", "0.819", "1", "1", "1"]
    assert backward == ["", "+ backward", "0.123", "0.492", "0.737", "2.46", "4", "4", "4"]
    assert rest[2][0] == "340M-8x2048, the layer"
    assert rest[2][5] == "wrong"
    assert "FLA at 340M-8x2048, the layer: wrong: dg is off" in text
    heading, forward, backward, *_ = rest[4:]
    assert heading == ["ms, the layer in a CUDA graph", *("", "projections", "flash-gsa", "flash-gsa, separate", "FLA")]
    assert forward == ["1.3B-8x2048", "forward", "0.0410", "0.164", "0.246", "0.819"]
    assert backward == ["", "+ backward", "0.123", "0.492", "0.737", "2.46"]
    assert rest[9][0] == "340M-8x2048"
    assert rest[9][5] == "–"
    # 1000 bytes a token in 10 ns, where a copy moves 1 TB/s.
    heading, forward, backward, *_ = rest[11:]
    assert heading == ["ms", "", "flash-gsa", "GB/s (of a copy)", "flash-gsa, separate", "GB/s (of a copy)"]
    assert forward == ["1.3B-8x2048, SiLU of q, k, v", "forward", "0.164", "100 (10%)", "0.246", "66.7 (7%)"]
    assert backward[1:3] == ["+ backward", "0.492"]
    text = operator(made_up_result(monkeypatch, only=("layer",)))
    assert "| 100 |" in text
    text = operator(made_up_result(monkeypatch, only=("layer",), peers=("fla",)))
    assert rows(text)[0] == ["ms", "", "projections", "FLA", "MiB, FLA"]


def test_states_computed_again_have_a_table_of_their_own(monkeypatch):
    text = operator(made_up_result(monkeypatch, only=("ceilings", "shapes")))
    heading, first, *_ = rows(text[text.index("| forward + backward, ms |") :])
    assert heading == [
        *("forward + backward, ms", "flash-gsa", "flash-gsa, recompute"),
        *("MiB, flash-gsa", "MiB, flash-gsa, recompute", "MiB, FLA"),
    ]
    assert first == ["1.3B-8x2048", "0.492", "0.614", "4", "3", "4"]
    assert "recompute" not in rows(text)[0]
    assert "recompute" not in operator(made_up_result(monkeypatch, peers=("auto", "fla")))


def test_time_a_token_against_the_length(monkeypatch):
    result = made_up_result(monkeypatch, only=("lengths",), peers=("auto",))
    text = lengths(result)
    found = {row[0]: row[1:] for row in rows(text)}
    assert found["ns a token, sequences of"] == [
        *("forward: one", "one, in a graph", "65,536 tokens"),
        *("+ backward: one", "one, in a graph", "65,536 tokens"),
    ]
    # 10 ns a token, and of a short sequence 20 µs of the host.
    assert found["2,048"] == ["19.8", "10.0", "10.0", "59.3", "30.0", "30.0"]
    assert found["65,536"] == ["10.0", "", "10.0", "30.0", "", "30.0"]
    assert found["524,288"] == ["10.0", "", "", "30.0", "", ""]
    assert "one sequence (10% and more above its graph): forward up to 16,384 tokens, + backward up to 16,384" in text
    assert found["all of these"] == ["0.0 %", "0.0 %"]
    for record in result["lengths"]:
        cut = record["shape"]["T"] == 4096 and record["shape"]["B"] == 16
        long = record["shape"]["T"] == 262144
        record["forward"]["seconds"] *= 1.2 if cut or record["shape"]["T"] < 2048 else 0.8 if long else 1
    found = {row[0]: row[1:] for row in rows(lengths(result))}
    assert found["65,536 tokens, cut into sequences"] == ["20.0 %", "0.0 %"]
    assert found["one sequence of 65,536 or more"] == ["25.0 %", "0.0 %"]
    assert found["all of these"] == ["50.0 %", "0.0 %"]


def test_lengths_without_graphs(monkeypatch):
    result = made_up_result(monkeypatch, only=("lengths",), peers=("auto",))
    for record in result["lengths"]:
        record.pop("in_graph", None)
    text = lengths(result)
    assert rows(text)[0][1:] == ["forward: one", "65,536 tokens", "+ backward: one", "65,536 tokens"]
    assert "graph" not in text


def test_parts_that_were_not_measured_are_left_out(monkeypatch):
    text = operator(made_up_result(monkeypatch, only=("decoding",)))
    assert rows(text)[0] == ["µs, one decoding step", "sequences", "copy of the state", "flash-gsa", "FLA"]
    assert [row[:2] for row in rows(text)][1:3] == [["1.3B, states in float32", "1"], ["1.3B, states in float32", "8"]]
    assert "GB/s" not in text
    text = operator(made_up_result(monkeypatch, only=("shapes",), peers=("auto",)))
    assert rows(text)[0] == ["ms", "", "flash-gsa", "MiB, flash-gsa"]


def test_a_block_without_a_result_file_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = "before\n<!-- result: op_gpu -->\nold\n<!-- end -->\nafter\n"
    assert render.rendered(text) == "before\n<!-- result: op_gpu -->\nNot measured yet.\n<!-- end -->\nafter\n"
    result = made_up_result(monkeypatch)
    (tmp_path / "op_gpu.json").write_text(json.dumps(result))
    assert operator(json.loads(json.dumps(result))) in render.rendered(text)
