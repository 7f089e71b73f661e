"""eval, generate and inspect on a tiny random model."""

import json
import re
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path):
    records = [{"text": "def f(): pass\n", "source": "code"}, {"text": "Grüße aus Köln.", "source": "prose"}]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records), "utf-8")
    return path


def test_eval_reports_by_source(run, checkpoint, texts):
    answer = run("eval", checkpoint, texts, "--json")
    assert answer.status == 0, answer.err
    figures = json.loads(answer.out)
    assert set(figures["by_source"]) == {"code", "prose"}
    assert figures["total"]["bytes"] == len("def f(): pass\nGrüße aus Köln.".encode())
    parts = figures["by_source"].values()
    assert figures["total"]["nats"] == pytest.approx(sum(p["nats"] for p in parts))

    table = run("eval", checkpoint, texts, "--tokens-per-pass", 5).out
    for name, score in {**figures["by_source"], "all": figures["total"]}.items():
        row = next(line for line in table.splitlines() if f" {name} " in line)
        assert f"{score['bits_per_byte']:.4f}" in row
    assert "\x1b" not in table


def test_eval_takes_other_fields(run, checkpoint, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"body": "some words", "part": "wiki"}))
    answer = run("eval", checkpoint, path, "--text-field", "body", "--source-field", "part", "--json")
    assert set(json.loads(answer.out)["by_source"]) == {"wiki"}
    assert "text-field" in run("eval", "--help").out


def test_generate_goes_on_from_a_prompt(run, checkpoint, stdin):
    options = ("--max-new-tokens", 20, "--seed", 1)
    first = run("generate", checkpoint, "def f", *options)
    assert first.status == 0, first.err
    assert first.out.startswith("def f")
    assert len(first.out) > len("def f\n")
    assert run("generate", checkpoint, "def f", *options).out == first.out
    assert run("generate", checkpoint, "def f", "--max-new-tokens", 20, "--seed", 2).out != first.out
    for arguments in (("-",), ()):
        stdin(b"def f")
        assert run("generate", checkpoint, *arguments, *options).out == first.out


def test_generate_begins_a_document_without_a_prompt(run, checkpoint, stdin):
    stdin(b"")
    answer = run("generate", checkpoint, "--max-new-tokens", 3, "--temperature", 0)
    assert answer.status == 0, answer.err
    assert answer.out.strip("\n") != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "--temperature is -1.0; expected 0"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-p", 0), "--top-p is 0.0; expected above 0"),
        (("--top-p", 1.5), "--top-p is 1.5"),
        (("--top-k", 0), "--top-k is 0; expected 1 or more"),
        (("--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("--seed", -1), "--seed is -1"),
        (("--temperature", 0, "--top-k", 5, "--seed", 1), "--top-k and --seed would do nothing at --temperature 0"),
        (("--device", "gpu"), "'gpu' is not a device"),
    ],
)
def test_generate_refuses_values_by_name(run, checkpoint, options, message):
    answer = run("generate", checkpoint, "x", *options)
    assert (answer.status, answer.out) == (2, "")
    assert message in answer.err


def test_generate_refuses_input_that_is_not_text(run, checkpoint, stdin):
    stdin(b"caf\xe9")
    answer = run("generate", checkpoint, "-")
    assert answer.status == 2
    assert "not UTF-8" in answer.err


def test_inspect_draws_a_text_or_a_file(run, checkpoint, tmp_path, stdin):
    (tmp_path / "a.py").write_text("print('ü')\n")
    answers = [run("inspect", checkpoint, tmp_path / "a.py", "--out", tmp_path / "file")]
    answers.append(run("inspect", checkpoint, "print('ü')\n", "--out", tmp_path / "text"))
    stdin("print('ü')\n".encode())
    answers.append(run("inspect", checkpoint, "-", "--out", tmp_path / "stdin"))
    assert [a.status for a in answers] == [0, 0, 0], answers
    pages = {(tmp_path / kind / "slots.html").read_text("utf-8") for kind in ("file", "text", "stdin")}
    assert len(pages) == 1
    assert (tmp_path / "file" / "slots.png").stat().st_size > 10_000


def test_inspect_one_head_of_a_long_text(run, checkpoint, tmp_path):
    answer = run("inspect", checkpoint, "x" * 50, "--layer", 1, "--head", 0, "--tokens", 10, "--out", tmp_path)
    assert answer.status == 0
    assert "51 tokens; showing the first 10" in answer.err
    page = (tmp_path / "slots.html").read_text("utf-8")
    assert page.count('"layer": 1, "head": 0') == page.count('"layer":') == 1


def test_inspect_refuses_heads_that_are_not_there(run, checkpoint, tmp_path):
    answer = run("inspect", checkpoint, "text", "--head", 9, "--out", tmp_path / "new")
    assert answer.status == 2
    assert "no head 9; layer 0 has query heads 0 to 1" in answer.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["eval", "generate", "inspect"])
def test_what_is_no_checkpoint_is_refused(run, checkpoint, texts, tmp_path, command):
    empty = tmp_path / "empty"
    empty.mkdir()
    answer = run(command, empty, texts)
    assert answer.status == 2
    assert "holds no model" in answer.err

    untold = tmp_path / "without tokenizer"
    shutil.copytree(checkpoint, untold, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "holds no tokenizer.json" in run(command, untold, texts).err


def test_a_tokenizer_of_another_model_is_refused(run, checkpoint, texts, tmp_path):
    from flash_gsa.data import load_tokenizer

    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    words = "some words, some more words " + str(list(range(400)))
    load_tokenizer("bpe:400", training_texts=lambda: [words] * 9).save_pretrained(foreign)
    answer = run("eval", foreign, texts)
    assert answer.status == 2
    assert "has 400 tokens and the model only 259" in answer.err


def test_the_python_example_of_the_documentation_runs(checkpoint, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(checkpoint, tmp_path / "runs" / "demo")
    exec(code[1].replace("layer=2", "layer=1"), {})
    assert (tmp_path / "slots.png").exists()
    assert (tmp_path / "slots.html").exists()
