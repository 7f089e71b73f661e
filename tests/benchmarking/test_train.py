"""The benchmark of training: a tiny run on the CPU, what is refused, and what becomes of what fails."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flash_gsa.benchmarking import train, train_plots
from flash_gsa.benchmarking.train import Options, benchmark
from flash_gsa.benchmarking.train_gate import errors_of, measure_errors
from flash_gsa.benchmarking.train_models import SIZES, TRAINED, Ours
from flash_gsa.benchmarking.train_profile import category, grouped
from flash_gsa.benchmarking.train_report import tables, times_fla
from flash_gsa.benchmarking.train_steps import Job, Training, _losses, caches, measure_steps
from flash_gsa.benchmarking.worker import TookTooLong
from flash_gsa.errors import UsageError

from .made_up_training import MadeUpWorker, made_up_result

CPU = torch.device("cpu")
JOB = Job("ours", "plain", "tiny", rows=2, length=32, precision="fp32")


class Here:
    """A worker that is this process."""

    def __enter__(self):
        return self

    def __exit__(self, *rest):
        pass

    def call(self, function, *arguments, limit):
        return function(*arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(result, its file's stages, lines) of a run of everything but cold starts."""
    path, stages, lines = tmp_path_factory.mktemp("train") / "new" / "train.json", [], []

    def say(line):
        lines.append(line)
        stages.append(json.loads(path.read_text()) if path.exists() else None)

    options = Options(device="cpu", variants=("plain",), profile=True, only=("ceilings", "steps", "profile"))
    result = benchmark(options, path, say, Here())
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    return result, stages, lines


def test_a_tiny_run_measures_ours_and_llama(measured):
    result, stages, lines = measured
    assert result["suite"] == "cpu"
    assert result["size"]["name"] == "tiny"
    assert len(lines) == 1 + 3 + 3 * 2 + 1
    assert [None if s is None else len(s["steps"]) for s in stages] == [None, 0, 0, 1, 2, 2, 2, 3, 4, 4, 5]
    gates = {g["implementation"]: g for g in result["gates"]}
    assert gates["ours"]["problem"] is None
    assert 0 < gates["ours"]["errors"]["dmodel.layers.1.attn.f_proj.weight"][0] < 1e-3
    assert gates["llama"]["problem"] is None
    by_name = {(r["implementation"], r["length"]): r for r in result["steps"]}
    assert by_name["fla", 32]["problem"].startswith("not run: ")
    for name in ("ours", "llama"):
        for length in (32, 64):
            r = by_name[name, length]
            assert r["problem"] is None
            assert r["rows"] * length == result["tokens"] == 64
            assert 0 < r["low"] <= r["seconds"] <= r["high"]
            assert r["tokens_per_second"] == 64 / r["seconds"]
            assert r["flops_per_second"] == pytest.approx(r["flops_per_token"] * r["tokens_per_second"])
            assert r["share_of_product"] > 0
            assert r["last_loss"] < r["first_loss"] == pytest.approx(math.log(256), rel=0.05)
            assert all(seconds > 0 for seconds in r["parts"].values())
            assert r["first_step_seconds"] > 0
            assert "mfu" not in r
    assert by_name["ours", 32]["backend"] == "chunk"
    assert by_name["ours", 64]["flops_per_token"] == SIZES["tiny"].training_flops("gsa", 64)


def test_the_profile_adds_up(measured):
    (profile,) = measured[0]["profile"]
    assert profile["kernel_milliseconds"] > 0
    assert sum(row["milliseconds"] for row in profile["categories"]) == pytest.approx(profile["kernel_milliseconds"])
    assert sum(profile["phases"].values()) == pytest.approx(profile["kernel_milliseconds"])
    assert {"products", "optimizer"} <= {row["category"] for row in profile["categories"]}
    assert {row["phase"] for row in profile["kernels"]} >= {"forward", "backward"}


