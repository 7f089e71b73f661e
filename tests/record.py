"""A pytest plugin: `--record FILE` keeps what a test run was and how it ended, as a result file (`make test-gpu`).

The file says of the run: device, versions, commit, date and command; how many tests passed, failed and were skipped, in
all and by file; every failure with its last words; why tests were skipped; how long it took, and which were slowest;
and of what tests say was compared with float64 (a property "errors", see tests/ops/conftest.py) how near it was.
Beside it FILE.log names every test with its outcome and seconds.
"""

import json
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("record", "a result file of the run")
    group.addoption("--record", type=Path, metavar="FILE", help="write counts, failures, device and versions to FILE")
    group.addoption(
        "--record-commit", metavar="COMMIT", help="the commit of the code, where it lies outside a checkout"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist the workers' reports all come to the process that started them.
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config))


class Recorder:
    """Collects the reports of a run and writes the file at its end."""

    def __init__(self, config: pytest.Config):
        from flash_gsa.benchmarking.about import about  # here, because most runs keep no record

        self.config = config
        self.start = time.monotonic()
        command = " ".join(["python -m pytest", *map(str, config.invocation_params.args)])
        self.about = about(command, known_commit=config.getoption("record_commit"))
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.xfailed: set[str] = set()
        self.errors: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "teardown":  # by then a test has said all
            # What is expected to be too far from float64 says nothing of the rest.
            for name, value in () if report.nodeid in self.xfailed else report.user_properties:
                for kind, what, of_plain, of_allowed in value if name == "errors" else ():
                    self.errors[kind, what].append((of_plain, of_allowed))
        if report.failed:
            self._failed(report)
        elif report.skipped:
            self.outcomes.setdefault(report.nodeid, "skipped")
            self.skipped[_reason(report)] += 1
            if hasattr(report, "wasxfail"):
                self.xfailed.add(report.nodeid)
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        slowest = self.seconds.most_common(SLOWEST)
        result = {
            "about": self.about,
            "exit_status": int(exitstatus),
            "seconds": round(time.monotonic() - self.start, 1),
            "processes": getattr(self.config.option, "numprocesses", None) or 1,
            "counts": dict(Counter(self.outcomes.values())),
            "by_file": self._by_file(),
            "failed": self.failures,
            "skipped": dict(self.skipped.most_common()),
            "errors": self._errors(),
            "slowest": [{"test": test, "seconds": round(seconds, 2)} for test, seconds in slowest],
        }
        path: Path = self.config.getoption("record")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        log = "".join(f"{how:7} {self.seconds[test]:7.2f} s  {test}\n" for test, how in sorted(self.outcomes.items()))
        path.with_suffix(".log").write_text(log, encoding="utf-8")

    def _errors(self) -> list[dict[str, Any]]:
        """By format of the inputs and result: how often it was compared, its error in units of plain PyTorch's, how
        often that was above 2, and the largest share of what is allowed."""
        found = []
        for (kind, what), pairs in sorted(self.errors.items()):
            of_plain = [of_plain for of_plain, _ in pairs]
            found.append(
                {
                    "format": kind,
                    "result": what,
                    "compared": len(pairs),
                    "median": statistics.median(of_plain),
                    "largest": max(of_plain),
                    "above_2": sum(x > 2 for x in of_plain),
                    "largest_of_allowed": max(of_allowed for _, of_allowed in pairs),
                }
            )
        return found

    def _failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.outcomes[report.nodeid] = "failed"
        lines = report.longreprtext.strip().splitlines() or ["no message"]
        said = [line[1:].strip() for line in lines if line.startswith("E ")]
        self.failures[report.nodeid] = (said or lines[-1:])[0][:500]

    def _by_file(self) -> dict[str, Any]:
        files: dict[str, Counter[str]] = defaultdict(Counter)
        for test, outcome in self.outcomes.items():
            files[test.partition("::")[0]][outcome] += 1
        return {name: dict(counts) for name, counts in sorted(files.items())}


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return getattr(report, "wasxfail", "") or "expected to fail"
