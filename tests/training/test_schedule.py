"""How many steps a run takes; of timed runs with a clock of our own."""

import pytest

from flash_gsa.errors import UsageError
from flash_gsa.training.recipe import BatchSection, ScheduleSection
from flash_gsa.training.schedule import RunLength

BATCH = BatchSection(rows=4, length=10)


def timed(minutes, seconds_at):
    """Runs until it is over; `seconds_at(step)` is the time after so many steps. Returns (steps, totals seen)."""
    length = RunLength(ScheduleSection(minutes=minutes, warmup_steps=5), BATCH)
    step, totals = 0, []
    while not length.is_over(step):
        step += 1
        length.update(step, seconds_at(step))
        totals.append(length.total_steps)
    return step, totals


def test_steps_and_tokens():
    assert RunLength(ScheduleSection(steps=7, warmup_steps=2), BATCH).total_steps == 7
    length = RunLength(ScheduleSection(tokens=401, warmup_fraction=0.2), BATCH)
    assert (length.total_steps, length.warmup_steps) == (11, 2)
    assert RunLength(ScheduleSection(tokens=401, warmup_tokens=41), BATCH).warmup_steps == 2
    assert not length.is_over(10)
    assert length.is_over(11)
    length.update(5, 1e9)
    assert length.total_steps == 11
    assert length.fraction(11, 0.0) == 1.0


def test_warmup_may_not_be_the_whole_run():
    with pytest.raises(UsageError, match=r"warmup_steps=10 leaves nothing of a run of 10 steps"):
        RunLength(ScheduleSection(tokens=400, warmup_steps=10), BATCH)


def test_steady_speed_is_planned_once():
    step, totals = timed(1, lambda step: 0.5 + 0.1 * step)  # half a second to get going, then ten steps a second
    assert step == pytest.approx(595, rel=0.02)
    assert totals[2] is None
    assert len({t for t in totals if t is not None}) == 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_of_speed_is_followed(factor):
    def seconds(step):
        return 0.1 * step if step <= 200 else 20 + 0.1 * factor * (step - 200)

    step, totals = timed(1, seconds)
    assert seconds(step) == pytest.approx(60, rel=0.025)
    assert 2 < len(set(totals)) < 60


def test_never_longer_than_the_budget_and_a_step():
    step, _ = timed(0.1, lambda step: 10.0 * step)  # a single step takes longer than the whole budget
    assert step == 1
    length = RunLength(ScheduleSection(minutes=1, warmup_steps=0), BATCH)
    assert (length.fraction(3, 15.0), length.seconds_left(3, 15.0, 5.0)) == (0.25, 45.0)


def test_a_resumed_run_keeps_its_plan():
    length = RunLength(ScheduleSection(minutes=1, warmup_steps=0), BATCH)
    length.total_steps = 600
    for step in range(301, 340):
        length.update(step, 30 + 0.1 * (step - 300))
    assert length.total_steps == 600
