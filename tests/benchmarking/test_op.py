"""Which measurements are made, in which order, and what becomes of those that fail."""

import json
import time

import pytest
import torch

from flash_gsa.benchmarking import measurements, op
from flash_gsa.benchmarking.decoding import measure_decoding
from flash_gsa.benchmarking.implementations import implementation
from flash_gsa.benchmarking.op import Options, benchmark
from flash_gsa.benchmarking.shapes import SUITES, Shape
from flash_gsa.benchmarking.worker import TookTooLong
from flash_gsa.errors import UsageError

from .made_up import MadeUpWorker, cold_start


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    monkeypatch.setattr(op, "measure_cold_start", cold_start)


def test_everything_is_measured_and_peers_that_tune_come_last():
    worker, lines = MadeUpWorker(), []
    result = benchmark(Options(), say=lines.append, worker=worker)
    assert result["suite"] == "gpu"
    asked = [name for _, name, _ in worker.asked]
    ours = {"auto", "recompute", "triton", "chunk", "separate"}
    assert set(asked) == ours | {"sdpa-cudnn", "sdpa-flash", "fla", "copy"}
    # Time against length comes after all the rest, and in both FLA comes last.
    sweep = SUITES["gpu"].sweep_shapes()
    shortest = min(s.T for s in sweep)
    lengths = next(i for i, (_, _, shape) in enumerate(worker.asked) if shortest == shape.T)
    for part in (worker.asked[:lengths], worker.asked[lengths:]):
        names = [name for _, name, _ in part]
        fla = part[names.index("fla") :]
        assert {name for _, name, _ in fla} == {"fla"}
        # All at one family of shapes before it tunes itself for the next.
        families = [shape.name for _, _, shape in fla]
        assert families == sorted(families, key=["1.3B", "7B", "340M"].index)
    assert {shape for _, _, shape in worker.asked[lengths:]} == set(sweep)
    assert len(lines) == len(worker.asked) + 2
    assert lines[0].startswith(f"[1/{len(lines)}] ceilings: 1e+03 GB/s")
    for part, expected in (
        ("shapes", 5 * 6 + 3 + 5),  # of packed sequences FLA is not asked
        ("layer", 3 * 4 + 2 * 7),
        ("decoding", 2 * 5 * (3 + 2)),
        ("lengths", 18 * 3),
        ("cold_start", 1),
    ):
        assert len(result[part]) == expected, part
    sweep = {(r["shape"]["B"], r["shape"]["T"]) for r in result["lengths"]}
    assert sweep == {(s.B, s.T) for s in SUITES["gpu"].sweep_shapes()}
    in_graph = {(r["implementation"], r["shape"]["B"] * r["shape"]["T"]) for r in result["lengths"] if "in_graph" in r}
    assert in_graph == {("auto", tokens) for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768)}
    in_graph = {(r["implementation"], r["shape"]["label"]) for r in result["shapes"] if "in_graph" in r}
    short = ("1.3B-8x2048", "1.3B-1x16384", "7B-4x4096", "340M-8x2048")
    all_of_them = {(name, label) for name in ("auto", "fla", "sdpa-cudnn", "sdpa-flash") for label in short}
    failed = {("fla", "340M-8x2048"), ("sdpa-flash", "7B-4x4096")}
    assert in_graph == all_of_them - failed | {("auto", "packed-1x16360")}


def test_layers_of_chosen_shapes_by_chosen_peers():
    around = [(o, n, "1.3B-8x2048") for o in ("silu", "gates", "norm") for n in ("auto", "separate")]
    around.append(("abc_gates", "auto", "1.3B-8x2048"))
    for peers, ways in (((), ("auto", "separate", "fla")), (("auto",), ("auto", "separate")), (("fla",), ("fla",))):
        worker = MadeUpWorker()
        result = benchmark(Options(only=("layer",), shapes=("1.3B",), peers=peers), say=print, worker=worker)
        whole = [
            entry
            for label in ("1.3B-8x2048", "1.3B-1x16384")
            for entry in (("projections", "auto", label), *(("layer", name, label) for name in ways))
        ]
        # As many tokens in one sequence as in eight: what surrounds the operator is measured once.
        assert sorted(worker.operations) == sorted(whole + (around if "auto" in ways else []))
        kept = [(r["operation"], r["implementation"], r["shape"]["label"]) for r in result["layer"]]
        assert kept == worker.operations


