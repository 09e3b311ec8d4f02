"""A model in a clean process: `python -m tasks.core.probe MODEL THREADS MEMORY_LIMIT` prints what loading costs.

The process imports numpy and ONNX Runtime only, as a device would. MEMORY_LIMIT in bytes, 0 for none.
"""

import json
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
    command = [sys.executable, "-m", "tasks.core.probe", str(model), str(threads), str(memory_limit_bytes or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        limit = f" within {memory_limit_bytes:,} bytes" if memory_limit_bytes else ""
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("error: ")
        raise StageError(f"{model} does not load and run in a clean process{limit}: {reason}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def peak_rss_bytes() -> int:
    """The process's own high-water mark; `ru_maxrss` would count what the parent had before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    model, threads, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    import numpy as np

    from tasks.core import session

    started = time.perf_counter()
    ready = session.open_session(Path(model), int(threads))
    loaded = time.perf_counter()
    session.logits(ready, np.zeros((1, *ready.get_inputs()[0].shape[1:]), np.float32))
    ran = time.perf_counter()
    times = {"load_ms": (loaded - started) * 1e3, "first_inference_ms": (ran - loaded) * 1e3}
    print(json.dumps(times | {"peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    run(main)
