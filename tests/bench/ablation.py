"""What each part of the default recipe buys: `python tests/bench/ablation.py [--seeds N]`, after `make run`.

For each seed the backbone is fine-tuned anew on data/prepared; then each row of the table makes its model from it for
the same budget of bytes and milliseconds, with one part of the recipe left out or done in an older way. Decisions are
made on train and val; top-1 is that of the final file on the test split, and all files of a seed are timed in one run.
Each core makes one row at a time, with one thread. Prints the mean and the range over the seeds, first of the rows
that come from the recipe's own network, and writes data/reports/bench/ablation.json. 70 minutes on 2 cores.
"""

import argparse
import contextlib
import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import onnx
from joblib import Parallel, delayed
from torch import Tensor, nn, no_grad, stack, zeros  # by name: joblib takes `torch` and `.classes` for torch.classes
from torch.nn import functional

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import benchmark, finetune, prune, quantize, reduce
from tasks.budget import allocation, costs
from tasks.budget.plan import Plan
from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, run
from tasks.graphs import calibration, graph, packing
from tasks.images import splits
from tasks.nets import backbone, distillation, importance, masks, training
from tasks.nets.export import export

REPORT = ROOT / paths.REPORTS / "bench" / "ablation.json"
TRAIN, VAL, TEST = (ROOT / path for path in (paths.TRAIN, paths.VAL, paths.TEST))
REFERENCE, RECIPE = "fine-tuned, fp32", "the recipe"
STEP = 1 / 32
ROUNDS = ((costs.Cost(2.5, 1.3), 0.4), (costs.Cost(1, 1), 0.6))  # times the limits, and the share of the epochs
LIKENESS = 3000  # weight of the features, as in the paper
answers = distillation.answers  # itself, where `known` puts what it came to in its place
COLUMNS = {"top1": "{:.2%}", "size_bytes": "{:,.0f}", "zst_bytes": "{:,.0f}", "latency_p50_ms": "{:.3f}"}
HEADER = f"{'':36} {'top-1':>24} {'bytes':>30} {'.zst bytes':>30} {'p50 ms':>24}"


class Job(NamedTuple):
    """What the rows of a seed start from."""

    seed: int
    params: config.Params
    teacher: nn.Module
    spec: backbone.Spec
    table: costs.Table
    folder: Path
    effects: dict[str, float]  # of its residual blocks
    answers: Tensor  # the teacher's


@contextlib.contextmanager
def known_structure(job: Job) -> Iterator[None]:
    """What is the same in all rows of a seed is not found out again."""
    with (
        patch.object(distillation, "answers", lambda *_: job.answers),
        patch.object(importance, "blocks", lambda *_: job.effects),
    ):
        yield


def compress(job: Job, **changes: Any) -> prune.Pruned:
    """The masked network by the recipe, with changes to its section `prune`; the budget without the drop."""
    budget = job.params.compress
    if budget is None or budget.max_size_bytes is None:
        raise StageError("params.yaml has no compress.max_size_bytes: the ablation is of a recipe with a budget")
    limits = budget.model_copy(update={"max_top1_drop": None})
    params = job.params.prune.model_copy(update=changes)
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        checkpoint = Path(scratch) / "checkpoint.pt"
        return prune.compress(job.teacher, job.spec, limits, params, job.table, TRAIN, VAL, checkpoint)


def compress_untaught(job: Job) -> prune.Pruned:
    """Recovery from the labels alone."""
    recovery = job.params.prune.recovery
    return compress(job, recovery=recovery and recovery.model_copy(update={"teacher_share": 0.0}))


def by_norm(job: Job) -> prune.Pruned:
    """Channels by the squared L2 norm of what makes them, over the mean of their group, instead of by Taylor."""

    @no_grad()
    def norms(_net: nn.Module, groups: list[Any], _batches: Any) -> list[Tensor]:
        scores = []
        for group in groups:
            total = zeros(len(group[0].idxs))
            for dep, indices in group:
                weight = getattr(dep.target.module, "weight", None)
                if weight is not None and weight.ndim > 1 and masks.side_of(dep) == "out":
                    total += (weight.reshape(len(weight), -1) ** 2).sum(1)[indices]
            scores.append(total / total.mean())
        return scores

    with patch.object(importance, "taylor", norms):
        return compress(job)


