"""Random budgets, measured again: `python tests/bench/budgets.py`, after `make run`.

Ten feasible budgets of bytes, milliseconds or both are drawn log-uniformly between the least that can be left of the
network and the whole of it. Each is met as the pipeline meets it: prune, export, quantize, reduce; with one epoch of
recovery, since neither bytes nor milliseconds depend on more, while what was never recovered may have ranges that int8
cannot take. Then the bytes of the files are counted, and all models are timed in one run. The machine's table is
measured first, and the model of `make run` is timed then and beside the others: by how much the machine has slowed down
or sped up since is divided out, and what it is without that is printed too. Three infeasible budgets have to be
refused, and what is offered instead has to be met as well. Prints a table, writes data/reports/bench/budgets.json, and
ends with status 1 if a budget is missed. A quarter of an hour on two quiet cores; on busy ones the milliseconds mean
nothing.
"""

import contextlib
import copy
import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from peers import REPETITIONS, medians

from flows import profile, search
from tasks import prune, quantize, reduce
from tasks.budget import costs
from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, run
from tasks.graphs import calibration
from tasks.nets import backbone, distillation, importance, training
from tasks.nets.export import export

YARDSTICK = "reduce"
REPORT = paths.REPORTS / "bench" / "budgets.json"
SEED, FEASIBLE = 0, 10
KINDS = (("size_bytes",), ("latency_ms",), ("size_bytes", "latency_ms"))
INFEASIBLE = 0.7  # of the least that can be had
OFFER = re.compile(r"has max_size_bytes (?P<size_bytes>\d+), max_latency_ms (?P<latency_ms>[\d.e-]+)")
HEADER = (
    f"{'':>9} {'budget':>10} {'planned':>10} {'measured':>10} {'ratio':>6} | "
    f"{'budget ms':>9} {'planned':>8} {'measured':>8} {'ratio':>6}"
)

Limits = dict[str, float]  # by field of `costs.Cost`


class Job(NamedTuple):
    """What every budget starts from."""

    params: config.Params
    teacher: nn.Module
    spec: backbone.Spec
    table: costs.Table
    calibration: list[bytes]
    folder: Path


@contextlib.contextmanager
def survey_once(job: Job) -> Iterator[None]:
    """What `prune.compress` sees of the whole network is the same for every budget, and what the teacher answers.

    What top-1 is left does not matter here: no budget limits its drop.
    """
    teacher, spec = job.teacher, job.spec
    train, val = (training.Images(split, spec.preprocessing, spec.classes) for split in (paths.TRAIN, paths.VAL))
    example = torch.stack([val[index][0] for index in range(2)])
    effects = importance.blocks(teacher, example, lambda: training.evaluate(teacher, val)[1])
    survey, head = prune.survey_channels, backbone.head(teacher)
    whole = survey(copy.deepcopy(teacher), effects, train, example, head)

    def surveyed(net: nn.Module, asked: dict[str, float], *more: Any) -> Any:
        return whole if asked is effects else survey(net, asked, *more)

    known = functools.cache(distillation.answers)
    with (
        patch.object(importance, "blocks", lambda *_: effects),
        patch.object(prune, "survey", surveyed),
        patch.object(distillation, "answers", lambda *_: known(teacher, train)),
        patch.object(training, "evaluate", lambda *_: (0.0, 0.0)),
    ):
        yield


def draw(within: search.Bounds) -> list[Limits]:
    """The feasible budgets, kind by kind in turn."""
    random = np.random.default_rng(SEED)
    budgets = []
    for number in range(FEASIBLE):
        ends = {name: np.log(within[name]) for name in KINDS[number % len(KINDS)]}
        budgets.append({name: search.round_up(float(np.exp(random.uniform(*end))), name) for name, end in ends.items()})
    return budgets


def compress(job: Job, limits: Limits, path: Path) -> costs.Cost:
    """Write the reduced model for the budget; returns what it costs by the table. `StageError` if nothing fits."""
    budget = config.Compress(**{f"max_{name}": limit for name, limit in limits.items()})
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        checkpoint, masked = Path(scratch) / "checkpoint.pt", Path(scratch) / "masked.onnx"
        found = prune.compress(
            job.teacher, job.spec, budget, job.params.prune, job.table, paths.TRAIN, paths.VAL, checkpoint
        )
        export(found.net, job.spec, masked)
        quantized = calibration.quantize(
            masked, job.calibration, job.spec.preprocessing, job.params.quantize, found.plan.float32
        )
    onnx.save(reduce.reduce(quantized)[0], path)
    return costs.Cost(found.plan.size_bytes, found.plan.latency_ms)


def offer_of(job: Job, limits: Limits) -> tuple[str, Limits | None]:
    """What is said to an infeasible budget, and the budget that is offered in its place; None if it was not refused."""
    try:
        compress(job, limits, job.folder / "infeasible.onnx")
    except StageError as error:
        offer = OFFER.search(str(error))
        return str(error), offer and {name: float(value) for name, value in offer.groupdict().items()}
    return "", None