def test_states_are_computed_again_where_that_is_told_of_and_where_it_is_asked_for():
    result = benchmark(Options(only=("shapes",)), say=print, worker=MadeUpWorker())
    told = [r["shape"]["label"] for r in result["shapes"] if r["implementation"] == "recompute"]
    assert told == ["1.3B-8x2048", "1.3B-1x16384", "1.3B-1x65536"]
    for shape in ("7B", "1.3B-8x2048"):
        worker = MadeUpWorker()
        benchmark(Options(only=("shapes",), shapes=(shape,), peers=("auto", "recompute")), say=print, worker=worker)
        assert [name for _, name, _ in worker.asked] == ["auto", "recompute"]


def test_times_stand_beside_the_least_the_bytes_need():
    record = benchmark(Options(shapes=("7B",), peers=("auto",)), say=print, worker=MadeUpWorker())["shapes"][0]
    both = record["forward_backward"]
    assert both["least_seconds"] == both["least_bytes"] / 1e12
    assert both["times_the_least"] == both["seconds"] / both["least_seconds"]


def test_what_fails_is_recorded_with_its_reason_and_the_rest_goes_on():
    result = benchmark(Options(), say=lambda line: None, worker=MadeUpWorker())
    problems = {(r["implementation"], r["shape"]["label"]): r["problem"] for r in result["shapes"] if r["problem"]}
    assert problems.pop(("sdpa-flash", "7B-4x4096")) == "failed: out of memory"
    assert problems.pop(("fla", "340M-8x2048")).startswith("wrong: dg is off by")
    packed = {problems.pop((f"sdpa-{kind}", "packed-1x16360")) for kind in ("cudnn", "flash")}
    assert packed == {"not run: packed sequences are not measured with it"}
    assert set(problems.values()) == {"not run: it is what auto runs"}


def test_the_result_is_written_as_it_grows(tmp_path):
    path = tmp_path / "new" / "op.json"
    written = []

    def look(line):
        written.append(json.loads(path.read_text()) if path.exists() else None)

    result = benchmark(Options(only=("shapes",), shapes=("340M",)), path, look, MadeUpWorker())
    assert [None if w is None else len(w["shapes"]) for w in written] == [None, 1, 2, 3, 4, 5]
    final = json.loads(path.read_text())
    assert final == json.loads(json.dumps(result))
    assert [p.name for p in path.parent.iterdir()] == ["op.json"]


def test_no_time_left(monkeypatch):
    worker = MadeUpWorker()
    options = Options(minutes=1.0, limit=50.0)
    now = iter([0.0, *[t for t in (0.0, 30.0, 70.0, 80.0) for _ in range(2)], *[90.0] * 1000])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    result = benchmark(options, say=lambda line: None, worker=worker)
    assert worker.limits == [30.0]
    left = [r["problem"] for part in ("shapes", "decoding", "lengths", "cold_start") for r in result[part]]
    assert left[0] is None
    assert set(left[1:]) == {"not run: no time left"}


def test_what_is_cut_by_the_end_has_not_failed(monkeypatch):
    class Slow(MadeUpWorker):
        def call(self, function, *arguments, limit):
            if function is measurements.measure_shape:
                raise TookTooLong(f"took longer than {limit:.0f} s")
            return super().call(function, *arguments, limit=limit)

    chosen = {"only": ("shapes",), "shapes": ("340M",), "peers": ("auto",)}
    for minutes, problem in ((None, "failed: took longer than 90 s"), (1.0, "not run: no time left")):
        result = benchmark(Options(limit=90.0, minutes=minutes, **chosen), say=print, worker=Slow())
        assert [r["problem"] for r in result["shapes"]] == [problem]


