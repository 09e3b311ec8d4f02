"""bench/interpreters.py finds the interpreters, and tells what it found of each, without setting one up."""

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_bench


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("interpreters")


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python(folder: Path, version: str, prefix: str, base: str | None = None) -> Path:
    """What says that it is a Python of that version."""
    said = json.dumps([version, prefix, base or prefix])
    return executable(folder / f"python{version.rpartition('.')[0]}", f"echo '{said}'")


def test_each_interpreter_is_found_once(bench: ModuleType, tmp_path: Path) -> None:
    path, shims, pyenv = tmp_path / "path", tmp_path / "shims", tmp_path / "pyenv"
    first = python(path, "3.12.1", "/one")
    python(shims, "3.12.1", "/one")  # the same by another name
    executable(shims / "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    python(shims, "3.11.9", "/venv", base="/two")  # a virtual environment
    other = python(pyenv / "versions/3.11.7/bin", "3.11.7", "/three")
    newest = python(pyenv / "versions/3.13.0/bin", "3.13.0", "/four")
    python(pyenv / "versions/3.10.1/bin", "3.10.1", "/five")
    executable(pyenv / "versions/odd/bin/python3.12", 'echo \'["2.7.18", "/six", "/six"]\'')
    executable(pyenv / "versions/mute/bin/python3.12", "echo Python")
    (pyenv / "versions/flat/bin").mkdir(parents=True)
    (pyenv / "versions/flat/bin/python3.12").write_text("not executable")
    environment = {"PATH": f"{path}:{tmp_path / 'missing'}::{shims}", "PYENV_ROOT": str(pyenv)}
    found = bench.discover(environment)
    assert found == [("3.11.7", other), ("3.12.1", first), ("3.13.0", newest)]
    assert bench.discover(environment, ("3.13",)) == found[2:]


def test_pyenv_is_at_home_where_nothing_else_is_said(bench: ModuleType, tmp_path: Path) -> None:
    made = python(tmp_path / ".pyenv/versions/3.11.2/bin", "3.11.2", "/one")
    assert bench.discover({"HOME": str(tmp_path)}) == [("3.11.2", made)]
    assert bench.discover({}) == []


def test_a_row_tells_how_far_it_came(bench: ModuleType) -> None:
    failed = bench.Row("3.13.0", False, 12.3, error="make setup: no such release")
    stopped = bench.Row("3.12.1", True, 12.3, run_seconds=4.0, error="weighin run: gone")
    done = bench.Row("3.11.7", True, 12.3, outcome="refused", run_seconds=45.6, top1=0.905, size_bytes=12345)
    assert [one.works for one in (failed, stopped, done)] == [False, False, True]
    assert bench.line(failed).split(maxsplit=7) == [
        *("3.13.0", "failed", "12", "-", "-", "-", "-", "make setup: no such release")
    ]
    assert bench.line(stopped).split()[3:5] == ["failed", "4"]
    assert bench.line(done).split() == ["3.11.7", "worked", "12", "refused", "46", "90.50%", "12,345"]


def test_a_set_up_that_fails_is_told_and_nothing_is_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def call(command: list[str], *_: object, **__: str) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, command[0] == "make", "", "first\nrequires another Python\n\n")

    monkeypatch.setattr(bench, "call", call)
    row = bench.examine(bench.Interpreter("3.13.0", Path("/python3.13")), tmp_path)
    assert (row.set_up, row.works, row.error) == (False, False, "make setup: requires another Python")
    assert [command[0] for command in called] == ["git", "make"]
    assert called[-1] == ["make", "setup", "PYTHON=/python3.13"]


def test_a_command_that_takes_too_long_is_ended(bench: ModuleType, tmp_path: Path) -> None:
    done = bench.call(["sh", "-c", "sleep 60; true"], tmp_path, 0.1)
    assert (done.returncode, bench.last_line(done)) == (124, "it took more than 0.1 s")
