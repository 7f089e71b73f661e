"""Estimates against what is counted by hand and by the kernels' own sizes; what does not fit is refused."""

import json
import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.recipe_heads import recipes_with_heads, with_head
from flash_gsa.errors import UsageError
from flash_gsa.models import GSAConfig
from flash_gsa.training import step_memory as step
from flash_gsa.training.dry_run import check_fits, dry_run
from flash_gsa.training.estimate import GIB, OUTSIDE, estimate_memory, model_size
from flash_gsa.training.recipe_file import load_recipe, parse_recipe

SMALL = """
name: small
description: for tests
tokenizer: bpe:4096
precision: bf16
model: {hidden_size: 64, num_hidden_layers: 4, num_heads: 2, num_slots: 16, intermediate_size: 128}
data: {kind: text, source: nowhere, held_out: 0.1}
batch: {rows: 64, length: 512, micro_rows: 8}
schedule: {tokens: 3_276_800, warmup_tokens: 100_000}
optimizer: {lr: 1e-3, min_lr: 1e-4}
evaluation: {every: 10}
checkpoints: {every: 10}
"""


def small(**engine):
    recipe = parse_recipe(SMALL)
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})


@pytest.fixture(scope="module")
def size():
    return model_size(small())


def test_sizes_are_those_of_the_model(size):
    block = 4 * 64 * 64 + 64 * 2 * 16 + 3 * 64 * 128 + 64 + 64 + 64  # projections, gates, MLP, three norms
    assert size.vocabulary == 4096
    assert size.largest_block == block
    assert size.outside_blocks == 2 * 4096 * 64 + 64
    assert size.parameters == 4 * block + size.outside_blocks
    assert size.embeddings == 2 * 4096 * 64


def test_steps_and_warm_up_follow_from_tokens(size):
    run = dry_run(small(), 1, size)
    assert (run.steps, run.warmup_steps) == (100, math.ceil(100_000 / 32768))
    assert (run.micro_rows, run.micro_batches) == (8, 8)
    assert run.flops == pytest.approx(3_276_800 * size.flops)
    assert run.seconds(1e12) == pytest.approx(run.flops / 1e12)
    again = dry_run(small(checkpointing="all"), 1, size)
    assert again.seconds(1e12) == pytest.approx(run.seconds(1e12) * 4 / 3)


@pytest.mark.parametrize(
    ("engine", "processes", "weights", "moments"),
    [
        ({}, 1, 4, 8),
        ({"kind": "ddp"}, 4, 4, 8),
        ({"kind": "fsdp2"}, 4, 1, 2),
        ({"kind": "hsdp", "replicas": 2}, 4, 2, 4),
        ({"kind": "zero2"}, 4, 2 + 1, 2),
        ({"kind": "zero3"}, 4, 0.5 + 1, 2),
    ],
)
def test_weights_and_moments_by_engine(size, engine, processes, weights, moments):
    memory = estimate_memory(small(**engine), processes, size)
    assert memory.weights == pytest.approx(weights * size.parameters, rel=1e-3)
    assert memory.moments == pytest.approx(moments * size.parameters, rel=1e-3)
    assert memory.total == memory.tensors + memory.outside


def test_resharding_once_a_step_keeps_all_weights_and_the_sums_of_micro_batches(size):
    def memory(micro_rows, **engine):
        recipe = small(kind="fsdp2", **engine)
        batch = recipe.batch.model_copy(update={"micro_rows": micro_rows})
        return estimate_memory(recipe.model_copy(update={"batch": batch}), 2, size)

    several, one = memory(8, reshard_after="step"), memory(32, reshard_after="step")
    two_blocks = 2 * size.largest_block + size.outside_blocks
    assert several.gathered - memory(8).gathered == 2 * (size.parameters - two_blocks)
    assert several.gradients == pytest.approx(4 * size.parameters, rel=1e-6)
    assert one.gradients < 4 * size.parameters / 2
    assert (several.weights, several.moments) == (memory(8).weights, memory(8).moments)


def test_the_buckets_of_ddp_are_beside_the_gradients_of_several_micro_batches(size):
    def memory(micro_rows):
        recipe = small(kind="ddp")
        batch = recipe.batch.model_copy(update={"micro_rows": micro_rows})
        return estimate_memory(recipe.model_copy(update={"batch": batch}), 2, size)

    several, one = memory(8), memory(32)
    assert several.gathered == one.gathered == 4 * size.parameters
    assert several.gradients == pytest.approx(4 * size.parameters, rel=1e-6)
    assert one.gradients == 0


def test_pure_bf16_is_half(size):
    pure = small().model_copy(update={"precision": "pure_bf16"})
    memory, mixed = estimate_memory(pure, 1, size), estimate_memory(small(), 1, size)
    assert (memory.weights, memory.moments) == (mixed.weights / 2, mixed.moments / 2)
    assert memory.working < mixed.working


