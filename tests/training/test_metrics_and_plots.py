"""metrics.jsonl and loss.png."""

import json
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import MetricsWriter, read_metrics
from flash_gsa.training.plots import _smooth, plot_loss, report_pictures


def train_record(step, loss=2.0):
    return {"kind": "train", "step": step, "tokens": 10 * step, "seconds": 0.5 * step, "loss": loss}


def write(run_dir, *records, **arguments):
    writer = MetricsWriter(run_dir, **{"resume_step": None} | arguments)
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


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, train_record(1), train_record(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"kind": "train", "step": 2', "\0\0\0"))
    with pytest.raises(UsageError, match=r"line 2 of .* is damaged"):
        read_metrics(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(UsageError, match=r"line 1 of .* is damaged"):
        read_metrics(path)


def test_trackers_are_told_what_the_file_is_told(tmp_path):
    told = []
    tracker = SimpleNamespace(write=told.append, flush=lambda: told.append("flush"), close=lambda: told.append("close"))
    write(tmp_path, train_record(1), train_record(2), trackers=[tracker])
    assert told == [train_record(1), train_record(2), "flush", "close"]


def test_trackers_are_closed_whatever_else_fails(tmp_path):
    def close():
        told.append("close")
        raise OSError("tracker")

    told = []
    trackers = [SimpleNamespace(write=told.append, close=close) for _ in range(2)]
    writer = MetricsWriter(tmp_path, resume_step=None, trackers=trackers)
    with pytest.raises(OSError, match="tracker"):
        writer.close()
    assert told == ["close", "close"]
    assert writer._file.closed


@pytest.mark.parametrize("score", [{"loss": 1.9, "bits_per_byte": 2.1}, {"accuracy": 0.5}, None])
def test_picture(tmp_path, score):
    records = [train_record(n, 5 / n) for n in range(1, 40)]
    if score:
        records += [{"kind": "eval", "step": n, "tokens": 0, "seconds": 0, **score} for n in (0, 20, 39)]
    write(tmp_path, *records)
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_loss(tmp_path / "metrics.jsonl", tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(records)`: the figures of a report by title, before they become PNGs."""

    def draw(records):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        pictures = report_pictures(records)
        return {picture.title: figure for picture, figure in zip(pictures, figures, strict=True)}

    return draw


def test_exact_quantities_are_drawn_as_they_are(drawn):
    rates, norms = [1e-3, 2e-3, 3e-3, 2e-3, 1e-3], [1.0, 3.0, 1.0, 3.0, 1.0]
    memory = [2**30, 2**31, 2**31, 2**31, 2**31]
    names = ("lr", "grad_norm", "memory_bytes")
    values = zip(rates, norms, memory, strict=True)
    figures = drawn([train_record(n) | dict(zip(names, v, strict=True)) for n, v in enumerate(values, 1)])
    curves = {title: [list(c.get_ydata()) for c in figure.axes[0].lines] for title, figure in figures.items()}
    assert curves["Learning rate"] == [rates]
    assert curves["Memory"] == [[1.0, 2.0, 2.0, 2.0, 2.0]]
    assert curves["Gradient norm"] == [norms, _smooth(norms).tolist()]


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ({"loss": 1.9, "bits_per_byte": 2.1}, "held-out loss (2.100 bits per byte at step 0)"),
        ({"accuracy": 0.5}, "held-out accuracy (0.500 at step 0)"),
    ],
)
def test_the_legend_says_of_which_step_the_score_is(drawn, score, says):
    figure = drawn([{"kind": "eval", "step": 0, "tokens": 0, "seconds": 0, **score}, train_record(1)])["Loss"]
    assert says in [entry.get_text() for entry in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("layers", "numbered"), [(1, range(1)), (12, range(12)), (48, range(0, 48, 2))])
def test_every_layer_has_its_colour_in_the_bar(drawn, layers, numbered):
    evaluation = {"kind": "eval", "step": 0, "accuracy": 0.5, "forgetting": {str(n): 0.1 for n in range(layers)}}
    axes, bar = drawn([evaluation, train_record(1)])["Forgetting"].axes
    assert [label.get_text() for label in bar.get_yticklabels()] == [str(n) for n in numbered]
    shown = bar.images[0].get_array()[:, 0]
    assert [tuple(c) for c in shown] == [tuple(line.get_color()) for line in axes.lines]


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
