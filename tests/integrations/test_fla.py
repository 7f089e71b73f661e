"""FLA's functions by our operator: their signatures, their results; and the switch, with an FLA of our own making.

What FLA 0.6.0 declares is in fla_functions.json, so no test of the first three parts needs it installed. Where it is,
the last part runs it.
"""

import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flash_gsa.errors import UsageError
from flash_gsa.integrations import fla as integration
from flash_gsa.integrations.fla import chunk_gsa, disable, enable, enabled, fused_recurrent_gsa

FUNCTIONS = {"chunk_gsa": chunk_gsa, "fused_recurrent_gsa": fused_recurrent_gsa}
RECORD = json.loads(Path(__file__).with_name("fla_functions.json").read_text(encoding="utf-8"))
both = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


# Signatures


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_that_of_the_recorded_release(name):
    recorded = RECORD["functions"][name]
    parameters = dict(inspect.signature(FUNCTIONS[name]).parameters)
    if recorded["other_keywords"]:
        assert parameters.pop(recorded["other_keywords"]).kind is inspect.Parameter.VAR_KEYWORD
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert list(parameters) == recorded["required"] + list(recorded["optional"])
    assert all(parameters[x].default is inspect.Parameter.empty for x in recorded["required"])
    assert {x: parameters[x].default for x in recorded["optional"]} == recorded["optional"]
    assert RECORD["version"] in integration.KNOWN_VERSIONS


# Results, against the recurrence written as FLA writes it


def make(*, HQ=2, H=2, T=11, B=2, K=5, V=7, M=6, lengths=None, state=True, dtype=torch.float64):
    """Inputs by FLA's names; s as its layer gives it, in the dtype of everything else."""
    N = B
    if lengths:
        B, T, N = 1, sum(lengths), len(lengths)
    x = {
        "q": torch.randn(B, T, HQ, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "g": F.logsigmoid(torch.randn(B, T, H, M)) / 8,
    }
    x["s"] = 1 - x["g"].exp()
    if state:
        x |= {"hk": torch.randn(N, H, K, M), "hv": torch.randn(N, H, M, V)}
    return {name: t.to(dtype).requires_grad_() for name, t in x.items()}


def bounds(lengths):
    return None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)])


def call(function, x, lengths=None, **options):
    state = (x["hk"], x["hv"]) if "hk" in x else None
    arguments = {name: t for name, t in x.items() if name not in ("hk", "hv")}
    return function(**(arguments | options), initial_state=state, output_final_state=True, cu_seqlens=bounds(lengths))


def recurrence(x, lengths=None, scale=None, reverse=False, g="given"):
    """Two linear recurrences joined by a softmax over slots, for every query head a state of its own."""
    group = x["q"].shape[2] // x["k"].shape[2]
    q, K = x["q"], x["q"].shape[3]
    k, v, s, gates = (x[name].repeat_interleave(group, 2) for name in ("k", "v", "s", "g"))
    (B, T, H), V, M = q.shape[:3], v.shape[3], s.shape[3]
    scale = K**-0.5 if scale is None else scale
    pieces = [(0, T, slice(None))]
    if lengths:
        ends = bounds(lengths).tolist()
        pieces = [(a, b, slice(n, n + 1)) for n, (a, b) in enumerate(itertools.pairwise(ends))]
    if g is None:
        s, gates = (torch.cat(p, 1) for p in zip(*(abc(s[:, a:b]) for a, b, _ in pieces), strict=True))
    outputs, finals = [], []
    for a, b, rows in pieces:
        N = 1 if lengths else B
        hk = x["hk"][rows].repeat_interleave(group, 1) if "hk" in x else q.new_zeros(N, H, K, M)
        hv = x["hv"][rows].repeat_interleave(group, 1) if "hv" in x else q.new_zeros(N, H, M, V)
        piece = {}
        for t in reversed(range(a, b)) if reverse else range(a, b):
            decay = gates[:, t].exp()
            hk = hk * decay[..., None, :] + k[:, t, ..., None] * s[:, t, ..., None, :]
            hv = hv * decay[..., :, None] + s[:, t, ..., None] * v[:, t, ..., None, :]
            p = (scale * (q[:, t, ..., None] * hk).sum(-2)).softmax(-1)
            piece[t] = (p[..., None] * hv).sum(-2)
        outputs += [piece[t] for t in range(a, b)]
        finals.append((hk[:, ::group], hv[:, ::group]))
    hk, hv = (torch.cat(states) for states in zip(*finals, strict=True))
    return torch.stack(outputs, 1), hk, hv


