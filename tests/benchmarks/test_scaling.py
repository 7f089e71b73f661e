"""One process and several compute as much each; the table says how many times one they are together."""

import pytest

from benchmarks.render import scaling
from benchmarks.scaling import CONFIGURATIONS, configurations, settings
from flash_gsa.training.recipe_file import load_recipe


@pytest.mark.parametrize(("name", "several", "micro_batches", "engine", "row"), configurations(4))
def test_every_process_computes_as_many_tokens(name, several, micro_batches, engine, row):
    processes = 1 if several == 1 else 4
    overrides = settings(engine, processes, 4, micro_batches, row, rows=8, length=2048)
    recipe = load_recipe("gsa_1.3b", overrides, data_named=False)
    rows, count = recipe.batch.micro_batches(processes, recipe.engine.context)
    assert count == micro_batches
    all_at_once = rows * recipe.batch.length / recipe.engine.context
    assert all_at_once == 8 * 2048 * (1 if row is None else row * 4 / processes)
    assert (recipe.engine.context > 1) == ("context" in name)


def test_each_is_compared_with_one_process_that_computes_as_often_a_step():
    about = {"command": "measure", "date": "2026-11-27", "commit": "new", "device": "a GPU", "versions": {"torch": "2"}}
    run = {"tokens_a_step": 16, "mfu": None, "peak_bytes": 2**30, "data_share": 0.0}
    runs = [
        {"name": name, "processes": processes, "micro_batches": count, "tokens_per_second": speed} | run
        for name, processes, count, speed in (
            ("one", 1, 1, 10),
            ("two", 2, 1, 19),
            ("one", 1, 4, 16),
            ("two", 2, 4, 28),
        )
    ]
    failed = {"name": "no", "processes": 1, "micro_batches": 1, "row": 2, "problem": "took too long"}
    text = scaling({"about": about, "recipe": "gsa_1.3b", "runs": [*runs, failed]})
    assert "| two | 2 | 1 | 19 | 1.90 |  | 1.0 | 0.00% |" in text
    assert "| two | 2 | 4 | 28 | 1.75 |  | 1.0 | 0.00% |" in text
    assert "| no | 1 | 1 | took too long |" in text
    assert "first step" not in text
    cut = run | {"name": "cut", "processes": 2, "micro_batches": 1, "tokens_per_second": 18, "row": 2}
    cut |= {"first_loss": 10.5, "first_gradient_norm": 1.25}
    again = scaling({"about": about, "recipe": "gsa_1.3b", "runs": [*runs, cut]})
    assert "Loss and gradient norm of the first step. cut: 10.5000 and 1.2500." in again
    assert text.count("| not run |") == len(CONFIGURATIONS)  # none of those above is one of them
    of_four = scaling({"about": about, "recipe": "gsa_1.3b", "asked": 4, "runs": runs})
    assert "| FSDP2 | 4 | 4 | not run |" in of_four
    assert "HSDP" in of_four
    assert "HSDP" not in text
