"""The loop: it learns, resumes exactly, stops cleanly, and refuses what would lose work."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flash_gsa.cli import main
from flash_gsa.data import encode_documents, load_tokenizer
from flash_gsa.errors import UsageError
from flash_gsa.inspection import slot_usage
from flash_gsa.models import GSAForCausalLM
from flash_gsa.models.flops import training_flops
from flash_gsa.training import checkpoint as checkpoint_module
from flash_gsa.training import events, trainer
from flash_gsa.training.engine import Engine, checkpoint_blocks
from flash_gsa.training.errors import TrainingStopped
from flash_gsa.training.export import export
from flash_gsa.training.inputs import prepare_inputs
from flash_gsa.training.metrics import MetricsWriter, read_metrics
from flash_gsa.training.model import model_config
from flash_gsa.training.optimizer import learning_rate
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.run_folder import open_run_folder
from flash_gsa.training.starts import read_starts
from flash_gsa.training.trainer import train

FIGURES = ("step", "tokens", "loss", "bits_per_byte", "lr", "grad_norm", "by_source", "accuracy")
FIGURES += ("forgetting", "slot_entropy", "dead_slots")


def curve(run_dir, kind="train"):
    """What must not depend on when a run was stopped: all but times and memory."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: r[k] for k in FIGURES if k in r} for r in records if r["kind"] == kind]


def weights(result):
    return load_file(result.checkpoint / "model.safetensors")


def began(run_dir):
    """At which step the run began, and each time that it went on."""
    return [start["step"] for start in read_starts(run_dir)]


