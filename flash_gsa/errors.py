"""How flash-gsa refuses bad input: one exception type, and the nearest right name for a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """A mistake in what the user gave: says what was wrong, what was expected, what to do.

    The command line prints its message without a traceback and exits with `status`.

    Attributes:
        everywhere: every process of a run raises it, in the same words; so the first alone prints it.
        status: 2; 1 where nothing that was given is wrong: a disk that is full, a loss that is not finite.
    """

    everywhere = False
    status = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `known`, or `""` if none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