def test_options_choose():
    options = Options(only=("shapes", "decoding"), shapes=("1.3B-1x16384", "340M"), peers=("chunk", "sdpa-cudnn"))
    result = benchmark(options, say=print, worker=MadeUpWorker())
    assert result["ceilings"] is None
    assert not result["lengths"]
    assert not result["cold_start"]
    labels = {(r["shape"]["label"], r["implementation"]) for r in result["shapes"]}
    assert labels == {(s, p) for s in ("1.3B-1x16384", "340M-8x2048") for p in ("chunk", "sdpa-cudnn")}
    assert "times_the_least" not in result["shapes"][0]["forward"]
    assert {r["implementation"] for r in result["decoding"]} == {"copy", "chunk"}


def test_the_reference_stops_where_it_takes_too_long():
    result = benchmark(Options(peers=("reference",), only=("lengths",)), say=print, worker=_Named("reference"))
    assert {r["shape"]["T"] for r in result["lengths"]} == {512, 1024, 2048}


class _Named(MadeUpWorker):
    """The same for one more name."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def call(self, function, *arguments, limit):
        if function is measurements.measure_shape:
            arguments = (arguments[0], "chunk", *arguments[2:])
        return super().call(function, *arguments, limit=limit)


def test_a_cold_start_of_fla_only_when_asked(monkeypatch):
    starts = []
    monkeypatch.setattr(op, "measure_cold_start", lambda *a: starts.append(a[1]) or cold_start(*a))
    for cold_fla in (False, True):
        benchmark(Options(only=("cold_start",), cold_fla=cold_fla), say=print, worker=MadeUpWorker())
    assert starts == ["auto", "auto", "fla"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ("shape",)}, "there is no part 'shape'; choose of .* Did you mean 'shapes'"),
        ({"shapes": ("13B",)}, r"there is no shape '13B'; choose of 1.3B, .* Did you mean '1.3B'"),
        ({"peers": ("flash",)}, "there is no implementation 'flash'; choose of auto, .*"),
        ({"budget": 0.0}, "budget is 0; expected a number above 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"repeats": 0}, "repeats is 0; expected 1 or more"),
        ({"cold_fla": True, "only": ("shapes",)}, "a cold start is asked for, but not among the parts"),
    ],
)
def test_mistakes_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        benchmark(Options(**options), say=print, worker=MadeUpWorker())


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="there is no device 'cuda:99' here"):
        measurements.open_device("cuda:99")


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_decoding_step_with_states_in_either_format(state):
    shape = Shape("x", B=3, T=1, HQ=4, H=2, K=8, V=8, M=8)
    copied, ours = (measure_decoding("cpu", name, shape, state, 0.01, 2, 2**14) for name in ("copy", "auto"))
    assert "problem" not in ours
    assert ours["errors"].keys() == {"o", "hk", "hv"}
    size = {"float32": 4, "bfloat16": 2}[state]
    assert copied["state_bytes"] == ours["state_bytes"] == size * 3 * 2 * 8 * 16
    assert 0 < copied["low"] <= copied["seconds"]
    assert 0 < ours["low"] <= ours["seconds"]
    # What is not in the format of the state is not timed as if it were.
    near = {"float32": 1e-6, "bfloat16": 4e-3}[state]
    assert near / 100 < ours["errors"]["hk"][0] < near


def test_one_token_for_fla_has_the_heads_of_its_state():
    grouped, fla = Shape("grouped", 2, 70, HQ=4, H=2, K=8, V=6, M=3), implementation("fla")
    heads = {name: x.shape[:3] for name, x in fla.token_inputs(grouped, torch.device("cpu")).items()}
    assert heads == {"q": (2, 1, 4), "k": (2, 1, 2), "v": (2, 1, 2), "g": (2, 1, 2), "s": (2, 1, 2)}
    hk, hv = fla.state(torch.zeros(grouped.state_numbers), grouped)
    assert (hk.shape, hv.shape) == ((2, 2, 8, 3), (2, 2, 3, 6))
    assert fla.inputs(grouped, torch.device("cpu"))["k"].shape == (2, 70, 4, 8)  # training has one for every query head
