"""TensorBoard, trackio and wandb: told once each step, one run over all resumes."""

import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from flash_gsa.errors import UsageError
from flash_gsa.training.metrics import MetricsWriter, read_metrics
from flash_gsa.training.trackers import check_trackers, start_trackers


def train_record(step, loss=2.0):
    return {"kind": "train", "step": step, "loss": loss}


def write(recipe, run_dir, *records, resume_step=None):
    """What the trainer does with a run that is started or resumed."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / "metrics.jsonl"
    shown = read_metrics(path) if resume_step is not None else []
    trackers = start_trackers(recipe, run_dir, resume_step=resume_step, shown=shown)
    writer = MetricsWriter(run_dir, resume_step=resume_step, trackers=trackers)
    for record in records:
        writer.write(record)
    writer.sync()
    writer.close()


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name which keeps what it is told."""
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.begun, fake.logged, fake.finished = [], [], 0

    def finish():
        fake.finished += 1

    fake.init = lambda **settings: fake.begun.append(settings)
    fake.log = lambda values, step: fake.logged.append((step, values))
    fake.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_tensorboard_shows_each_step_once(make_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe("logging.trackers=[tensorboard]")
    write(recipe, tmp_path / "run", train_record(1), train_record(2), train_record(3))
    by_source = {"kind": "eval", "step": 3, "by_source": {"books": 1.5}}
    write(recipe, tmp_path / "run", train_record(3, 7.0), by_source, resume_step=2)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("train/loss")] == [(1, 2), (2, 2), (3, 7)]
    assert [(s.step, s.value) for s in board.Scalars("eval/by_source/books")] == [(3, 1.5)]


def test_wandb_goes_on_with_its_run(make_recipe, tmp_path, wandb):
    recipe = make_recipe("logging={trackers: [wandb], project: mine}")
    run_dir = tmp_path / "run"
    evaluation = {"kind": "eval", "step": 2, "dead_slots": {"0": 0.25}}
    write(recipe, run_dir, train_record(1), train_record(2), evaluation, train_record(3))
    # Steps 2 and 3 are taken again; the evaluation of step 3 had not come before.
    again = [train_record(2), evaluation, train_record(3), {**evaluation, "step": 3}, train_record(4)]
    write(recipe, run_dir, *again, resume_step=1)

    first, second = wandb.begun
    assert first == second
    assert first["project"] == "mine"
    assert first["resume"] == "allow"
    assert first["name"] == f"run-{first['id']}"
    assert first["config"]["optimizer"]["lr"] == 0.01
    assert [step for step, _ in wandb.logged] == [1, 2, 2, 3, 3, 4]
    assert wandb.logged[2] == (2, {"eval/dead_slots/0": 0.25})
    assert wandb.finished == 2

    write(recipe, run_dir, train_record(1))  # anew
    assert wandb.begun[2]["id"] != first["id"]
    assert wandb.logged[-1][0] == 1


def test_a_tracker_that_fails_does_not_end_the_run(make_recipe, tmp_path, wandb):
    def fail(values, step):
        raise ConnectionError("no network")

    wandb.log = fail
    recipe = make_recipe("logging.trackers=[wandb]")
    with pytest.warns(UserWarning, match="wandb failed and is told no more: no network") as warned:
        write(recipe, tmp_path / "run", train_record(1), train_record(2))
    assert len(warned) == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_one_that_cannot_begin_is_refused(make_recipe, tmp_path, wandb):
    def fail(**settings):
        raise RuntimeError("No API key configured.")

    wandb.init = fail
    with pytest.raises(UsageError, match="wandb could not begin a run: No API key configured"):
        write(make_recipe("logging.trackers=[wandb]"), tmp_path / "run")


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr("flash_gsa.training.trackers.find_spec", lambda name: None if name == "trackio" else object())
    check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UsageError, match=r'pip install "flash-gsa\[trackio\]"'):
        check_trackers(["tensorboard", "trackio"])


@pytest.mark.parametrize(
    ("trackers", "message"),
    [("wandb", "expected a list"), ("[wand]", "'tensorboard', 'trackio' or 'wandb'"), ("[wandb, wandb]", "one twice")],
)
def test_names_that_do_not_exist_are_refused(make_recipe, trackers, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(f"logging.trackers={trackers}")


def test_trackio_goes_on_with_its_run(make_recipe, tmp_path):
    pytest.importorskip("trackio")
    make_recipe()
    # A process of its own: trackio reads TRACKIO_DIR when it is imported.
    code = f"""
from pathlib import Path
from flash_gsa.training.recipe_file import load_recipe
from tests.training.test_trackers import train_record, write
recipe = load_recipe(Path({str(tmp_path)!r}) / "tiny.yaml", ["logging.trackers=[trackio]"])
folder = Path({str(tmp_path)!r}) / "run"
write(recipe, folder, train_record(1), train_record(2), train_record(3))
write(recipe, folder, train_record(2), train_record(3), train_record(4, 1.5), resume_step=1)
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("flash-gsa")
print(name, [(r["step"], r["train/loss"]) for r in SQLiteStorage.get_logs("flash-gsa", name)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
    )
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if line.startswith("run-")][-1]
    assert last.endswith("[(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.5)]")


def offline_records(path):
    """Of a run of wandb that is offline: 7 bytes, then pieces of records in blocks of 32 KiB, as LevelDB logs them."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, last
            yield Record.FromString(record)
            record = b""


def test_real_wandb_goes_on_with_its_run(make_recipe, tmp_path):
    pytest.importorskip("wandb")
    make_recipe()
    command = [sys.executable, "-m", "flash_gsa", "train", str(tmp_path / "tiny.yaml")]
    command += ["logging.trackers=[wandb]", "logging.project=slots"]
    folders = {f"WANDB_{name}": str(tmp_path / "wandb") for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    environment = os.environ | folders | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    (tmp_path / "wandb").mkdir()

    def told():
        """The run and the losses by step, of what the command made wandb write."""
        done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "wandb failed" not in done.stderr
        (file,) = (tmp_path / "wandb").glob("**/offline-run-*/*.wandb")
        records = list(offline_records(file))
        shutil.rmtree(file.parent)
        run = next(record.run for record in records if record.HasField("run"))
        rows = [{"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
        return run, {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}

    metrics = tmp_path / "run" / "metrics.jsonl"
    first, losses = told()
    lines = metrics.read_text().splitlines(keepends=True)
    # As a crash after step 10 leaves it.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= 10))
    second, again = told()

    assert losses == {r["step"]: r["loss"] for r in read_metrics(metrics) if r["kind"] == "train"}
    assert again == {step: losses[step] for step in (11, 12)}
    assert first.run_id == second.run_id
    assert first.display_name == second.display_name == f"run-{first.run_id}"
    assert first.project == "slots"
