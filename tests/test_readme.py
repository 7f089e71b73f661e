"""What the README tells people to type works, at a size for tests."""

import json
import lzma
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flash_gsa.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("flash-gsa ")
]

SMALL = {
    "demo": "tokenizer=byte model.hidden_size=32 model.num_hidden_layers=1 model.intermediate_size=32 batch.rows=1 "
    "data.train_bytes=20000 evaluation.max_bytes=1000 data.held_out=1000 schedule.minutes=null schedule.steps=2 "
    "schedule.warmup_steps=1",
    "mqar_tiny": "schedule.steps=2 schedule.warmup_steps=1 data.held_out=10",
    "prose_15m": "tokenizer=byte model.hidden_size=32 model.num_hidden_layers=1 model.intermediate_size=32 "
    "batch.rows=1 schedule.minutes=null schedule.steps=2 schedule.warmup_steps=1 device=cpu",
}


def test_the_python_example(tmp_path):
    (example,) = (block for language, block in BLOCKS if language == "python")
    assert len([line for line in example.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = done.stdout.splitlines()
    assert shapes[0] == "torch.Size([2, 1000, 8, 64]) [(2, 2, 64, 32), (2, 2, 32, 64)]"
    assert "bytes of state" in shapes[1]
    assert shapes[2] == "torch.Size([1, 15])"


def test_the_commands(tmp_path, monkeypatch, capfd):
    assert len(COMMANDS) >= 6
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(ROOT / "README.md", tmp_path)
    for part in ("train", "valid"):
        with lzma.open(f"{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for i in range(20):
                file.write(json.dumps({"text": f"{part} {i} says a few words. " * 60, "source": "made up"}) + "\n")
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments = [argument for argument in arguments if not argument.startswith("schedule.")]
            given = {argument.split("=")[0] for argument in arguments}
            arguments += [setting for setting in SMALL[arguments[1]].split() if setting.split("=")[0] not in given]
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "5"]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code, f"{command}: {capfd.readouterr().err}"
    assert (tmp_path / "look" / "slots.png").stat().st_size > 1000
    assert (tmp_path / "look" / "slots.html").exists()


def test_the_tree_names_every_module():
    for module in (ROOT / "flash_gsa").rglob("*.py"):
        part = module.relative_to(ROOT / "flash_gsa")
        if part.name == "__init__.py":
            continue
        documents = README + (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        assert part.name in documents, f"{part} is named neither in README.md nor in docs/training.md"


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"