def abc(logits):
    """Write strengths and gates of softmax weights over a slot's own past; nothing fades at the first token."""
    z = logits.logcumsumexp(1)
    return (logits - z).exp(), torch.cat([z[:, :1], z[:, :-1]], 1) - z


CASES = {
    "plain": {},
    "scaled": {"scale": 1.0},
    "new": {"state": False},
    "grouped": {"HQ": 6},
    "packed": {"lengths": (4, 1, 9)},
    "packed and grouped": {"lengths": (4, 1, 9), "HQ": 4, "H": 1},
    "one token": {"T": 1, "HQ": 4},
    "long": {"T": 70, "B": 1},
    "ABC": {"g": None, "HQ": 4},
    "ABC, packed": {"g": None, "lengths": (4, 1, 9)},
}
REVERSED = {
    "backwards": {},
    "backwards, packed": {"lengths": (4, 1, 9), "HQ": 4},
    "backwards, packed, new": {"lengths": (4, 1, 9), "state": False},
    "backwards, ABC": {"g": None, "lengths": (4, 3)},
}
ALL_CASES = [
    *(pytest.param(f, case, id=f"{n}: {c}") for n, f in FUNCTIONS.items() for c, case in CASES.items()),
    *(pytest.param(fused_recurrent_gsa, case | {"reverse": True}, id=c) for c, case in REVERSED.items()),
]