def test_working_memory_grows_with_rows_and_shrinks_with_checkpointing(size):
    def working(rows, **engine):
        recipe = small(**engine)
        return estimate_memory(
            recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_rows": rows})}), 1, size
        ).working

    two, four, eight = (working(rows) for rows in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.05)
    # Between them lie what some blocks keep.
    assert working(8, checkpointing="all") < working(8, checkpointing=2) < eight


def test_live_memory_is_counted_while_it_lives():
    layer = torch.nn.Linear(256, 256, bias=False)
    with FakeTensorMode(allow_non_fake_inputs=True), step._Live(layer, 1.0) as live:
        x = torch.empty(1024, 256)
        y = layer(torch.relu(torch.relu(x)))
        y.sum().backward()
    one, weight = 1024 * 256 * 4, 256 * 256 * 4
    # x, the second ReLU (the first is gone) and y; the weight's gradient; the sum and its gradient.
    assert live.worst == 3 * one + weight + 2 * 4
    assert live.worst_gradients == 0
    assert live._gradients == weight


def test_kernels_keep_what_is_estimated():
    """Against the shapes that the Triton operator tells torch.compile."""
    pytest.importorskip("triton")
    from flash_gsa.ops.triton.library import attention_op, linear_attention_op

    T, H, K, M = 4096, 2, 128, 64

    def saved(function):
        kept = {}

        def pack(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function()
        return sum(kept.values())

    with FakeTensorMode():
        bounds = torch.empty(2 + 4 + 1, dtype=torch.int32)  # however many: there are as many states between chunks
        q, k, v = (torch.empty(1, T, H, K, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        g = torch.empty(1, T, H, M, requires_grad=True)
        for again in (False, True):
            theirs = saved(lambda a=again: attention_op(q, k, v, g, None, None, None, bounds, 1.0, False, True, a))
            ours = saved(lambda a=again: step._Slots.apply(q, k, v, g, None, a))
            assert ours == pytest.approx(theirs, rel=0.001)
        q, k, g = (torch.empty(1, T, H, M, dtype=d, requires_grad=True) for d in (q.dtype, q.dtype, torch.float32))
        theirs = saved(lambda: linear_attention_op(q, k, v, g, None, bounds, 1.0, False))
        assert saved(lambda: step._Linear.apply(q, k, v, g)) == pytest.approx(theirs, rel=0.001)


def test_states_that_are_computed_again_are_there_in_the_backward(monkeypatch):
    def worst():
        with FakeTensorMode(allow_non_fake_inputs=True), step._Live(torch.nn.Linear(1, 1), 1.0) as live:
            q, k, v = (torch.empty(1, 1024, 2, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            g = torch.empty(1, 1024, 2, 64, requires_grad=True)
            states = sum(x.nbytes for x in step._states(q, 256, v, g))
            step._Slots.apply(q, k, v, g, None, True).backward(torch.empty_like(q))
        return live.worst, states

    most, states = worst()
    monkeypatch.setattr(step, "_states", lambda *_: ())
    less, none = worst()
    assert states > none == 0
    assert most - less >= states


def test_a_block_keeps_what_is_counted_by_hand():
    tokens, d, inner, heads, slots = 2048, 64, 128, 2, 16

    def working(layers, states="keep"):
        sizes = {"hidden_size": d, "intermediate_size": inner, "num_heads": heads, "num_slots": slots}
        config = json.dumps(GSAConfig(num_hidden_layers=layers, vocab_size=64, states=states, **sizes).to_dict())
        return step.step_memory(config, 2, tokens // 2, torch.bfloat16, torch.bfloat16, "none", False, 0.0).working

    with FakeTensorMode():
        k = torch.empty(1, tokens, heads, d // heads, dtype=torch.bfloat16)
        g = torch.empty(1, tokens, heads, slots)
        *gates, hk, hv = (x.nbytes for x in step._shared(k, d // heads, k, g))
        shared = sum(gates) + hk + hv
    # Both sums and their norms; q, k, v before and after SiLU; o. Gate and up. Logits of gates, gates, scores p.
    numbers = 2 * (4 + 6 + 1) * d + 2 * 2 * inner + (2 + 4 + 2) * heads * slots
    rows = 4 * (3 + heads)  # three norms, and logarithms of sums of exponentials
    assert (working(6) - working(4)) / 2 == pytest.approx(tokens * (numbers + rows) + shared, rel=0.002)
    less = [working(6, states) - working(4, states) for states in ("keep", "recompute")]
    assert (less[0] - less[1]) / 2 == pytest.approx(hk + hv, rel=0.01)


@pytest.mark.parametrize("mixer", ["gla", "hgrn2", "retnet", "attention"])
def test_every_mixer_can_be_estimated(mixer):
    recipe = small()
    model = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "token_mixer": mixer}
    assert estimate_memory(recipe.model_copy(update={"model": model})).working > 0


def test_abc_and_convolutions_can_be_estimated():
    recipe = small()
    model = recipe.model | {"gating": "abc", "use_short_conv": True}
    assert estimate_memory(recipe.model_copy(update={"model": model})).working > estimate_memory(recipe).working


def refusal(recipe, processes, memory, size):
    with pytest.raises(UsageError) as error:
        check_fits(recipe, processes, int(memory), size)
    return str(error.value)


def test_what_fits_is_accepted_and_what_does_not_is_refused_with_the_smallest_change(size):
    need = estimate_memory(small(), 1, size).total
    check_fits(small(), 1, need, size)
    assert "batch.micro_rows=4 (" in refusal(small(), 1, need - 1, size)


def test_resharding_after_each_block_is_proposed_first(size):
    recipe, block = small(kind="fsdp2", reshard_after="step"), small(kind="fsdp2")
    need, less = (estimate_memory(r, 2, size).total for r in (recipe, block))
    assert "smallest change that fits: engine.reshard_after=block (" in refusal(recipe, 2, need - 1, size)
    assert "fits: engine.reshard_after=block batch.micro_rows=" in refusal(recipe, 2, less - 1, size)


def test_each_change_that_is_proposed_fits(size):
    recipe = small(kind="ddp")

    def with_rows(rows, **engine):
        changed = small(kind="ddp", **engine)
        return changed.model_copy(update={"batch": changed.batch.model_copy(update={"micro_rows": rows})})

    one_row = estimate_memory(with_rows(1), 4, size).total
    checkpointed, two_rows = (estimate_memory(with_rows(n, checkpointing="all"), 4, size).total for n in (1, 2))
    assert checkpointed < min(one_row, two_rows)
    assert "smallest change that fits: engine.checkpointing=all batch.micro_rows=1 (" in refusal(
        recipe, 4, min(one_row, two_rows) - 1, size
    )
    assert "smallest change that fits: engine.kind=fsdp2" in refusal(recipe, 4, checkpointed - 1, size)
    assert "Nothing fits" in refusal(recipe, 4, OUTSIDE, size)


def test_more_processes_are_the_last_resort(size):
    alone = small(kind="fsdp2", checkpointing="all")
    least = alone.model_copy(update={"batch": alone.batch.model_copy(update={"micro_rows": 1})})
    eight = estimate_memory(least, 8, size).total
    said = refusal(least, 2, eight, size)
    assert re.search(r"fits: [48] processes with engine\.checkpointing=all batch\.micro_rows=1", said)


def proposals(said, processes):
    """Of a refusal: on how many processes, and which overrides."""
    found = re.findall(r"(?:fits|over \d+ processes): (?:(\d+) processes with )?(\S+=[^(]*) \(", said)
    return [(int(count or processes), overrides.split()) for count, overrides in found]


LONG = ["model.num_hidden_layers=2", "batch={rows: 16, length: 1048576}", "schedule={steps: 10, warmup_steps: 1}"]


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("{kind: single}", 1),
        ("{kind: ddp}", 4),
        ("{kind: fsdp2, reshard_after: step}", 4),
        ("{kind: fsdp2, context: 2}", 4),
        ("{kind: hsdp, replicas: 2}", 4),
        ("{kind: zero2}", 4),
        ("{kind: zero3, checkpointing: all}", 4),
    ],
)
def test_every_proposal_passes_the_dry_run_down_to_where_nothing_fits(tmp_path, monkeypatch, engine, processes):
    monkeypatch.setattr("flash_gsa.training.dry_run.MOST_PROCESSES", 16)
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL, encoding="utf-8")
    given = [*LONG, f"engine={engine}"]
    recipe = load_recipe(str(file), given)
    size = model_size(recipe)
    needed, said = estimate_memory(recipe, processes, size), ""
    while True:
        memory = int(needed.outside + 0.9 * needed.tensors)
        before, said = said, refusal(recipe, processes, memory, size)
        if "Nothing fits" in said:
            break
        for count, overrides in proposals(said, processes):
            changed = load_recipe(str(file), [*given, *overrides])
            check_fits(changed, count, memory, size)
            assert changed.batch.tokens == recipe.batch.tokens
            needed = estimate_memory(changed, count, size)
            assert f"{overrides[-1]} ({needed.total / GIB:.1f} GiB)" in said
    assert "16 processes with" in before
    assert "engine.context=16" in before


@pytest.fixture(scope="module")
def long_rows():
    def build(*overrides):
        engine = "engine={kind: fsdp2}"
        return load_recipe("gsa_1.3b", [engine, "batch.rows=8", "batch.micro_rows=1", *overrides])

    return build, model_size(build())


def test_rows_beyond_a_device_are_cut_over_as_few_processes_as_hold_them(long_rows):
    build, size = long_rows
    said = refusal(build("batch.length=65536"), 8, 80 * GIB, size)
    assert "needs about 116.4 GiB" in said
    assert "smallest change that fits: engine.checkpointing=all (16.8 GiB). Or, with each row cut" in said
    assert (8, ["engine.context=2"]) in proposals(said, 8)
    then = build("batch.length=65536", "engine.context=2")
    assert estimate_memory(then, 8, size).total / GIB == pytest.approx(61.4, abs=0.1)
    check_fits(then, 8, 80 * GIB, size)

    long = ["engine.checkpointing=all", "batch.length=1048576"]
    assert "The smallest change that fits: engine.context=4 (" in refusal(build(*long), 8, 80 * GIB, size)
    check_fits(build(*long, "engine.context=4"), 8, 80 * GIB, size)
    assert estimate_memory(build(*long, "engine.context=2"), 8, size).total > 80 * GIB


@pytest.mark.parametrize("model", [{"token_mixer": "attention"}, {"num_slots": 16, "attn": {"layers": [1]}}])
def test_rows_of_softmax_attention_are_not_cut(tmp_path, model):
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL, encoding="utf-8")
    model = json.dumps({"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2} | model)
    engine = "engine={kind: fsdp2, checkpointing: all}"
    recipe = load_recipe(str(file), [f"model={model}", engine, "batch={rows: 16, length: 16384, micro_rows: 1}"])
    size = model_size(recipe)
    needed = estimate_memory(recipe, 4, size)
    said = refusal(recipe, 4, needed.outside + needed.tensors / 2, size)
    assert "Nothing fits" in said
    assert "context" not in said


def test_rows_that_do_not_divide_are_not_cut(size):
    recipe = small(kind="fsdp2", checkpointing="all")
    batch = recipe.batch.model_copy(update={"length": 16385, "micro_rows": 1})
    recipe = recipe.model_copy(update={"batch": batch})
    needed = estimate_memory(recipe, 4, size)
    assert "Nothing fits" in refusal(recipe, 4, needed.outside + needed.tensors / 2, size)


@pytest.mark.parametrize(
    ("engine", "processes", "message"),
    [
        ({}, 2, "engine.kind=single is one process, and there are 2"),
        ({"kind": "ddp", "context": 3}, 3, "cannot be cut into equal stretches for the processes of engine.context=3"),
        ({"kind": "hsdp", "replicas": 2}, 3, "start 2 or 4, or set engine.replicas to one of 1, 3"),
        ({"kind": "ddp", "context": 2}, 3, "start 2 processes"),
        ({"kind": "ddp"}, 3, "The nearest that can: batch.rows=72, or 2 processes"),
        ({"kind": "ddp"}, 16, "batch.rows=128, or batch.micro_rows=4, or 8 processes"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(size, engine, processes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        estimate_memory(small(**engine), processes, size)


def test_rows_are_divided_over_groups_of_context():
    batch = small().batch
    assert batch.micro_batches(8) == (8, 1)
    assert batch.micro_batches(8, context=4) == (8, 4)
    assert batch.model_copy(update={"micro_rows": None}).micro_batches(4) == (16, 1)


@pytest.mark.parametrize("path", recipes_with_heads(), ids=lambda path: path.stem)
def test_recipes_load_and_say_what_they_take(path):
    load_recipe(path.stem, data_named=False)
    assert with_head(path) == path.read_text(encoding="utf-8"), "run python -m benchmarks.render"


def test_the_paper_s_models_have_the_paper_s_sizes():
    for name, millions in (("gsa_340m", 380), ("gsa_1.3b", 1377), ("gsa_2.7b", 2728)):
        recipe = load_recipe(name)
        assert round(model_size(recipe).parameters / 1e6) == millions
        assert recipe.batch.tokens == 2**19
    assert estimate_memory(load_recipe("gsa_1.3b"), 8).total < 79 * GIB


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mqar_tiny", ["model.gating=abc"]),
        ("demo", ["model.gating=data_independent", "engine.checkpointing=2"]),
        ("demo", ["model.use_short_conv=true", "precision=pure_bf16"]),
        ("demo", ["model.num_heads=4", "model.num_kv_heads=2"]),
        ("demo", ["model.attn={layers: [1]}"]),
        *(("demo", [f"model.token_mixer={mixer}"]) for mixer in ("gla", "hgrn2", "retnet", "attention")),
    ],
)
def test_every_model_can_be_estimated(name, overrides):
    """A run on a GPU asks before it begins; what cannot be estimated could not be trained."""
    recipe = load_recipe(name, overrides, data_named=False)
    needed = estimate_memory(recipe, 1).tensors
    assert needed > 12 * model_size(recipe).parameters * (0.5 if recipe.precision == "pure_bf16" else 1)
