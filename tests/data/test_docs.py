"""The example of docs/data.md runs."""

import re
from pathlib import Path

import torch
import yaml

from flash_gsa.training.recipe import TextData

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    code, mixed = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    batch = names["batch"]
    assert batch.input_ids.shape == batch.targets.shape == torch.Size([1, 4096])
    assert batch.cu_seqlens[-1] == 4096
    exec(mixed, names | {"code": names["store"], "prose": names["store"]})
    (recipe,) = re.findall(r"```yaml\ndata:\n(.*?)```", text, re.DOTALL)
    assert [source.name for source in TextData(**yaml.safe_load(recipe)).source] == ["code", None]