def test_pictures_and_tables_of_it(measured, tmp_path):
    result = measured[0]
    assert [p.name for p in train_plots.draw(result, tmp_path)] == ["train_cpu-speed.png"]
    assert (tmp_path / "train_cpu-speed.png").stat().st_size > 1000
    assert next(table.row_count for table in tables(result)) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"peers": ("lama",)}, "Did you mean 'llama'?"),
        ({"variants": ("compield",)}, "Did you mean 'compiled'?"),
        ({"size": "1.3"}, "Did you mean '1.3B'?"),
        ({"precision": "bf17"}, "Did you mean 'bf16'?"),
        ({"only": ("step",)}, "Did you mean 'steps'?"),
        ({"peers": ("fla",), "variants": ("compiled",)}, "none of fla has a variant compiled; they have plain"),
        ({"steps": 0}, "steps is 0"),
        ({"minutes": -1.0}, "minutes is -1"),
        ({"only": ("profile",)}, "give both"),
        ({"only": ("steps",), "profile": True}, "give both"),
    ],
)
def test_options_that_cannot_be(options, told):
    with pytest.raises(UsageError) as refused:
        Options(**options)
    assert told in str(refused.value)


@pytest.mark.parametrize("length", [3000, 1])
def test_a_length_that_does_not_divide_the_tokens(length):
    with pytest.raises(UsageError, match=f"sequences of {length} tokens do not make up the 16384 tokens"):
        benchmark(Options(lengths=(2048, length)), say=print, worker=MadeUpWorker())


def test_values_come_before_speed_and_what_tunes_itself_last(monkeypatch):
    worker = MadeUpWorker()
    made_up_result(monkeypatch, worker, profile=True)
    asked = [(function.__name__, job.implementation, job.variant) for function, job in worker.asked]
    assert [who for _, who, _ in asked] == sorted((who for _, who, _ in asked), key=["ours", "llama", "fla"].index)
    for name, who, variant in asked:
        assert asked.index(("measure_errors", who, variant)) <= asked.index((name, who, variant))
    assert asked.count(("measure_steps", "ours", "compiled")) == 4
    assert asked.count(("measure_profile", "ours", "compiled")) == 1


def test_what_is_wrong_is_not_timed(monkeypatch):
    worker = MadeUpWorker(fla_wrong=True)
    result = made_up_result(monkeypatch, worker)
    fla = [r for r in result["steps"] if r["implementation"] == "fla"]
    assert [r["problem"] for r in fla] == ["wrong: logits is off"] * 4
    assert not [job for function, job in worker.asked if job.implementation == "fla" and function is not measure_errors]
    assert times_fla(result["steps"][0], result["steps"]) is None


def test_rates_are_shares_and_multiples(monkeypatch):
    result = made_up_result(monkeypatch)
    first = result["steps"][0]
    assert first["mfu"] == first["flops_per_second"] / 1e15
    assert first["share_of_product"] == first["flops_per_second"] / 8e14
    assert times_fla(first, result["steps"]) == pytest.approx(1.25)
    assert times_fla(result["steps"][-1], result["steps"]) is None
    problems = {(r["implementation"], r["variant"], r["length"]): r["problem"] for r in result["steps"] if r["problem"]}
    assert problems == {("llama", "compiled", 16384): "failed: out of memory"}
    assert [r["variant"] for r in result["cold_start"]] == ["plain", "compiled"]


def test_pictures_of_speed_and_memory(monkeypatch, tmp_path):
    drawn = train_plots.draw(made_up_result(monkeypatch), tmp_path)
    assert [p.name for p in drawn] == ["train_gpu-speed.png", "train_gpu-memory.png"]


def test_what_takes_too_long_and_what_no_time_is_left_for():
    class Slow(MadeUpWorker):
        def call(self, function, *arguments, limit):
            if function is measure_steps:
                raise TookTooLong(f"took longer than {limit:.0f} s")
            return super().call(function, *arguments, limit=limit)

    chosen = {"only": ("steps",), "peers": ("ours",), "variants": ("plain",), "lengths": (2048,), "limit": 90.0}
    for minutes, problem in ((None, "failed: took longer than 90 s"), (1.0, "not run: no time left")):
        result = benchmark(Options(minutes=minutes, **chosen), say=print, worker=Slow())
        assert [r["problem"] for r in result["steps"]] == [problem]


def test_a_cold_start_has_caches_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "Worker", Here)
    monkeypatch.setattr(train, "measure_first_step", lambda device, job: {"caches": caches()})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "kernel").touch()
    assert caches()["triton"] == "filled"
    record = train.measure_cold_start("cpu", JOB, 10.0)
    assert record["first"]["caches"] == {"triton": "empty", "inductor": "empty"}
    assert caches()["triton"] == "filled"


@pytest.mark.parametrize("precision", ["pure_bf16", "bf16"])
def test_ours_is_right_in_other_precisions(precision):
    assert errors_of(replace(JOB, precision=precision), CPU).problem is None


