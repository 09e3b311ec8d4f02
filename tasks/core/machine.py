"""The machine that this process runs on, as the system describes it."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """Return the sorted names of the processor's instruction sets, as Linux has them; none on other systems."""
    found = _cpuinfo()
    return sorted(found.get("flags", found.get("Features", "")).split())  # the latter is what Arm has


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo by their keys; empty where there is no such file."""
    found: dict[str, str] = {}
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else ():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
