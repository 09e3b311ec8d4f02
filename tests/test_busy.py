"""bench/busy.py with a small network and a few steps."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_bench_runs_and_says_what_is_left(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/bench/busy.py"), "--rounds", "1", "--steps", "2", "--size", "8"]
    report = tmp_path / "busy.json"
    options = ["--network", "mlp", "--report", str(report), "--setting", "passive", "--setting", "one thread"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    table = json.loads(report.read_text())["images_per_s"]
    assert set(table) == {"passive", "one thread"}
    assert all(len(row[state]) == 1 and row[state][0] > 0 for row in table.values() for state in ("quiet", "busy"))
    assert len(done.stdout.splitlines()) == len(table) + 4
