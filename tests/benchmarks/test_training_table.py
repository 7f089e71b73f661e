"""A result of the training benchmark in the documents."""

from benchmarks.training_table import training, training_summary
from tests.benchmarking.made_up_training import MadeUpWorker, made_up_result


def test_speed_memory_and_where_the_time_goes(monkeypatch):
    text = training(made_up_result(monkeypatch, profile=True, command="flash-gsa bench train"))
    heads = "flash-gsa | flash-gsa, compiled | Llama | Llama, compiled | FLA"
    assert f"| tokens/s (times those of FLA) | {heads} |" in text
    assert "| 8×2048 | 65,536 (**1.25×**) | 81,920 (**1.56×**) | 43,691 (**0.83×**) |" in text
    assert f"| peak memory, GiB | {heads} |" in text
    assert "| 1×16384 | 40.0 | 40.0 | 40.0 | – | 40.0 |" in text
    assert "| flash-gsa, 8×2048 | 75.0 | 150.0 | 25.0 | 250.0 | 52.4% | 65.5% |" in text
    assert "| products | 3 | 50.00 | 54.9% |" in text
    assert "The first step of flash-gsa, compiled takes 80 s in a new process with empty caches, 9 s" in text
    assert "Llama, compiled at 1×16384: failed: out of memory." in text
    assert text.endswith("· 0123456789ab")


def test_without_fla_nothing_is_compared(monkeypatch):
    text = training_summary(made_up_result(monkeypatch, MadeUpWorker(fla_wrong=True)))
    assert "times those" not in text
    assert "| 8×2048 | 65,536 | 81,920 | 43,691 | 65,536 | wrong |" in text


def test_watts_and_clocks_where_somebody_has_them(monkeypatch):
    result = made_up_result(monkeypatch)
    assert "watts" not in training(result)
    power = {"watts": 699.6, "limit_watts": 700.0, "power_capped": 0.96, "sm_mhz": 1410, "most_sm_mhz": 1980}
    first = result["steps"][0]
    assert first["length"] == 2048
    first |= {"steps": 10, "power": power | {"joules": 16.384 * 100}}
    result["ceilings"]["product"]["power"] = power
    text = training(result)
    assert "| watts | limited by power, % of the time | MHz | mJ a token |" in text
    assert "| 52.4% | 65.5% | 700 of 700 | 96 | 1,410 of 1,980 | 10.0 |" in text
    assert "| 65.5% | – | – | – | – |" in text.replace("81.9%", "65.5%")
    assert "TFLOP/s, 1,410 MHz and 700 of 700 W, limited by power in 96% of the time." in text
