"""How far apart an unmodified FLA language model is with the switch off and on. Prints JSON.

    python -m tests.integrations.compare_fla --device cuda --dtype bfloat16 --tokens 256
    TRITON_INTERPRET=1 python -m tests.integrations.compare_fla --device cpu --dtype float32 --tokens 40 \\
        --without chunk_gsa ABC

FLA's layer calls `chunk_gsa` for more than 64 tokens and `fused_recurrent_gsa` for fewer. A model of one layer is run
on a training step, a batch with left padding, packed sequences, and a prompt continued token by token; then the two
functions on their own, with options no layer uses. Each is run three times: by FLA ("fla"), by the same FLA code with
the switch on ("ours"), and with the switch on our recurrence and everything in float32, which is what both are
measured against. A figure is ‖x - exact‖ / ‖exact‖; "apart" is ‖ours - fla‖ / ‖exact‖.

A program of its own because it makes FLA's kernels take their first configuration instead of timing them all, which
would take minutes on a GPU and cannot be done in Triton's interpreter. (There FLA 0.6.0's chunk kernels and its gates
of ABC do not run at all: the interpreter lacks what they use.)
"""

import argparse
import copy
import functools
import itertools
import json
import time
import warnings
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from flash_gsa.integrations import fla as switch
from flash_gsa.ops import Problem, explain