def checkpoints(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


class At:
    """A listener that does something after step `step`."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def __call__(self, event):
        if isinstance(event, events.Stepped) and event.record["step"] == self.step:
            self.action()


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def uninterrupted(make_recipe, tmp_path):
    result = train(make_recipe(f"output_dir={tmp_path}/whole"))
    return curve(result.run_dir), curve(result.run_dir, "eval"), weights(result)


def assert_same(result, uninterrupted):
    steps, evaluations, tensors = uninterrupted
    assert curve(result.run_dir) == steps
    assert curve(result.run_dir, "eval") == evaluations
    found = weights(result)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def assert_speeds(result, recipe):
    """FLOP/s are those of so many tokens; their share of a CPU's peak is not known."""
    model = GSAForCausalLM.from_pretrained(result.checkpoint)
    for record in read_metrics(result.run_dir / "metrics.jsonl"):
        if record["kind"] == "train":
            flops = training_flops(model, recipe.batch.length)
            assert record["flops_per_second"] == pytest.approx(flops * record["tokens_per_second"])
            assert "mfu" not in record


def assert_usage(result, evaluations):
    """Every evaluation says how slots are used; the last, of the model that was saved."""
    for record in evaluations:
        assert 0 < record["forgetting"]["0"] < 1
        assert 0.5 < record["slot_entropy"]["0"] <= 1
        assert record["dead_slots"]["0"] == 0
    model = GSAForCausalLM.from_pretrained(result.checkpoint)
    held_out = prepare_inputs(load_recipe(str(result.run_dir / "recipe.yaml"))).held_out
    sample = held_out.sample(256)
    assert 1 < len(sample) == min(256, max(held_out.store.lengths(held_out.documents)))
    assert held_out.sample(3) == sample[:3]
    for name, layers in slot_usage(model, sample).items():
        assert layers["0"] == pytest.approx(evaluations[-1][name]["0"], abs=1e-5)


class OnAGpu(Engine):
    """An engine whose device does 10^9 FLOP/s at best."""

    def peak_flops(self):
        return 1e9


def test_what_a_gpu_cannot_hold_is_refused_before_the_data_are_read(make_recipe, monkeypatch):
    monkeypatch.setattr(Engine, "device_memory", lambda self: 2**20)
    monkeypatch.setattr(trainer, "prepare_inputs", lambda *_, **__: pytest.fail("the data were read"))
    recipe = make_recipe()
    with pytest.raises(UsageError, match=r"needs about .* GiB on each of 1 device, which has 0\.0 GiB"):
        train(recipe)
    assert not (trainer.run_dir_of(recipe) / "metrics.jsonl").exists()


def test_the_process_that_tokenises_tells_even_if_another_is_the_main_one(make_recipe, monkeypatch):
    monkeypatch.setattr(Engine, "is_main", property(lambda self: False))
    told = []

    class Enough(Exception):
        pass

    def listen(event):
        told.append(event)
        if "tokenising" in getattr(event, "what", ""):
            raise Enough

    with pytest.raises(Enough):
        train(make_recipe(), on_event=listen)
    assert len(told) == 1


def test_the_share_of_the_peak_is_told_where_it_is_known(make_recipe):
    result = train(make_recipe("schedule.steps=3"), engine=OnAGpu("cpu"))
    records = [r for r in read_metrics(result.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert len(records) == 3
    assert all(r["mfu"] == pytest.approx(r["flops_per_second"] / 1e9) for r in records)


def test_a_whole_run(make_recipe):
    recipe, told = make_recipe(), []
    result = train(recipe, on_event=told.append)
    steps, evaluations = curve(result.run_dir), curve(result.run_dir, "eval")
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in evaluations] == [0, 5, 10, 12]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 1.0
    assert set(evaluations[0]["by_source"]) == {"odd", "even"}
    assert [r["tokens"] for r in steps] == [128 * n for n in range(1, 13)]
    rates = [learning_rate(n, peak=1e-2, floor=1e-3, warmup_steps=2, total_steps=12) for n in range(1, 13)]
    assert [r["lr"] for r in steps] == rates
    assert_speeds(result, recipe)
    assert_usage(result, evaluations)
    assert checkpoints(result.run_dir) == ["step-00000008", "step-00000012"]
    assert (result.step, result.signal, result.checkpoint.name) == (12, None, "step-00000012")
    assert result.metrics["loss"] == evaluations[-1]["loss"]
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    kinds = [type(e) for e in told if not isinstance(e, events.Preparing)]
    assert kinds[:3] == [events.Started, events.Evaluated, events.Stepped]
    assert kinds[-2:] == [events.Saved, events.Ended]
    assert [kinds.count(kind) for kind in (events.Stepped, events.Evaluated, events.Saved)] == [12, 4, 3]


def test_compiled_blocks_train_and_resume_alike(make_recipe, uninterrupted, monkeypatch):
    compiled = []

    def compile_without_inductor(block):
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_inductor)
    recipe = make_recipe("engine.compile=true")
    assert train(recipe, on_event=At(5, send(signal.SIGTERM))).step == 5
    result = train(recipe)
    assert [type(block).__name__ for block in compiled] == ["GSABlock"] * 2
    for record, expected in zip(curve(result.run_dir), uninterrupted[0], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_checkpoint_is_a_model_with_its_tokenizer(make_recipe, tmp_path):
    result = train(make_recipe())
    model = GSAForCausalLM.from_pretrained(result.checkpoint)
    tokenizer = load_tokenizer(str(result.checkpoint))
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    (ids,) = encode_documents(tokenizer, ["the slot forgets"])
    ids = torch.from_numpy(ids.astype("int64"))[None]
    loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(result.metrics["loss"], abs=0.5)


@pytest.mark.parametrize("steps", [(1,), (5,), (4, 9), (3, 4, 11)])
def test_resumes_with_the_same_bits(make_recipe, uninterrupted, steps):
    recipe = make_recipe()
    for step in steps:
        result = train(recipe, on_event=At(step, send(signal.SIGTERM)))
        assert (result.step, result.signal) == (step, "SIGTERM")
        assert result.checkpoint.name == f"step-{step:08d}"
    result = train(recipe)
    assert (result.step, result.signal) == (12, None)
    assert_same(result, uninterrupted)
    assert began(result.run_dir) == [0, *steps]


def test_a_finished_run_stays_as_it_is(make_recipe):
    first = train(make_recipe())
    before = read_metrics(first.run_dir / "metrics.jsonl")
    told = []
    again = train(make_recipe(), on_event=told.append)
    assert again == first
    assert not any(isinstance(e, events.Stepped | events.Saved) for e in told)
    assert read_metrics(first.run_dir / "metrics.jsonl") == before


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from flash_gsa.training import checkpoint, events
from flash_gsa.training.recipe_file import load_recipe
from flash_gsa.training.trainer import train

torch.set_num_threads(1)
file, moment = sys.argv[1:]
first = Path(load_recipe(file).output_dir, "checkpoints", "step-00000004")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def listener(event):
    if moment == "between" and isinstance(event, events.Stepped) and event.record["step"] == 6:
        while not first.exists():  # written beside the training, on a slow disk longer than it takes to come here
            time.sleep(0.01)
        die()

write_json = checkpoint._write_json

def dying_write_json(path, value):
    if moment == "writing" and path.name == "manifest.json" and value["step"] == 8:
        path.write_text("{")
        die()
    write_json(path, value)

checkpoint._write_json = dying_write_json
train(load_recipe(file), on_event=listener)
"""


@pytest.mark.parametrize(("moment", "left"), [("between", []), ("writing", [".writing-step-00000008"])])
def test_resumes_after_kill_9(make_recipe, uninterrupted, tmp_path, moment, left):
    recipe = make_recipe()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tiny.yaml"), moment]
    process = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, check=False)
    assert process.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") == [*left, "step-00000004"]
    result = train(recipe)
    assert_same(result, uninterrupted)
    assert began(result.run_dir) == [0, 4]
    assert checkpoints(tmp_path / "run") == ["step-00000008", "step-00000012"]


SMALL = ("batch={rows: 1, length: 16}",)
# What kernels are made for: heads of 128, 64 slots, rows of several chunks and segments, several micro-batches.
AS_MODELS_ARE = (
    "model={hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_heads: 2, num_slots: 64}",
    "batch={rows: 4, length: 1024, micro_rows: 2}",
    "optimizer.lr=1e-3",
)


@pytest.mark.timeout(2000)  # a disk that takes its time over 100 checkpoints
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("device", "kills", "steps", "every", "sizes"),
    [
        ("cpu", 20, 400, 4, SMALL),
        pytest.param("cuda", 3, 800, 16, SMALL, marks=[pytest.mark.gpu, pytest.mark.long]),
        pytest.param("cuda", 3, 200, 16, AS_MODELS_ARE, marks=[pytest.mark.gpu, pytest.mark.long]),
    ],
)
def test_kills_at_random_change_no_bit(make_recipe, tmp_path, device, kills, steps, every, sizes):
    more = (f"schedule.steps={steps}", f"checkpoints.every={every}", "evaluation.every=200", f"device={device}")
    more += sizes
    # In a process of its own: those that are killed are forks, and must not inherit a device in use.
    whole = [sys.executable, "-m", "flash_gsa", "train", str(tmp_path / "tiny.yaml"), *more]
    make_recipe()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as fast as those that are killed
    subprocess.run([*whole, f"output_dir={tmp_path}/once"], env=environment, timeout=1000, check=True)
    once = train(make_recipe(*more, f"output_dir={tmp_path}/once"))
    # All together get about half of the way.
    longest = read_metrics(once.run_dir / "metrics.jsonl")[-1]["seconds"] / kills
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path / "tiny.yaml"), "3", str(kills)]
    command += [str(longest), *more]
    done = subprocess.run(command, env=environment, timeout=1500, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    present = json.loads(done.stdout.splitlines()[-1])
    assert len(present) == kills + 1
    assert present[-2] > 0, "no kill came after a checkpoint"
    killed = replace(once, run_dir=tmp_path / "run", checkpoint=tmp_path / "run" / "checkpoints" / once.checkpoint.name)
    assert_same(killed, (curve(once.run_dir), curve(once.run_dir, "eval"), weights(once)))
    assert checkpoints(killed.run_dir) == checkpoints(once.run_dir)
    assert began(killed.run_dir)[-1] > 0


def test_killed_before_the_first_checkpoint_starts_again(make_recipe, uninterrupted):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    recipe = make_recipe()
    with pytest.raises(Killed):
        train(recipe, on_event=At(2, die))
    assert_same(train(recipe), uninterrupted)


def interrupt_twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_is_not_swallowed(make_recipe):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), on_event=At(2, interrupt_twice))
    assert signal.getsignal(signal.SIGINT) is before


def test_texts_that_were_moved_are_the_same_texts(make_recipe, tmp_path, uninterrupted):
    assert train(make_recipe(), on_event=At(5, send(signal.SIGTERM))).step == 5
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "text.jsonl").rename(elsewhere / "text.jsonl")
    assert_same(train(make_recipe(f"data.source={elsewhere}/text.jsonl")), uninterrupted)
    assert "elsewhere/text.jsonl" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_other_texts_under_the_name_are_refused(make_recipe, tmp_path):
    assert train(make_recipe(), on_event=At(5, send(signal.SIGTERM))).step == 5
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(UsageError, match=r"cannot go on in the data: data was .* when the run was saved"):
        train(make_recipe(f"data.source={tmp_path}/other.jsonl"))
    with pytest.raises(UsageError, match=r"another recipe:\s+- data.source_field: not given there, 'from' now"):
        train(make_recipe("data.source_field=from"))


def test_a_run_says_what_it_is_trained_on(make_recipe):
    told = []
    train(make_recipe("schedule.steps=3"), on_event=told.append)
    (line,) = next(event.data for event in told if isinstance(event, events.Started))
    found = re.fullmatch(r"(\d+) documents of ([\d,]+) tokens to train on, gone through (\d+\.\d\d) times in all", line)
    tokens = int(found[2].replace(",", ""))
    assert 0 < int(found[1]) < tokens
    assert float(found[3]) == pytest.approx(3 * 4 / -(-tokens // 32), abs=0.01)


def test_weights_may_be_read_by_whom_the_rest_may(make_recipe, tmp_path):
    before = os.umask(0o022)
    try:
        folder = train(make_recipe("schedule.steps=3", "schedule.warmup_steps=1")).checkpoint
        export(folder, tmp_path / "exported")
    finally:
        os.umask(before)
    files = [*folder.iterdir(), *(tmp_path / "exported").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(make_recipe, uninterrupted):
    recipe = make_recipe()
    folder = train(recipe, on_event=At(9, send(signal.SIGTERM))).checkpoint
    content = bytearray((folder / "trainer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "trainer.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"step-00000009 is damaged.*Delete that folder to go on from step-00000008"):
        train(recipe)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert_same(train(recipe), uninterrupted)


def test_a_full_disk_stops_the_run_and_costs_nothing(make_recipe, uninterrupted, monkeypatch):
    def full(path, value):
        if value["step"] == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    write_json = checkpoint_module._write_json
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write_json", full)
        with pytest.raises(UsageError, match=r"step 8 could not be written.*no space.*step-00000004 is complete"):
            train(recipe)
    assert_same(train(recipe), uninterrupted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_that_do_not_fit_the_disk(make_recipe, tmp_path, uninterrupted, monkeypatch, capsys):
    """What could not be written fails again when the file is closed, which is not what the user is told; and a
    checkpoint that was still being written counts."""

    def write(metrics, record):
        if record["step"] == 6:
            with Path("/dev/full").open("w") as full:
                os.dup2(full.fileno(), metrics._file.fileno())
            threading.Timer(0.2, failed.set).start()
        write_record(metrics, record)

    def write_late(path, value):
        assert failed.wait(60)
        write_json(path, value)

    failed, write_record, write_json = threading.Event(), MetricsWriter.write, checkpoint_module._write_json
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        patch.setattr(checkpoint_module, "_write_json", write_late)
        with pytest.raises(SystemExit) as ended:
            main(["train", str(tmp_path / "tiny.yaml")])
    assert ended.value.code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"The metrics in .* could not be written: no space is left.*step-00000004 is complete", told), told
    assert_same(train(recipe), uninterrupted)


def test_damaged_held_out_tokens_are_no_diverged_model(make_recipe, monkeypatch):
    """They are named, the learning rate is not blamed, and a checkpoint that was still being written counts."""
    recipe = make_recipe()
    held_out = prepare_inputs(recipe).held_out
    tokens = held_out.store.document(int(held_out.documents[0])).tobytes()
    (shard,) = (s.path for s in held_out.store.shards)
    assert shard.read_bytes().count(tokens) == 1

    def damage():
        with shard.open("r+b") as file:
            file.seek(shard.read_bytes().index(tokens))
            file.write(b"\xff" * len(tokens))
        threading.Timer(0.2, failed.set).start()

    def write_late(path, value):
        assert failed.wait(60)
        write_json(path, value)

    failed, write_json = threading.Event(), checkpoint_module._write_json
    monkeypatch.setattr(checkpoint_module, "_write_json", write_late)
    with pytest.raises(UsageError, match=r"shard-00000\.arrow is damaged: it holds token id") as raised:
        train(recipe, on_event=At(5, damage))
    assert not isinstance(raised.value, TrainingStopped)
    assert checkpoints(trainer.run_dir_of(recipe)) == ["step-00000004"]


def test_metrics_that_fail_when_they_are_closed(make_recipe, uninterrupted, monkeypatch):
    def close(metrics):
        close_all(metrics)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")  # as NFS tells it

    close_all = MetricsWriter.close
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "close", close)
        with pytest.raises(UsageError, match=r"The metrics in .*no space is left.*step-00000012 is complete"):
            train(recipe)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, existing="overwrite", on_event=At(2, interrupt_twice))
    assert_same(train(recipe), uninterrupted)


LIMITED = """
import resource, sys
from flash_gsa.cli import main

size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
main()
"""


def test_a_file_that_the_system_does_not_let_grow(make_recipe, tmp_path, uninterrupted):
    """As a full disk, by the system itself: weights fit into so many bytes, optimiser moments do not."""
    size = (tmp_path / "whole/checkpoints/step-00000012/model.safetensors").stat().st_size
    recipe = make_recipe()
    command = [sys.executable, "-c", LIMITED, str(int(1.5 * size)), "train", str(tmp_path / "tiny.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 1
    told = " ".join(done.stderr.split())
    assert re.search(r"checkpoint of step 4 could not be written.*File too large", told), told
    assert "Traceback" not in told
    assert not [name for name in checkpoints(tmp_path / "run") if name.startswith("step-")]
    assert_same(train(recipe), uninterrupted)


def test_steps_go_on_while_a_checkpoint_is_written(make_recipe, monkeypatch):
    release, told = threading.Event(), []

    def slow(*arguments, **options):
        assert release.wait(60)
        return save_checkpoint(*arguments, **options)

    def listen(event):
        told.append(event)
        if isinstance(event, events.Stepped) and event.record["step"] == 6:
            release.set()

    save_checkpoint = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", slow)
    train(make_recipe(), on_event=listen)
    what = [
        f"step {e.record['step']}" if isinstance(e, events.Stepped) else e.folder.name
        for e in told
        if isinstance(e, events.Stepped | events.Saved)
    ]
    assert what.index("step 4") < what.index("step 6") < what.index("step-00000004")


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe):
    recipe = make_recipe("optimizer.lr=1e38", "schedule.warmup_steps=0", "checkpoints.every=1")
    with pytest.raises(TrainingStopped) as caught:
        train(recipe)
    stop = caught.value
    assert stop.checkpoint.name == f"step-{stop.step - 1:08d}"
    message = str(stop)
    assert re.search(rf"stopped at step {stop.step}: (loss nan|g contains NaN)", message)
    assert f"batch {stop.step - 1} of the stream of seed 0, with sequences that begin '" in message
    assert f"{stop.checkpoint} is intact" in message
    assert [r["step"] for r in curve(stop.checkpoint.parent.parent)] == list(range(1, stop.step))


class BadGradient(Engine):
    """An engine whose third gradient overflows."""

    calls = 0

    def clip(self, max_norm):
        self.calls += 1
        norm = super().clip(max_norm)
        return norm if self.calls < 3 else torch.full_like(norm, float("inf"))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_recipe):
    with pytest.raises(
        TrainingStopped, match=r"at step 3: loss \d.*gradient norm inf.*No checkpoint had been"
    ) as caught:
        train(make_recipe(), engine=BadGradient("cpu"))
    assert (caught.value.step, caught.value.checkpoint) == (3, None)


class Spiking(Engine):
    """An engine that tells of a loss 20 nats higher at its `call`-th step."""

    def __init__(self, call):
        super().__init__("cpu")
        self.left = call

    def update(self, *args, **options):
        self.left -= 1
        outcome = super().update(*args, **options)
        return replace(outcome, loss=outcome.loss + 20) if self.left == 0 else outcome


def test_a_spike_is_told_changes_nothing_and_is_seen_by_a_resumed_run_too(make_recipe, tmp_path):
    def run(name, *calls):
        """Of engines that spike at their `calls`-th step, the first but for the last stopped after step 22."""
        recipe, told = make_recipe("schedule.steps=30", f"output_dir={tmp_path}/{name}"), []
        for call in calls:
            stop = At(22, send(signal.SIGTERM)) if call != calls[-1] else None

            def listen(event, stop=stop):
                told.extend([event.record] if isinstance(event, events.Spiked) else [])
                if stop:
                    stop(event)

            result = train(recipe, engine=Spiking(call), on_event=listen)
        lines = [r for r in read_metrics(result.run_dir / "metrics.jsonl") if r["kind"] == "spike"]
        assert [dict(r) for r in told] == lines
        return lines, weights(result)

    (calm, plain), (once, spiked), (later, resumed) = run("calm", 99), run("once", 25), run("later", 98, 25 - 22)
    assert calm == []
    (line,) = once
    assert (line["step"], line["batch"]) == (25, 24)
    assert line["loss"] > line["limit"] > line["expected"]
    # The losses before the stop are in the checkpoint: without them 8 steps are too few to tell.
    timeless = [{key: value for key, value in r.items() if key != "seconds"} for r in (line, *later)]
    assert timeless[1:] == timeless[:1]
    for other in (spiked, resumed):
        assert all(torch.equal(other[name], plain[name]) for name in plain)


def test_accumulation_weighs_every_token_the_same(make_recipe, tmp_path):
    """Rows of one batch or of four: the same stream of tokens, so the same loss and gradient but for rounding.

    The batches of a step have different numbers of scored tokens here, so a mean of means would differ.
    """
    one = train(make_recipe("batch={rows: 4, length: 16}", f"output_dir={tmp_path}/one"))
    four = train(make_recipe("batch={rows: 4, length: 16, micro_rows: 1}", f"output_dir={tmp_path}/four"))
    for a, b in zip(curve(one.run_dir), curve(four.run_dir), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_nothing(make_recipe, tmp_path):
    plain = train(make_recipe(f"output_dir={tmp_path}/plain"))
    for change in ("engine.checkpointing=all", "engine.checkpointing=1", "model.states=recompute"):
        less = train(make_recipe(change, f"output_dir={tmp_path}/{change}"))
        assert curve(plain.run_dir) == curve(less.run_dir)


def test_every_nth_block_is_checkpointed(make_recipe):
    model = GSAForCausalLM(model_config(make_recipe("model.num_hidden_layers=5"), vocab_size=9))
    for policy, chosen in (("none", []), ("all", [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])):
        checkpoint_blocks(model, policy)
        assert [i for i, block in enumerate(model.model.layers) if block.gradient_checkpointing] == chosen


def test_another_seed_is_another_run(make_recipe, tmp_path):
    a = train(make_recipe("schedule.steps=3", f"output_dir={tmp_path}/a"))
    b = train(make_recipe("schedule.steps=3", "seed=1", f"output_dir={tmp_path}/b"))
    assert curve(a.run_dir)[0]["loss"] != curve(b.run_dir)[0]["loss"]


def test_another_recipe_in_the_same_folder(make_recipe, uninterrupted):
    train(make_recipe(), on_event=At(5, send(signal.SIGTERM)))
    with pytest.raises(UsageError) as caught:
        train(make_recipe("optimizer.lr=2e-2", "model.num_slots=8", "model.use_norm=false"))
    assert "optimizer.lr: 0.01 there, 0.02 now" in str(caught.value)
    assert "model.num_slots: 4 there, 8 now" in str(caught.value)
    assert "model.use_norm: not given there, False now" in str(caught.value)
    went_on = train(make_recipe("model.states=recompute"))  # the same bits
    assert_same(went_on, uninterrupted)
    with pytest.raises(UsageError, match="already holds a run"):
        train(make_recipe(), existing="refuse")
    harmless = make_recipe(
        "description=other words", "checkpoints={every: 7, keep: 3}", "logging.trackers=[tensorboard]"
    )
    assert_same(train(harmless), uninterrupted)
    fresh = train(make_recipe("schedule.steps=3"), existing="overwrite")
    assert (fresh.step, checkpoints(fresh.run_dir)) == (3, ["step-00000003"])


def test_checkpoints_that_stay(make_recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "check_space", lambda run_dir, needed: asked.append(needed))
    result = train(make_recipe("schedule.steps=11", "checkpoints={every: 2, keep: 1, keep_every: 4}"))
    assert checkpoints(result.run_dir) == ["step-00000004", "step-00000008", "step-00000011"]
    # Two at once, and two for good.
    (checkpoints_asked_for,) = {needed / (12 * sum(w.numel() for w in weights(result).values())) for needed in asked}
    assert checkpoints_asked_for == 4


def test_a_recipe_mended_before_the_first_checkpoint_starts(make_recipe, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        train(make_recipe(f"data.source={tmp_path}/nowhere.txt"))
    assert train(make_recipe("schedule.steps=3")).step == 3


def test_a_folder_of_something_else_is_left_alone(make_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"no recipe\.yaml"):
        train(make_recipe())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        train(make_recipe(f"output_dir={tmp_path}/file"))


def test_the_recipe_of_a_run_that_cannot_be_read(make_recipe):
    run = train(make_recipe("schedule.steps=3")).run_dir
    (run / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml is not UTF-8 text \(byte 6\)"):
        train(make_recipe("schedule.steps=3"))


def test_two_processes_do_not_share_a_folder(make_recipe):
    with open_run_folder(make_recipe(), "resume"), pytest.raises(UsageError, match="Another process is training in"):
        train(make_recipe())


def test_mqar(make_recipe, tmp_path):
    overrides = ["tokenizer=null", "data={kind: mqar, vocab_size: 32, num_kv_pairs: 2, held_out: 4}", "batch.length=16"]
    recipe = make_recipe(*overrides)
    whole = train(make_recipe(*overrides, f"output_dir={tmp_path}/whole"))
    train(recipe, on_event=At(7, send(signal.SIGTERM)))
    assert_same(train(recipe), (curve(whole.run_dir), curve(whole.run_dir, "eval"), weights(whole)))
    assert 0 <= whole.metrics["accuracy"] <= 1
    assert not (whole.checkpoint / "tokenizer.json").exists()


def test_a_time_budget_is_kept(make_recipe):
    recipe = make_recipe("schedule={minutes: 0.04, warmup_steps: 2}", "checkpoints.every=1000", "evaluation.every=1000")
    result = train(recipe)
    records = [r for r in read_metrics(result.run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert 2.0 < records[-1]["seconds"] < 3.5
    assert records[-1]["lr"] < 2e-3  # the cosine has come down, though nobody knew the number of steps
    assert result.step == records[-1]["step"] > 5
