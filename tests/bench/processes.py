"""One process or two: `python tests/bench/processes.py [--seeds N]`, after `make run`, in the same folder.

Fine-tunes the recipe's network on the images of the last run with `devices: 1` and `devices: 2`, with each of the
seeds, in turns: val top-1, and the seconds and CPU seconds of the stage. Then times training steps whose batch is one,
or two or four parts one after another: weights would be the same to the byte for one, two and four processes if each
computed the same parts, with batch normalisation over a part, and this is what that costs before anything is
exchanged. Prints means with their ranges, and writes data/reports/bench/processes.json. 25 minutes on 2 quiet cores.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flows.dvc_bridge import ENVIRONMENT
from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, run

REPORT = paths.REPORTS / "bench" / "processes.json"
DEVICES = (1, 2)
PARTS = (1, 2, 4)
STEPS, WARMUP = 8, 2
STAGE = [sys.executable, "-m", "tasks.finetune"]


def finetune(devices: int, seed: int) -> dict[str, float]:
    """Run the stage in a folder of its own, on the prepared images of this one."""
    yaml = YAML(typ="safe")
    content = yaml.load(paths.PARAMS)
    content["finetune"]["training"] |= {"devices": devices, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="weighin-") as name:
        folder = Path(name)
        yaml.dump(content, folder / paths.PARAMS)
        (folder / paths.TRAIN.parent).parent.mkdir(parents=True)
        (folder / paths.TRAIN.parent).symlink_to(paths.TRAIN.parent.resolve())
        for report in (one for one in map(paths.report, ("ingest", "validate")) if one.exists()):
            files.write_bytes(folder / report, report.read_bytes())
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(STAGE, cwd=folder, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        top1 = files.read_json(folder / paths.report("finetune"))["val_top1"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seed": seed, "val_top1": top1, "seconds": time.monotonic() - began, "cpu_seconds": cpu}


def speeds(params: config.Finetune, classes: int, rounds: int) -> dict[int, list[float]]:
    """Images a second of training steps by the number of parts that a batch is computed in; they take turns."""
    import torch

    from tasks.nets import backbone, training

    training.make_deterministic(params.training.seed, params.training.threads)
    size = params.training.batch_size
    preprocessing = backbone.preprocessing(params.backbone, params.image_size)
    net = backbone.create(params.backbone, classes, preprocessing).to(memory_format=torch.channels_last).train()
    optimizer, _ = training._optimizer(net, params.training, (STEPS + WARMUP) * len(PARTS) * rounds)
    loss = training.cross_entropy(params.training.label_smoothing)
    images = torch.randn(size, *preprocessing.shape).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (size,))
    found: dict[int, list[float]] = {parts: [] for parts in PARTS}
    for _ in range(rounds):
        for parts, row in found.items():
            began = 0.0
            for step in range(STEPS + WARMUP):
                began = time.monotonic() if step == WARMUP else began
                optimizer.zero_grad()
                for own, answers in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                    (loss(own, net(own), answers) / parts).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            row.append(STEPS * size / (time.monotonic() - began))
    return found


def cell(values: list[float], form: str) -> str:
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many trainings of each row; 0: the parts of a batch alone"
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often the parts of a batch take turns")
    arguments = parser.parse_args()
    if not paths.TRAIN.exists():
        raise StageError(f"{paths.TRAIN} is missing: run `make run` first")
    params, load = config.load(), os.getloadavg()[0]
    rows: dict[int, list[dict[str, float]]] = {devices: [] for devices in DEVICES}
    for seed in range(arguments.seeds):
        for devices, found in rows.items():
            found.append(finetune(devices, seed))
    parts = speeds(params.finetune, len(config.class_names(params)), arguments.rounds)
    cost = {number: [one / whole for one, whole in zip(row, parts[1], strict=True)] for number, row in parts.items()}
    about: dict[str, Any] = {
        "processor": machine.processor(),
        "cores": machine.usable_cores(),
        "load_before": load,
    }
    files.write_json(REPORT, about | {"devices": rows, "images_per_s_by_parts": parts})
    print(f"\n{about['processor']}, {about['cores']} cores, load before {load:.2f}")
    if arguments.seeds:
        print(f"{'devices':10} {'val top-1':>28} {'seconds':>24} {'CPU seconds':>24}")
    for devices, found in rows.items() if arguments.seeds else ():
        top1, seconds, cpu = ([row[name] for row in found] for name in ("val_top1", "seconds", "cpu_seconds"))
        print(f"{devices:<10} {cell(top1, '{:.2%}'):>28} {cell(seconds, '{:.0f}'):>24} {cell(cpu, '{:.0f}'):>24}")
    print(f"{'parts':10} {'images a second':>28} {'of one part':>24}")
    for number, row in parts.items():
        spread = f"{median(cost[number]):.2f} ({min(cost[number]):.2f} to {max(cost[number]):.2f})"
        print(f"{number:<10} {median(row):28.0f} {spread:>24}")


if __name__ == "__main__":
    run(main)
