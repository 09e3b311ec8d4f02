"""prune: decide what goes, zero it, and recover by distillation; the physical shape stays."""

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.core import backbone, config, files, masks, paths, training
from tasks.core.backbone import Spec
from tasks.core.errors import StageError, run
from tasks.core.export import export
from tasks.core.progress import track


def decide(slim: nn.Module, params: config.Prune, val: training.Images, head: str) -> dict[str, Any]:
    """Remove blocks and channels from the network physically, and zero single weights; returns the plan."""
    plan: dict[str, Any] = {"blocks": [], "channels": {}, "weights": {}}
    example = torch.stack([val[index][0] for index in range(2)])
    if params.blocks:
        plan["blocks"] = _least_missed(slim, params.blocks, val, example)
        masks.remove_blocks(slim, [block["name"] for block in plan["blocks"]])
    if params.channels:
        plan["channels"] = masks.remove_channels(slim, params.channels, example, head)
    if params.weights:
        plan["weights"] = masks.zero_weights(slim, params.weights)
    return plan


def _least_missed(net: nn.Module, params: config.Blocks, val: training.Images, example: Tensor) -> list[dict[str, Any]]:
    names = masks.residual_blocks(net, example)
    if params.remove > len(names):
        raise StageError(f"prune.blocks.remove is {params.remove}, but this backbone has {len(names)} residual blocks")
    _, before = training.evaluate(net, val)
    effects = list(
        track(masks.block_effects(net, names, lambda: training.evaluate(net, val)[1]), "trying blocks", len(names))
    )
    chosen = sorted(effects, key=lambda effect: effect.val_loss)[: params.remove]
    return [{"name": effect.name, "val_loss_increase": effect.val_loss - before} for effect in chosen]


def recover(
    slim: nn.Module,
    teacher: nn.Module,
    params: config.Recovery,
    train: training.Images,
    val: training.Images,
    **fit: Any,
) -> list[dict[str, float]]:
    """Train the slim network, in place, to answer as the teacher does; zeros stay zero. Returns the history."""
    where = training.device()
    slim.to(where)
    teacher.to(where).eval()

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.inference_mode():
            target = teacher(images)
        hard = functional.cross_entropy(logits, labels, label_smoothing=params.training.label_smoothing)
        return params.teacher_share * distance(logits, target, params.temperature) + (1 - params.teacher_share) * hard

    history = training.fit(slim, train, val, loss, params.training, **fit)
    slim.cpu()
    teacher.cpu()
    return history


def distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers, times T^2 (Hinton et al. 2015, arXiv:1503.02531, section 2)."""
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def prune(
    teacher: nn.Module, spec: Spec, params: config.Prune, train: Path, val: Path, checkpoint: Path
) -> tuple[nn.Module, dict[str, Any], list[dict[str, float]]]:
    """The masked network in the teacher's shape, the plan, and recovery's history (empty without recovery)."""
    held_out = training.Images(val, spec.preprocessing, spec.classes)
    head = backbone.head(teacher)
    slim = copy.deepcopy(teacher)
    plan = decide(slim, params, held_out, head)
    example = torch.stack([held_out[index][0] for index in range(2)])
    full = masked(teacher, slim, plan["channels"], example)  # refuses, if at all, before hours of recovery
    history: list[dict[str, float]] = []
    if params.recovery:
        images = training.Images(train, spec.preprocessing, spec.classes, params.recovery.training.augment)
        hold = masks.hold_zeros(slim.to(training.device()), head)
        history = recover(slim, teacher, params.recovery, images, held_out, checkpoint=checkpoint, after_step=hold)
        full = masked(teacher, slim, plan["channels"], example)
    return full, plan, history


def readable(removed: masks.Removed) -> dict[str, dict[str, str]]:
    """The removed channels as ranges: [0, 1, 2, 7] is "0-2,7"."""

    def ranges(numbers: list[int]) -> str:
        runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
        bounds = [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]
        return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in bounds)

    return {name: {side: ranges(numbers) for side, numbers in sides.items()} for name, sides in removed.items()}


@torch.no_grad()
def masked(teacher: nn.Module, slim: nn.Module, removed: masks.Removed, images: Tensor) -> nn.Module:
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
    params = config.load().prune
    teacher, spec = backbone.load(paths.weights("finetune"), paths.spec("finetune"))
    training.make_deterministic(params.recovery.training.seed if params.recovery else 0)
    inputs = (paths.TRAIN, paths.VAL, paths.weights("finetune"))
    checkpoint = training.checkpoint_path("prune", *inputs, params=params, spec=spec)
    net, plan, history = prune(teacher, spec, params, paths.TRAIN, paths.VAL, checkpoint)
    top1, loss = training.evaluate(net, training.Images(paths.VAL, spec.preprocessing, spec.classes))
    metrics = {"val_top1": top1, "val_loss": loss, **sparsity(net)}
    backbone.save(net, spec, paths.weights("prune"), paths.spec("prune"))
    files.write_json(paths.PLAN, plan | {"channels": readable(plan["channels"])})
    export(net, spec, paths.onnx("prune"))
    training.write_history(paths.history("prune"), history)
    files.write_json(paths.report("prune"), metrics)
    training.forget("prune")
    left = metrics["nonzero_parameters"] / metrics["parameters"]
    print(f"prune: val top-1 {top1:.2%} with {left:.1%} of the parameters left")


if __name__ == "__main__":
    run(main)
