"""The drift of decoding: float32 states stay exact, what bfloat16 loses is seen where slots remember long."""

import json

import pytest
import torch

from flash_gsa.benchmarking import drift
from flash_gsa.errors import UsageError
from flash_gsa.ops.reference import reference_step


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the result of 300 steps on the CPU, its file, the lines said)."""
    file, lines = tmp_path_factory.mktemp("drift") / "deeper" / "drift.json", []
    result = drift.measure_drift(300, file, "cpu", "a command", say=lines.append)
    return result, file, lines


def test_states_in_float32_stay_exact_and_those_in_bfloat16_err_most_where_slots_remember(measured):
    rows = {(r["state"], r["span"], r["steps"]): r for r in measured[0]["rows"]}
    assert rows.keys() == {
        (name, span, steps) for name in ("float32", "bfloat16") for span in drift.SPANS for steps in (1, 10, 100, 300)
    }
    for (name, _, steps), row in rows.items():
        assert row["output"] < 3e-3 or name == "bfloat16"  # o is rounded to bfloat16
        assert (row["states"] < 1e-5) == (name == "float32"), row
        if steps == 1:
            assert row["states"] < 3e-3
    last = {span: rows["bfloat16", span, 300]["states"] for span in drift.SPANS}
    assert last[10_000] > 3 * last[10]


def test_outputs_are_compared_over_the_last_tenth():
    x = {dtype: [torch.zeros(300, 5, 3)] for dtype in (torch.float32, torch.float64)}
    x[torch.float32][0][:269], x[torch.float64][0][:269] = 5.0, 7.0
    for y in x.values():
        y[0][269:] = 2.0
    x[torch.float32][0][299, 4] = 3.0
    states = (torch.ones(1, 5, 2, 3), torch.ones(1, 5, 3, 2))
    rows = drift._errors(torch.float32, 300, x, states, states)
    assert [row["output"] for row in rows] == pytest.approx([0, 0, 0, 0, 30**-0.5 / 2])
    assert {row["states"] for row in rows} == {0.0}


def test_tokens_come_in_stretches_that_end_at_powers_of_ten(monkeypatch):
    monkeypatch.setattr(drift, "AT_ONCE", 40)
    found = [(x[0].shape[1], here) for x, here in drift._tokens(130, torch.device("cpu"))]
    assert found == [(1, True), (9, True), (40, False), (40, False), (10, True), (30, True)]


def test_gates_forget_within_their_spans():
    for (_, _, _, g), _ in drift._tokens(1000, torch.device("cpu")):
        if g.shape[1] == 900:
            spans = -1 / g.mean(dim=(0, 1, 3))
            assert torch.allclose(spans * 1.6487, torch.tensor(drift.SPANS, dtype=torch.float32), rtol=0.05)


def test_a_step_that_errs_is_seen(monkeypatch):
    def slightly_wrong(q, k, v, g, *, state, in_place):
        return reference_step(q, k, 1.1 * v, g, None, state, 1.0, in_place)

    monkeypatch.setattr(drift, "gated_slot_attention_step", slightly_wrong)
    rows = drift.measure_drift(20, device="cpu", say=lambda line: None)["rows"]
    assert all(row["output"] > 5e-3 for row in rows if row["steps"] > 1 and row["state"] == "float32")


def test_the_file_holds_the_result(measured):
    result, file, lines = measured
    assert json.loads(file.read_text(encoding="utf-8")) == result
    assert result["about"]["command"] == "a command"
    assert [line.split(" steps:")[0] for line in lines] == ["1", "10", "100", "300"]
    assert all(result["seconds"][name] > 0 for name in ("float32", "bfloat16"))


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(UsageError, match="steps: expected at least 1, got 0"):
        drift.measure_drift(0, device="cpu")
    with pytest.raises(UsageError, match="no device 'cuda:9'"):
        drift.measure_drift(1, device="cuda:9")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written to .*file.drift\.json"):
        drift.measure_drift(1, tmp_path / "file" / "drift.json", "cpu", say=lambda line: None)
