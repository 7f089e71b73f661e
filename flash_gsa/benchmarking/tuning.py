"""Kernels that tune themselves at their first call compile dozens of candidates, one after the other: minutes.

Here all candidates of a kernel are compiled at once, one a processor core, before the first of them is timed. Which one
is chosen does not change; only the wait is shorter. A cold start is measured without this.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

try:
    import triton
    from triton.runtime.autotuner import Autotuner
except ImportError:  # torch's CPU build brings no Triton
    triton = None


@contextmanager
def compiled_in_parallel(workers: int | None = None) -> Iterator[None]:
    """Within it, `triton.autotune` compiles a kernel's candidates in `workers` threads (default: one a core)."""
    if triton is None or not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
        candidates = prune(self, kwargs, *rest)
        # What does not compile is found out and left aside by the tuner itself.
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for candidate in candidates:
                self.fn.run(*self.nargs.values(), **kwargs | candidate.all_kwargs() | {"warmup": True})
        return candidates

    Autotuner.prune_configs = prune_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = prune