def channels_alone(job: Job) -> prune.Pruned:
    """No residual block goes."""
    with known_structure(job._replace(effects={})):
        return compress(job)


def in_rounds(job: Job) -> prune.Pruned:
    """The blocks, and a part of the channels; recovery, new scores, and the rest of the channels; recovery again."""
    budget, recovery = job.params.compress, job.params.prune.recovery
    if budget is None or recovery is None:
        raise StageError("params.yaml has no compress or no prune.recovery: there is nothing to do in rounds")
    asked = (budget.max_size_bytes, budget.max_latency_ms)
    limits = [limit and limit * margin for limit, margin in zip(asked, prune.MARGIN, strict=True)]
    images, held_out = (training.Images(split, job.spec.preprocessing, job.spec.classes) for split in (TRAIN, VAL))
    head, example = backbone.head(job.teacher), stack([held_out[index][0] for index in range(2)])
    look = functools.partial(prune.survey_channels, train=images, example=example, head=head)
    *_, whole = look(copy.deepcopy(job.teacher), job.effects)
    slim = copy.deepcopy(job.teacher)
    masks.cut_blocks(slim, allocation.allocate(whole, allocation.Limits(*limits), job.table).blocks)
    full: list[Any] = []
    for times, share in ROUNDS:
        graph, groups, scores, network = look(slim, {})
        full = full or groups
        loose = [limit and limit * more for limit, more in zip(limits, times, strict=True)]
        plan = allocation.allocate(network, allocation.Limits(*loose), job.table)
        masks.cut(slim, graph, groups, scores, plan.widths)
        schedule = recovery.training.model_copy(update={"epochs": round(share * recovery.training.epochs)})
        params = recovery.model_copy(update={"training": schedule})
        hold = masks.hold_zeros(slim, head)
        with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
            checkpoint = Path(scratch) / "checkpoint.pt"
            distillation.distill(slim, job.teacher, params, images, held_out, checkpoint=checkpoint, after_step=hold)
    removed = masks.find_zeroed_channels(slim, full, plan.widths)
    return prune.Pruned(
        prune.build_masked(job.teacher, slim, removed, example), Plan(channels=removed, float32=plan.float32), []
    )


def with_features(job: Job) -> prune.Pruned:
    """The teacher's features teach, too: by which images of a batch are alike in them, so that widths may differ.

    Tung and Mori 2019, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682, with its weight.
    """
    head, plain_distill, plain_answered = backbone.head(job.teacher), distillation.distill, distillation.loss_of_answers

    def likeness(features: Tensor) -> Tensor:
        return functional.normalize(features @ features.T)

    def distill(
        student: nn.Module,
        teacher: nn.Module,
        params: config.Recovery,
        train: training.Images,
        *others: Any,
        **fit: Any,
    ) -> list[dict[str, float]]:
        seen: list[Tensor] = []
        hook = student.get_submodule(head).register_forward_pre_hook(
            lambda _, inputs: seen.__setitem__(slice(None), inputs)
        )
        body = copy.deepcopy(teacher)
        body.set_submodule(head, nn.Identity())
        features = answers(body, train).clone()  # a copy that autograd may see

        def answered(*arguments: Any) -> training.Loss:
            inner = plain_answered(*arguments)
            return lambda images, logits, rows: (
                inner(images, logits, rows)
                + LIKENESS * functional.mse_loss(likeness(seen[0]), likeness(features[rows]))
            )

        with patch.object(distillation, "answered", answered):
            history = plain_distill(student, teacher, params, train, *others, **fit)
        hook.remove()
        return history

    with patch.object(distillation, "distill", distill):
        return compress(job)