def test_the_gate_finds_a_wrong_gradient(monkeypatch):
    right = Ours.loss

    def wrong(self, model, forwarded, tokens, **options):
        # Only in the way large tables of logits are computed.
        hidden = 1.01 * forwarded - 0.01 * forwarded.detach() if options else forwarded
        return right(self, model, hidden, tokens, **options)

    monkeypatch.setattr(Ours, "loss", wrong)
    assert "is off by" in measure_errors("cpu", JOB)["problem"]


def test_a_loss_that_does_not_fall_is_wrong():
    for last in (math.nan, 2.5):
        assert _losses(2.0, SimpleNamespace(loss=torch.tensor(last)))["problem"].startswith("wrong: the loss did not")
    assert "problem" not in _losses(2.0, SimpleNamespace(loss=torch.tensor(1.5)))


def test_a_graph_needs_a_gpu():
    assert measure_steps("cpu", replace(JOB, variant="graph"), 1) == {"problem": "not run: CUDA graphs need a GPU"}


def test_compiled_blocks_and_formats():
    training = Training(replace(JOB, variant="compiled", precision="pure_bf16"), CPU)
    assert all(block._compiled_call_impl is not None for block in training.model.model.layers)
    assert {p.dtype for p in training.model.parameters()} == {torch.bfloat16}
    llama = Training(replace(JOB, implementation="llama", precision="pure_bf16"), CPU).model
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in llama.buffers()} == {torch.float32}  # angles of the rotation


@pytest.mark.parametrize(
    ("name", "parameters"), [("130M", 0.135e9), ("340M", 0.37e9), ("1.3B", 1.37e9), ("2.7B", 2.73e9)]
)
def test_sizes_correspond(name, parameters):
    size = SIZES[name]
    with torch.device("meta"):
        found = {who: TRAINED[who].build(TRAINED[who].config(size, "plain")) for who in ("ours", "llama")}
        stands_for_llama = TRAINED["ours"].build(size.config("attention"))
    counts = {who: sum(p.numel() for p in model.parameters()) for who, model in found.items()}
    assert counts["ours"] == pytest.approx(parameters, rel=0.03)
    assert counts["llama"] == sum(p.numel() for p in stands_for_llama.parameters())
    assert counts["llama"] == pytest.approx(counts["ours"], rel=0.02)
    # Six for every parameter of a matrix, embeddings aside; and the operator.
    least = 6 * (counts["ours"] - size.vocabulary * size.hidden)
    assert least < size.training_flops("gsa", 2048) < 1.03 * least


def test_fla_has_the_parameters_of_ours():
    pytest.importorskip("fla")
    fla = TRAINED["fla"]
    with torch.device("meta"):
        models = [fla.build(fla.config(SIZES["tiny"], variant)) for variant in fla.variants]
        own = fla.twin(SIZES["tiny"])
    for model in models:
        theirs = {name: p.shape for name, p in model.named_parameters()}
        assert theirs == {name: p.shape for name, p in own.named_parameters()}


@pytest.mark.parametrize(
    ("phase", "kernel", "kind"),
    [
        ("forward", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("backward", "void cutlass::device_kernel<cutlass_80_tensorop_bf16_s16816gemm>", "products"),
        ("loss", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "loss, products"),
        ("loss", "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "loss, the rest"),
        ("forward", "prepare", "operator"),
        ("backward", "values_backward", "operator"),
        ("backward", "silu_backward", "around the operator"),
        ("backward", "swiglu_backward", "between an MLP's products"),
        ("forward", "add_norm_forward", "norms"),
        ("forward", "triton_poi_fused_mul_silu_0", "compiled by Inductor"),
        ("backward", "void at::native::(anonymous namespace)::cuComputePartGradGammaBeta<float>", "norms"),
        ("forward", "Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("forward", "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel>", "elementwise"),
        ("optimizer", "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("backward", "something_new", "other"),
    ],
)
def test_kernels_by_category(phase, kernel, kind):
    assert category(phase, kernel) == kind


def test_small_kernels_count_without_being_listed():
    found = grouped({("forward", "prepare"): [1.0, 100.0], ("forward", "outputs"): [1.0, 0.01]})
    assert [row["name"] for row in found["kernels"]] == ["prepare"]
    assert found["categories"][0]["calls"] == 2
    assert found["kernel_milliseconds"] == 100.01
