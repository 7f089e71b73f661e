"""Checkpoints are complete or not there; every kind of damage is named; a full disk costs nothing."""

import errno
import json
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from flash_gsa.errors import UsageError
from flash_gsa.training import checkpoint as module
from flash_gsa.training.checkpoint import (
    BackgroundWriter,
    begin_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    resolve_model_folder,
    save_checkpoint,
)
from flash_gsa.training.engine import Piece


def write_model(folder):
    (folder / "config.json").write_text("{}")


WEIGHTS = {"model/w": Piece(torch.arange(100.0))}


def save(run_dir, step, keep=2, **changes):
    pieces = {**WEIGHTS, "a/b": Piece(torch.ones(3))}
    arguments = {"write_model": write_model, "pieces": pieces, "state": {"seconds": 1.5}, "keep": keep}
    begin_checkpoint(run_dir, step)
    return save_checkpoint(run_dir, step, **arguments | changes)


def present(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_round_trip(tmp_path):
    tensors = {
        "m": torch.randn(3, 4).t().contiguous(),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "u8": torch.tensor([7], dtype=torch.uint8),
    }
    pieces = WEIGHTS | {name: Piece(t) for name, t in tensors.items()}
    folder = save(tmp_path, 12, pieces=pieces, state={"data": {"epoch": 3}})
    loaded = load_checkpoint(folder)
    assert (loaded.folder, loaded.step, loaded.state["data"]) == (folder, 12, {"epoch": 3})
    assert sorted(loaded.names()) == sorted(pieces)
    for name, piece in pieces.items():
        found = loaded.read(name)
        assert torch.equal(found, piece.tensor)
        assert found.dtype == piece.tensor.dtype
    assert torch.equal(loaded.read("model/w", 10, 20), torch.arange(10.0, 20.0))
    with pytest.raises(UsageError, match="holds no model/other"):
        loaded.read("model/other")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "trainer.json", "trainer.safetensors"}


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 30, 4_000):
        save(tmp_path, step, keep=2)
    assert present(tmp_path) == ["step-00000030", "step-00004000"]
    assert latest_checkpoint(tmp_path).folder.name == "step-00004000"


def test_some_are_kept_for_good(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=1, keep_every=30)
    assert present(tmp_path) == ["step-00000030", "step-00000060", "step-00000070"]
    save(tmp_path, 80, keep=1)
    assert present(tmp_path) == ["step-00000080"]


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None


def test_steps_beyond_eight_digits_are_in_order(tmp_path):
    save(tmp_path, 99_999_999)
    assert save(tmp_path, 100_000_000) == latest_checkpoint(tmp_path).folder


def test_writing_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    folder = save(tmp_path, 5, state={"seconds": 2.0})
    assert present(tmp_path) == ["step-00000005"]
    assert load_checkpoint(folder).state["seconds"] == 2.0


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


DAMAGE = [
    ("model.safetensors", cut, r"model\.safetensors has 494 bytes where 504 were written"),
    ("model.safetensors", flip, r"contents of model\.safetensors have changed"),
    ("trainer.safetensors", flip, r"contents of trainer\.safetensors have changed"),
    ("trainer.json", lambda p: p.unlink(), r"trainer\.json is missing"),
    ("manifest.json", lambda p: p.unlink(), r"manifest\.json is missing"),
    ("manifest.json", cut, r"manifest\.json cannot be read"),
    ("manifest.json", lambda p: p.write_text('{"format": 1}'), r"manifest\.json cannot be read"),
    ("manifest.json", lambda p: p.write_text("[]"), r"manifest\.json cannot be read"),
    ("manifest.json", lambda p: p.write_text('{"format": 9, "files": {}}'), r"has format 9, and .* reads format 2"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGE)
def test_damage_is_named(tmp_path, file, damage, message):
    folder = save(tmp_path, 7)
    damage(folder / file)
    for read in (load_checkpoint, lambda _: latest_checkpoint(tmp_path)):
        with pytest.raises(UsageError, match=message):
            read(folder)


def test_damage_says_what_to_go_on_from(tmp_path):
    folder = save(tmp_path, 7)
    flip(folder / "model.safetensors")
    with pytest.raises(UsageError, match="no other checkpoint beside it"):
        load_checkpoint(folder)
    save(tmp_path, 3, keep=5)
    with pytest.raises(UsageError, match=r"Delete that folder to go on from step-00000003"):
        load_checkpoint(folder)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write_model", "save_file", "_write_json", "_flush"])
def test_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, where):
    older = save(tmp_path, 1)
    if where != "write_model":
        monkeypatch.setattr(module, where, full_disk)
    with pytest.raises(UsageError, match=r"step 2 could not be written .*no space is left .*step-00000001 is complete"):
        save(tmp_path, 2, write_model=full_disk if where == "write_model" else write_model, keep=1)
    assert present(tmp_path) == ["step-00000001"]
    assert load_checkpoint(older).step == 1


