import json

import pytest

from flash_gsa.cli import machine


def test_tables_and_json_agree(run):
    answer = run("doctor", "--json")
    report = json.loads(answer.out)
    assert answer.status == 0, report["problems"]
    assert report["usable"]
    cpu = report["devices"][0]
    assert cpu["self_test"] == "passed"
    assert [b["verdict"] for b in cpu["backends"]].count("chosen") == 1
    versions = {p["name"]: p["installed"] for p in report["packages"]}
    text = run("doctor").out
    assert versions["torch"] in text
    assert "This machine can run flash-gsa" in text


def test_a_missing_and_an_old_package_are_problems(run, monkeypatch):
    really = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: {"rich": None, "typer": "0.1"}.get(name, really(name)))
    answer = run("doctor", "--json")
    problems = json.loads(answer.out)["problems"]
    assert answer.status == 1
    assert any(p.startswith("rich: missing: pip install 'rich>=") for p in problems)
    assert any(p.startswith("typer: is 0.1; flash-gsa needs >=") for p in problems)
    assert len(problems) == 2


@pytest.mark.parametrize("failure", [RuntimeError("no kernel image"), None])
def test_an_operator_that_fails_or_is_wrong_is_a_problem(monkeypatch, failure):
    from flash_gsa.ops import api

    really = api.gated_slot_attention

    def broken(q, *rest, backend="auto", **options):
        if backend == "auto":
            if failure:
                raise failure
            q = 1.1 * q
        return really(q, *rest, backend=backend, **options)

    monkeypatch.setattr(api, "gated_slot_attention", broken)
    report = machine.diagnose()
    assert not report["usable"]
    assert ("no kernel image" if failure else "differs from the reference") in report["problems"][0]
