"""Time and memory for many images: `python tests/bench/many_images.py [--images N]...`.

Grey images of 28 by 28 pixels, all different, in IDX files, go through `ingest`, `validate` and one epoch of `finetune`
with the small perceptron, each stage as a process of its own. Printed are seconds, images a second and the peak of
anonymous memory in MB of the stage with the processes that it starts; pages of files that are mapped do not count, as
the system takes them back when it needs room. Writes data/reports/bench/many_images.json, and ends with status 1 if ten
times as many images take more than 11 times as long. Half an hour on two quiet cores for 10,000, 100,000 and 1,000,000.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flows.dvc_bridge import ENVIRONMENT
from tasks.core import files, machine, paths

TARGET = ROOT / paths.REPORTS / "bench" / "many_images.json"
RECIPE = ROOT / "data" / "recipes" / "mlp-digits.yaml"
COUNTS = (10_000, 100_000, 1_000_000)
STAGES = ("ingest", "validate", "finetune")
SIDE, AT_ONCE = 28, 10_000
EVERY_S = 0.1
MOST = 1.1  # times what linear growth would take
HEADER = f"{'images':>10} " + " ".join(f"{name:>9} s {'images/s':>9} {'MB':>7}" for name in STAGES)


def lay(root: Path, images: int) -> None:
    """The source, and a recipe that reads it: noise, darker or lighter by its class."""
    random, source = np.random.default_rng(0), root / "source"
    source.mkdir()
    labels = np.arange(images) % 10
    with (source / "train-images-idx3-ubyte").open("wb") as file:
        file.write(bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (images, SIDE, SIDE)))
        for start in range(0, images, AT_ONCE):
            part = labels[start : start + AT_ONCE, None, None]
            noise = random.integers(0, 56, (len(part), SIDE, SIDE), dtype=np.uint8)
            file.write((noise + 20 * part).astype(np.uint8).tobytes())
    header = bytes([0, 0, 8, 1]) + images.to_bytes(4, "big")
    files.write_bytes(source / "train-labels-idx1-ubyte", header + labels.astype(np.uint8).tobytes())
    yaml = YAML(typ="safe")
    recipe = yaml.load(RECIPE)
    recipe["classes"] = list("0123456789")
    recipe["ingest"] = {"kind": "idx", "path": str(source), "split": {"val": 0.1, "test": 0.2}}
    recipe["ingest"] |= {"max_corrupt_fraction": 0, "seed": 0}
    recipe["validate"]["min_rows_per_class"] = 2
    recipe["finetune"]["image_size"] = SIDE
    recipe["finetune"]["training"]["epochs"] = 1
    yaml.dump(recipe, root / paths.PARAMS)


def anonymous_mb(process: psutil.Process) -> float:
    """What a process and those that it has started hold in memory and on no disk, in MB."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(text.split()[1]) for text in lines if text.startswith(("RssAnon", "RssShmem")))
    return total / 1024


def measure(root: Path, stage: str) -> dict[str, float]:
    """Run a stage; its seconds and its peak of memory."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with (root / "log.txt").open("w") as log:
        process = psutil.Popen(
            [sys.executable, "-m", f"tasks.{stage}"], cwd=root, env=environment, stdout=log, stderr=log
        )
        began, peak = time.monotonic(), 0.0
        while process.poll() is None:
            try:
                peak = max(peak, anonymous_mb(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(EVERY_S)
        seconds = time.monotonic() - began
    if process.wait() != 0:
        sys.exit(f"error: {stage} ended with status {process.returncode}: {(root / 'log.txt').read_text()[-500:]}")
    return {"seconds": seconds, "peak_mb": peak}


def examine(images: int) -> dict[str, dict[str, float]]:
    """The row of a number of images."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        lay(Path(scratch), images)
        return {stage: measure(Path(scratch), stage) for stage in STAGES}


def line(images: int, row: dict[str, dict[str, float]]) -> str:
    cells = (f"{one['seconds']:11.1f} {images / one['seconds']:9,.0f} {one['peak_mb']:7,.0f}" for one in row.values())
    return f"{images:10,} " + " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, action="append", help="so many; may be repeated")
    parser.add_argument("--report", type=Path, default=TARGET, help="the file of results")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{machine.processor()}, {machine.usable_cores()} cores, load before {load:.2f}\n{HEADER}", flush=True)
    table: dict[int, dict[str, dict[str, float]]] = {}
    for images in arguments.images or COUNTS:
        table[images] = examine(images)
        print(line(images, table[images]), flush=True)
    about: dict[str, Any] = {"processor": machine.processor(), "cores": machine.usable_cores(), "load_before": load}
    files.write_json(arguments.report, about | {"rows": {str(images): row for images, row in table.items()}})
    slow = False
    for fewer, more in itertools.pairwise(sorted(table)):
        growth = {stage: table[more][stage]["seconds"] / table[fewer][stage]["seconds"] for stage in STAGES}
        told = ", ".join(f"{times:.1f} times ({stage})" for stage, times in growth.items())
        print(f"{more:,} instead of {fewer:,} images take {told}")
        slow |= any(times > MOST * more / fewer for times in growth.values())
    sys.exit(slow)


if __name__ == "__main__":
    main()
