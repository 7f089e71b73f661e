"""The report page: whole by itself, of any run, however far it came."""

import base64
import json
import re
import sys

import pytest

from flash_gsa.errors import UsageError
from flash_gsa.training.plots import duration
from flash_gsa.training.recipe_file import recipe_to_yaml
from flash_gsa.training.report import write_report
from flash_gsa.training.starts import read_starts, record_start


def train_record(step):
    figures = {
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 640.0,
        "flops_per_second": 6.4e8,
        "data_seconds": 0.05,
    }
    return {
        "kind": "train",
        "step": step,
        "tokens": 128 * step,
        "seconds": 0.5 * step,
        "loss": 5 / step,
        "memory_bytes": 2**30,
        "devices": 2,
        **figures,
    }


def evaluation(step, **figures):
    return {"kind": "eval", "step": step, "tokens": 128 * step, "seconds": 0.5 * step, **figures}


SLOTS = {name: {"0": 0.25, "1": 0.5} for name in ("forgetting", "slot_entropy", "dead_slots")}
TEXT = {"loss": 1.9, "bits_per_byte": 2.1, "by_source": {"<odd>": 2.2, "even": 2.0}}


@pytest.fixture
def folder(tmp_path, make_recipe):
    """`folder(record, …)`: the folder of a run with that metrics.jsonl."""

    def make(*records, overrides=()):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "recipe.yaml").write_text(recipe_to_yaml(make_recipe(*overrides)))
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return run

    return make


