"""The layer around the operator: what its projections, activations, gates and output norm cost.

    y = W_o (RMSNorm(SiLU(o)) ∘ w)        o = GSA(SiLU(W_q x), SiLU(W_k x), SiLU(W_v x), logsigmoid(W_f x) / τ)

The whole layer is timed as it is, with separate PyTorch operations around the operator, and as FLA has it; beside it
its projections, which no layer can do without, and each of what surrounds the operator, as it is and separate. ABC's
gates, which take the place of GSA's, are not fused from PyTorch's operations and are timed as they are alone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_gsa.layers import GatedSlotAttention
from flash_gsa.ops import abc_gates, gated_slot_attention
from flash_gsa.ops.pointwise import log_gates, separate, silu_each, silu_norm
from flash_gsa.ops.triton.available import runs_on

from .gate import SMALL_BATCH, TIMES, TIMES_OTHERS, Errors, compare, in_precision
from .implementations import Tensors, implementation, measured_dtype
from .measurements import add_graph, open_device, synchronize
from .rounded import rounded_products
from .shapes import Shape
from .timing import Stopwatch, captured
from .tuning import compiled_in_parallel

ABC = "abc_gates"
SURROUNDINGS = ("silu", "gates", ABC, "norm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "f_proj")
TAU = 8.0
EPS = 1e-5
"""The only ε that FLA's layer computes with, whatever it is told."""
JUDGED_LENGTH = 1000
"""At most so many tokens of a layer are compared; its operator at full size is compared where it is timed alone."""


@dataclass(frozen=True)
class Subject:
    """What is timed: `function` of the tensors `inputs`, which it holds itself, and its `equation` in any precision."""

    inputs: Tensors
    function: Callable[[], Tensors]
    equation: Callable[[Tensors], Tensors]


def measured_of_layers(shapes: list[Shape], names: list[str]) -> Iterator[tuple[Shape, str, str]]:
    """(shape, operation, implementation) of all that is measured for the layers `names`: "auto", "separate", "fla"."""
    first: dict[tuple[str, int], Shape] = {}
    for shape in shapes:
        yield shape, "projections", "auto"
        yield from ((shape, "layer", name) for name in names)
        # What surrounds the operator knows tokens, not sequences: it costs the same for one as for many. ABC's gates,
        # sums over a sequence, are timed at the first of these shapes alone.
        first.setdefault((shape.name, shape.tokens), shape)
    for shape in first.values():
        for operation in SURROUNDINGS:
            ways = ("auto",) if operation == ABC else ("auto", "separate")
            yield from ((shape, operation, name) for name in names if name in ways)


def measure_layer(device: str, name: str, shape: Shape, operation: str, budget: float, repeats: int) -> dict[str, Any]:
    """Values, then time and memory of `operation`: "layer", "projections" or one of SURROUNDINGS.

    Args:
        name: "auto": as the layer does it here; "separate": in separate PyTorch operations; "fla": FLA's layer.
    """
    place = open_device(device)
    if reason := _reason_against(name, shape, place):
        return {"problem": f"not run: {reason}"}
    backend = implementation("auto").backend(shape, place) if operation == "layer" and name != "fla" else None
    record: dict[str, Any] = {"backend": backend, "dtype": str(measured_dtype(place)).removeprefix("torch.")}

    timed = subject(operation, name, shape, place)
    start = time.perf_counter()
    # As in `measure_shape`: what tunes itself does so at the size that is timed.
    with compiled_in_parallel():
        outgoing = outgoing_gradients(timed)
        results_and_gradients(timed, outgoing)
    synchronize(place)
    record["first_call_seconds"] = time.perf_counter() - start
    judged = timed
    if operation not in SURROUNDINGS:
        judged = subject(operation, name, replace(shape, B=SMALL_BATCH, T=min(shape.T, JUDGED_LENGTH)), place)
    errors = errors_of(judged, TIMES_OTHERS if name == "fla" else TIMES)
    record["errors"] = errors.found
    if errors.problem:
        return record | {"problem": f"wrong: {errors.problem}"}

    def forward() -> Tensors:
        with torch.no_grad():
            return timed.function()

    def both() -> Tensors:
        return results_and_gradients(timed, outgoing)

    stopwatch = Stopwatch(place, budget, repeats)
    for label, call, least in zip(("forward", "forward_backward"), (forward, both), least_bytes(timed), strict=True):
        if operation in SURROUNDINGS:
            # Shorter than their launches, which in a layer are hidden behind the projections.
            cost = replace(stopwatch.cost(captured(call, place)), peak_bytes=None)
            record[label] = asdict(cost) | {"least_bytes": least}
        else:
            record[label] = asdict(stopwatch.cost(call))
    if operation not in SURROUNDINGS and place.type == "cuda":
        add_graph(record, {"forward": forward, "forward_backward": both}, stopwatch, place)
    return record


