"""What a training step of the 1.3B model cannot do without, beside what was measured, as it stands in the documents."""

from typing import Any

from benchmarks.markdown import table, told

Record = dict[str, Any]

ROWS, LENGTH = 8, 2048
WANTED = {"times FLA": 1.45, "tokens a second": 73_000, "of the product": 0.77}
"""What a step is wanted to make; the last two are one on a card whose product is faster than any measured here."""
MOVED = {
    "SiLU(gate) ∘ up: 5 + 9 tensors in PyTorch, 3 + 5 here, and the product again": (38.5, 24.75, False),
    "both sums and norms, with what joins the residual stream backward": (26, 17, False),
    "sums of the gradients of the inputs of q, k, v, f and of gate, up": (12, 4, True),
    "the result of SiLU and norm before W_o again": (0, 1, False),
}
"""Of a block, what lies between its products: passes over a [tokens, width] tensor, in PyTorch and here; and whether
those here are within products, which read them and add to them. The MLP's tensors are 2.75 such wide."""
BFLOAT16 = 2
OPTIMIZER_PASSES = 7  # weight, gradient and two moments read; all but the gradient written


def between_products(result: Record) -> str:
    """Passes of a block, their floor at the speed of a copy, and what is saved by making fewer."""
    one = _pass_seconds(result)
    rows = []
    for what, (there, here, within) in MOVED.items():
        times = [f"{1e6 * one * passes:.0f}" for passes in (here, there - here)]
        rows.append([what, f"{there:g}", f"{here:g}{', within products' if within else ''}", *times])
    size = result["size"]
    saved = one * sum(there - here for there, here, _ in MOVED.values())
    bytes_moved = BFLOAT16 * result["tokens"] * size["hidden"]
    return "\n\n".join(
        [
            f"One pass over a [{result['tokens']:,}, {size['hidden']:,}] tensor in bfloat16, "
            f"U = {bytes_moved / 1e6:.0f} MB, takes {1e6 * one:.1f} µs at the {_speed(result) / 1e12:.2f} TB/s of a "
            "copy.",
            table(["", "U moved, PyTorch", "U moved here", "floor, µs", "predicted gain, µs"], rows),
            f"The gains together are {1e3 * saved:.2f} ms a block, {1e3 * saved * size['layers']:.0f} ms a step of "
            f"{size['layers']} blocks.",
            told(result["about"]),
        ]
    )


def step_bounds(result: Record, profiled: Record, operator: Record) -> str:
    """The floors of a step's parts, their sum, and what is wanted.

    Args:
        result: of `flash-gsa bench train`: ours beside FLA.
        profiled: the same with a profile of ours by kinds of kernels.
        operator: of `flash-gsa bench op`: the operator in a CUDA graph.
    """
    size, layers = result["size"], result["size"]["layers"]
    ours, fla = (_step(result, name) for name in ("ours", "fla"))
    profile = next(p for p in profiled["profile"] if p["implementation"] == "ours" and p["variant"] == "plain")
    kinds = {kind["category"]: kind["milliseconds"] for kind in profile["categories"]}
    op = next(r for r in operator["shapes"] if _is_the_layer(r))["in_graph"]["forward_backward"]["seconds"]
    parameters = ours["parameters"]
    floors = {
        "products of blocks": (kinds["products"], "as profiled, one phase at a time"),
        "products of the loss": (kinds["loss, products"], "as profiled"),
        "the operator": (
            1e3 * layers * op,
            f"forward and backward of {layers} layers, each {1e3 * op:.3f} ms in a graph",
        ),
        "AdamW": (
            1e3 * OPTIMIZER_PASSES * BFLOAT16 * parameters / _speed(result),
            f"weights, gradients and moments of {parameters / 1e9:.2f} billion, at the speed of a copy",
        ),
        "what lies between products": (
            1e3 * layers * _pass_seconds(result) * sum(here for _, here, within in MOVED.values() if not within),
            f"{layers} times the floors of the table above, but for what is within products",
        ),
    }
    together = sum(time for time, _ in floors.values())
    without = together - floors["what lies between products"][0]
    rows = [[f"{name}: {how}", f"{time:.0f}"] for name, (time, how) in floors.items()]
    rows += [["**together**", f"{together:.0f}"], ["measured", f"{1e3 * ours['seconds']:.0f}"]]
    wanted = 1e3 * fla["seconds"] / WANTED["times FLA"]
    goal = 1e3 * result["tokens"] / WANTED["tokens a second"]
    rows.append([f"FLA's step, over {WANTED['times FLA']}", f"{wanted:.0f}"])
    rows.append([f"a step at {WANTED['tokens a second']:,} tokens/s", f"{goal:.0f}"])
    alone = _step(profiled, "ours")
    # FLOP/s of steps over those of a large product in the same run: what that product would be as tokens a second.
    product = result["ceilings"]["product"]["flops_per_second"] / ours["flops_per_token"]
    times_fla = WANTED["times FLA"] * result["tokens"] / fla["seconds"]
    return "\n\n".join(
        [
            table([f"ms of a step of {result['tokens']:,} tokens, {size['name']}, bfloat16", ""], rows),
            f"Measured, ours makes {fla['seconds'] / ours['seconds']:.2f} times FLA's tokens a second. Products, "
            f"operator and AdamW alone, with nothing between them, are {without:.0f} ms. In the run with the profile "
            f"all kernels together take {profile['kernel_milliseconds']:.0f} ms when phases run with rests between "
            f"them, and a whole step {1e3 * alone['seconds']:.0f}.",
            f"A large product in the same run is as fast as {product:,.0f} tokens/s would be, if a step were nothing "
            f"else. Ours makes {result['tokens'] / ours['seconds'] / product:.1%} of it; "
            f"{WANTED['of the product']:.0%} would be {WANTED['of the product'] * product:,.0f} tokens/s, "
            f"{WANTED['tokens a second']:,} are {WANTED['tokens a second'] / product:.1%}, and {WANTED['times FLA']} "
            f"times FLA's are {times_fla:,.0f}, {times_fla / product:.1%}.",
            "Steps and the copy: " + told(result["about"]),
            "The profile: " + told(profiled["about"]),
            "The operator: " + told(operator["about"]),
        ]
    )


