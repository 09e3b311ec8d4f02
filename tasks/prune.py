"""prune: decide what goes, zero it, and train what is left; the physical shape stays."""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tasks.budget import allocation, costs
from tasks.budget.plan import Block, Plan
from tasks.core import config, files, paths, shares
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.nets import backbone, distillation, importance, masks, processes, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export

TAYLOR_IMAGES, TAYLOR_BATCH = 1024, 32  # at most: scoring needs no more memory than training
MARGIN = costs.Cost(
    0.97, 0.85
)  # of a limit: what is planned and what is measured differ by less, if the machine is the same
RELAX_FACTOR = 1.5  # from one try to the next, where what fits the budget does not hold the top-1
TRIES = 4


def decide(slim: nn.Module, params: config.Prune, val: training.Images, head: str) -> Plan:
    """Remove blocks and channels from the network physically, and zero single weights; returns the plan."""
    plan = Plan()
    example = torch.stack([val[index][0] for index in range(2)])
    if params.blocks:
        plan.blocks, plan.block_scores = _blocks(slim, params.blocks, val, example)
        masks.cut_blocks(slim, [block.name for block in plan.blocks])
    if params.channels:
        plan.channels, plan.groups = masks.cut_channels(slim, params.channels, example, head)
    if params.weights:
        plan.weights = masks.zero_weights(slim, params.weights)
    return plan


def _blocks(
    net: nn.Module, params: config.Blocks, val: training.Images, example: Tensor
) -> tuple[list[Block], dict[str, float] | None]:
    """The residual blocks that go and why; by the threshold, with the scores of those that stay, too."""
    if params.threshold is None:
        return _least_missed(net, params.remove or 0, val, example), None
    scores = masks.block_scores(net, masks.residual_blocks(net, example))
    gone = [Block(name=name, score=score) for name, score in scores.items() if score < params.threshold]
    if not gone:
        lowest = f"the lowest of {len(scores)} is {min(scores.values()):.3f}" if scores else "this backbone has none"
        print(f"no residual block is under prune.blocks.threshold {params.threshold:g}: {lowest}", flush=True)
    return gone, scores


def _least_missed(net: nn.Module, count: int, val: training.Images, example: Tensor) -> list[Block]:
    effects = importance.blocks(net, example, lambda: training.evaluate(net, val)[1])
    if count > len(effects):
        raise StageError(f"prune.blocks.remove is {count}, but this backbone has {len(effects)} residual blocks")
    chosen = sorted(effects, key=effects.__getitem__)[:count]
    return [Block(name=name, val_loss_increase=effects[name]) for name in chosen]


class Pruned(NamedTuple):
    """The masked network in the teacher's shape, the plan, and recovery's history (empty without recovery)."""

    net: nn.Module
    plan: Plan
    history: list[dict[str, float]]


def prune(teacher: nn.Module, spec: Spec, params: config.Prune, train: Path, val: Path, checkpoint: Path) -> Pruned:
    """Prune by the shares that the parameters name."""
    images, held_out = (training.Images(split, spec.preprocessing, spec.classes) for split in (train, val))
    slim = copy.deepcopy(teacher)
    plan = decide(slim, params, held_out, backbone.head(teacher))
    return finish(teacher, slim, plan, params, images, held_out, checkpoint)


# Seven parameters: two networks with what tells them apart, and the two splits and the file of the training.
def finish(
    teacher: nn.Module,
    slim: nn.Module,
    plan: Plan,
    params: config.Prune,
    images: training.Images,
    held_out: training.Images,
    checkpoint: Path,
) -> Pruned:
    """Recover the slim network and put it back into the teacher's shape."""
    example = torch.stack([held_out[index][0] for index in range(2)])
    full = build_masked(teacher, slim, plan.channels, example)  # refuses, if at all, before hours of recovery
    history: list[dict[str, float]] = []
    if params.recovery:
        hold = masks.hold_zeros(slim.to(training.device()), backbone.head(teacher))
        history = distillation.distill(
            slim, teacher, params.recovery, images, held_out, checkpoint=checkpoint, after_step=hold
        )
        full = build_masked(teacher, slim, plan.channels, example)
    return Pruned(full, plan, history)


Survey = tuple[object, list[object], list[Tensor], allocation.Network]  # graph, groups, scores, and what to choose from


