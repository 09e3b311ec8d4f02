"""Audit of registries of growing size: `python tests/bench/audit_scaling.py [DECISIONS] [BYTES]`.

Makes registries of an eighth, a half and all of DECISIONS (1,000), with real files of BYTES (5 GB) in all for the
largest, and audits each with --all in a fresh process. Prints time and memory, and writes
data/reports/bench/audit_scaling.json. Every fourth decision is a refusal; each has artifacts of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ledger import MODEL, Ledger

from tasks.core import files
from tasks.core.progress import track

TARGET = Path(__file__).parents[2] / "data/reports/bench/audit_scaling.json"
ALONE = f"""
import json, resource, sys, time
from pathlib import Path
from flows.registry.audit import audit
started = time.perf_counter()
report = audit(Path.cwd(), "{MODEL}", "all")
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({{
    "seconds": time.perf_counter() - started,
    "peak_rss_bytes": int(peak.split()[1]) * 1024,
    "decisions": report.decisions,
    "artifacts": report.artifacts,
    "bytes_hashed": report.bytes_hashed,
    "findings": [one._asdict() for one in report.findings],
}}))
"""


def grow(ledger: Ledger, start: int, end: int, size: int) -> None:
    """Decisions number `start` to `end`, each with `size` bytes of weights of its own."""
    for number in track(range(start, end), "deciding", end - start):
        ledger.decide(number, wrong=90 if number % 4 == 3 else 10, padding=size)


def run_audit(root: Path) -> dict[str, Any]:
    """What the audit of everything takes, in a process of its own."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "HOME": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    given = [int(one) for one in sys.argv[1:]]
    decisions, size = given or (1000, 5_000_000_000)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        ledger, before = Ledger.begin(Path(scratch) / "project", bootstrap=True), 0
        for count in (decisions // 8, decisions // 2, decisions):
            started = time.perf_counter()
            grow(ledger, before, count, size // decisions)
            before = count
            rows.append(run_audit(ledger.root) | {"making_seconds": time.perf_counter() - started})
            print(json.dumps(rows[-1]), flush=True)
    print(f"{'decisions':>9} {'artifacts':>9} {'GB hashed':>9} {'seconds':>8} {'MB/s':>6} {'peak MB':>8} findings")
    for row in rows:
        hashed = row["bytes_hashed"]
        print(
            f"{row['decisions']:>9} {row['artifacts']:>9} {hashed / 1e9:>9.2f} {row['seconds']:>8.1f} "
            f"{hashed / 1e6 / row['seconds']:>6.0f} {row['peak_rss_bytes'] / 1e6:>8.1f} {len(row['findings'])}"
        )
    files.write_json(TARGET, rows)
    sys.exit(any(row["findings"] for row in rows))


if __name__ == "__main__":
    main()