def subject(operation: str, name: str, shape: Shape, device: torch.device) -> Subject:
    """What is timed as `operation` by the implementation `name`; arguments as `measure_layer`."""
    if operation == "layer":
        made = _layer(name, shape, device)
    elif operation == "projections":
        made = _projections(shape, device)
    else:
        made = _surrounding(operation, shape, device)
    return replace(made, function=separate()(made.function)) if name == "separate" else made


def errors_of(judged: Subject, times: float = TIMES) -> Errors:
    """Errors of its results and gradients; allowed is `times` what its equation loses in the inputs' format, in which
    the operator in it makes its products, too."""
    outgoing = outgoing_gradients(judged)
    dtype = next(iter(judged.inputs.values())).dtype

    def by_equation(dtype: torch.dtype) -> Tensors:
        inputs = {name: x.detach().requires_grad_() for name, x in in_precision(judged.inputs, dtype).items()}
        return results_and_gradients(replace(judged, inputs=inputs, function=lambda: judged.equation(inputs)), outgoing)

    exact = by_equation(torch.float64)
    with rounded_products(dtype):
        plain = by_equation(dtype)
    return compare(results_and_gradients(judged, outgoing), exact, plain, times)


def results_and_gradients(given: Subject, outgoing: Tensors) -> Tensors:
    """Its results by their names, then the gradients of its inputs as "d…", given those of its results."""
    results = given.function()
    ends = [outgoing[name].to(y.dtype) for name, y in results.items()]
    gradients = torch.autograd.grad(list(results.values()), list(given.inputs.values()), ends)
    found = {name: y.detach() for name, y in results.items()}
    return found | {f"d{name}": dx for name, dx in zip(given.inputs, gradients, strict=True)}


def outgoing_gradients(given: Subject) -> Tensors:
    """A random gradient of each result."""
    with torch.no_grad():
        results = given.function()
    random = torch.Generator(next(iter(results.values())).device).manual_seed(1)
    return {name: torch.empty_like(y).normal_(generator=random) for name, y in results.items()}


def least_bytes(given: Subject) -> tuple[int, int]:
    """Forward: inputs read, results written. Both: then inputs and gradients of results read, gradients written."""
    with torch.no_grad():
        results = sum(y.nbytes for y in given.function().values())
    inputs = sum(x.nbytes for x in given.inputs.values())
    return inputs + results, 3 * inputs + 2 * results


def _reason_against(name: str, shape: Shape, device: torch.device) -> str | None:
    if name == "separate" and not runs_on(torch.empty(1, device=device)):
        return "nothing is fused here, so it is what auto runs"
    return implementation("fla").reason_against(shape, device) if name == "fla" else None


def _layer(name: str, shape: Shape, device: torch.device) -> Subject:
    layer: nn.Module = _made(shape, device)
    if name == "fla":
        from fla.layers.gsa import GatedSlotAttention as Theirs

        theirs = Theirs(**_options(shape)).to(device, measured_dtype(device))
        theirs.load_state_dict(layer.state_dict())
        layer = theirs
    (x,) = _normal(shape, device, shape.HQ * shape.K)

    def function() -> Tensors:
        y = layer(x)
        return {"y": y[0] if name == "fla" else y}

    def equation(t: Tensors) -> Tensors:
        q, k, v, f = (F.linear(t["x"], t[f"{projection}.weight"]) for projection in PROJECTIONS)
        q, k, v = (F.silu(y).unflatten(-1, (heads, -1)) for y, heads in ((q, shape.HQ), (k, shape.H), (v, shape.H)))
        # FLA's layer keeps gates and write strengths in its 16 bits, and may lose what that loses.
        g = (F.logsigmoid(f) / TAU if name == "fla" else _gates(f)).unflatten(-1, (shape.H, shape.M))
        o = gated_slot_attention(q, k, v, g, 1 - g.exp(), backend="chunk")[0].flatten(-2)
        return {"y": F.linear(_norm(o, t["g_norm.weight"]), t["o_proj.weight"])}

    return Subject({"x": x} | dict(layer.named_parameters()), function, equation)