def survey_channels(
    net: nn.Module,
    effects: dict[str, float],
    train: training.Images,
    example: Tensor,
    head: str,
    batch: int = TAYLOR_BATCH,
) -> Survey:
    """The network's DepGraph, its groups, their scores on training images, and what `allocation` chooses from."""
    net.to(memory_format=torch.channels_last)
    with masks.known_structure():
        graph, groups = masks.channel_groups(net, example, head)
        chosen = torch.linspace(0, len(train) - 1, min(len(train), TAYLOR_IMAGES)).long().tolist()
        batches: importance.Batches = DataLoader(Subset(train, chosen), batch)  # type: ignore[arg-type]
        scores = importance.taylor(net, groups, track(batches, "scoring channels", -(-len(chosen) // batch)))
        return graph, groups, scores, importance.network(net, groups, scores, effects, example)


def prune_to_limits(
    slim: nn.Module,
    limits: allocation.Limits,
    whole: allocation.Network,
    effects: dict[str, float],
    table: costs.Table,
    look: Callable[..., Any],
) -> Plan:
    """Remove what has to go for the limits from the network, in place; returns the plan.

    Blocks first; what is left is then surveyed again, by `look`, since channels are missed otherwise without them.
    """
    first = allocation.allocate(whole, limits, table)
    masks.cut_blocks(slim, first.blocks)
    left = {name: effect for name, effect in effects.items() if name not in first.blocks}
    graph, groups, scores, network = look(slim, left)
    plan = allocation.allocate(network._replace(blocks={}), limits, table)  # their sums cost; they stay
    with masks.known_structure():
        removed, cut = masks.cut(slim, graph, groups, scores, plan.widths)
    last = {step.group: step for step in plan.steps}
    for number, group in enumerate(cut):
        group.last_score = last[number].score if number in last else None
    return Plan(
        size_bytes=plan.cost.size_bytes,
        latency_ms=plan.cost.latency_ms,
        blocks=[
            Block(name=step.block, val_loss_increase=effects[step.block], **step.saves._asdict())
            for step in first.steps
            if step.block is not None
        ],
        channels=removed,
        groups=cut,
        float32=plan.float32,
    )


# Eight parameters: the models, what is asked, and the two splits and the file that every attempt uses.
def compress(
    teacher: nn.Module,
    spec: Spec,
    budget: config.Compress,
    params: config.Prune,
    table: costs.Table,
    train: Path,
    val: Path,
    checkpoint: Path,
) -> Pruned:
    """The network that fits the budget with the least damage; without sizes in it, the smallest that holds the top-1.

    All decisions are made on train and val. `StageError` if no network fits, with the nearest that was found.
    """
    images, held_out = (training.Images(split, spec.preprocessing, spec.classes) for split in (train, val))
    head, example = backbone.head(teacher), torch.stack([held_out[index][0] for index in range(2)])
    reference, _ = training.evaluate(teacher, held_out)
    batch = min(TAYLOR_BATCH, params.recovery.training.batch_size) if params.recovery else TAYLOR_BATCH

    def look(net: nn.Module, effects: dict[str, float]) -> Any:
        return survey_channels(net, effects, images, example, head, batch)

    def attempt(limits: allocation.Limits) -> Attempt:
        slim = copy.deepcopy(teacher)
        plan = prune_to_limits(slim, limits, whole, effects, table, look)
        if params.weights:
            plan.weights = masks.zero_weights(slim, params.weights)
        key = hashlib.sha256(repr(plan).encode()).hexdigest()[:8]  # of another table comes another network
        path = checkpoint.with_stem(f"{checkpoint.stem}-{key}")
        pruned = finish(teacher, slim, plan, params, images, held_out, path)
        drop = shares.subtract(reference, training.evaluate(pruned.net, held_out)[0])
        print(f"{plan.size_bytes:,.0f} bytes and {plan.latency_ms:.3f} ms: val top-1 {-drop:+.2%}", flush=True)
        holds = budget.max_top1_drop is None or drop <= budget.max_top1_drop
        return Attempt(pruned, costs.Cost(plan.size_bytes, plan.latency_ms), drop, holds)

    effects = importance.blocks(teacher, example, lambda: training.evaluate(teacher, held_out)[1])
    *_, whole = look(copy.deepcopy(teacher), effects)
    if budget.max_size_bytes is None and budget.max_latency_ms is None:
        ends = [allocation.allocate(whole, limits, table).cost for limits in (allocation.UNLIMITED, allocation.MINIMAL)]
        found = _smallest(attempt, *ends)
    else:
        found = _fitting(attempt, budget)
    return found.pruned


class Attempt(NamedTuple):
    """A recovered network, what it costs by the table, what val top-1 it lost, and whether that is allowed."""

    pruned: Pruned
    cost: costs.Cost
    drop: float
    holds: bool


Try = Callable[[allocation.Limits], Attempt]


def _fitting(attempt: Try, budget: config.Compress) -> Attempt:
    asked = (budget.max_size_bytes, budget.max_latency_ms)
    limits = allocation.Limits(*(limit and limit * margin for limit, margin in zip(asked, MARGIN, strict=True)))
    found = attempt(limits)
    if found.holds and not any(limits.exceeded(found.cost)):
        return found
    for _ in range(TRIES):
        if found.holds:
            break
        loose = [limit and max(limit, cost) * RELAX_FACTOR for limit, cost in zip(limits, found.cost, strict=True)]
        limits = allocation.Limits(*loose)
        found = attempt(limits)
    size, latency = (
        math.ceil(value / margin * unit) / unit
        for value, margin, unit in zip(found.cost, MARGIN, (1e-3, 1e3), strict=True)
    )
    values = ", ".join(f"{name} {value:g}" for name, value in budget if value is not None)
    raise StageError(
        f"no network was found for compress in params.yaml ({values}): the nearest "
        f"{'that holds has' if found.holds else 'does not hold either, and has'} max_size_bytes {size:.0f}, "
        f"max_latency_ms {latency:g} and max_top1_drop {round_up_drop(found.drop):g}"
    )


def round_up_drop(drop: float) -> float:
    """With four digits, so that it holds when it is given as the limit."""
    return math.ceil(round(max(drop, 0) * 1e4, 5)) / 1e4


def _smallest(attempt: Try, whole: costs.Cost, least: costs.Cost) -> Attempt:
    """By bisection of the way from the whole network to the least that can be left of it, on a logarithmic scale."""
    low, high, best = 0.0, 1.0, None
    for _ in range(TRIES):
        middle = (low + high) / 2
        shares = [a * (b / a) ** middle for a, b in zip(whole, least, strict=True)]
        found = attempt(allocation.Limits(*shares))
        if found.holds:
            low, best = middle, found
        else:
            high = middle
    if best is None:
        raise StageError(
            f"compress.max_top1_drop in params.yaml cannot be held: already at {found.cost.size_bytes:,.0f} bytes the "
            f"drop is {round_up_drop(found.drop):g}; allow more, or give prune.recovery more epochs"
        )
    return best


@torch.no_grad()
def build_masked(teacher: nn.Module, slim: nn.Module, removed: masks.Removed, images: Tensor) -> nn.Module:
    """The slim network's function in the teacher's shape; `StageError` if the images tell them apart."""
    full = copy.deepcopy(teacher)
    masks.scatter(slim, full, removed)
    expected, found = slim.eval()(images), full.eval()(images)
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        gap = float((expected - found).abs().max())
        raise StageError(f"the masked network differs from the slim one by {gap:g}: this backbone cannot be masked")
    return full


def sparsity(net: nn.Module) -> dict[str, int]:
    """How many parameters there are, and how many are not zero."""
    parameters = list(net.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in parameters),
    }


def main() -> None:
    everything = config.load()
    params, budget = everything.prune, everything.compress
    if params.recovery and processes.run_together(main, params.recovery.training.devices):
        return
    teacher, spec = backbone.load(paths.weights("finetune"), paths.spec("finetune"))
    recovery = params.recovery.training if params.recovery else None
    training.make_deterministic(recovery.seed if recovery else 0, recovery.threads if recovery else None)
    inputs = (paths.TRAIN, paths.VAL, paths.weights("finetune"))
    checkpoint = training.checkpoint_path("prune", *inputs, described_by=(params, spec))
    if budget:
        table = costs.read(paths.DEVICE)
        net, plan, history = compress(teacher, spec, budget, params, table, paths.TRAIN, paths.VAL, checkpoint)
    else:
        net, plan, history = prune(teacher, spec, params, paths.TRAIN, paths.VAL, checkpoint)
    processes.end_helpers()
    top1, loss = training.evaluate(net, training.Images(paths.VAL, spec.preprocessing, spec.classes))
    metrics = {"val_top1": top1, "val_loss": loss, **sparsity(net)}
    backbone.save(net, spec, paths.weights("prune"), paths.spec("prune"))
    files.write_json(paths.PLAN, plan.to_json())
    export(net, spec, paths.onnx("prune"))
    training.write_history(paths.history("prune"), history)
    files.write_json(paths.report("prune"), metrics)
    files.forget("prune")
    left = metrics["nonzero_parameters"] / metrics["parameters"]
    print(f"prune: val top-1 {top1:.2%} with {left:.1%} of the parameters left")


if __name__ == "__main__":
    run(main)
