"""Loss spikes: a loss far above those before it. Seen and told; training goes on.

    limit_t = m + max(5 s, 0.1)        m, s: mean and standard deviation of the last 100 losses
    spike at t:  loss_t > limit_t and loss_{t-1} ≤ limit_{t-1}

A loss above its limit counts as the limit among the last 100. So a single spike hardly widens them, and a loss that
stays high becomes what is expected. A spike of many steps is told once, at its first.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import Any

WINDOW = 100
"""Losses that are looked back on."""

LEAST = 20
"""Losses before the first that can be a spike: a standard deviation of fewer says little."""

DEVIATIONS = 5.0
"""Of the losses of a step: so many standard deviations above their mean is beyond chance."""

SMALLEST_RISE = 0.1
"""In nats: a smaller rise is not worth a line, however even the loss was before."""


@dataclass(frozen=True)
class Spike:
    """A loss, the mean that was expected and the limit that it is above; nats a token."""

    loss: float
    expected: float
    limit: float


class SpikeDetector:
    """Shown the loss of each step in turn, says where a spike begins. Nothing that trains depends on it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._above = False

    def see(self, loss: float) -> Spike | None:
        """Takes the loss of the next step, a finite number; returns a spike if one begins there."""
        if len(self._losses) < LEAST:
            self._losses.append(loss)
            return None
        expected = fmean(self._losses)
        deviation = math.sqrt(fmean((x - expected) ** 2 for x in self._losses))
        limit = expected + max(DEVIATIONS * deviation, SMALLEST_RISE)
        begins = loss > limit and not self._above
        self._above = loss > limit
        self._losses.append(min(loss, limit))
        return Spike(loss, expected, limit) if begins else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to keep, ready for JSON."""
        return {"losses": list(self._losses), "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._above = state["above"]
