"""What each part of the default recipe buys: `python tests/bench/ablation.py [--seeds N]`, after `make run`.

For each seed the backbone is fine-tuned anew on data/prepared; then each row of the table makes its model from it for
the same budget of bytes and milliseconds, with one part of the recipe left out or done in an older way. Decisions are
made on train and val; top-1 is that of the final file on the test split, and all files of a seed are timed in one run.
Prints the mean and the range over the seeds, and writes data/reports/bench/ablation.json. About a quarter of an hour a
seed on two quiet cores.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import onnx
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import benchmark, finetune, prune, quantize, reduce
from tasks.core import backbone, config, costs, files, graph, importance, masks, paths, training
from tasks.core.errors import StageError, run
from tasks.core.export import export

REPORT = ROOT / paths.REPORTS / "bench" / "ablation.json"
TRAIN, VAL, TEST = (ROOT / path for path in (paths.TRAIN, paths.VAL, paths.TEST))
REFERENCE, RECIPE = "fine-tuned, fp32", "the recipe"
STEP = 1 / 32
COLUMNS = {"top1": "{:.2%}", "size_bytes": "{:,.0f}", "zst_bytes": "{:,.0f}", "latency_p50_ms": "{:.3f}"}
HEADER = f"{'':36} {'top-1':>24} {'bytes':>30} {'.zst bytes':>30} {'p50 ms':>24}"


class Job(NamedTuple):
    """What the rows of a seed start from."""

    params: config.Params
    teacher: nn.Module
    spec: backbone.Spec
    table: costs.Table
    folder: Path


def compressed(job: Job, **changes: Any) -> prune.Pruned:
    """The masked network by the recipe, with changes to its section `prune`; the budget without the drop."""
    budget = job.params.compress
    if budget is None or budget.max_size_bytes is None:
        raise StageError("params.yaml has no compress.max_size_bytes: the ablation is of a recipe with a budget")
    limits = budget.model_copy(update={"max_top1_drop": None})
    params = job.params.prune.model_copy(update=changes)
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        checkpoint = Path(scratch) / "checkpoint.pt"
        return prune.compress(job.teacher, job.spec, limits, params, job.table, TRAIN, VAL, checkpoint)


def untaught(job: Job) -> prune.Pruned:
    """Recovery from the labels alone."""
    recovery = job.params.prune.recovery
    return compressed(job, recovery=recovery and recovery.model_copy(update={"teacher_share": 0.0}))


def by_norm(job: Job) -> prune.Pruned:
    """Channels by the squared L2 norm of what makes them, over the mean of their group, instead of by Taylor."""

    @torch.no_grad()
    def norms(_net: nn.Module, groups: list[Any], _batches: Any) -> list[Tensor]:
        scores = []
        for group in groups:
            total = torch.zeros(len(group[0].idxs))
            for dep, indices in group:
                weight = getattr(dep.target.module, "weight", None)
                if weight is not None and weight.ndim > 1 and masks.side_of(dep) == "out":
                    total += (weight.reshape(len(weight), -1) ** 2).sum(1)[indices]
            scores.append(total / total.mean())
        return scores

    with patch.object(importance, "taylor", norms):
        return compressed(job)


def channels_alone(job: Job) -> prune.Pruned:
    """No residual block goes."""
    with patch.object(importance, "blocks", lambda *_: {}):
        return compressed(job)


def uniform(job: Job, found: prune.Pruned) -> prune.Pruned:
    """The recipe's blocks, and one share of the channels of every group, the least that leaves as few parameters."""
    images, held_out = (training.Images(split, job.spec.preprocessing, job.spec.classes) for split in (TRAIN, VAL))
    example, head = torch.zeros(2, *job.spec.preprocessing.shape), backbone.head(job.teacher)
    aim, ratio = prune.sparsity(found.net)["nonzero_parameters"], 0.0
    while True:
        ratio += STEP
        slim = copy.deepcopy(job.teacher)
        masks.remove_blocks(slim, [block["name"] for block in found.plan["blocks"]])
        removed = masks.remove_channels(slim, config.Channels(ratio=ratio), example, head)
        if prune.sparsity(slim)["parameters"] <= aim:
            break
    plan = {"channels": removed, "float32": found.plan["float32"]}
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        checkpoint = Path(scratch) / "checkpoint.pt"
        return prune.finish(job.teacher, slim, plan, job.params.prune, images, held_out, checkpoint)


def written(job: Job, name: str, net: nn.Module, float32: list[str]) -> dict[str, Path]:
    """The files of a row: masked fp32, quantized, and reduced."""
    folder = job.folder / name.replace(" ", "-").replace(",", "")
    folder.mkdir()
    made = {stage: folder / f"{stage}.onnx" for stage in ("prune", "quantize", "reduce")}
    export(net, job.spec, made["prune"])
    images = quantize.calibration_images(TRAIN, job.spec.classes, job.params.quantize.calibration_images)
    model = quantize.quantize(made["prune"], images, job.spec.preprocessing, job.params.quantize, float32)
    onnx.save(model, made["quantize"])
    onnx.save(reduce.reduce(model)[0], made["reduce"])
    return made


