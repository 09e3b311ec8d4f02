"""track: what a log of a long step says, also of other processes that take its cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core import machine, progress

TICKS = os.sysconf("SC_CLK_TCK")


class Clock:
    """A machine of four cores on which time passes as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stat: Path, usable: int = 4) -> None:
        self.stat, self.now, self.own, self.others, self.idle = stat, 100.0, 10.0, 50.0, 1000.0
        monkeypatch.setattr(machine, "STAT", stat)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(usable)))
        monkeypatch.setattr("os.times", lambda: os.times_result((self.own, 0.0, 0.0, 0.0, 0.0)))
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.passes(0, 0, 0)

    def passes(self, seconds: float, own: float, others: float) -> None:
        """So many seconds, in which this process used so many cores, and others so many."""
        self.now, self.own, self.others = self.now + seconds, self.own + seconds * own, self.others + seconds * others
        self.idle += seconds * (4 - own - others)
        user, idle = round((self.own + self.others) * TICKS), round(self.idle * TICKS)
        self.stat.write_text(f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    return Clock(monkeypatch, tmp_path / "stat")


def test_a_line_every_few_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in progress.track("abcdef", "letters", 6):
        seen.append(item)
        clock.passes(2.0, own=4, others=0)
    assert "".join(seen) == "abcdef"
    assert capsys.readouterr().err.splitlines() == ["letters: 3/6 in 6 s"]


@pytest.mark.parametrize(("others", "said"), [(0.4, ""), (1.5, ", others use 1.5 of 4 cores")])
def test_it_says_when_others_use_the_cores(
    others: float, said: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress.track("ab", "letters"):
        clock.passes(6.0, own=4 - others, others=others)
    assert capsys.readouterr().err.splitlines() == [f"letters: 1 in 6 s{said}"]


def test_each_line_is_about_the_time_since_the_last(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for index in progress.track(range(3), "numbers"):
        clock.passes(10.0, own=1, others=3 if index == 0 else 0)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(", others use 3.0 of 4 cores")
    assert second == "numbers: 2 in 20 s"


@pytest.mark.parametrize(("others", "crowded"), [(2.0, False), (2.6, True)])
def test_cores_that_this_process_may_not_use_are_for_others(
    others: float, crowded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock(monkeypatch, tmp_path / "stat", usable=2)
    cores = machine.Cores()
    clock.passes(10.0, own=1, others=others)
    assert bool(cores.crowd()) is crowded


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert machine.Cores().crowd() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="others have no /proc")
def test_the_processes_that_this_one_has_started_are_no_others() -> None:
    before = machine._children_s()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            while machine._children_s() < before + 0.2:
                assert child.poll() is None
        finally:
            child.kill()
    assert machine._children_s() < before + 0.2
