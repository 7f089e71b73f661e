"""How fast text becomes tokens: measured, and told of recipes that say how much text."""

import json

from benchmarks import recipe_heads, render, tokenising
from flash_gsa.training.recipe_file import load_recipe


def test_a_source_by_a_process_on_every_core(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenising, "usable_cores", lambda: 2)
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(200)))
    out = tmp_path / "found.json"
    tokenising.main([str(source), "--tokenizer", "byte", "--max-bytes", "5000", "--output", str(out)])
    result = json.loads(out.read_text())
    assert result["processes"] == 2
    assert 5000 <= result["text_bytes"] < 5200
    assert result["tokens"] == result["text_bytes"] + 2 * result["documents"]  # bytes, and both ends of each document
    assert result["store_bytes"] > 2 * result["tokens"]
    assert result["about"]["command"] == (
        "python -m benchmarks.tokenising text.jsonl --tokenizer byte --max-bytes 5000"
    )
    assert "2 processes: " in capsys.readouterr().out
    assert f"{result['documents']} documents of 0 MB, with `byte`, by 2 processes: " in render.tokenising(result)


def test_heads_say_what_a_corpus_takes(monkeypatch, tmp_path):
    run = {"processes": 4, "seconds": 10.0, "text_bytes": 4 * 10**8, "store_bytes": 2 * 10**8}
    (tmp_path / "tokenising.json").write_text(json.dumps(run))
    monkeypatch.setattr(recipe_heads, "RESULTS", tmp_path)
    lines = recipe_heads._prepared(load_recipe("gsa_1.3b", ["data.max_bytes=360_000_000_000"], data_named=False))
    assert "360 GB of text become 180 GB of tokens" in lines[0]
    assert " 10 core-hours" in lines[1]  # at 10 MB a second
    assert recipe_heads._prepared(load_recipe("gsa_1.3b", ["data.max_bytes=null"], data_named=False)) == []
