"""Recipes: what is accepted, and that every mistake is named with what to do."""

import pytest
import yaml

from flash_gsa.errors import UsageError
from flash_gsa.training.recipe_file import (
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_names,
    recipe_to_yaml,
)

BASE = """
name: tiny
description: a test
tokenizer: byte
model: {hidden_size: 16}
data: {kind: text, source: stdlib, held_out: 0.1}
batch: {rows: 2, length: 8}
schedule: {steps: 10, warmup_steps: 2}
optimizer: {lr: 3e-4, min_lr: 0}
evaluation: {every: 5}
checkpoints: {every: 5}
"""
GIVEN = {name: ["data.source=train.txt", "data.valid_source=valid.txt"] for name in ("prose_15m", "prose_100m")}


def load(tmp_path, *overrides, text=BASE):
    (tmp_path / "tiny.yaml").write_text(text)
    return load_recipe(tmp_path / "tiny.yaml", overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_survive_writing(name):
    recipe = load_recipe(name, GIVEN.get(name, []))
    assert recipe.name == name
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe


def test_recipes_are_listed():
    assert {"demo", "mqar_tiny", "prose_15m", "prose_100m", "gsa_340m", "gsa_1.3b", "gsa_2.7b"} <= set(recipe_names())


def test_data_may_stay_open_where_none_is_read():
    assert load_recipe("prose_15m", data_named=False).batch.rows == 16
    with pytest.raises(UsageError, match=r"data\.source must be given"):
        load_recipe("prose_15m")


def test_values_and_overrides(tmp_path):
    recipe = load(
        tmp_path, "optimizer.lr=1e-3", "model.num_slots=32", "model.attn.layers=[0]", "optimizer.lr=2e-3", "seed=7"
    )
    assert recipe.optimizer.lr == 2e-3
    assert recipe.model == {"hidden_size": 16, "num_slots": 32, "attn": {"layers": [0]}}
    assert (recipe.seed, recipe.batch.tokens) == (7, 16)


def test_numbers_with_exponent_are_numbers(tmp_path):
    assert load(tmp_path).optimizer.lr == 3e-4  # plain YAML 1.1 would read the text "3e-4"
    assert load(tmp_path, "optimizer.lr=1E-2").optimizer.lr == 1e-2


def test_round_trip_keeps_everything(tmp_path):
    recipe = load(
        tmp_path, "optimizer.eps=1e-12", "description='ünïcode: #1'", "model.attn={layers: [1]}", "data.source=[a, b]"
    )
    assert parse_recipe(recipe_to_yaml(recipe)) == recipe
    assert yaml.safe_load(recipe_to_yaml(recipe))["optimizer"]["eps"] == 1e-12


REFUSED = [
    (["optimizer.lrr=1"], r"unknown key optimizer\.lrr\. Did you mean 'lr'\?"),
    (["optimiser.lr=1"], r"unknown key optimiser\. Did you mean 'optimizer'\?"),
    (["data.sorce=x"], r"unknown key data\.sorce\. Did you mean 'source'\?"),
    (["zzz=1"], r"unknown key zzz\. Known at the top level: name, description"),
    (["batch.zzz=1"], r"unknown key batch\.zzz\. Known in batch: rows, length, micro_rows"),
    (["optimizer.lr=fast"], r"optimizer\.lr: expected a number, got 'fast' \(text\)"),
    (["batch.rows=2.5"], r"batch\.rows: expected a whole number, got 2\.5 \(a number\)"),
    (["batch.rows=true"], r"batch\.rows: expected a whole number, got True \(true/false\)"),
    (["batch.rows=0"], r"batch\.rows: expected greater than 0, got 0"),
    (["batch=3"], r"batch: expected a section of keys, got 3 \(a whole number\)"),
    (["batch.rows.x=3"], r"'batch\.rows\.x=3': batch\.rows is a single value"),
    (["precision=fp16"], r"precision: expected 'auto', 'bf16', 'fp32' or 'pure_bf16', got 'fp16'"),
    (["data.kind=images"], r"data\.kind must be text or mqar, got 'images'"),
    (["data.source=???"], r"data\.source must be given: set data\.source=… \(training text: stdlib"),
    (["schedule.steps=null"], r"give one of schedule\.steps, schedule\.tokens, schedule\.minutes"),
    (["schedule.tokens=100"], r"schedule gives steps and tokens; keep one of them: add schedule\.steps=null or"),
    (
        ["schedule.warmup_fraction=0.1"],
        r"give one of schedule\.warmup_steps, schedule\.warmup_tokens, schedule\.warmup_fraction",
    ),
    (
        ["schedule.warmup_steps=null"],
        r"give one of schedule\.warmup_steps, schedule\.warmup_tokens, schedule\.warmup_fraction",
    ),
    (
        ["schedule={minutes: 1, warmup_fraction: 0.1}"],
        r"schedule\.warmup_fraction needs a known number of steps",
    ),
    (["schedule.warmup_steps=10"], r"schedule\.warmup_steps=10 leaves nothing of a run of 10 steps"),
    (["optimizer.min_lr=1"], r"optimizer\.min_lr \(1\.0\) is above optimizer\.lr \(0\.0003\)"),
    (["data.held_out=null"], r"give one of data\.held_out .* and data\.valid_source"),
    (["data.valid_source=x"], r"give one of data\.held_out .* and data\.valid_source"),
    (["data.held_out=1.5"], r"data\.held_out=1\.5: expected a share between 0 and 1, or a number of bytes"),
    (["data.held_out=some"], r"data\.held_out: expected a whole number or a number, got 'some' \(text\)"),
    (["tokenizer=null"], r"tokenizer is missing: text needs one"),
    (["model.vocab_size=300"], r"model\.vocab_size is taken from the tokenizer"),
    (["model.hiden_size=300"], r"GSAConfig has no setting 'hiden_size'.* Did you mean 'hidden_size'\?"),
    (["model.num_slots=many"], r"num_slots must be a whole number"),
    (["name=a/b"], r"name: expected letters, digits and any of _ \. -, the first a letter or a digit, got 'a/b'"),
    (["optimizer.betas=[0.9]"], r"optimizer\.betas: expected at least 2 entries, got \[0\.9\] \(a list\)"),
    (["optimizer.betas=[0.9, 0.95, 0.99]"], r"optimizer\.betas: expected at most 2 entries"),
    (["logging.project="], r"logging\.project: expected text"),
    (["logging.project=''"], r"logging\.project: expected text that is not empty, got ''"),
    (["engine.checkpointing=0"], r"engine\.checkpointing: expected 'none' or 'all' or greater than 0, got 0"),
    (["engine.checkpointing=some"], r"engine\.checkpointing: expected 'none' or 'all' or a whole number, got 'some'"),
    (
        ["engine.checkpointing=99"],
        r"engine\.checkpointing=99 would compute no block again: the model has \d+\. Set a number up to",
    ),
    (["model.num_slots=-3"], r"in the section model: num_slots must be a whole number of at least 1, got -3"),
    (["data.source=[{source: a, wieght: 2}]"], r"unknown key data\.source\.0\.wieght\. Did you mean 'weight'\?"),
    (["data.source=[3]"], r"data\.source: expected text, got \[3\] \(a list\)"),
    (["data={}"], r"data\.kind must be text or mqar, got None"),
    (["batch={rows: 2}"], r"batch\.length is missing; give it a value"),
    (["engine.reshard_after=step"], r"engine\.reshard_after=step is for engine\.kind=fsdp2 and hsdp.*; single has no"),
    (["optimizer.lr=.inf"], r"optimizer\.lr: expected a finite number, got inf"),
    (["schedule={minutes: .inf, warmup_steps: 1}"], r"schedule\.minutes: expected a finite number, got inf"),
    (
        ["engine={kind: ddp, context: 2}", "model={token_mixer: attention, hidden_size: 16, num_heads: 1}"],
        r"layer 0 is softmax attention, which has no state.* Leave it out \(engine\.context of a recipe\)",
    ),
    (["engine.kind=zero3", "precision=pure_bf16"], r"engine\.kind=zero3 keeps fp32 weights .* use precision=bf16"),
    (
        ["checkpoints={every: 4, keep_every: 10}"],
        r"checkpoints\.keep_every=10 must be a multiple of checkpoints\.every=4: between those there are no",
    ),
    (["device=gpu"], r"device='gpu' is not a device: expected auto, cpu, cuda or cuda:0"),
    (["data.source=[]"], r"data\.source is an empty list: name at least one source of text"),
    (["data.valid_source=[]", "data.held_out=null"], r"data\.valid_source is an empty list: name at least one"),
    (["data.source=[{source: [], weight: 1}]"], r"data\.source\.0\.source is an empty list: name at least one"),
    (["engine.replicas=2"], r"engine\.replicas goes with engine\.kind=hsdp"),
    (["seed"], r"'seed' is not an override: expected key\.path=value"),
    (["seed=[1"], r"The value in 'seed=\[1' is not YAML"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused_with_what_to_do(tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, *overrides)


def test_mqar_has_no_tokenizer(tmp_path):
    mqar = ["data={kind: mqar, num_kv_pairs: 4}", "batch.length=64"]
    with pytest.raises(UsageError, match=r"set tokenizer=null"):
        load(tmp_path, *mqar)
    assert load(tmp_path, *mqar, "tokenizer=null").data.num_kv_pairs == 4


def test_all_mistakes_of_a_kind_are_told_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, "batch.rows=x", "seed=-1")
    assert "batch.rows" in str(caught.value)
    assert "seed" in str(caught.value)


def test_files_that_are_no_recipes(tmp_path):
    for text, message in [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", r"expected `key: value` lines, got a list"),
        (BASE + "seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("", "got nothing"),
    ]:
        with pytest.raises(UsageError, match=message):
            load(tmp_path, text=text)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(byte 9\)"):
        load_recipe(tmp_path / "latin.yaml")


def test_names_that_are_no_recipes(tmp_path):
    with pytest.raises(UsageError, match=r"no recipe 'dmeo'\. Did you mean 'demo'\? Shipped are "):
        load_recipe("dmeo")
    with pytest.raises(UsageError, match=r"nothing\.yaml does not exist"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match=r"is a folder\. Expected a YAML file, or one of "):
        load_recipe(tmp_path)


def test_differences_name_the_keys(tmp_path):
    old, new = load(tmp_path), load(tmp_path, "optimizer.lr=1", "model.num_slots=8")
    assert recipe_differences(old, new) == {"optimizer.lr": (3e-4, 1.0), "model.num_slots": (None, 8)}
    assert recipe_differences(old, old) == {}