def step_energy(result: Record) -> str:
    """What a token costs in energy, what of it the model's products cost, and what a power limit leaves for the rest.

    Args:
        result: of `flash-gsa bench train`, with watts.
    """
    ours, product = _step(result, "ours"), result["ceilings"]["product"]
    tokens, limit = ours["rows"] * ours["length"] * ours["steps"], ours["power"]["limit_watts"]
    all_of_it = ours["power"]["joules"] / tokens
    products = ours["flops_per_token"] * product["power"]["watts"] / product["flops_per_second"]
    left = limit / WANTED["tokens a second"]
    wanted = f"at {WANTED['tokens a second']:,} tokens/s, all that {limit:.0f} W give"
    rows = [
        ["a token in training, measured", all_of_it],
        [f"its {ours['flops_per_token'] / 1e9:.2f} GFLOP, at what a product of {product['size']}² takes", products],
        ["the rest: operator, norms, activations, optimiser", all_of_it - products],
        [wanted, left],
        ["of that for the rest", left - products],
    ]
    return "\n\n".join(
        [
            table(["mJ", ""], [[name, f"{1e3 * joules:.2f}"] for name, joules in rows]),
            f"In {ours['power']['power_capped']:.0%} of the looks during the steps the power limit lowered the clock. "
            f"The product runs at {product['power']['sm_mhz']:,.0f} MHz and {product['power']['watts']:.0f} W, a step "
            f"at {ours['power']['sm_mhz']:,.0f} MHz and {ours['power']['watts']:.0f} W; without a limit the card runs "
            f"at {ours['power']['most_sm_mhz']:,.0f} MHz. A step's FLOP/s are {ours['share_of_product']:.1%} of the "
            "product's.",
            told(result["about"]),
        ]
    )


def _speed(result: Record) -> float:
    return result["ceilings"]["copy"]["bytes_per_second"]


def _pass_seconds(result: Record) -> float:
    return BFLOAT16 * result["tokens"] * result["size"]["hidden"] / _speed(result)


def _step(result: Record, name: str) -> Record:
    wanted = {"implementation": name, "variant": "plain", "rows": ROWS, "length": LENGTH}
    return next(r for r in result["steps"] if wanted.items() <= r.items())


def _is_the_layer(record: Record) -> bool:
    return record["implementation"] == "auto" and record["shape"]["label"] == f"1.3B-{ROWS}x{LENGTH}"
