"""Distillation: a network learns to answer as another one does (Hinton et al. 2015, arXiv:1503.02531)."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from tasks.core import config
from tasks.core.progress import track
from tasks.images.preprocessing import batch_of
from tasks.nets import processes, training


def distill(
    student: nn.Module,
    teacher: nn.Module,
    params: config.Recovery,
    train: training.Images,
    val: training.Images,
    **fit: Any,
) -> list[dict[str, float]]:
    """Train the student, in place, to answer as the teacher and the labels do; returns the history.

    `train` comes without augmentation: that is a part of the parameters. A teacher without a share is not asked.
    """
    where = training.device()
    student.to(where)
    teacher.to(where).eval()
    augment = params.training.augment
    images: training.Labelled = train.with_augmentation(augment)
    weights = training.class_weights(params.training, train.labels)
    if weights is not None:
        weights = weights.to(where)
    loss = training.cross_entropy(params.training.label_smoothing, weights)
    if params.teacher_share > 0 and augment.crop_scale == 1 and augment.erase == 0:
        images = Mirrored(train, augment.flip)  # the teacher has but two answers to an image
        loss = loss_of_answers(answers(teacher, train), torch.tensor(train.labels), params, weights)
    elif params.teacher_share > 0:
        loss = loss_with_teacher(teacher, params, weights)
    history = training.fit(student, images, val, loss, params.training, **fit)
    student.cpu()
    teacher.cpu()
    return history


class Mirrored:
    """Images as they are or mirrored, float32 (C, H, W), each with the row of `answers` that belongs to it."""

    def __init__(self, images: training.Images, flip: float) -> None:
        self.images, self.flip, self.labels = images, flip, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = self.images[index]
        mirrored = bool(torch.rand(()) < self.flip)
        return (image.flip(2) if mirrored else image), index + mirrored * len(self.images)


@torch.inference_mode()
def answers(teacher: nn.Module, images: training.Images) -> Tensor:
    """The teacher's logits, float32 (2 N, classes): for each image as it is, then for each mirrored."""
    where = next(chain(teacher.parameters(), teacher.buffers())).device
    size = batch_of(images.preprocessing, training.EVALUATION_BATCH)
    own = range(processes.rank(), len(images), processes.world_size())
    loader: Iterable[tuple[Tensor, Tensor]] = DataLoader(Subset(images, own), size)  # type: ignore[arg-type]
    as_is: list[Tensor] = []
    mirrored: list[Tensor] = []
    for batch, _ in track(loader, "asking the teacher", -(-len(own) // size)):
        for found, seen in ((as_is, batch), (mirrored, batch.flip(3))):
            found.append(teacher(seen.to(where, memory_format=torch.channels_last)))
    return torch.cat([processes.gather_rows(torch.cat(found), len(images)) for found in (as_is, mirrored)])


def loss_of_answers(
    targets: Tensor, labels: Tensor, params: config.Recovery, weights: Tensor | None = None
) -> training.Loss:
    """The loss of distillation from answers that are known, where `Mirrored` gives their rows as labels."""
    targets, labels = targets.clone(), labels.to(targets.device)  # a copy that autograd may see
    return lambda _, logits, rows: _loss(logits, targets[rows], labels[rows % len(labels)], params, weights)


def loss_with_teacher(teacher: nn.Module, params: config.Recovery, weights: Tensor | None = None) -> training.Loss:
    """The loss of distillation, for which the teacher sees each batch."""

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.inference_mode():
            target = teacher(images)
        return _loss(logits, target, labels, params, weights)

    return loss


def _loss(
    logits: Tensor, target: Tensor, labels: Tensor, params: config.Recovery, weights: Tensor | None = None
) -> Tensor:
    hard = functional.cross_entropy(logits, labels, weights, label_smoothing=params.training.label_smoothing)
    counted = None if weights is None else weights[labels]
    soft = distance(logits, target, params.temperature, counted)
    return params.teacher_share * soft + (1 - params.teacher_share) * hard


def distance(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of softened answers, times T^2 (Hinton et al. 2015, arXiv:1503.02531, section 2).

    The mean over the images, each of which counts as `counted` says, float32 (B,), or all alike.
    """
    found = functional.log_softmax(student / temperature, 1)
    wanted = functional.log_softmax(teacher / temperature, 1)
    if counted is None:
        return temperature**2 * functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
    each = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(1)
    return temperature**2 * (each * counted).sum() / counted.sum()