HEADS = 2
FUNCTION_CASES: dict[str, dict[str, dict]] = {
    "chunk_gsa": {
        "grouped, packed": {"HQ": 4, "lengths": (70, 1, 29), "cu_seqlens_cpu": True},
        "ABC": {"g": None},
        "ABC, packed": {"g": None, "lengths": (70, 1, 29)},
    },
    "fused_recurrent_gsa": {
        "ABC": {"g": None},
        "ABC, packed": {"g": None, "lengths": (30, 1, 9)},
        "reverse": {"reverse": True},
        "reverse, packed": {"reverse": True, "lengths": (30, 1, 9)},
        "reverse ABC": {"reverse": True, "g": None},
        "one token, grouped": {"T": 1, "HQ": 4, "gradients": False},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=HEADS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--without", nargs="*", default=[], help="leave out runs with one of these words in the name")
    given = parser.parse_args()
    take_the_first_configuration()
    print(json.dumps(compare(**vars(given)), indent=2))


def take_the_first_configuration() -> None:
    """To be called before FLA is imported."""
    tuner = triton.runtime.autotuner.Autotuner
    original = tuner.__init__

    @functools.wraps(original)
    def init(self, fn, arg_names, configs, *args, **kwargs):
        original(self, fn, arg_names, list(configs)[:1], *args, **kwargs)

    tuner.__init__ = init


def compare(
    device: str, dtype: str, tokens: int, hidden: int, slots: int, kv_heads: int, backend: str, without: list[str]
) -> dict[str, object]:
    import fla
    from fla.models import GSAConfig, GSAForCausalLM

    start = time.perf_counter()
    torch.manual_seed(0)
    config = GSAConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        num_slots=slots,
        vocab_size=96,
        intermediate_size=hidden,
        initializer_range=0.2,  # enough for slots that differ, so that q and k matter
        fuse_cross_entropy=False,
        pad_token_id=0,
    )
    model = GSAForCausalLM(config).to(device, getattr(torch, dtype))
    exact = copy.deepcopy(model).float()
    ids = torch.randint(1, 96, (2, tokens), device=device)
    calls = count_calls()

    runs: dict[str, Callable] = {"training": training, "padded": padded, "packed": packed, "decoding": decoding}
    for name, cases in FUNCTION_CASES.items():
        for case, options in cases.items():
            runs[f"{name}: {case}"] = functools.partial(function, name=name, slots=slots, **options)
    runs = {name: run for name, run in runs.items() if not any(word in name for word in without)}
    result: dict[str, object] = {}
    for name, run in runs.items():
        theirs = run(model, ids)
        assert calls["operator"] == 0, "FLA's run went through our operator"
        with switch.enabled(backend), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*runs in FLA")
            ours = run(model, ids)
        counted, calls["operator"] = calls["operator"], 0
        with switch.enabled("reference"):
            truth = run(exact, ids)
        calls["operator"] = 0
        assert ours.keys() == truth.keys() == theirs.keys()
        result[name] = {"calls": counted} | {
            what: {
                "fla": distance(theirs[what], truth[what], truth[what]),
                "ours": distance(ours[what], truth[what], truth[what]),
                "apart": distance(ours[what], theirs[what], truth[what]),
            }
            for what in truth
        }
    return {
        "fla": fla.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "on": torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter",
        "settings": {"dtype": dtype, "tokens": tokens, "hidden": hidden, "slots": slots, "kv_heads": kv_heads},
        "backend": runs_on(model, ids, hidden // HEADS, slots) if backend == "auto" else backend,
        "seconds": round(time.perf_counter() - start, 1),
        "distance": result,
    }


def runs_on(model, ids: Tensor, head: int, slots: int) -> str:
    """The backend that "auto" is, for the training step."""
    dtype = next(model.parameters()).dtype
    problem = Problem(*ids.shape, HEADS, HEADS, head, head, slots, dtype, ids.device.type)
    return next(name for name, why_not in explain(problem) if why_not is None)


def count_calls() -> dict[str, int]:
    """How often the switch has called our operator, whole sequences and single tokens."""
    calls = {"operator": 0}

    def counting(function: Callable) -> Callable:
        def counted(*args, **kwargs):
            calls["operator"] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("gated_slot_attention", "gated_slot_attention_step"):
        setattr(switch, name, counting(getattr(switch, name)))
    return calls


def distance(x: Tensor, y: Tensor, of: Tensor) -> float:
    x, y, of = (t.double() for t in (x, y, of))
    return float((x - y).norm() / of.norm())


def training(model, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {f"d {name}": p.grad.clone() for name, p in model.named_parameters()}


@torch.no_grad()
def padded(model, ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    return {"logits": model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]}


@torch.no_grad()
def packed(model, ids: Tensor) -> dict[str, Tensor]:
    flat = ids.reshape(1, -1)
    bounds = torch.tensor([0, 5, ids.shape[1] + 3, flat.shape[1]], device=ids.device, dtype=torch.int32)
    return {"logits": model(flat, cu_seqlens=bounds, use_cache=False).logits}


@torch.no_grad()
def decoding(model, ids: Tensor) -> dict[str, Tensor]:
    steps = 4
    out = model(ids[:, :-steps], use_cache=True)
    logits = [out.logits[:, -1]]
    for t in range(ids.shape[1] - steps, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    hk, hv = out.past_key_values[0]["recurrent_state"]
    return {"logits": torch.stack(logits), "hk": hk, "hv": hv}


def function(model, ids: Tensor, *, name, slots, T=None, HQ=HEADS, lengths=None, gradients=True, **options):
    """One call of FLA's function `name` (of what stands in its place) in the dtype of `model`, with its gradients."""
    import fla.ops.gsa

    random = torch.Generator().manual_seed(1)
    dtype, inputs = next(model.parameters()).dtype, {}
    N, B = (len(lengths), 1) if lengths else (2, 2)
    T = sum(lengths) if lengths else T or 40
    H, K, V, M = HEADS, 16, 32, slots
    for x, shape in {"q": (HQ, K), "k": (H, K), "v": (H, V), "g": (H, M), "s": (H, M)}.items():
        inputs[x] = torch.randn(B, T, *shape, generator=random)
    inputs["g"] = torch.nn.functional.logsigmoid(inputs["g"]) / 8
    if options.get("g", True) is not None:
        inputs["s"] = -torch.expm1(inputs["g"])
    # The numbers are those of bfloat16 in every run, so that only what is computed from them differs.
    inputs = {x: t.bfloat16().to(ids.device, dtype).requires_grad_(gradients) for x, t in inputs.items()}
    states = [torch.randn(N, H, *shape, generator=random) for shape in ((K, M), (M, V))]
    states = [x.to(ids.device).requires_grad_(gradients) for x in states]
    if lengths:
        bounds = torch.tensor([0, *itertools.accumulate(lengths)])
        options["cu_seqlens"] = bounds.to(ids.device)
        if options.get("cu_seqlens_cpu"):
            options["cu_seqlens_cpu"] = bounds
    called = getattr(fla.ops.gsa, name)
    o, (hk, hv) = called(**(inputs | options), initial_state=tuple(states), output_final_state=True)
    found = {"o": o, "hk": hk, "hv": hv}
    if gradients:
        weights = [torch.randn(x.shape, generator=random).to(x) for x in found.values()]
        sum((x * w).sum() for x, w in zip(found.values(), weights, strict=True)).backward()
        inputs |= {"hk0": states[0], "hv0": states[1]}
        found |= {f"d {x}": t.grad for x, t in inputs.items() if t.grad is not None}
    return {x: t.detach() for x, t in found.items()}


if __name__ == "__main__":
    main()
