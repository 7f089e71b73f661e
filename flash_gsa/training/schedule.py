"""How many steps a run takes."""

from math import ceil

from flash_gsa.errors import UsageError
from flash_gsa.training.recipe import BatchSection, ScheduleSection

_UNTIMED_STEPS = 3  # the first steps allocate memory and warm caches: they say nothing about the rest
_TIMED_STEPS = 5
_TIMED_FRACTION = 0.04
_DRIFT = 0.02


class RunLength:
    """The number of steps of a run, known from the start or found from a time budget.

    With `steps` or `tokens` it never changes. With `minutes` it is unknown at first; after 4 % of the time
    it is set to what the speed so far allows, and set again whenever that estimate moves by more than 2 %, so
    that the learning rate ends its cosine when the time ends. `total_steps` goes into the checkpoint, and a
    resumed run keeps it, with the time already spent.
    """

    def __init__(self, schedule: ScheduleSection, batch: BatchSection) -> None:
        """Raises UsageError if warm-up would take the whole run."""
        self.total_steps: int | None = schedule.steps
        if schedule.tokens is not None:
            self.total_steps = ceil(schedule.tokens / batch.tokens)
        self.budget = None if schedule.minutes is None else 60.0 * schedule.minutes
        self.warmup_steps = schedule.warmup_steps or ceil((schedule.warmup_tokens or 0) / batch.tokens)
        if schedule.warmup_fraction is not None and self.total_steps is not None:
            self.warmup_steps = round(schedule.warmup_fraction * self.total_steps)
        if self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise UsageError(
                f"schedule.warmup_steps={self.warmup_steps} leaves nothing of a run of {self.total_steps} "
                "steps; warm up for less, or train for longer"
            )
        self._clock: tuple[int, float] | None = None
        self._first_step: int | None = None

    def update(self, step: int, seconds: float) -> None:
        """Tells that `step` steps have taken `seconds` in all; corrects `total_steps` of a timed run."""
        if self.budget is None:
            return
        if self._first_step is None:
            self._first_step = step
        if seconds >= self.budget:
            self.total_steps = step
            return
        if self._clock is None:
            if step - self._first_step >= _UNTIMED_STEPS:
                self._clock = (step, seconds)
            return
        first, start = self._clock
        if step - first < _TIMED_STEPS or seconds - start < _TIMED_FRACTION * self.budget:
            return
        expected = step + max(1, round((self.budget - seconds) * (step - first) / (seconds - start)))
        if self.total_steps is None or abs(expected - self.total_steps) > _DRIFT * self.total_steps:
            self.total_steps = expected

    def is_over(self, step: int) -> bool:
        """Whether `step` steps are all of the run."""
        return self.total_steps is not None and step >= self.total_steps

    def fraction(self, step: int, seconds: float) -> float:
        """The part of the run that is done, 0 to 1."""
        if self.total_steps is not None:
            return min(1.0, step / self.total_steps)
        assert self.budget is not None
        return min(1.0, seconds / self.budget)

    def seconds_left(self, step: int, seconds: float, seconds_a_step: float) -> float:
        """Seconds until the end, at `seconds_a_step`; of a timed run, what is left of the time."""
        if self.budget is not None:
            return max(0.0, self.budget - seconds)
        assert self.total_steps is not None
        return (self.total_steps - step) * seconds_a_step
