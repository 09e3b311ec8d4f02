"""The mutants of bench/mutants.py are other programs, and its way to run tests tells killed from surviving ones."""

import ast
import bisect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import ROOT, Mutant, mutants

BOUND = "tasks/core/noninferiority.py"
SCRIPT = ROOT / "tests/bench/mutants.py"
# Of the bound: the line that is changed, and how. Tests that take milliseconds find them.
FIXED = (
    (
        "if challenger.shape != champion.shape:",
        "challenger.shape != champion.shape -> challenger.shape == champion.shape",
    ),
    ("if losses == images:  # or there are none", "losses == images -> losses != images"),
    ("wrong = images - right", "images - right -> images + right"),
)
QUICK = "counts or different_images or no_images or proportion"


def by_change(source: str) -> dict[tuple[str, str], Mutant]:
    return {(one.text, one.change): one for one in mutants(source)}


@pytest.mark.parametrize("module", ["tasks/gate.py", BOUND, "flows/registry/chain.py"])
def test_every_mutant_is_another_program(module: str) -> None:
    source = (ROOT / module).read_text()
    original, found = ast.parse(source).body, mutants(source)
    assert len(found) > 100
    assert [one.number for one in found] == list(range(len(found)))
    for one in found:
        assert source.splitlines()[one.line - 1].strip() == one.text
        changed = ast.parse(one.source).body
        place = bisect.bisect_left([top.end_lineno or 0 for top in original], one.line)
        assert ast.dump(changed[place]) != ast.dump(original[place]), one.change
        assert len(changed) == len(original)


def test_each_place_is_changed_once_in_each_way() -> None:
    source = '''@cached(size=9)
def share(part: int, whole: int) -> float:
    """A share."""
    if not 0 < part <= whole or whole is None:  # nothing
        raise ValueError(part)
    return part / whole if part == 0 else 0
'''
    assert [(one.line, one.change) for one in mutants(source)] == [
        (1, "9 -> 10"),
        (1, "9 -> 8"),
        (4, "not 0 < part <= whole or whole is None -> not 0 < part <= whole and whole is None"),
        (4, "not 0 < part <= whole -> 0 < part <= whole"),
        (4, "0 < part <= whole -> 0 <= part <= whole"),
        (4, "0 < part <= whole -> 0 >= part <= whole"),
        (4, "0 < part <= whole -> 0 < part < whole"),
        (4, "0 < part <= whole -> 0 < part > whole"),
        (4, "0 -> 1"),
        (4, "0 -> -1"),
        (4, "whole is None -> whole is not None"),
        (5, "raise ValueError(part) -> pass"),
        (6, "return part / whole if part == 0 else 0 -> return None"),
        (6, "part == 0 -> part != 0"),
        (6, "0 -> 1"),
        (6, "0 -> -1"),
        (6, "part / whole -> part * whole"),
        (6, "0 -> 1 (no. 2)"),
        (6, "0 -> -1 (no. 2)"),
    ]
    dropped = next(one.source for one in mutants(source) if one.change.startswith("raise"))
    assert ast.unparse(ast.parse(dropped)) == ast.unparse(ast.parse(source.replace("raise ValueError(part)", "pass")))


def call(report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--module", "noninferiority", "--report", str(report), *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_some_are_killed_and_one_survives_the_tests_that_do_not_look_there(tmp_path: Path) -> None:
    """In a process of its own, since it forks; a second call has nothing left to do."""
    report, found = tmp_path / "mutants.jsonl", by_change((ROOT / BOUND).read_text())
    chosen = [found[one].number for one in FIXED]
    unseen = next(one.number for one in found.values() if one.text.startswith("edge = ") and one.change == "32 -> 33")
    options = [text for number in [*chosen, unseen] for text in ("--mutant", str(number))]
    done = call(report, *options, "--keyword", QUICK)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {row["mutant"]: row["result"] for row in rows} == dict.fromkeys(chosen, "killed") | {unseen: "survived"}
    assert all(row["by"].startswith("tests/test_comparison.py::") for row in rows if row["result"] == "killed")
    assert "noninferiority: 4 mutants, 3 killed, 0 timed out, 1 survived" in done.stdout, done.stderr
    before = report.read_bytes()
    again = call(report, *options, "--keyword", QUICK)
    assert report.read_bytes() == before
    assert again.stdout.splitlines() == done.stdout.splitlines()[4:]
