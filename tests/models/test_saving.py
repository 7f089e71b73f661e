"""Saving, loading, the Auto classes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flash_gsa import GSAConfig, GSAForCausalLM, GSAModel

AUTO = """
torch.set_num_threads(1)  # as in the tests: with more, sums come in another order on some processors
ids = torch.arange(3, 20)[None]
config = AutoConfig.from_pretrained({folder!r})
body, model = AutoModel.from_pretrained({folder!r}), AutoModelForCausalLM.from_pretrained({folder!r})
assert type(config).__name__ == "GSAConfig" and type(body).__name__ == "GSAModel", (config, body)
assert torch.equal(model(ids).logits, torch.load({folder!r} + "/logits.pt"))
assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
assert not any(type(finder).__module__.startswith("flash_gsa") for finder in sys.meta_path)
"""
ORDERS = {
    "transformers first": "import sys, torch, transformers\nimport flash_gsa\n",
    "flash_gsa first": (
        "import sys\nimport flash_gsa\nassert not {'torch', 'transformers'} & set(sys.modules)\nimport torch\n"
    ),
    # Many packages look whether transformers is there before somebody imports it.
    "looked for first": (
        "import sys\nimport flash_gsa\nfrom importlib.util import find_spec\n"
        "assert find_spec('transformers').submodule_search_locations\nimport torch\n"
    ),
    "from flash_gsa": "import sys\nfrom flash_gsa import GSAConfig\nimport torch\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_flash_gsa_is_all_the_auto_classes_need(tiny, tmp_path, order):
    model = tiny(attn={"layers": [1]}, use_short_conv=True)
    model.save_pretrained(tmp_path)
    torch.save(model(torch.arange(3, 20)[None]).logits.detach(), tmp_path / "logits.pt")
    program = ORDERS[order] + "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
    program += AUTO.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_saved_and_loaded_is_the_same_model(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.bin"))
    for kind in (GSAForCausalLM, AutoModelForCausalLM):
        again, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not again.training
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        loaded = {"_name_or_path": str(tmp_path), "dtype": "float32"}
        assert again.config.to_dict() == model.config.to_dict() | loaded
        assert torch.equal(again(ids).logits, model(ids).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, GSAModel)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_the_body_alone_is_saved_and_loaded(tiny, ids, tmp_path):
    body = tiny().model
    body.save_pretrained(tmp_path)
    assert torch.equal(GSAModel.from_pretrained(tmp_path)(ids).last_hidden_state, body(ids).last_hidden_state)


def test_trained_gates_survive_loading(tiny, tmp_path):
    model = tiny(gating="data_independent")
    with torch.no_grad():
        for block in model.model.layers:
            block.attn.f_bias.fill_(1.25)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "o_proj" not in k}, file, metadata={"format": "pt"})
    again = GSAForCausalLM.from_pretrained(tmp_path)
    for block in again.model.layers:
        assert (block.attn.f_bias == 1.25).all()
        assert block.attn.o_proj.weight.isfinite().all()


def test_tied_embeddings_are_one_matrix_saved_once(tiny, ids, tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = GSAForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embeddings.weight
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert tiny().lm_head.weight is not tiny().model.embeddings.weight


def test_loading_in_bfloat16(tiny, ids, tmp_path):
    tiny().save_pretrained(tmp_path)
    model = GSAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model(ids).logits.dtype == torch.bfloat16


def test_weights_of_another_vocabulary_are_refused(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    config = GSAConfig.from_pretrained(tmp_path, vocab_size=40)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GSAForCausalLM.from_pretrained(tmp_path, config=config)


def test_an_unknown_key_in_a_file_is_refused_by_name(tiny, tmp_path):
    tiny().config.save_pretrained(tmp_path)
    file = Path(tmp_path, "config.json")
    file.write_text(file.read_text().replace('"num_slots"', '"num_slot"'))
    with pytest.raises(ValueError, match=r"no setting 'num_slot'\. Did you mean 'num_slots'"):
        AutoConfig.from_pretrained(tmp_path)
