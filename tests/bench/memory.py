"""What does each stage need in memory? `python tests/bench/memory.py [--side PIXELS]...`.

Runs the stages from `finetune` to `gate` on a few images of noise, each as a process of its own, as `weighin run` does,
for EfficientNet-Lite0 at 64, 224 and 384 pixels. What comes after training should need no more than training did.
Prints the peak resident memory of each in MB, with that of fine-tuning as the measure, writes
data/reports/bench/memory.json, and ends with status 1 if a later stage needs more. Takes about 20 minutes on two cores.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import STAGES
from tasks.core import files, paths, quiet

TARGET = ROOT / paths.REPORTS / "bench" / "memory.json"
SIDES = (64, 224, 384)
COUNTS = {"train": 96, "val": 64, "test": 64}
CLASSES = ("cat", "dog")
MEASURED = STAGES[STAGES.index("finetune") :]
HEADER = f"{'pixels':>6} " + " ".join(f"{name:>10}" for name in MEASURED)


def lay(root: Path, side: int) -> None:
    """Everything that the first of the stages reads: prepared splits, the data's verdict, and a recipe."""
    random = np.random.default_rng(0)
    for name, count in COUNTS.items():
        rows: list[dict[str, Any]] = []
        for index in range(count):
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "JPEG")
            rows.append({"image": stream.getvalue(), "label": CLASSES[index % 2]})
        path = root / paths.PREPARED / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    files.write_json(root / paths.report("validate"), {"passed": True})
    files.write_json(root / paths.CHAMPION_RECORD, {"schema_version": 2, "version": None, "bootstrap": True})
    shutil.copytree(ROOT / "tasks", root / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "dvc.yaml", root)
    yaml = YAML(typ="safe")
    recipe = yaml.load(ROOT / "data/recipes/folder.yaml")
    recipe["classes"] = list(CLASSES)
    recipe["finetune"]["image_size"] = side
    for training in (recipe["finetune"]["training"], recipe["prune"]["recovery"]["training"]):
        training["epochs"] = 1
    recipe["quantize"]["calibration_images"] = 64
    recipe["benchmark"]["iterations"] = 10
    with (root / paths.PARAMS).open("w") as file:
        yaml.dump(recipe, file)


def peak_mb(root: Path, stage: str) -> float:
    """Run a stage; its largest resident memory in MB, of whatever it has started too."""
    environment = os.environ | quiet.SETTINGS | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-m", f"tasks.{stage}"], cwd=root, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"error: {stage} ended with status {process.returncode}")
    return usage.ru_maxrss / 1024


def examine(side: int) -> dict[str, float]:
    """MB by stage for images of this size."""
    with tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True) as scratch:
        lay(Path(scratch), side)
        return {stage: peak_mb(Path(scratch), stage) for stage in MEASURED}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--side", type=int, action="append", help="pixels; may be repeated")
    sides = parser.parse_args().side or SIDES
    print(HEADER, flush=True)
    found = {}
    for side in sides:
        found[side] = examine(side)
        print(f"{side:6} " + " ".join(f"{found[side][name]:10.0f}" for name in MEASURED), flush=True)
    files.write_json(TARGET, {str(side): row for side, row in found.items()})
    sys.exit(any(max(row.values()) > row["finetune"] for row in found.values()))


if __name__ == "__main__":
    main()
