"""What goes wrong in the worker costs one call, not the run."""

import time

import pytest

from flash_gsa.benchmarking.worker import Failed, Worker
from flash_gsa.errors import UsageError

from . import calls

LIMIT = 60.0


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def test_results_come_back_from_one_process(worker):
    assert worker.call(calls.add, 2, 3, limit=LIMIT) == 5
    first = worker.call(calls.process, limit=LIMIT)
    assert worker.call(calls.process, limit=LIMIT) == first


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (calls.fail, "ValueError: the first line"),
        (calls.fail_without_words, "KeyError"),
        (calls.run_out_of_memory, "out of memory"),
    ],
)
def test_an_error_is_told_in_one_line_and_the_process_goes_on(worker, function, reason):
    before = worker.call(calls.process, limit=LIMIT)
    with pytest.raises(Failed) as failure:
        worker.call(function, limit=LIMIT)
    assert str(failure.value) == reason
    assert worker.call(calls.process, limit=LIMIT) == before


def test_mistakes_of_the_user_stay_what_they_are(worker):
    with pytest.raises(UsageError, match="there is no such thing"):
        worker.call(calls.refuse, limit=LIMIT)


def test_a_process_that_dies_is_replaced(worker):
    with pytest.raises(Failed, match=r"ended its process \(exit status 7\)"):
        worker.call(calls.die, limit=LIMIT)
    assert worker.call(calls.add, 1, 1, limit=LIMIT) == 2


def test_what_hangs_is_ended(worker):
    worker.call(calls.process, limit=LIMIT)
    start = time.monotonic()
    with pytest.raises(Failed, match="took longer than 0 s"):
        worker.call(calls.hang, limit=0.2)
    assert time.monotonic() - start < 10
    assert worker.call(calls.add, 1, 1, limit=LIMIT) == 2
