"""The environment of a decision: what ran, on what. No host, user or path is in it."""

import os
import platform
import re
from importlib import metadata
from typing import Any

from tasks.core import machine

THREADS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")


def describe_environment() -> dict[str, Any]:
    """Python, platform, processor, cores, thread settings and installed packages.

    No host, user or path is in it; a package that was installed from a folder or an address has its version only.
    """
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "processor": {"name": machine.processor(), "flags": machine.processor_flags()},
        "cores": {"present": os.cpu_count(), "usable": machine.usable_cores()},
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "packages": _packages(),
    }


def _packages() -> list[str]:
    found: dict[str, str] = {}
    for one in metadata.distributions():
        name, version = _read_field(one, "Name"), _read_field(one, "Version")
        if name and version:  # a package half removed has neither; the first of two is the one that Python imports
            found.setdefault(normalize(name), f"{name}=={version}")
    return [found[key] for key in sorted(found)]


def _read_field(package: metadata.Distribution, field: str) -> str | None:
    """What a package's metadata has of a field of one line; `package.metadata` would take the whole readme apart."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or package.read_text("") or ""
    found = re.search(rf"^{field}:[ \t]*(.*?)[ \t]*$", text.partition("\n\n")[0], re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
