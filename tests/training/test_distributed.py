"""Two processes on CPUs: every engine trains as one process does, and goes on from what any other has written."""

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from flash_gsa.errors import UsageError
from flash_gsa.training.checkpoint import latest_checkpoint, load_checkpoint, resolve_model_folder
from flash_gsa.training.engine import Engine
from flash_gsa.training.engines import open_engine
from flash_gsa.training.export import export, load_model
from flash_gsa.training.metrics import read_metrics
from flash_gsa.training.starts import read_starts
from flash_gsa.training.trainer import train

from ..conftest import made_once
from .conftest import write_tiny
from .processes import go_on_from

pytestmark = pytest.mark.timeout(1000)  # a dozen runs of two processes are made at once, for all tests
KINDS = {
    "ddp": ["engine.kind=ddp"],
    "fsdp2": ["engine.kind=fsdp2"],
    "hsdp": ["engine.kind=hsdp", "engine.replicas=2"],
    "zero2": ["engine.kind=zero2"],
    "zero3": ["engine.kind=zero3"],
    "context": ["engine={kind: fsdp2, context: 2}"],
    "step": ["engine={kind: fsdp2, reshard_after: step}"],
    "more": ["engine={kind: fsdp2, checkpointing: 2}", "batch.micro_rows=2"],
}
# Four processes: groups of shards that are copies of each other, and rows cut over some of the processes.
OF_FOUR = {
    "hsdp of four": ["engine={kind: hsdp, replicas: 2, reshard_after: step}"],
    "rows and context": ["engine={kind: fsdp2, context: 2}"],
    "hsdp and context": ["engine={kind: hsdp, replicas: 2, context: 2}"],
}
# Four processes that go on after two.
MORE = "four after fsdp2"
# Processes that score other numbers of held-out passes: of documents by 37 tokens, of three batches of MQAR.
UNEVEN = ("ddp", "fsdp2", "zero3", "context", "step")
FEW_STEPS = ["schedule.steps=2", "schedule.warmup_steps=0"]
MQAR = ["tokenizer=null", "data={kind: mqar, vocab_size: 32, num_kv_pairs: 4, held_out: 12}"]
AFTER = [
    ("fsdp2", "one"),
    ("zero3", "fsdp2"),
    ("zero2", "zero3"),
    ("ddp", "zero2"),
    ("hsdp", "context"),
    ("step", "ddp"),
]
# Sums are taken in another order; AdamW's first steps divide by the size of a gradient, also where that is rounding.
SAME = {"rel": 2e-5, "abs": 2e-6}


LAUNCHER, ENVIRONMENT = [sys.executable, "-m", "torch.distributed.run"], {**os.environ, "OMP_NUM_THREADS": "1"}