def uniform(job: Job, found: prune.Pruned) -> prune.Pruned:
    """The recipe's blocks, and one share of the channels of every group, the least that leaves as few parameters."""
    images, held_out = (training.Images(split, job.spec.preprocessing, job.spec.classes) for split in (TRAIN, VAL))
    example, head = zeros(2, *job.spec.preprocessing.shape), backbone.head(job.teacher)
    aim, ratio = prune.sparsity(found.net)["nonzero_parameters"], 0.0
    while True:
        ratio += STEP
        slim = copy.deepcopy(job.teacher)
        masks.cut_blocks(slim, [block.name for block in found.plan.blocks])
        removed = masks.cut_channels(slim, config.Channels(ratio=ratio), example, head).removed
        if prune.sparsity(slim)["parameters"] <= aim:
            break
    plan = Plan(channels=removed, float32=found.plan.float32)
    with tempfile.TemporaryDirectory(dir=job.folder) as scratch:
        checkpoint = Path(scratch) / "checkpoint.pt"
        return prune.finish(job.teacher, slim, plan, job.params.prune, images, held_out, checkpoint)


def write_models(job: Job, name: str, net: nn.Module, float32: list[str]) -> dict[str, Path]:
    """The files of a row: masked fp32, quantized, and reduced."""
    folder = job.folder / name.replace(" ", "-").replace(",", "")
    folder.mkdir()
    made = {stage: folder / f"{stage}.onnx" for stage in ("prune", "quantize", "reduce")}
    export(net, job.spec, made["prune"])
    images = quantize.calibration_images(TRAIN, job.spec.classes, job.params.quantize.calibration_images)
    model = calibration.quantize(made["prune"], images, job.spec.preprocessing, job.params.quantize, float32)
    onnx.save(model, made["quantize"])
    onnx.save(reduce.reduce(model)[0], made["reduce"])
    return made


def heavy(quantized: Path, target: Path) -> Path:
    """The reduced model without what `reduce` does to all that is not weight."""
    with patch.multiple(reduce, lighten=lambda _: None, share=lambda _: None, rename=lambda _: None):
        onnx.save(reduce.reduce(onnx.load(quantized))[0], target)
    return target


def own_files(job: Job, found: prune.Pruned) -> dict[str, Path]:
    """The recipe's final file, and what it would be without one of the later steps."""
    made = write_models(job, RECIPE, found.net, found.plan.float32)
    in_float = job.folder / "float32.onnx"
    onnx.save(graph.in_float(packing.unpack(onnx.load(made["reduce"]))), in_float)
    return {
        RECIPE: made["reduce"],
        "masked, not removed": made["quantize"],
        "names, scales, int32 biases stay": heavy(made["quantize"], job.folder / "heavy.onnx"),
        "int8 in all layers": write_models(job, "int8", found.net, [])["reduce"],
        "fp32 of the same shape": in_float,
    }


ROWS: dict[str, Callable[[Job, prune.Pruned], prune.Pruned]] = {
    "no recovery": lambda job, _: compress(job, recovery=None),
    "channels by norm, not by Taylor": lambda job, _: by_norm(job),
    "one share for all groups": uniform,
    "no blocks go": lambda job, _: channels_alone(job),
    "two rounds": lambda job, _: in_rounds(job),
    "no distillation": lambda job, _: compress_untaught(job),
    "distillation of features, too": lambda job, _: with_features(job),
}


def begin(params: config.Params, seed: int, scratch: Path) -> tuple[Job, prune.Pruned, dict[str, Path]]:
    """Fine-tune the backbone with this seed, and go by the recipe; the rows' training has the seed, too."""
    folder = scratch / str(seed)
    folder.mkdir()
    training.make_deterministic(seed)
    first = params.finetune.model_copy(update={"training": params.finetune.training.model_copy(update={"seed": seed})})
    teacher, spec = finetune.start(params.model_copy(update={"finetune": first}))
    finetune.finetune(teacher, spec, first, TRAIN, VAL, folder / "finetune.pt")
    export(teacher, spec, folder / "finetune.onnx")
    recovery = params.prune.recovery
    if recovery:
        recovery = recovery.model_copy(update={"training": recovery.training.model_copy(update={"seed": seed})})
    params = params.model_copy(update={"prune": params.prune.model_copy(update={"recovery": recovery})})
    images, held_out = (training.Images(split, spec.preprocessing, spec.classes) for split in (TRAIN, VAL))
    example = stack([held_out[index][0] for index in range(2)])
    effects = importance.blocks(teacher, example, lambda: training.evaluate(teacher, held_out)[1])
    table = costs.read(ROOT / paths.DEVICE, params.benchmark.threads)
    job = Job(seed, params, teacher, spec, table, folder, effects, answers(teacher.eval(), images))
    with known_structure(job):
        found = compress(job)
    return job, found, {REFERENCE: folder / "finetune.onnx"} | own_files(job, found)