def _projections(shape: Shape, device: torch.device) -> Subject:
    layer = _made(shape, device)
    x, o = _normal(shape, device, shape.HQ * shape.K, shape.HQ * shape.V)
    weights = {name: w for name, w in layer.named_parameters() if name != "g_norm.weight"}

    def function() -> Tensors:
        return {name[0]: getattr(layer, name)(x) for name in PROJECTIONS} | {"y": layer.o_proj(o)}

    def equation(t: Tensors) -> Tensors:
        products = {name[0]: F.linear(t["x"], t[f"{name}.weight"]) for name in PROJECTIONS}
        return products | {"y": F.linear(t["o"], t["o_proj.weight"])}

    return Subject({"x": x, "o": o} | weights, function, equation)


def _surrounding(operation: str, shape: Shape, device: torch.device) -> Subject:
    queries, keys, values = shape.HQ * shape.K, shape.H * shape.K, shape.H * shape.V
    if operation == "silu":
        q, k, v = _normal(shape, device, queries, keys, values)

        def silu() -> Tensors:
            return dict(zip(("q_out", "k_out", "v_out"), silu_each(q, k, v), strict=True))

        return Subject({"q": q, "k": k, "v": v}, silu, lambda t: {f"{name}_out": F.silu(x) for name, x in t.items()})
    if operation == "gates":
        (f,) = _normal(shape, device, shape.H * shape.M)
        return Subject({"f": f}, lambda: {"g": log_gates(f, TAU)}, lambda t: {"g": _gates(t["f"])})
    if operation == ABC:
        (f,) = _normal(shape, device, shape.H * shape.M)
        logits = f.detach().unflatten(-1, (shape.H, shape.M)).requires_grad_()

        def gates() -> Tensors:
            return dict(zip("gs", abc_gates(logits), strict=True))

        return Subject({"f": logits}, gates, lambda t: _abc_gates(t["f"]))
    (o,) = _normal(shape, device, shape.HQ * shape.V)
    w = _made(shape, device).g_norm.weight
    return Subject({"o": o, "w": w}, lambda: {"y": silu_norm(o, w, EPS)}, lambda t: {"y": _norm(t["o"], t["w"])})


def _gates(f: Tensor) -> Tensor:
    return F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32))) / TAU


def _abc_gates(f: Tensor) -> Tensors:
    """g_t = log σ(z_{t-1} - f_t), s_t = σ(f_t - z_{t-1}), z the logarithm of the sum so far; g = 0, s = 1 at first."""
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    margin = f[:, 1:] - f.logcumsumexp(1)[:, :-1]
    nothing = torch.zeros_like(f[:, :1])
    return {
        "g": torch.cat([nothing, F.logsigmoid(-margin)], 1),
        "s": torch.cat([nothing + 1, torch.sigmoid(margin)], 1),
    }


def _norm(o: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(F.silu(o), w.shape, w, EPS)


def _made(shape: Shape, device: torch.device) -> Any:
    """Our layer; its projections make normal numbers of normal numbers, as the operator gets them where it is alone."""
    layer = GatedSlotAttention(**_options(shape)).to(device, measured_dtype(device))
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(float(weight.dim() == 1), weight.shape[-1] ** -0.5, generator=random)
    return layer


def _options(shape: Shape) -> dict[str, Any]:
    """What both packages' layers take."""
    sizes = {"hidden_size": shape.HQ * shape.K, "num_heads": shape.HQ, "num_kv_heads": shape.H, "num_slots": shape.M}
    return sizes | {"gate_logit_normalizer": TAU, "norm_eps": EPS, "layer_idx": 0}


def _normal(shape: Shape, device: torch.device, *widths: int) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(2)
    sizes = ((shape.B, shape.T, width) for width in widths)
    made = (torch.randn(*size, generator=random, device=device) for size in sizes)
    return [x.to(measured_dtype(device)).requires_grad_() for x in made]
