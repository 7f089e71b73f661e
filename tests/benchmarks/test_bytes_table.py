"""Tables of what is counted: sums, times at the speed of a copy, and measurements beside them."""

import pytest

from benchmarks.bytes_table import held, moved

ABOUT = {"command": "count", "date": "2031-01-02", "commit": "new", "device": "a CPU", "versions": {"torch": "2"}}
LABELS = ("1.3B-8x2048", "340M-8x2048")


def counted(label, size):
    kernels = [("states_forward", 3, 1), ("inputs_backward", 5, 2), ("inputs_backward", 4, 2)]
    return {
        "shape": {"label": label},
        "dtype": "bfloat16",
        "C": 128,
        "BT": 64,
        "kernels": [
            {"kernel": name, "read": read * size, "written": written * size} for name, read, written in kernels
        ],
        "forward_alone": {"read": 3 * size, "written": size},
        "once": {"forward": 2 * size, "forward_backward": 6 * size},
        "memory": {"kernel": "inputs_backward", "tensors": {"o": size, "dq": 2 * size}},
        "kept": {"keep": 3 * 2**20, "recompute": 2**19},
    }


def measured(**missing):
    def record(name, label, seconds, peak):
        times = {"forward": {"seconds": seconds}, "forward_backward": {"seconds": 3 * seconds, "peak_bytes": peak}}
        return {"implementation": name, "shape": {"label": label}, "problem": missing.get(name)} | times

    return {
        "about": ABOUT | {"command": "bench", "device": "a GPU"},
        "ceilings": {"copy": {"bytes_per_second": 2e12}},
        "shapes": [
            record(name, label, seconds, peak * 2**20)
            for label in LABELS
            for name, seconds, peak in (("auto", 20e-6, 5), ("fla", 90e-6, 16))
        ],
    }


RESULT = {"about": ABOUT, "shapes": [counted("1.3B-8x2048", 10 * 10**6), counted("340M-8x2048", 10**6)]}


def rows(text):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_bytes_of_kernels_and_their_sums_at_the_speed_of_a_copy():
    text = moved(RESULT, measured())
    found = rows(text)
    assert found["MB"] == ["1.3B-8x2048: read", "written", "µs", "340M-8x2048: read", "written", "µs"]
    assert found["`states_forward`"] == ["30", "10", "20", "3", "1", "2"]
    assert found["`inputs_backward`"] == ["50", "20", "35", "5", "2", "4"]
    assert found["`inputs_backward`, values"] == ["40", "20", "30", "4", "2", "3"]
    assert found["**as cut**, forward alone"] == ["30", "10", "20", "3", "1", "2"]
    assert found["**as cut**, forward + backward"] == ["120", "50", "85", "12", "5", "8"]
    assert found["everything once, forward + backward"] == ["", "60", "30", "", "6", "3"]
    assert found["measured, forward + backward"] == ["", "", "60", "", "", "60"]
    assert found["FLA's forward, over 4"] == ["", "", "22", "", "", "22"]
    assert found["FLA's forward + backward, over 4.5 and 4"] == ["", "", "60", "", "", "68"]
    assert "2,000 GB/s" in text
    assert "`count` · a CPU" in text
    assert "`bench` · a GPU" in text


def test_what_is_held_beside_what_was_measured():
    found = rows(held(RESULT, measured()))
    assert found["`o`"] == ["the output", "9.54", "0.95"]
    assert found["**sum**"] == ["", "**28.61**", "**2.86**"]
    assert found["measured"] == ["", "5.00", "5.00"]
    assert found['kept between the two, `states="keep"`'] == ["with the output", "3.00", "3.00"]
    assert found['kept between the two, `states="recompute"`'] == ["with the output", "0.50", "0.50"]
    assert found["half of FLA's, measured"] == ["", "8.00", "8.00"]


def test_without_fla_there_is_nothing_to_compare_with():
    result = measured(fla="not run: no time left")
    assert rows(moved(RESULT, result))["FLA's forward, over 4"] == ["", "", "–", "", "", "–"]
    assert rows(held(RESULT, result))["half of FLA's, measured"] == ["", "–", "–"]


def test_every_tensor_has_words():
    unknown = counted("340M-8x2048", 1)
    unknown["memory"]["tensors"]["mystery"] = 1
    with pytest.raises(AssertionError, match="a tensor without words"):
        held({"about": ABOUT, "shapes": [unknown]}, measured())