def text(page):
    """What a reader sees, without the pictures."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.read_text("utf-8")))


def pictures(page):
    return re.findall(r'alt="([^"]*) over the steps"', page.read_text("utf-8"))


def test_page_of_a_run(folder):
    spike = {
        "kind": "spike",
        "step": 8,
        "tokens": 0,
        "seconds": 0,
        "loss": 9.0,
        "expected": 1.0,
        "limit": 2.0,
        "batch": 7,
    }
    run = folder(
        evaluation(0, **TEXT, **SLOTS), *map(train_record, range(1, 12)), spike, evaluation(11, **TEXT, **SLOTS)
    )
    record_start(run, resume_step=None, device="cpu", engine="cpu, fp32")
    record_start(run, resume_step=4, device="cpu", engine="two of them")
    page = write_report(run)
    assert page == run / "report.html"
    seen = text(page)
    for part in (
        "tiny: for tests",
        "Step 11, 1,408 tokens, 6 s: 92% of the planned 12 steps.",
        "held-out bits per byte 2.1000",
        "tokens a second 640",
        "model FLOPs a token 1 M",
        "waiting for data 25.0%",
        "memory 1.00 GiB",
        "loss spikes 1",
        "source bits per byte at step 0 at step 11 &lt;odd&gt; 2.200 2.200",
        "processes 2 at step 11",
        "Slots by layer, at step 11 layer forgetting slot entropy dead slots 0 0.250 0.250 25.0% 1 0.500 0.500 50.0%",
        "8 loss spike loss 9.000, 1.000 expected, batch 7",
        "on two of them",
        "hidden_size: 16",
    ):
        assert part in seen
    assert "at the end" not in seen
    assert re.search(r"4 resumed 2\d\d\d-", seen)
    assert pictures(page) == [
        *("Loss", "Learning rate", "Gradient norm", "Throughput", "Model FLOP/s", "Waiting for data", "Memory"),
        *("Forgetting", "Slot entropy", "Dead slots"),
    ]


def test_page_needs_nothing_else(folder):
    html = write_report(folder(train_record(1))).read_text("utf-8")
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html)
    assert sources
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html


def test_one_step_and_nothing_else(folder):
    page = write_report(folder({k: train_record(1)[k] for k in ("kind", "step", "tokens", "seconds", "loss")}))
    assert "training loss 5.0000 last step" in text(page)
    assert pictures(page) == ["Loss"]


def test_one_evaluation_is_shown_once(folder):
    seen = text(write_report(folder(evaluation(0, **TEXT), train_record(1))))
    assert "Held-out text by source source bits per byte at step 0 &lt;odd&gt; 2.200 even 2.000" in seen


def test_recall_and_a_mixer_without_slots(folder):
    records = [evaluation(0, accuracy=0.1), *map(train_record, range(1, 13)), evaluation(12, accuracy=0.75)]
    page = write_report(folder(*records))
    assert "held-out accuracy 0.7500" in text(page)
    assert "all of the planned 12 steps" in text(page)
    assert "Slot" not in " ".join(pictures(page))
    assert "Slots by layer" not in text(page)


def test_a_known_peak_and_a_long_run(folder):
    records = [train_record(n) | {"mfu": 0.4} for n in range(1, 120)]
    page = write_report(folder(*records, overrides=["schedule={minutes: 1, warmup_steps: 2}"]))
    assert "MFU 40.0%" in text(page)
    assert "99% of the planned" not in text(page)
    assert "all of the planned 1 min" in text(page)
    assert {"Loss, second half", "MFU"} < set(pictures(page))


def test_a_file_that_is_being_written_or_was_cut(folder):
    run = folder(train_record(1), train_record(2))
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "train", "st')
    assert "Step 2," in text(write_report(run))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("a: [", r"recipe\.yaml is not YAML"), ("a: 1", r"recipe\.yaml cannot be used:\s+- unknown key a")],
)
def test_a_recipe_that_is_damaged(recipe, message, folder):
    run = folder(train_record(1))
    (run / "recipe.yaml").write_text(recipe)
    with pytest.raises(UsageError, match=message):
        write_report(run)


def test_folders_without_a_run(tmp_path, folder):
    with pytest.raises(UsageError, match=r"not the folder of a run: expected a folder with recipe\.yaml"):
        write_report(tmp_path)
    run = folder(evaluation(0, **TEXT))
    with pytest.raises(UsageError, match="no training step yet"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        write_report(run)


def test_starting_anew_forgets_earlier_starts(tmp_path):
    record_start(tmp_path, resume_step=None, device="cpu", engine="first")
    record_start(tmp_path, resume_step=3, device="cpu", engine="second")
    assert [(s["step"], s["engine"]) for s in read_starts(tmp_path)] == [(0, "first"), (3, "second")]
    assert {"command", "date", "commit", "device", "versions"} < set(read_starts(tmp_path)[0])
    record_start(tmp_path, resume_step=None, device="cpu", engine="third")
    assert [s["engine"] for s in read_starts(tmp_path)] == ["third"]


@pytest.mark.parametrize("program", ["/env/bin/flash-gsa", "/code/flash_gsa/__main__.py"])
@pytest.mark.parametrize(
    ("launch", "begins"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "torchrun --nproc-per-node 2 "),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc-per-node 4 ",
        ),
    ],
)
def test_the_command_of_several_processes_can_be_typed_again(tmp_path, monkeypatch, program, launch, begins):
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [program, "train", "demo", "device=cpu"])
    record_start(tmp_path, resume_step=None, device="cpu", engine="ddp")
    assert read_starts(tmp_path)[0]["command"] == begins + "-m flash_gsa train demo device=cpu"


@pytest.mark.parametrize("world", [None, "1"])
def test_the_command_of_one_process(tmp_path, monkeypatch, world):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(sys, "argv", ["/code/flash_gsa/__main__.py", "train", "a recipe.yaml"])
    record_start(tmp_path, resume_step=None, device="cpu", engine="cpu")
    assert read_starts(tmp_path)[0]["command"] == "python -m flash_gsa train 'a recipe.yaml'"


def test_durations():
    seconds = (12, 247, 2 * 3600 + 300, 3 * 86400 + 4 * 3600)
    assert [duration(s) for s in seconds] == ["12 s", "4 min 07 s", "2 h 05 min", "3 d 04 h"]
