"""The example of docs/data.md runs."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    batch = names["batch"]
    assert batch.input_ids.shape == batch.targets.shape == torch.Size([1, 4096])
    assert batch.cu_seqlens[-1] == 4096