def row(name: str, limits: Limits, planned: costs.Cost, measured: costs.Cost) -> dict[str, Any]:
    """A budget and what became of it."""
    met = all(getattr(measured, key) <= limit for key, limit in limits.items())
    return {"name": name, "budget": limits, "planned": planned._asdict(), "measured": measured._asdict(), "met": met}


def line(entry: dict[str, Any]) -> str:
    """The row as text under HEADER; a ratio is that of measured to planned."""
    cells = []
    for key, form, width in (("size_bytes", ",.0f", 10), ("latency_ms", ".4f", 8)):
        limit, planned, measured = entry["budget"].get(key), entry["planned"][key], entry["measured"][key]
        asked = "-" if limit is None else f"{limit:{form}}"
        cells.append(f"{asked:>{max(width, 9)}} {planned:{width}{form}} {measured:{width}{form}}")
        cells[-1] += f" {measured / planned:6.3f}"
    return f"{entry['name']:>9} {' | '.join(cells)} {'met' if entry['met'] else 'MISSED'}"


def latencies(models: dict[str, Path], device: config.Benchmark) -> dict[str, float]:
    """Milliseconds of each model, and of YARDSTICK, which always runs after the same large one."""
    beside = {stage: paths.onnx(stage) for stage in ("finetune", YARDSTICK)}
    return {name: found["latency_p50_ms"] for name, found in medians(models | beside, device).items()}


def measure(job: Job, within: search.Bounds, before: float) -> dict[str, Any]:
    """All budgets: rows, refusals, and how many times as long as `before`, with its table, the machine takes now."""
    budgets = {f"{number}": limits for number, limits in enumerate(draw(within), 1)}
    least = {name: low * INFEASIBLE for name, (low, _) in within.items()}
    refusals = []
    for number, kind in enumerate(KINDS, 1):
        limits = {name: search.round_up(least[name], name) for name in kind}
        said, offer = offer_of(job, limits)
        refusals.append({"budget": limits, "said": said, "offer": offer})
        print(f"{limits}: {said or 'NOT REFUSED'}", flush=True)
        if offer:
            budgets[f"offer {number}"] = offer
    models = {name: job.folder / f"{name}.onnx" for name in budgets}
    planned = {name: compress(job, limits, models[name]) for name, limits in budgets.items()}
    times = latencies(models, job.params.benchmark)
    slower = times[YARDSTICK] / before
    found = {name: costs.Cost(models[name].stat().st_size, times[name] / slower) for name in budgets}
    return {
        "rows": [row(name, limits, planned[name], found[name]) for name, limits in budgets.items()],
        "refusals": refusals,
        "slower": slower,
        "undivided_latency_ms": times,
    }


def main() -> None:
    os.chdir(ROOT)
    for path in (paths.weights("finetune"), paths.onnx("reduce"), paths.TRAIN, paths.VAL):
        if not path.exists():
            raise StageError(f"{path} is missing: run `make run` first")
    params = config.load()
    if params.prune.recovery is None:
        raise StageError("params.yaml has no prune.recovery: it says how the pruned networks are trained")
    schedule = params.prune.recovery.training.model_copy(update={"epochs": 1})
    recovery = params.prune.recovery.model_copy(update={"training": schedule})
    params = params.model_copy(update={"prune": params.prune.model_copy(update={"recovery": recovery})})
    training.make_deterministic(SEED)
    teacher, spec = backbone.load(paths.weights("finetune"), paths.spec("finetune"))
    calibration = quantize.calibration_images(
        paths.TRAIN, config.class_names(params), params.quantize.calibration_images
    )
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        path = Path(scratch) / paths.DEVICE.name
        profile.profile(params, path)
        before = latencies({}, params.benchmark)[YARDSTICK]
        job = Job(params, teacher, spec, costs.read(path, params.benchmark.threads), calibration, Path(scratch))
        with survey_once(job):
            found = measure(job, search.bounds(params, job.table), before)
    print("", HEADER, *map(line, found["rows"]), sep="\n")
    ratios = [one["measured"]["latency_ms"] / one["planned"]["latency_ms"] for one in found["rows"]]
    print(f"measured milliseconds are {min(ratios):.3f} to {max(ratios):.3f} times the planned ones")
    print(f"the machine takes {found['slower']:.3f} times as long as with its table, which is divided out; undivided:")
    for one in found["rows"]:
        if (limit := one["budget"].get("latency_ms")) is not None:
            took = found["undivided_latency_ms"][one["name"]]
            print(f"{one['name']:>9} {took:.4f} ms of {limit:.4f} {'met' if took <= limit else 'MISSED'}")
    about = {"seed": SEED, "margin": prune.MARGIN._asdict(), "processor": machine.processor()}
    device = params.benchmark.model_dump() | {"repetitions": REPETITIONS}
    files.write_json(REPORT, about | {"profile": device} | found)
    missed = [one["name"] for one in found["rows"] if not one["met"]]
    sys.exit(bool(missed) or not all(one["offer"] for one in found["refusals"]))


if __name__ == "__main__":
    run(main)
