"""What bounds a step: floors from result files, their sum, and what is wanted of a step."""

import pytest

from benchmarks.step_table import between_products, step_bounds, step_energy
from tests.benchmarks.test_bytes_table import ABOUT, rows

LAYER = {"label": "1.3B-8x2048"}


def step(name, seconds, length=2048):
    where = {"variant": "plain", "rows": 16_384 // length, "length": length, "parameters": 10**9}
    where |= {"flops_per_token": 8e9}
    return {"implementation": name, "seconds": seconds} | where


TRAINED = {
    "about": ABOUT | {"command": "bench train"},
    "size": {"name": "1.3B", "hidden": 1000, "layers": 10},
    "tokens": 16_384,
    "ceilings": {"copy": {"bytes_per_second": 1e12}, "product": {"flops_per_second": 8e14}},
    "steps": [step("ours", 9.0, 4096), step("fla", 0.29), step("ours", 0.2)],
}
PROFILED = {
    "about": ABOUT | {"command": "bench train with a profile"},
    "profile": [
        {"implementation": "ours", "variant": "compiled", "kernel_milliseconds": 9.0, "categories": []},
        {
            "implementation": "ours",
            "variant": "plain",
            "kernel_milliseconds": 171.0,
            "categories": [
                {"category": "products", "milliseconds": 100.0},
                {"category": "loss, products", "milliseconds": 7.0},
            ],
        },
    ],
    "steps": [step("ours", 0.205)],
}
OPERATOR = {
    "about": ABOUT | {"command": "bench op"},
    "shapes": [
        {"implementation": "fla", "shape": LAYER, "in_graph": {"forward_backward": {"seconds": 9.0}}},
        {"implementation": "auto", "shape": LAYER, "in_graph": {"forward_backward": {"seconds": 0.002}}},
    ],
}

POWER = {"watts": 690.0, "limit_watts": 700.0, "power_capped": 0.9, "sm_mhz": 1410, "most_sm_mhz": 1980}


def test_passes_at_the_speed_of_a_copy():
    text = between_products(TRAINED)
    assert "U = 33 MB, takes 32.8 µs at the 1.00 TB/s" in text
    found = rows(text)
    assert found["both sums and norms, with what joins the residual stream backward"] == ["26", "17", "557", "295"]
    assert found["the result of SiLU and norm before W_o again"] == ["0", "1", "33", "-33"]
    saved = 32.768e-3 * (13.75 + 9 + 8 - 1)
    assert f"{saved:.2f} ms a block, {10 * saved:.0f} ms a step of 10 blocks" in text


def test_the_floors_of_a_step_add_up():
    text = step_bounds(TRAINED, PROFILED, OPERATOR)
    found = {name.split(":")[0]: int(cells[0]) for name, cells in rows(text).items() if cells[0].isdigit()}
    assert found["products of blocks"] == 100
    assert found["products of the loss"] == 7
    assert found["the operator"] == 20
    assert found["AdamW"] == 14
    assert found["what lies between products"] == pytest.approx(10 * 32.768e-3 * 42.75, abs=0.5)
    assert found["**together**"] == pytest.approx(141 + 10 * 32.768e-3 * 42.75, abs=0.5)
    assert found["measured"] == 200
    assert found["FLA's step, over 1.45"] == 200
    assert found["a step at 73,000 tokens/s"] == 224
    assert "1.45 times FLA's tokens a second" in text
    assert "alone, with nothing between them, are 141 ms" in text
    assert "together take 171 ms" in text
    # 8e14 FLOP/s are 100,000 tokens/s; a step of 0.2 s makes 81,920, FLA's of 0.29 s 56,497.
    assert "Ours makes 81.9% of it; 77% would be 77,000 tokens/s, 73,000 are 73.0%" in text
    assert "1.45 times FLA's are 81,920, 81.9%." in text
    assert "step 205." in text
    for command in ("`bench train`", "`bench train with a profile`", "`bench op`"):
        assert command in text


def test_what_a_power_limit_leaves():
    ours = step("ours", 0.2) | {"power": POWER | {"joules": 1638.4}, "steps": 10}
    ours |= {"share_of_product": 0.75}
    product = {"size": 8192, "flops_per_second": 5e14, "power": POWER | {"watts": 500.0, "sm_mhz": 1500}}
    ceilings = TRAINED["ceilings"] | {"product": product}
    text = step_energy(TRAINED | {"steps": [ours], "ceilings": ceilings})
    found = {name: float(cells[0]) for name, cells in rows(text).items() if cells[0][:1].isdigit()}
    # Of 10 mJ a token a product's 1 pJ a FLOP are 8; 700 W over 73,000 tokens are 9.59.
    assert list(found.values()) == [10.0, 8.0, 2.0, 9.59, 1.59]
    assert "at 1,500 MHz and 500 W, a step at 1,410 MHz and 690 W; without a limit the card runs at 1,980 MHz" in text
    assert "75.0% of the product's" in text
    assert "In 90% of the looks" in text