@pytest.mark.parametrize(("function", "case"), ALL_CASES)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(function, case):
    options = {name: case[name] for name in ("scale", "reverse", "g") if name in case}
    lengths = case.get("lengths")
    x = make(**{name: value for name, value in case.items() if name not in options})
    o, final = call(function, x, lengths, **options)
    expected = recurrence(x, lengths, **options)
    assert isinstance(final, list)
    inputs = [t for name, t in x.items() if options.get(name, True) is not None]
    weights = [torch.randn_like(y) for y in expected]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), inputs)
        for ys in ((o, *final), expected)
    ]
    # ABC's gates are differences of float64 logarithms; nothing else is worse than a few roundings.
    torch.testing.assert_close((o, *final), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


@both
def test_no_final_state_is_a_pair_of_none(function):
    x = make()
    o, final = function(x["q"], x["k"], x["v"], x["s"], x["g"])
    assert final == [None, None]
    # … which a caller may hand in again.
    again, _ = function(x["q"], x["k"], x["v"], x["s"], x["g"], initial_state=final)
    torch.testing.assert_close(again, o, rtol=0, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_states(function, dtype):
    x = {name: t.detach() for name, t in make(dtype=dtype).items()}
    o, final = call(function, x)
    assert o.dtype == dtype
    assert [t.dtype for t in final] == [torch.float32, torch.float32]
    expected, *_ = recurrence({name: t.double() for name, t in x.items()})
    assert (o - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


@both
def test_one_token_at_a_time_is_the_whole_and_no_state_is_overwritten(function):
    x = {name: t.detach() for name, t in make(HQ=4).items()}
    whole, final = call(function, x)
    state, kept, outputs = (x["hk"], x["hv"]), [], []
    for t in range(x["q"].shape[1]):
        kept.append([y.clone() for y in state] + list(state))
        token = {name: x[name][:, t : t + 1] for name in ("q", "k", "v", "s", "g")}
        o, state = function(**token, initial_state=state, output_final_state=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(list(state), final)
    for before_k, before_v, hk, hv in kept:
        assert torch.equal(before_k, hk)
        assert torch.equal(before_v, hv)
    assert function(**token, initial_state=state)[1] == [None, None]


def test_a_single_token_is_one_step_unless_gradients_are_wanted(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the other function should have been called")

    x = make(T=1)
    monkeypatch.setattr(integration, "gated_slot_attention_step", refuse)
    call(fused_recurrent_gsa, x)[0].sum().backward()
    assert x["hk"].grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(integration, "gated_slot_attention", refuse)
    with torch.no_grad():
        call(fused_recurrent_gsa, x)


def test_bounds_on_the_cpu_are_the_ones_that_are_read():
    x = {name: t.detach() for name, t in make(lengths=(4, 1, 9)).items()}
    o, final = call(chunk_gsa, x, (4, 1, 9))
    unreadable = torch.empty(4, dtype=torch.int64, device="meta")
    arguments = {name: x[name] for name in ("q", "k", "v", "s", "g")} | {"initial_state": (x["hk"], x["hv"])}
    other, same = chunk_gsa(
        **arguments, output_final_state=True, cu_seqlens=unreadable, cu_seqlens_cpu=bounds((4, 1, 9))
    )
    torch.testing.assert_close((other, *same), (o, *final), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"head_first": False}, DeprecationWarning, "head_first was removed"),
        ({"chunk_size": 48}, UsageError, "power of two, got 48"),
        ({"chunk_size": 0}, UsageError, "power of two, got 0"),
        ({"checkpoint_level": 3}, UsageError, "0, 1 or 2, got 3"),
        ({"output_state": True}, UsageError, "no argument 'output_state'.*Did you mean 'output_final_state'"),
        ({"cu_seqlens": torch.tensor([0, 11])}, UsageError, "batch dimension must be 1"),
        ({"initial_state": (torch.zeros(2, 2, 5, 6, dtype=torch.float64), None)}, UsageError, "hv must have shape"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    x = make()
    with pytest.raises(error, match=words):
        chunk_gsa(x["q"], x["k"], x["v"], x["s"], x["g"], **options)


def test_options_that_only_trade_memory_for_time_change_nothing():
    x = make()
    arguments = [x[name] for name in ("q", "k", "v", "s", "g")]
    expected, _ = chunk_gsa(*arguments)
    for options in ({"chunk_size": 16}, {"checkpoint_level": 0}, {"checkpoint_level": 1}):
        assert torch.equal(chunk_gsa(*arguments, **options)[0], expected)


# The switch


def write_fla(folder: Path, version="9.9.9", **signatures):
    """A package `fla` with the modules that matter of FLA's; its functions return their own name."""
    for name, recorded in RECORD["functions"].items():
        optional = [f"{x}={default!r}" for x, default in recorded["optional"].items()]
        rest = ["**kwargs"] if recorded["other_keywords"] else []
        signatures.setdefault(name, ", ".join([*recorded["required"], *optional, *rest]))
    files = {
        "fla/__init__.py": f"__version__ = {version!r}\n",
        "fla/ops/__init__.py": "from .gsa import chunk_gsa, fused_recurrent_gsa\n",
        "fla/ops/gsa/__init__.py": "from .chunk import chunk_gsa\nfrom .fused_recurrent import fused_recurrent_gsa\n",
        "fla/layers/__init__.py": "from .gsa import layer\n",
        "fla/layers/gsa.py": "from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa\n\n"
        "def layer(**inputs):\n    return chunk_gsa(**inputs)\n",
        "fla/layers/later.py": "from fla.ops.gsa import chunk_gsa as other_name, fused_recurrent_gsa\n\n"
        "def layer(**inputs):\n    return other_name(**inputs)\n",
    }
    for name, recorded in RECORD["functions"].items():
        path = recorded["defined_in"]
        files[path] = f"def {name}({signatures[name]}):\n    return 'from FLA', locals()\n"
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in front of sys.path, no `fla` imported yet, and everything as it was afterwards."""
    for name in [n for n in sys.modules if n.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(integration, "_warned", set())
    yield tmp_path
    disable()
    for name in [n for n in sys.modules if n.split(".")[0] == "fla"]:
        del sys.modules[name]


@pytest.fixture
def fla(site):
    write_fla(site)
    return importlib.import_module("fla.layers").gsa


def inputs():
    return {name: t.detach() for name, t in make(state=False).items()}


def names_of_fla():
    return {
        (module.__name__, name): vars(module)[name]
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").split(".")[0] == "fla"
        for name in FUNCTIONS
        if name in vars(module)
    }


def test_a_layer_runs_on_our_operator_while_the_switch_is_on(fla):
    x = inputs()
    assert fla.layer(**x)[0] == "from FLA"
    enable()
    torch.testing.assert_close(fla.layer(**x)[0], chunk_gsa(**x)[0], rtol=0, atol=0)
    disable()
    assert fla.layer(**x)[0] == "from FLA"


def test_every_name_is_bound_and_bound_back(fla):
    before = names_of_fla()
    assert len(before) == 8
    enable()
    assert all(function is not before[name] for name, function in names_of_fla().items())
    assert all(function.__module__ == integration.__name__ for function in names_of_fla().values())
    enable()
    disable()
    assert names_of_fla() == before
    disable()
    assert names_of_fla() == before


def test_modules_from_elsewhere_are_reached_too(fla, tmp_path, monkeypatch):
    (tmp_path / "remote_code.py").write_text("from fla.ops.gsa import chunk_gsa\n", encoding="utf-8")
    elsewhere = importlib.import_module("remote_code")
    monkeypatch.setitem(sys.modules, "remote_code", elsewhere)
    original = elsewhere.chunk_gsa
    with enabled():
        assert elsewhere.chunk_gsa is not original
    assert elsewhere.chunk_gsa is original


def test_what_is_imported_meanwhile_follows_the_switch(fla):
    x = inputs()
    original = fla.fused_recurrent_gsa
    with enabled():
        later = importlib.import_module("fla.layers.later")
        assert isinstance(later.layer(**x)[0], torch.Tensor)
    assert later.fused_recurrent_gsa is original
    assert later.layer(**x)[0] == "from FLA"  # bound to another name, still what was imported, but off
    with enabled():
        assert isinstance(later.layer(**x)[0], torch.Tensor)


def test_blocks_nest_and_leave_what_they_found(fla):
    x = inputs()

    def on():
        return isinstance(fla.layer(**x)[0], torch.Tensor)

    with enabled():
        with enabled():
            assert on()
        assert on()
        enable()
    assert on()
    with enabled():
        disable()
        assert on()
    assert not on()
    with pytest.raises(KeyError), enabled():
        raise KeyError
    assert not on()


def test_overlapping_threads_keep_it_on_until_the_last_is_done(fla):
    x = inputs()
    inside, first_left = threading.Event(), threading.Event()
    seen = []

    def second():
        with enabled():
            inside.set()
            assert first_left.wait(30)
            seen.append(fla.layer(**x)[0])

    thread = threading.Thread(target=second)
    with enabled():
        thread.start()
        assert inside.wait(30)
    first_left.set()
    thread.join(30)
    assert isinstance(seen[0], torch.Tensor)
    assert fla.layer(**x)[0] == "from FLA"


def test_the_backend_is_the_last_asked_for(fla, monkeypatch):
    asked = []
    operator = integration.gated_slot_attention
    monkeypatch.setattr(
        integration, "gated_slot_attention", lambda *a, **o: asked.append(o["backend"]) or operator(*a, **o)
    )
    x = inputs()
    enable("reference")
    fla.layer(**x)
    with enabled("chunk"):
        fla.layer(**x)
        enable()
        fla.layer(**x)
    fla.layer(**x)
    assert asked == ["reference", "chunk", "auto", "auto"]


def test_what_the_operator_refuses_goes_to_fla_with_one_warning(fla):
    x = inputs()
    mixed = x | {"k": x["k"].float()}
    with enabled():
        with pytest.warns(RuntimeWarning, match="chunk_gsa runs in FLA.*one dtype") as caught:
            where, received = fla.layer(**mixed)
        assert where == "from FLA"
        assert all(received[name] is mixed[name] for name in mixed)
        assert caught[0].filename == fla.__file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fla.layer(**mixed)[0] == "from FLA"
            assert isinstance(fla.layer(**x)[0], torch.Tensor)
        with pytest.warns(RuntimeWarning, match="no argument 'new_option'"):
            assert fla.layer(**x, new_option=1)[1]["kwargs"] == {"new_option": 1}
        with pytest.warns(RuntimeWarning, match="fused_recurrent_gsa runs in FLA"):
            assert fla.fused_recurrent_gsa(**mixed)[0] == "from FLA"


def test_a_backend_that_cannot_run_it_leaves_it_to_fla(fla):
    x = inputs()
    with enabled("triton"), pytest.warns(RuntimeWarning, match="runs in FLA, not in flash-gsa: backend 'triton'"):
        assert fla.layer(**x)[0] == "from FLA"


def test_an_error_of_the_operator_itself_is_not_hidden(fla, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(integration, "gated_slot_attention", broken)
    with enabled(), pytest.raises(RuntimeError, match="out of memory"):
        fla.layer(**inputs())


def test_an_unknown_backend_is_refused_and_nothing_is_changed(fla):
    before = names_of_fla()
    with pytest.raises(UsageError, match=r"'chunks' does not exist.*Did you mean 'chunk'"):
        enable("chunks")
    assert names_of_fla() == before


def test_without_fla_the_error_says_how_to_install_it(site, monkeypatch):
    class NoFLA:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "fla":
                raise ModuleNotFoundError("No module named 'fla'", name="fla")

    monkeypatch.setattr(sys, "meta_path", [NoFLA, *sys.meta_path])
    with pytest.raises(UsageError, match=r"not installed.*`pip install flash-linear-attention==0\.6\.0`"):
        enable()


def test_another_package_of_that_name_is_refused(site):
    (site / "fla").mkdir()
    (site / "fla" / "__init__.py").write_text("__version__ = '1'\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"No module named 'fla.ops'.*knows .* 0.6.0, and this is version 1\."):
        enable()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"chunk_gsa": "q, k, v, s, g=None, scale=1.0"}, "scale=1.0.*scale=None.* was expected"),
        ({"fused_recurrent_gsa": "q, k, v, s, head_first=True"}, "head_first=True"),
    ],
)
def test_functions_that_take_something_else_are_refused_and_nothing_is_changed(site, changed, words):
    write_fla(site, version="7.0", **changed)
    importlib.import_module("fla.layers")
    before = names_of_fla()
    with pytest.raises(UsageError, match=f"{words}.*this is version 7.0"):
        enable()
    assert names_of_fla() == before


def test_a_missing_function_is_refused(site):
    write_fla(site)
    (site / "fla/ops/gsa/__init__.py").write_text("from .chunk import chunk_gsa\n", encoding="utf-8")
    (site / "fla/ops/__init__.py").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="has no fused_recurrent_gsa"):
        enable()


# FLA itself, where it is installed

needs_fla = pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# What bfloat16 loses in a few roundings, and float32 in long sums; beyond that, at most twice FLA's own error.
FLOOR = {"float32": 1e-5, "bfloat16": 2 * torch.finfo(torch.bfloat16).eps}


def run_unmodified_fla(dtype: str, *arguments: str, **environment: str) -> str:
    """compare_fla.py in a process of its own: every figure of ours at most twice FLA's distance from exact. The backend
    that ours ran on."""
    command = [sys.executable, "-m", "tests.integrations.compare_fla", "--dtype", dtype, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    runs = found["distance"]
    assert all(run.pop("calls") == (5 if name == "decoding" else 1) for name, run in runs.items())
    worse = {
        f"{name}: {what}": figures
        for name, run in runs.items()
        for what, figures in run.items()
        if not figures["ours"] <= 2 * figures["fla"] + FLOOR[dtype]
    }
    assert not worse, json.dumps(worse, indent=2)
    return found["backend"]


@needs_fla
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_that_of_the_installed_release(name):
    theirs = getattr(importlib.import_module("fla.ops.gsa"), name)
    assert integration._arguments(theirs) == integration._arguments(FUNCTIONS[name])


@needs_fla
@needs_triton
def test_unmodified_fla_in_the_interpreter():
    small = ["--device", "cpu", "--tokens", "12", "--hidden", "16", "--slots", "6", "--kv-heads", "1"]
    run_unmodified_fla("float32", *small, "--without", "chunk_gsa", "ABC", TRITON_INTERPRET="1")


@needs_fla
@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("tokens", [40, 256])
def test_unmodified_fla_on_a_gpu(dtype, tokens):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert run_unmodified_fla(dtype, "--device", "cuda", "--tokens", str(tokens), "--kv-heads", "1") == "triton"
