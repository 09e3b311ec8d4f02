"""What a process has started on a leash ends with it, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from workspace import wait_for

from flows import leash

# Starts the program that it is given on a leash of half a second, and waits for it.
STARTER = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
from flows import leash
held = leash.start(sys.argv[1:], grace_s=0.5)
try:
    held.wait()
finally:
    leash.end(held)
"""
PROGRAMS = {
    "obedient": "touch begun; exec sleep 60",
    "stubborn": "trap '' TERM INT HUP; touch begun; while true; do sleep 1; done",
    "with a child": "sleep 60 & touch begun; sleep 60",
}


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_its_starter(tmp_path: Path, program: str, ending: signal.Signals) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, "sh", "-c", PROGRAMS[program]], cwd=tmp_path, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    wait_for((tmp_path / "begun").exists, "the program's start")
    started = family(psutil.Process(starter.pid))
    assert len(started) > 2
    starter.send_signal(ending)
    starter.wait()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill $$", 143)])
def test_its_exit_status_is_handed_on(script: str, status: int) -> None:
    assert leash.start(["sh", "-c", script]).wait() == status


def test_what_a_program_leaves_running_ends_after_it() -> None:
    held = leash.start(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE)
    assert held.stdout is not None
    output = held.stdout.read()
    assert held.wait() == 0
    assert not psutil.pid_exists(int(output))
