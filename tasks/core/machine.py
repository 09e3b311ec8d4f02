"""The machine that this process runs on, as the system describes it."""

import os
import platform
import time
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
STAT = Path("/proc/stat")
CROWDED = 0.5  # cores that others take from this process


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """Return the sorted names of the processor's instruction sets, as Linux has them; none on other systems."""
    found = _cpuinfo()
    return sorted(found.get("flags", found.get("Features", "")).split())  # the latter is what Arm has


class Cores:
    """How much of the machine's cores other processes take, since this was made or last asked."""

    def __init__(self) -> None:
        self.last = _busy_s()

    def crowd(self) -> str:
        """What to say if others leave this process fewer cores than it may use; empty if not, or not on Linux.

        Empty, too, for one of several that train together, since those take cores of one another.
        """
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            return ""
        before, self.last = self.last, _busy_s()
        present, usable = os.cpu_count() or 1, usable_cores()
        if before is None or self.last is None or self.last[0] <= before[0]:
            return ""
        others = (self.last[1] - before[1]) / (self.last[0] - before[0])
        return f", others use {others:.1f} of {present} cores" if others > present - usable + CROWDED else ""


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy_s() -> tuple[float, float] | None:
    """The time now, and for how long others have used a core, both in seconds; None where the system does not say."""
    if not STAT.exists():
        return None
    user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, STAT.read_text().split(maxsplit=9)[1:9])
    own = sum(os.times()[:4]) + _children_s()  # the former has the processes that it started and that have ended
    return time.monotonic(), (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK") - own


def _children_s() -> float:
    """For how many seconds the processes have used a core that this one has started and that still run."""
    ticks = 0
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text().split():
            with suppress(OSError):  # it may have ended since
                ticks += sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo by their keys; empty where there is no such file."""
    found: dict[str, str] = {}
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else ():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
