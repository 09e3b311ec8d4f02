"""Training beside other work: `python tests/bench/busy.py [--rounds N]`.

Images a second of training steps as fine-tuning takes them, on a quiet machine and beside one endless loop, for several
ways in which OpenMP's threads wait for one another. The settings take turns, each in a process of its own. Prints the
median of the rounds, the share of the quiet speed that is left, and the machine's load before, and writes
data/reports/bench/busy.json. Six minutes on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flows.dvc_bridge import ENVIRONMENT
from tasks.core import files, machine, paths

REPORT = ROOT / paths.REPORTS / "bench" / "busy.json"
SPIN = "GOMP_SPINCOUNT"
WARMUP, BATCH = 2, 64
SETTINGS: dict[str, dict[str, str | None]] = {
    "PyTorch's default": {SPIN: None},
    "spin 30000": {SPIN: "30000"},
    "spin 1000": {SPIN: "1000"},
    "spin 100": {SPIN: "100"},
    "spin 0": {SPIN: "0"},
    "passive": {SPIN: None, "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOOP = "while True: pass"


def train(network: str, size: int, steps: int) -> None:
    """Print the images a second of so many steps, after two that warm up."""
    import torch

    from tasks.core import config
    from tasks.nets import backbone, training

    training.make_deterministic(0)
    preprocessing = backbone.preprocessing(network, size)
    net = backbone.create(network, 10, preprocessing).to(memory_format=torch.channels_last)
    params = config.load(ROOT / paths.PARAMS).finetune.training
    optimizer, _ = training._optimizer(net, params, steps + WARMUP)
    loss = training.cross_entropy(params.label_smoothing)
    images = torch.randn(BATCH, *preprocessing.shape).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    started = 0.0
    for step in range(steps + WARMUP):
        if step == WARMUP:
            started = time.monotonic()
        optimizer.zero_grad()
        loss(images, net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    print(json.dumps(steps * BATCH / (time.monotonic() - started)))


def speed(setting: dict[str, str | None], arguments: argparse.Namespace, busy: bool) -> float:
    """Images a second in a process with this setting, beside an endless loop or not."""
    environment = os.environ | ENVIRONMENT | {name: value for name, value in setting.items() if value is not None}
    for name in (name for name, value in setting.items() if value is None):
        del environment[name]
    command = [sys.executable, __file__, "--train", arguments.network, str(arguments.size), str(arguments.steps)]
    loop = subprocess.Popen([sys.executable, "-c", LOOP]) if busy else None
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        if loop:
            loop.kill()
            loop.wait()
    return float(json.loads(done.stdout))


def line(name: str, quiet: list[float], busy: list[float]) -> str:
    left = [after / before for before, after in zip(quiet, busy, strict=True)]
    return (
        f"{name:20} {median(quiet):10.0f} {median(busy):10.0f} {median(left):10.0%} {min(left):8.0%} to {max(left):.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help=f"of {BATCH} images each")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="this one alone; may be repeated")
    parser.add_argument("--network", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--report", type=Path, default=REPORT, help="the file of results")
    parser.add_argument("--train", nargs=3, metavar=("NETWORK", "SIZE", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        network, size, steps = arguments.train
        train(network, int(size), int(steps))
        return
    load = os.getloadavg()[0]
    table: dict[str, Any] = {name: {"quiet": [], "busy": []} for name in arguments.setting or SETTINGS}
    for number in range(arguments.rounds):
        for name, row in table.items():
            for state, found in row.items():
                found.append(speed(SETTINGS[name], arguments, state == "busy"))
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    about = {"processor": machine.processor(), "cores": machine.usable_cores(), "load_before": load}
    files.write_json(arguments.report, about | {"images_per_s": table})
    print(f"\n{about['processor']}, {about['cores']} cores, load before {load:.2f}")
    print(f"{'':20} {'quiet':>10} {'busy':>10} {'left':>10}     range")
    print(*(line(name, row["quiet"], row["busy"]) for name, row in table.items()), sep="\n")


if __name__ == "__main__":
    main()
