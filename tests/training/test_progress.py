"""The display: a bar in a terminal, plain lines elsewhere, nothing from other processes than the first."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from flash_gsa.training import events
from flash_gsa.training.progress import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell(display):
    record = {"step": 7, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412}
    with display:
        display(events.Preparing("preparing the data"))
        data = ("30 documents of 1,200 tokens to train on",)
        display(events.Started("runs/x", 4, 2_500_000, 4096, "cpu (2 threads), fp32", data))
        for step in range(5, 8):
            display(events.Stepped(record | {"step": step}, 100, 0.07, 83.0))
        display(events.Spiked({"step": 7, "loss": 9.0, "expected": 2.5, "limit": 2.75, "batch": 6}))
        display(events.Evaluated({"step": 7, "loss": 2.4, "bits_per_byte": 1.7}))
        display(events.Evaluated({"step": 7, "accuracy": 0.91}))
        display(events.Saved("runs/x/checkpoints/step-00000007"))
        display(events.Ended(7, "SIGTERM"))


def show(output):
    console = Console(file=output, force_terminal=True, width=100, color_system=None)
    tell(ProgressDisplay(console))
    return output.getvalue()


def plain(text):
    lines = text.splitlines()
    assert lines[0] == "preparing the data"
    assert "2.50 M parameters, 4,096 tokens a step" in lines[1]
    assert "going on after step 4" in lines[1]
    assert lines[2] == "30 documents of 1,200 tokens to train on"
    assert lines[-5] == "step      7  loss spike: 9.000, 2.500 expected, batch 6; training goes on"
    assert "held out: loss 2.400, 1.700 bits per byte" in lines[-4]
    assert "held out: accuracy 0.910" in lines[-3]
    assert "Stopped by SIGTERM after step 7. The same command goes on" in lines[-1]
    assert sum("tokens/s" in line for line in lines) <= 1  # at most one in ten seconds
    assert not any(ord(c) < 32 for line in lines for c in line)


def test_plain_lines_where_there_is_no_terminal():
    plain(show(io.StringIO()))  # although the console is told that it is one


def test_a_bar_in_a_terminal():
    text = show(Terminal())
    for part in ("step 7/100", "loss 2.500", "12,346 tokens/s  41% of peak", "1:23 left", "loss spike: 9.000"):
        assert part in text


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert show(Terminal()) == ""
    monkeypatch.setenv("RANK", "0")
    assert "loss spike" in show(Terminal())


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pipe_and_a_pseudo_terminal(terminal):
    code = "from tests.training.test_progress import tell, ProgressDisplay\ntell(ProgressDisplay())"
    # What CI sets, and what would put control characters into a log.
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("RANK", None)
    ours, theirs = pty.openpty() if terminal else os.pipe()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        while piece := os.read(ours, 4096):
            output += piece
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(ours)
    assert child.wait() == 0
    if terminal:
        assert b"\x1b[?25l" in output
        assert output.rstrip().endswith(b"goes on from there.")
        assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h")  # the cursor is shown again
    else:
        plain(output.decode())
