"""A model in a clean process: `python -m tasks.runtime.probe MODEL THREADS MEMORY_LIMIT [GOLDEN]` prints what it does.

That is what loading costs or, with golden inputs and outputs, how it meets them. The process imports numpy and ONNX
Runtime only, as a device would. MEMORY_LIMIT in bytes, 0 for none.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tasks.core.errors import StageError, run


def probe(model: Path, threads: int, memory_limit_bytes: int | None) -> dict[str, Any]:
    """`load_ms`, `first_inference_ms` and `peak_rss_bytes` of the model in a process of its own.

    `StageError` if it does not load and run there, under the limit on the process's data if one is given.
    """
    return _clean(model, threads, memory_limit_bytes)


def meet(golden: Path, model: Path, threads: int, memory_limit_bytes: int | None) -> dict[str, Any]:
    """How the model meets golden outputs in a process of its own, by case.

    Each case has `difference` (the largest of any logit; null if one is not finite), `same_top1` and `repeatable`
    (every run gives the same bits). `StageError` if the model does not load and run there.
    """
    return _clean(model, threads, memory_limit_bytes, str(golden))


def _clean(model: Path, threads: int, memory_limit_bytes: int | None, *more: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tasks.runtime.probe",
        str(model),
        str(threads),
        str(memory_limit_bytes or 0),
        *more,
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # as on a device
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if done.returncode != 0:
        limit = f" within {memory_limit_bytes:,} bytes" if memory_limit_bytes else ""
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: ")
        raise StageError(f"{model} does not load and run in a clean process{limit}: {reason}")
    result: dict[str, object] = json.loads(done.stdout)
    return result


def peak_rss_bytes() -> int:
    """The process's own high-water mark; `ru_maxrss` would count what the parent had before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _costs(model: Path, threads: int) -> dict[str, Any]:
    import numpy as np

    from tasks.runtime import session

    started = time.perf_counter()
    ready = session.open_session(model, threads)
    loaded = time.perf_counter()
    session.logits(ready, np.zeros((1, *ready.get_inputs()[0].shape[1:]), np.float32))
    ran = time.perf_counter()
    times = {"load_ms": (loaded - started) * 1e3, "first_inference_ms": (ran - loaded) * 1e3}
    return times | {"peak_rss_bytes": peak_rss_bytes()}


def main() -> None:
    model, threads, limit, *golden = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    given = Path(model), int(threads)
    if golden:
        from tasks.runtime.golden import compare

        print(json.dumps(compare(*given, Path(golden[0]))))
    else:
        print(json.dumps(_costs(*given)))


if __name__ == "__main__":
    run(main)
