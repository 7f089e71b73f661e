"""A process that measures for another: what hangs, dies or leaves the device unusable there costs one measurement."""

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from flash_gsa.errors import UsageError


class Failed(Exception):
    """A call in the worker did not come back with a result; the message is the reason, in one line."""


class TookTooLong(Failed):
    """A call in the worker was ended because it took longer than it was given."""


class Worker:
    """Calls functions in a child process, which is started when needed and again after it was lost.

    Use it as a context manager: at its end the child is gone.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *rest: object) -> None:
        self.stop()

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """`function(*arguments)` in the child; both must be picklable.

        Args:
            limit: seconds after which the child is ended.

        Raises:
            TookTooLong: the function took longer than `limit`.
            Failed: it raised, or ended the process.
            UsageError: the function raised one.
        """
        connection = self._start()
        try:
            connection.send((function, arguments))
            if not connection.poll(limit):
                self.stop()
                raise TookTooLong(f"took longer than {limit:.0f} s")
            kind, value = connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            raise Failed(f"ended its process (exit status {code})") from None
        if kind == "usage":
            raise UsageError(value)
        if kind == "failed":
            raise Failed(value)
        return value

    def stop(self) -> None:
        """End the child now."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        if self._connection is None or not self._process.is_alive():
            self.stop()
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection


def reason(error: BaseException) -> str:
    """An error in one line."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _serve(connection: Connection) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", function(*arguments))
        except UsageError as mistake:
            answer = ("usage", str(mistake))
        except Exception as error:
            answer = ("failed", reason(error))
        connection.send(answer)
        if not _clean():
            return


def _clean() -> bool:
    """Free what the call left behind; False if the device no longer answers."""
    if "torch" not in sys.modules:
        return True
    from .measurements import release

    try:
        release()
    except Exception:
        return False
    return True
