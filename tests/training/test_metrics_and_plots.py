"""metrics.jsonl, TensorBoard, the picture and the display."""

import io
import json

import pytest
from rich.console import Console

from flash_gsa.errors import UsageError
from flash_gsa.training import events
from flash_gsa.training.metrics import MetricsWriter, read_metrics
from flash_gsa.training.plots import _smooth, plot_loss
from flash_gsa.training.progress import ProgressDisplay


def train_record(step, loss=2.0):
    return {"kind": "train", "step": step, "tokens": 10 * step, "seconds": 0.5 * step, "loss": loss}


def write(run_dir, *records, **arguments):
    writer = MetricsWriter(run_dir, **{"resume_step": None, "tensorboard": False} | arguments)
    for record in records:
        writer.write(record)
    writer.sync()
    writer.close()


def test_records_come_back_exactly(tmp_path):
    records = [train_record(1, 1 / 3), {"kind": "eval", "step": 1, "by_source": {"ä": 0.1}}]
    write(tmp_path, *records)
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_resuming_drops_what_will_be_done_again(tmp_path):
    write(tmp_path, *(train_record(n) for n in range(1, 6)))
    write(tmp_path, train_record(4, 9.0), resume_step=3)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 2),
        (2, 2),
        (3, 2),
        (4, 9),
    ]
    write(tmp_path, train_record(1), resume_step=None)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, train_record(1), train_record(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, train_record(3), resume_step=2)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_what_is_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, train_record(1, float("nan")))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, train_record(1), train_record(2), train_record(3), tensorboard=True)
    by_source = {"kind": "eval", "step": 3, "by_source": {"books": 1.5}}
    write(tmp_path, train_record(3, 7.0), by_source, resume_step=2, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 2), (2, 2), (3, 7)]
    assert [(s.step, s.value) for s in board.Scalars("eval/by_source/books")] == [(3, 1.5)]


@pytest.mark.parametrize("score", [{"loss": 1.9, "bits_per_byte": 2.1}, {"accuracy": 0.5}, None])
def test_picture(tmp_path, score):
    records = [train_record(n, 5 / n) for n in range(1, 40)]
    if score:
        records += [{"kind": "eval", "step": n, "tokens": 0, "seconds": 0, **score} for n in (0, 20, 39)]
    write(tmp_path, *records)
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_loss(tmp_path / "metrics.jsonl", tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_moving_average_neither_lags_nor_shrinks():
    line = [3.0 - 0.01 * n for n in range(250)]
    assert _smooth(line)[2:-2] == pytest.approx(line[2:-2])
    assert _smooth([1.0, 3.0]).tolist() == [2.0, 2.0]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        plot_loss(tmp_path)
    write(tmp_path)
    with pytest.raises(UsageError, match="no training step yet"):
        plot_loss(tmp_path)


def show(terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
    record = {"step": 7, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412}
    with ProgressDisplay(console) as display:
        display(events.Preparing("preparing the data"))
        display(events.Started("runs/x", 4, 2_500_000, 4096, "cpu (2 threads), fp32"))
        for step in range(5, 8):
            display(events.Stepped(record | {"step": step}, 100, 0.07, 83.0))
        display(events.Evaluated({"step": 7, "loss": 2.4, "bits_per_byte": 1.7}))
        display(events.Evaluated({"step": 7, "accuracy": 0.91}))
        display(events.Saved("runs/x/checkpoints/step-00000007"))
        display(events.Ended(7, "SIGTERM"))
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = show(terminal=False).splitlines()
    assert lines[0] == "preparing the data"
    assert "2.50 M parameters, 4,096 tokens a step" in lines[1]
    assert "going on after step 4" in lines[1]
    assert "held out: loss 2.400, 1.700 bits per byte" in lines[-4]
    assert "held out: accuracy 0.910" in lines[-3]
    assert "Stopped by SIGTERM after step 7. The same command goes on" in lines[-1]
    assert sum("tokens/s" in line for line in lines) <= 1  # at most one in ten seconds


def test_a_bar_in_a_terminal():
    text = show(terminal=True)
    for part in ("step 7/100", "loss 2.500", "12,346 tokens/s  41% of peak", "1:23 left"):
        assert part in text