def another(name: str, job: Job, found: prune.Pruned) -> dict[str, Path]:
    """The final file of a row, by its name; none where the row finds no network."""
    training.make_deterministic(job.seed)
    try:
        with known_structure(job):
            other = ROWS[name](job, found)
        made = write_models(job, name, other.net, other.plan.float32)["reduce"]
    except StageError as error:
        print(f"{name}, seed {job.seed}: {error}", flush=True)
        return {}
    print(f"{name}, seed {job.seed}: {made.stat().st_size:,} bytes", flush=True)
    return {name: made}


def measure(models: dict[str, Path], params: config.Params) -> dict[str, dict[str, float]]:
    """Top-1, bytes, .zst bytes and milliseconds of a seed's files, which take turns."""
    times = benchmark.latencies(models, params.benchmark)
    return {name: weigh(path, params, times[name]) for name, path in models.items()}


def weigh(model: Path, params: config.Params, times: Any) -> dict[str, float]:
    actual, _ = splits.columns(TEST, config.class_names(params))
    predicted = benchmark.answers(model, TEST, params.benchmark.threads)
    weight = benchmark.weight(model)
    return {
        "top1": benchmark.accuracy(actual, predicted, config.class_names(params))["top1"],
        "size_bytes": weight["size_bytes"],
        "zst_bytes": weight["zst_bytes"],
        "latency_p50_ms": benchmark.latency(times).latency_p50_ms,
    }


def line(name: str, rows: list[dict[str, float]]) -> str:
    """A row of the table: mean (least to most)."""
    cells = []
    for (key, form), width in zip(COLUMNS.items(), (24, 30, 30, 24), strict=True):
        values = [row[key] for row in rows]
        text = f"{form} ({form} to {form})".format(mean(values), min(values), max(values))
        cells.append(f"{text:>{width}}")
    return f"{name:36} {' '.join(cells)}"


def report(params: config.Params, models: list[dict[str, Path]]) -> None:
    """Measure all that is made, print the table, and write it."""
    seeds = [measure(made, params) for made in models]
    names = dict.fromkeys(name for rows in seeds for name in rows)
    table = {name: [rows[name] for rows in seeds if name in rows] for name in names}
    files.write_json(REPORT, {"seeds": len(seeds), "processor": machine.processor(), "rows": table})
    print("", HEADER, *(line(name, rows) for name, rows in table.items()), sep="\n")
    pairs = list(zip(table[REFERENCE], table[RECIPE], strict=True))
    claims = {
        "times smaller": [before["size_bytes"] / after["size_bytes"] for before, after in pairs],
        "times smaller as .zst": [before["size_bytes"] / after["zst_bytes"] for before, after in pairs],
        "times faster": [before["latency_p50_ms"] / after["latency_p50_ms"] for before, after in pairs],
        "points of top-1 lost": [(before["top1"] - after["top1"]) * 100 for before, after in pairs],
    }
    for name, values in claims.items():
        print(f"the recipe, {name}: {mean(values):.2f} ({min(values):.2f} to {max(values):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many fine-tunings and compressions")
    seeds = parser.parse_args().seeds
    if not TRAIN.exists():
        raise StageError(f"{paths.TRAIN} is missing: run `make run` first")
    params = config.load(ROOT / paths.PARAMS)
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, Parallel(n_jobs=-1) as cores:
        begun = cores(delayed(begin)(params, seed, Path(scratch)) for seed in range(seeds))
        models = [own for *_, own in begun]
        report(params, models)
        rows = [(name, seed) for name in ROWS for seed in range(seeds)]
        made = cores(delayed(another)(name, *begun[seed][:2]) for name, seed in rows)
        for (_, seed), row in zip(rows, made, strict=True):
            models[seed] |= row
        report(params, models)


if __name__ == "__main__":
    run(main)
