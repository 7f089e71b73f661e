import pytest

from flash_gsa.benchmarking import plots
from flash_gsa.benchmarking.report import tables

from .made_up import made_up_result


def test_pictures_of_a_result(monkeypatch, tmp_path):
    result = made_up_result(monkeypatch)
    drawn = plots.draw(result, tmp_path / "new")
    assert [path.name for path in drawn] == ["op_gpu-time.png", "op_gpu-memory.png", "op_gpu-speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_lines_and_bars_are_the_figures(monkeypatch):
    result = made_up_result(monkeypatch)
    one, many = plots._time(result).axes
    assert [line.get_label() for line in one.lines] == ["flash-gsa (triton)", "FLA", "softmax, cuDNN"]
    assert one.lines[0].get_xdata()[0] == 512
    assert one.lines[0].get_ydata()[0] == pytest.approx(1e3 * 3 * (1e-8 * 512 + 20e-6))
    assert many.lines[0].get_ydata() == pytest.approx([1 / 3e-8 / 1e6] * 8)
    (bars,) = plots._speedup(result).axes
    said = [text.get_text() for text in bars.texts]
    # Five shapes, cuDNN and the flash kernel each, then FLA; slower ones too.
    assert said == ["2.0×", "0.5×"] * 3 + ["2.0×", "failed"] + ["2.0×", "0.5×"] + ["5.0×"] * 4 + ["wrong"]


def test_parts_that_did_not_run_have_no_picture(monkeypatch, tmp_path):
    result = made_up_result(monkeypatch, only=("ceilings", "decoding"))
    assert plots.draw(result, tmp_path) == []
    assert [table.title for table in tables(result)] == ["One decoding step"]
