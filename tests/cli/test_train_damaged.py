"""`flash-gsa train` with the settings as they are, on tokens that are no longer what was written."""

import os

import pytest

from flash_gsa.data import verification
from flash_gsa.data.shards import sha256_of
from tests.training.conftest import write_tiny


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("flash_gsa.training.trainer.write_report", lambda run_dir: run_dir / "report.html")


def test_a_flipped_byte_is_refused_with_the_shard_and_both_checksums(run, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(verification, "sha256_of", lambda file: (read.append(file.name), sha256_of(file))[1])
    write_tiny(tmp_path)

    def train(number):
        return run(
            "train", tmp_path / "tiny.yaml", "schedule.steps=1", "schedule.warmup_steps=0", f"output_dir=run-{number}"
        )

    monkeypatch.chdir(tmp_path)
    assert train(1).status == 0
    (shard,) = tmp_path.glob("cache/*/*.arrow")
    (shard.parent / verification.VERIFIED).unlink()
    expected = sha256_of(shard)
    assert train(2).status == train(3).status == 0
    assert read == [shard.name]
    contents = bytearray(shard.read_bytes())
    contents[-100] ^= 1
    shard.write_bytes(contents)
    answer = train(4)
    told = "".join(answer.err.split())  # lines are broken
    assert answer.status == 2
    assert f"{shard.name}isdamaged:itssha256is{sha256_of(shard)},andthemanifestexpects{expected}" in told
    contents[-100] ^= 1
    shard.write_bytes(contents)
    os.utime(shard, (0, 0))
    read.clear()
    assert train(5).status == train(6).status == 0
    assert read == [shard.name]