def launched(processes, *arguments, seconds=280):
    """Runs tests.training.processes; returns what it printed."""
    command = [*LAUNCHER, "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "tests.training.processes", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, timeout=seconds, capture_output=True, text=True, check=False)


def one_of_two_machines():
    """The command of each; HOST is this machine, with a port that was free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*LAUNCHER, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "machines"]
    return [*command, "--rdzv-endpoint", f"127.0.0.1:{port}"]


def launched_on_two_machines(*arguments, seconds=280):
    """The same by two launchers that find each other, as on two machines; returns what each printed."""
    command = [*one_of_two_machines(), "-m", "tests.training.processes", *map(str, arguments)]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [one.communicate(timeout=seconds)[0] for one in both]
    assert not any(one.returncode for one in both), "\n".join(text[-3000:] for text in said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders by name: "one" by this process; each of KINDS by two; "A after B", which went on after B's step 4."""
    folder = made_once(tmp_path_factory, "distributed", make_runs)
    return lambda name: folder / name.replace(" ", "-")


def make_runs(folder):
    make = write_tiny(folder)
    common = ["model.num_hidden_layers=2", "batch.micro_rows=1", "schedule.steps=7"]

    def settings(name, *more):
        return [*common, *more, f"output_dir={folder / name.replace(' ', '-')}"]

    train(make(*settings("one")))
    train(make(*settings("mqar by one", *FEW_STEPS, *MQAR)))
    asked = [{"overrides": settings(name, *more)} for name, more in KINDS.items()]
    for name, other in AFTER:
        overrides = settings(f"{name} after {other}", *KINDS[name])
        asked.append({"overrides": overrides, "after": [str(folder / other), 4]})
    asked.append({"overrides": settings("odd", *KINDS["fsdp2"], "batch.rows=3")})
    for name in UNEVEN:
        overrides = settings(f"uneven {name}", *KINDS[name], *FEW_STEPS)
        asked.append({"overrides": overrides, "pass": 37})
        overrides = settings(f"mqar by {name}", *KINDS[name], *FEW_STEPS, *MQAR)
        asked.append({"overrides": overrides})
    asked.append({"overrides": settings("single")})
    # What the first process finds alone: a folder that holds a run of another recipe.
    asked.append({"overrides": settings("ddp", *KINDS["ddp"], "optimizer.lr=0.5")})
    for kind in ("zero2", "fsdp2"):
        huge = ("optimizer.lr=1e38", "schedule.warmup_steps=0")
        asked.append({"overrides": settings(f"nan by {kind}", *KINDS[kind], *huge)})
    done = launched(2, folder / "tiny.yaml", *map(json.dumps, asked))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    four = [{"overrides": settings(name, *more)} for name, more in OF_FOUR.items()]
    four.append({"overrides": settings(MORE, *KINDS["fsdp2"]), "after": [str(folder / "fsdp2"), 4]})
    done = launched(4, folder / "tiny.yaml", *map(json.dumps, four))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    killed = {"overrides": settings("killed", *KINDS["fsdp2"])}
    done = launched(2, folder / "tiny.yaml", json.dumps(killed | {"killed": 6}))
    assert done.returncode != 0
    for other in ("fsdp2", "zero3", "killed"):
        go_on_from(folder / other, 4, folder / f"one-after-{other}")
        train(make(*settings(f"one after {other}")))
    machines = {"overrides": settings("machines", *KINDS["fsdp2"])}
    launched_on_two_machines(folder / "tiny.yaml", *map(json.dumps, (machines, killed)))


# Which of two processes is killed, after how many steps of its launch, and how many seconds later. Five steps are
# enough for one more checkpoint, and all together do not reach the end.
RANDOM = random.Random(21)
KILLS = [(RANDOM.randrange(2), RANDOM.randint(5, 7), round(RANDOM.uniform(0, 0.2), 3)) for _ in range(4)]
# Which is killed while a checkpoint is written, in a run of its own.
IN_WRITING = (0, 1)


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """A folder of runs: "random" and "writing-RANK" with what kills left of them; "long" and "short" by one process."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    return made_once(tmp_path_factory, "kills", make_kills)


def make_kills(folder):
    make = write_tiny(folder)
    common = ["model.num_hidden_layers=2", "batch.micro_rows=1"]
    long, short = [*common, "schedule.steps=40", "checkpoints.every=2"], [*common, "schedule.steps=7"]
    train(make(*long, f"output_dir={folder}/long"))
    train(make(*short, f"output_dir={folder}/short"))
    run = {"overrides": [*long, *KINDS["fsdp2"], f"output_dir={folder}/random"]}
    launches = [[run | {"random": kill}] for kill in KILLS]
    runs = {
        rank: {"overrides": [*short, *KINDS["fsdp2"], f"output_dir={folder}/writing-{rank}"]} for rank in IN_WRITING
    }
    launches += [[run | {"writing": [rank, 7]}] for rank, run in runs.items()]
    launches.append([*runs.values(), run])
    command = [sys.executable, "-m", "tests.training.processes", str(folder / "tiny.yaml"), *map(json.dumps, launches)]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=500, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    # Only who was to be killed was, while the other one trained or waited, which fails then; the last launch went well.
    killed = [[rank for rank in range(2) if pair[rank] == -signal.SIGKILL] for pair in codes]
    assert killed == [*([rank] for rank, _, _ in KILLS), *([rank] for rank in IN_WRITING), []], codes
    assert all(all(pair) for pair in codes[:-1]), codes
    assert codes[-1] == [0, 0], done.stderr[-6000:]


def figures(run_dir, kind):
    return [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == kind]


def assert_same(found, expected):
    for kind, names in (("train", ("loss", "grad_norm", "lr", "bits_per_byte")), ("eval", ("loss", "bits_per_byte"))):
        a, b = figures(found, kind), figures(expected, kind)
        assert [r["step"] for r in a] == [r["step"] for r in b]
        for name in names:
            assert [r[name] for r in a] == pytest.approx([r[name] for r in b], **SAME)
    for a, b in zip(figures(found, "eval"), figures(expected, "eval"), strict=True):
        for name in ("by_source", "forgetting", "slot_entropy", "dead_slots"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does(runs, kind):
    assert_same(runs(kind), runs("one"))
    assert [r["devices"] for r in figures(runs(kind), "train")] == [2] * 7


@pytest.mark.parametrize("kind", UNEVEN)
def test_processes_score_different_numbers_of_passes(runs, kind):
    found, expected = (figures(runs(name), "eval")[0] for name in (f"uneven {kind}", "one"))
    assert found["loss"] == pytest.approx(expected["loss"], **SAME)
    assert found["by_source"] == pytest.approx(expected["by_source"], **SAME)
    assert figures(runs(f"uneven {kind}"), "eval")[-1]["step"] == 2
    by_several, by_one = (figures(runs(f"mqar by {name}"), "eval") for name in (kind, "one"))
    assert [r["accuracy"] for r in by_several] == pytest.approx([r["accuracy"] for r in by_one], abs=0.03)
    assert [r["step"] for r in by_several] == [0, 2]


@pytest.mark.parametrize("kind", OF_FOUR)
def test_four_processes_do_too(runs, kind):
    assert_same(runs(kind), runs("one"))
    assert [r["devices"] for r in figures(runs(kind), "train")] == [4] * 7


def test_launchers_of_several_machines_find_each_other(runs):
    assert_same(runs("machines"), runs("one"))
    (start,) = read_starts(runs("machines"))
    assert start["command"].startswith("torchrun --nnodes 2 --nproc-per-node 1")


# A HOST where nobody listens, as one that cannot be reached: how long it may take to join does not matter.
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ("join_timeout=2", "RendezvousTimeoutError"),
        ("is_host=false,read_timeout=2,join_timeout=600", "RendezvousConnectionError"),
    ],
)
def test_what_a_launcher_says_that_stays_alone(settings, error):
    began = time.monotonic()
    command = [*one_of_two_machines(), "--rdzv-conf", settings, "-m", "flash_gsa", "train", "demo"]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert set(re.findall(r"Rendezvous\w+Error(?=[:\n])", done.stderr)) == {error}, done.stderr[-3000:]
    assert time.monotonic() - began < 100  # which is less than without these settings


def test_accelerate_starts_processes_as_well(runs, tmp_path):
    make = write_tiny(tmp_path)
    make()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2"]
    command += ["--num-machines", "1", "--mixed-precision", "no", "--dynamo-backend", "no", "--main-process-port", "0"]
    command += ["-m", "flash_gsa", "train", str(tmp_path / "tiny.yaml"), "engine.kind=ddp", "model.num_hidden_layers=2"]
    command += ["batch.micro_rows=1", "schedule.steps=7", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=ENVIRONMENT, timeout=280, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_same(tmp_path / "run", runs("one"))


@pytest.mark.parametrize("kind", KINDS)
def test_their_checkpoints_hold_the_same_weights_and_moments(runs, kind):
    found, expected = (load_checkpoint(runs(name) / "checkpoints" / "step-00000007") for name in (kind, "one"))
    assert sorted(found.names()) == sorted(expected.names())
    for name in expected.names():
        if not name.startswith("random/"):
            torch.testing.assert_close(found.read(name), expected.read(name), rtol=1e-3, atol=1e-5)
    shards = sorted(p.name for p in (found.folder / "shards").glob("*"))
    whole = kind in ("ddp", "zero2", "zero3")
    assert shards == ([] if whole else ["00000-of-00002.safetensors", "00001-of-00002.safetensors"])
    assert (found.folder / "model.safetensors").exists() == whole


@pytest.mark.parametrize("name", ["one after fsdp2", "one after zero3", *(f"{a} after {b}" for a, b in AFTER)])
def test_any_engine_goes_on_from_any_others_checkpoint(runs, name):
    assert_same(runs(name), runs("one"))
    assert [start["step"] for start in read_starts(runs(name))] == [0, 4]


@pytest.mark.parametrize("name", ["killed", "one after killed"])
def test_a_run_of_which_one_process_was_killed_goes_on_with_two_or_one(runs, name):
    assert_same(runs(name), runs("one"))
    assert [start["step"] for start in read_starts(runs(name))] == [0, 4]


def test_more_processes_go_on(runs):
    assert_same(runs(MORE), runs("one"))
    assert [start["step"] for start in read_starts(runs(MORE))] == [0, 4]
    assert [r["devices"] for r in figures(runs(MORE), "train")] == [2] * 4 + [4] * 3


def test_kills_of_any_process_at_random_change_no_loss(kills):
    assert {rank for rank, _, _ in KILLS} == {0, 1}
    assert_same(kills / "random", kills / "long")
    expected = [r["loss"] for r in figures(kills / "long", "train")]
    assert len(expected) == 40
    for number in range(len(KILLS)):
        found = figures(kills / f"random-left-{number}", "train")
        assert [r["step"] for r in found] == list(range(1, len(found) + 1))
        assert [r["loss"] for r in found] == pytest.approx(expected[: len(found)], **SAME)
        assert 4 <= len(found) < 40
    first, *others = (start["step"] for start in read_starts(kills / "random"))
    assert first == 0
    assert len(others) == len(KILLS)
    assert others == sorted(others)
    assert 0 < others[0] < others[-1]
    whole = ["step-00000038", "step-00000040"]
    assert sorted(p.name for p in (kills / "random" / "checkpoints").iterdir()) == whole


@pytest.mark.parametrize("rank", IN_WRITING)
def test_a_checkpoint_that_not_all_have_finished_is_none(kills, rank):
    (left,) = (path for path in kills.glob(f"writing-{rank}-left-*") if read_starts(path)[-1]["step"] == 0)
    unfinished, whole = sorted((left / "checkpoints").iterdir())
    assert (unfinished.name, whole.name) == (".writing-step-00000007", "step-00000004")
    # Process 0 takes its own .json away, then waits for the other's; process 1 dies before it has one.
    shard = f"{rank:05d}-of-00002"
    assert [p.name for p in unfinished.glob(f"shards/{shard}.*")] == [f"{shard}.safetensors"]
    assert not (unfinished / "manifest.json").exists()
    assert latest_checkpoint(left).folder == resolve_model_folder(left) == whole
    went_on = kills / f"writing-{rank}"
    assert_same(went_on, kills / "short")
    assert [start["step"] for start in read_starts(went_on)] == [0, 4]
    assert sorted(p.name for p in (went_on / "checkpoints").iterdir()) == ["step-00000004", "step-00000007"]


def test_a_sharded_checkpoint_is_a_model(runs, tmp_path):
    expected = load_file(runs("one") / "checkpoints" / "step-00000007" / "model.safetensors")
    model = load_model(runs("fsdp2"))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-3, atol=1e-5)
    export(runs("fsdp2"), tmp_path / "out", torch.bfloat16)
    found = load_model(tmp_path / "out")
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def refusals(run_dir):
    return [path.read_text() for path in sorted(run_dir.glob("refused-*.txt"))]


def test_what_does_not_fit_the_processes_is_refused_by_each(runs):
    for message in refusals(runs("odd")):
        assert re.search(r"batch\.rows=3.*cannot be divided over 2 processes.*batch\.rows=[24]", message)
    for message in refusals(runs("single")):
        assert re.search(r"2 processes were started, and engine\.kind=single uses one", message)
    assert len(refusals(runs("odd"))) == len(refusals(runs("single"))) == 2


def test_what_one_process_finds_is_raised_by_each(runs):
    messages = refusals(runs("ddp"))
    assert len(messages) == 2
    for message in messages:
        assert re.search(r"holds a run of another recipe", message)


@pytest.mark.parametrize("kind", ["zero2", "fsdp2"])
def test_what_is_not_finite_stops_every_process(runs, kind):
    messages = refusals(runs(f"nan by {kind}"))
    assert len(messages) == 2
    for message in messages:
        assert re.search(r"Training stopped at step \d: (loss|the held-out score|g contains)", message)


def test_an_engine_of_several_processes_says_how_to_start_them(make_recipe, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for kind in ("ddp", "fsdp2", "zero2"):
        with pytest.raises(UsageError, match=rf"engine\.kind={kind} needs processes.*torchrun --nproc-per-node"):
            open_engine(make_recipe(f"engine.kind={kind}"))


def test_without_deepspeed(make_recipe, monkeypatch):

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    with pytest.raises(UsageError, match=r"pip install flash-gsa\[deepspeed\].*engine\.kind=fsdp2"):
        open_engine(make_recipe("engine.kind=zero3"))


def test_more_processes_than_gpus(make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ("WORLD_SIZE", "4"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")
    for name, value in (*names, ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"4 processes were started on this machine, which has 2 GPU"):
        open_engine(make_recipe("engine.kind=ddp", "device=cuda"))
    with pytest.raises(UsageError, match=r"device=cuda:1 is one device"):
        open_engine(make_recipe("engine.kind=ddp", "device=cuda:1"))


def test_processes_that_do_not_find_each_other(make_recipe, tmp_path):
    make_recipe()
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flash_gsa", "train", tmp_path / "tiny.yaml", "engine.kind=ddp", "engine.timeout=2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(
        r"Process 1 of 2 did not find the others at 127\.0\.0\.1:9 within engine\.timeout=2 s", done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not in the environment, where a launcher puts it: torchrun"),
        ({"RANK": "5"}, "RANK=5 with WORLD_SIZE=2: expected whole numbers, RANK from 0 below WORLD_SIZE"),
        ({"RANK": "x"}, "RANK=x with WORLD_SIZE=2"),
    ],
)
def test_what_no_launcher_would_say(make_recipe, monkeypatch, environment, message):
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in (usual | environment).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        open_engine(make_recipe("engine.kind=ddp"))


def test_one_process_is_the_default(make_recipe):
    engine = open_engine(make_recipe())
    assert type(engine) is Engine
    assert (engine.rank, engine.ranks, engine.is_main) == (0, 1, True)


# Name: one of KINDS, precision, more overrides. What float32 products on a GPU, in another order, leave of a loss after
# seven steps; and bfloat16's.
ON_GPUS = {
    "ddp": ("ddp", "fp32"),
    "fsdp2": ("fsdp2", "fp32"),
    "hsdp": ("hsdp", "fp32"),
    "zero2": ("zero2", "bf16"),
    "zero3": ("zero3", "fp32"),
    "context": ("context", "fp32"),
    "step": ("step", "bf16"),
    "more": ("more", "bf16", "engine.compile=true"),
    "pure": ("fsdp2", "pure_bf16"),
}
UNEVEN_ON_GPUS = ("fsdp2", "zero3", "context")
# Four processes, each on a GPU of its own.
FOUR_ON_GPUS = OF_FOUR | {"fsdp2 of four": KINDS["fsdp2"], "fsdp2 of four after fsdp2": KINDS["fsdp2"]}
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2, "pure_bf16": 2e-2}


@pytest.fixture(scope="module")
def gpu_runs(tmp_path_factory):
    """Folders by name: of runs by one process on one GPU, called after their precision; by two on two, and by four
    where there are four; "A after B"."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return made_once(tmp_path_factory, "gpu_runs", make_gpu_runs)


def make_gpu_runs(folder):
    make = write_tiny(folder)
    model = "model={hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, num_heads: 2, num_slots: 16}"
    common = [
        "device=cuda",
        model,
        "batch={rows: 8, length: 64, micro_rows: 2}",
        "schedule.steps=7",
        "optimizer.lr=1e-3",
    ]

    def settings(name, precision, *more):
        return [*common, f"precision={precision}", *more, f"output_dir={folder / name}"]

    def asked(name, kind, precision, *more):
        return {"overrides": settings(name, precision, *KINDS[kind], *more)}

    for precision in TOLERANCE:
        train(make(*settings(precision, precision)))
    deepspeed = importlib.util.find_spec("deepspeed")
    runs = [asked(name, *what) for name, what in ON_GPUS.items() if deepspeed or "zero" not in name]
    runs += [
        asked(f"uneven-{kind}", kind, "fp32") | {"pass": 37}
        for kind in UNEVEN_ON_GPUS
        if deepspeed or "zero" not in kind
    ]
    runs.append(asked("fsdp2-after-fp32", "fsdp2", "fp32") | {"after": [str(folder / "fp32"), 4]})
    done = launched(2, folder / "tiny.yaml", *map(json.dumps, runs), seconds=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    if torch.cuda.device_count() >= 4:
        four = [{"overrides": settings(name.replace(" ", "-"), "fp32", *more)} for name, more in FOUR_ON_GPUS.items()]
        four[-1] |= {"after": [str(folder / "fsdp2"), 4]}
        done = launched(4, folder / "tiny.yaml", *map(json.dumps, four))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    go_on_from(folder / "fsdp2", 4, folder / "fp32-after-fsdp2")
    train(make(*settings("fp32-after-fsdp2", "fp32")))


def assert_near(found, expected, precision):
    for what in ("train", "eval"):
        losses = [r["loss"] for r in figures(found, what)]
        assert losses == pytest.approx([r["loss"] for r in figures(expected, what)], rel=TOLERANCE[precision])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.long), *list(ON_GPUS)[1:]])
def test_two_gpus_train_as_one_does(gpu_runs, name):
    if not (gpu_runs / name).exists():
        pytest.skip("needs DeepSpeed")
    precision = ON_GPUS[name][1]
    assert_near(gpu_runs / name, gpu_runs / precision, precision)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOUR_ON_GPUS)
def test_four_gpus_train_as_one_does(gpu_runs, name):
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
    folder = gpu_runs / name.replace(" ", "-")
    assert_near(folder, gpu_runs / "fp32", "fp32")
    assert [start["step"] for start in read_starts(folder)] == ([0, 4] if "after" in name else [0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", UNEVEN_ON_GPUS)
def test_gpus_score_other_numbers_of_held_out_passes(gpu_runs, kind):
    if not (gpu_runs / f"uneven-{kind}").exists():
        pytest.skip("needs DeepSpeed")
    assert_near(gpu_runs / f"uneven-{kind}", gpu_runs / "fp32", "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fsdp2-after-fp32", "fp32-after-fsdp2"])
def test_another_number_of_gpus_goes_on(gpu_runs, name):
    assert_near(gpu_runs / name, gpu_runs / "fp32", "fp32")
    assert [start["step"] for start in read_starts(gpu_runs / name)] == [0, 4]