def test_full_disk_as_safetensors_reports_it(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def rust(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", rust)
    with pytest.raises(UsageError, match=r"no space is left on the disk\. No checkpoint has been written yet"):
        save(tmp_path, 2)
    assert present(tmp_path) == []


def test_space_is_asked_for_beforehand(tmp_path):
    module.check_space(tmp_path, 1)
    with pytest.raises(UsageError, match=r"has .* free, and the checkpoints of this run need .*GiB"):
        module.check_space(tmp_path, 1 << 60)


def test_half_written_folders_are_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert latest_checkpoint(tmp_path).folder.name == "step-00000001"
    remove_leftovers(tmp_path)
    assert present(tmp_path) == ["step-00000001"]


def test_manifest_is_written_last(tmp_path, monkeypatch):
    seen = []
    original = module._write_json

    def watch(path, value):
        seen.append((path.name, sorted(p.name for p in path.parent.iterdir())))
        original(path, value)

    monkeypatch.setattr(module, "_write_json", watch)
    save(tmp_path, 1)
    assert seen[-1] == ("manifest.json", ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"])


def test_resolve_run_checkpoint_and_plain_folder(tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    folder = save(run, 7)
    plain.mkdir()
    write_model(plain)
    save_file({"w": torch.ones(1)}, plain / "model.safetensors")
    assert resolve_model_folder(run) == folder
    assert resolve_model_folder(run / "checkpoints") == folder
    assert resolve_model_folder(str(folder)) == folder
    assert resolve_model_folder(plain) == plain


def test_resolve_does_not_need_the_trainers_files(tmp_path):
    folder = save(tmp_path, 7)
    (folder / "trainer.safetensors").unlink()
    assert resolve_model_folder(folder) == folder
    flip(folder / "model.safetensors")
    with pytest.raises(UsageError, match="have changed"):
        resolve_model_folder(folder)


def test_resolve_refuses(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        resolve_model_folder(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds no model"):
        resolve_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="Pickled weights"):
        resolve_model_folder(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="has not written a checkpoint yet"):
        resolve_model_folder(tmp_path / "run")


def test_nothing_is_pickled(tmp_path):
    folder = save(tmp_path, 7)
    assert {os.path.splitext(p)[1] for p in os.listdir(folder)} == {".json", ".safetensors"}


def save_sharded(run_dir, step, whole, ranks):
    """As that many processes do, each with its rows; the main one waits for the others, so it is the last here."""
    begin_checkpoint(run_dir, step)
    cuts = [len(whole) * rank // ranks for rank in range(ranks + 1)]
    for rank in reversed(range(ranks)):
        rows = whole[cuts[rank] : cuts[rank + 1]]
        pieces = {"model/w": Piece(rows, cuts[rank], len(whole))} if len(rows) else {}
        if rank == 0:
            pieces["optimizer/step/w"] = Piece(torch.tensor(3.0))
        folder = save_checkpoint(
            run_dir,
            step,
            write_model=write_model,
            pieces=pieces,
            state={},
            keep=2,
            sharded=True,
            rank=rank,
            ranks=ranks,
        )
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_rows_of_several_processes_are_read_by_any_number(tmp_path, ranks):
    whole = torch.randn(4, 3)  # fewer rows than processes, once
    folder = save_sharded(tmp_path, 3, whole, ranks)
    found = load_checkpoint(folder)
    assert torch.equal(found.read("model/w"), whole)
    assert torch.equal(found.read("model/w", 1, 3), whole[1:3])
    assert found.read("optimizer/step/w") == 3
    files = set(json.loads((folder / "manifest.json").read_text())["files"])
    assert files == {"config.json", "trainer.json"} | {
        f"shards/{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)
    }
    flip(folder / f"shards/{ranks - 1:05d}-of-{ranks:05d}.safetensors")
    with pytest.raises(UsageError, match=rf"contents of shards/{ranks - 1:05d}-of-{ranks:05d}\.safetensors have"):
        load_checkpoint(folder)


def test_the_main_process_waits_for_the_others(tmp_path):
    begin_checkpoint(tmp_path, 1)
    common = {"write_model": write_model, "state": {}, "keep": 2, "sharded": True, "ranks": 2}
    writer = BackgroundWriter()
    writer.start(lambda: save_checkpoint(tmp_path, 1, pieces=WEIGHTS, rank=0, **common))
    time.sleep(0.3)
    assert writer.poll() is None
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, pieces={}, rank=1, **common)
    assert writer.wait() == latest_checkpoint(tmp_path).folder
    assert writer.poll() is None


@pytest.mark.parametrize("ends", [False, True], ids=["never begins", "ends half-way"])
def test_the_main_process_does_not_wait_for_ever(tmp_path, monkeypatch, ends):
    older = save(tmp_path, 1)
    begin_checkpoint(tmp_path, 2)
    common = {"write_model": write_model, "state": {}, "keep": 2, "sharded": True, "ranks": 2}
    if ends:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_listed", lambda path: 1 / 0)  # between the shard and what says that it is whole
            with pytest.raises(ZeroDivisionError):
                save_checkpoint(tmp_path, 2, pieces=WEIGHTS, rank=1, **common)
        (tmp_path / "checkpoints/.writing-step-00000002/shards/00001-of-00002.failed").unlink()
    told = r"step 2 could not be written .*process 1 has not written its part.* for 0\.3 s \(engine\.timeout\)"
    with pytest.raises(UsageError, match=told):
        save_checkpoint(tmp_path, 2, pieces=WEIGHTS, rank=0, patience=0.3, **common)
    assert present(tmp_path) == [older.name]


def test_the_main_process_waits_for_one_that_is_slow(tmp_path):
    begin_checkpoint(tmp_path, 1)
    common = {"write_model": write_model, "state": {}, "keep": 2, "sharded": True, "ranks": 2}
    writer = BackgroundWriter()
    writer.start(lambda: save_checkpoint(tmp_path, 1, pieces=WEIGHTS, rank=0, patience=0.6, **common))
    while not (shards := tmp_path / "checkpoints/.writing-step-00000001/shards").exists():
        time.sleep(0.01)
    for size in range(12):  # twice as long, and never so long without a byte
        (shards / "00001-of-00002.safetensors").write_bytes(b"0" * size)
        time.sleep(0.1)
    assert writer.poll() is None
    save_checkpoint(tmp_path, 1, pieces={}, rank=1, **common)
    assert writer.wait() == latest_checkpoint(tmp_path).folder


def test_what_fails_in_the_background_is_raised_in_front(tmp_path):
    writer = BackgroundWriter()
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert writer.wait() is None


def test_a_full_disk_of_one_process_is_told_by_the_main_one(tmp_path, monkeypatch):
    older = save(tmp_path, 1)
    begin_checkpoint(tmp_path, 2)
    common = {"write_model": write_model, "state": {}, "keep": 2, "sharded": True, "ranks": 2}
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full_disk)
        with pytest.raises(UsageError, match=r"step 2 could not be written .*no space is left"):
            save_checkpoint(tmp_path, 2, pieces={}, rank=1, **common)
    with pytest.raises(UsageError, match=r"process 1 could not write its part: .*No space left.*step-00000001 is"):
        save_checkpoint(tmp_path, 2, pieces=WEIGHTS, rank=0, **common)
    assert present(tmp_path) == [older.name]
