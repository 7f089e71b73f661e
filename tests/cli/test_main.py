"""The shell around the commands: help at once, mistakes without traceback, completion."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from flash_gsa.cli import app

COMMANDS = ("demo", "train", "recipes", "report", "eval", "generate", "export", "inspect", "doctor")


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from flash_gsa.cli import main; main()", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom flash_gsa.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)))\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, heavy, seconds = done.stdout.splitlines()
    assert heavy == "[]"
    # Processor time, which other work on the machine does not lengthen.
    assert float(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run, command):
    assert command in run("--help").out
    answer = run(command, "--help")
    assert answer.status == 0
    assert re.search(rf"Examples?:\s+.*flash-gsa {command}", answer.out, re.S)
    assert "[bold]" not in answer.out


def test_no_placeholder_repeats_its_option():
    """typer 0.27 takes such a placeholder for the option's name: `--minutes MINUTES` became `--MINUTES`."""
    found, left = [], [(["flash-gsa"], typer.main.get_command(app))]
    while left:
        path, command = left.pop()
        left += [([*path, name], below) for name, below in getattr(command, "commands", {}).items()]
        found += [(path, option) for option in command.params if option.param_type_name == "option"]
    assert len(found) > 50
    for path, option in found:
        assert option.metavar != option.name.upper(), (path, option.name)
        assert all(name == name.lower() for name in option.opts), (path, option.opts)


def test_mistakes_are_told_without_traceback(run):
    answer = run("train", "dmeo")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("flash-gsa: ")
    assert "Did you mean 'demo'?" in answer.err
    assert "Traceback" not in answer.err


def test_unknown_commands_and_options_are_refused(run):
    answer = run("trian")
    assert answer.status == 2
    assert "train" in answer.err
    assert run("doctor", "--jsn").status == 2


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_interrupting_ends_cleanly_with_130(tmp_path):
    code = (
        "import sys\nfrom flash_gsa.cli import main, doctor, machine\n"
        "def slow():\n print('ready', flush=True)\n import time; time.sleep(60)\n"
        "machine.diagnose = slow\nmain(['doctor'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flash-gsa tr", "train"),
        ("flash-gsa train ", "demo"),
        ("flash-gsa train demo schedule.mi", "schedule.minutes="),
        ("flash-gsa train demo optimizer.weight", "optimizer.weight_decay="),
        ("flash-gsa demo model.num_s", "model.num_slots="),
        ("flash-gsa recipes pro", "prose_15m"),
    ],
)
def test_shell_completion(words, expected):
    parts = words.split(" ")
    process = start(_FLASH_GSA_COMPLETE="complete_bash", COMP_WORDS="\n".join(parts), COMP_CWORD=str(len(parts) - 1))
    out, err = process.communicate(timeout=60)
    assert expected in out.split(), err


def test_recipes_are_listed_and_printed(run):
    assert {"demo", "mqar_tiny", "prose_15m"} <= {line.split()[0] for line in run("recipes").out.splitlines() if line}
    recipe = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    assert run("recipes", "demo").out == recipe.read_text("utf-8")
    answer = run("recipes", "prose_15")
    assert answer.status == 2
    assert "Did you mean 'prose_15m'?" in answer.err