def heavy(quantized: Path, target: Path) -> Path:
    """The reduced model without what `reduce` does to all that is not weight."""
    with patch.multiple(reduce, lighten=lambda _: None, share=lambda _: None, rename=lambda _: None):
        onnx.save(reduce.reduce(onnx.load(quantized))[0], target)
    return target


ROWS: dict[str, Callable[[Job], prune.Pruned]] = {
    "no distillation": untaught,
    "channels by norm, not by Taylor": by_norm,
    "no blocks go": channels_alone,
    "no recovery": lambda job: compressed(job, recovery=None),
}


def measure(params: config.Params, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """By row, top-1, bytes, .zst bytes and milliseconds of one seed; a row that no network meets is left out."""
    first = params.finetune.model_copy(update={"training": params.finetune.training.model_copy(update={"seed": seed})})
    training.make_deterministic(seed)
    teacher, spec = finetune.start(first, params.classes, params.model)
    finetune.finetune(teacher, spec, first, TRAIN, VAL, folder / "finetune.pt")
    if params.prune.recovery:
        schedule = params.prune.recovery.training.model_copy(update={"seed": seed})
        recovery = params.prune.recovery.model_copy(update={"training": schedule})
        params = params.model_copy(update={"prune": params.prune.model_copy(update={"recovery": recovery})})
    job = Job(params, teacher, spec, costs.read(ROOT / paths.DEVICE), folder)
    models = {REFERENCE: folder / "finetune.onnx"}
    export(teacher, spec, models[REFERENCE])
    print(RECIPE, flush=True)
    found = compressed(job)
    own = written(job, RECIPE, found.net, found.plan["float32"])
    models[RECIPE] = own["reduce"]
    models["masked, not removed"] = own["quantize"]
    models["names, scales, int32 biases stay"] = heavy(own["quantize"], folder / "heavy.onnx")
    models["fp32 of the same shape"] = folder / "float.onnx"
    onnx.save(graph.in_float(onnx.load(own["reduce"])), models["fp32 of the same shape"])
    models["int8 in all layers"] = written(job, "int8", found.net, [])["reduce"]
    for name, row in (ROWS | {"one share for all groups": lambda job: uniform(job, found)}).items():
        print(name, flush=True)
        try:
            other = row(job)
        except StageError as error:
            print(f"{name}: {error}", flush=True)
            continue
        models[name] = written(job, name, other.net, other.plan["float32"])["reduce"]
    times = benchmark.latencies(models, params.benchmark)
    return {name: weighed(path, params, times[name]) for name, path in models.items()}


def weighed(model: Path, params: config.Params, times: Any) -> dict[str, float]:
    actual, _ = benchmark.dataset.columns(TEST, params.classes)
    predicted = benchmark.answers(model, TEST, params.benchmark.threads)
    weight = benchmark.weight(model)
    return {
        "top1": benchmark.accuracy(actual, predicted, params.classes)["top1"],
        "size_bytes": weight["size_bytes"],
        "zst_bytes": weight["zst_bytes"],
        "latency_p50_ms": benchmark.latency(times)["latency_p50_ms"],
    }


def line(name: str, rows: list[dict[str, float]]) -> str:
    """A row of the table: mean (least to most)."""
    cells = []
    for (key, form), width in zip(COLUMNS.items(), (24, 30, 30, 24), strict=True):
        values = [row[key] for row in rows]
        text = f"{form} ({form} to {form})".format(mean(values), min(values), max(values))
        cells.append(f"{text:>{width}}")
    return f"{name:36} {' '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many fine-tunings and compressions")
    seeds = parser.parse_args().seeds
    if not TRAIN.exists():
        raise StageError(f"{paths.TRAIN} is missing: run `make run` first")
    params = config.load(ROOT / paths.PARAMS)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
            for name, row in measure(params, seed, Path(scratch)).items():
                table.setdefault(name, []).append(row)
        files.write_json(REPORT, {"seeds": seed + 1, "processor": benchmark.processor(), "rows": table})
    print("", HEADER, *(line(name, rows) for name, rows in table.items()), sep="\n")
    reference, own = table[REFERENCE], table[RECIPE]
    pairs = list(zip(reference, own, strict=True))
    for what, key in (("smaller", "size_bytes"), ("faster", "latency_p50_ms")):
        ratios = [before[key] / after[key] for before, after in pairs]
        print(f"the recipe is {mean(ratios):.1f} times {what} ({min(ratios):.1f} to {max(ratios):.1f})")
    packed = [before["size_bytes"] / after["zst_bytes"] for before, after in pairs]
    drops = [(before["top1"] - after["top1"]) * 100 for before, after in pairs]
    print(f"packed {mean(packed):.1f} times ({min(packed):.1f} to {max(packed):.1f})")
    print(f"and loses {mean(drops):.2f} points of top-1 ({min(drops):.2f} to {max(drops):.2f})")


if __name__ == "__main__":
    run(main)
