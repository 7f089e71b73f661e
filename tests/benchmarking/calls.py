"""What a worker is asked to do in tests; imports nothing heavy, as the worker imports it."""

import os
import time

from flash_gsa.errors import UsageError


def add(a, b):
    return a + b


def process():
    return os.getpid()


def fail():
    raise ValueError("the first line\nthe second line")


def fail_without_words():
    raise KeyError


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


def run_out_of_memory():
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. …")


def refuse():
    raise UsageError("there is no such thing")


def die():
    os._exit(7)


def hang():
    time.sleep(60)
