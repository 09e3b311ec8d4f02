"""The training loop that fine-tuning and recovery share: deterministic, resumable, with its history."""

import copy
import functools
import hashlib
import io
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError
from tasks.core.progress import track
from tasks.images import splits
from tasks.images.preprocessing import Preprocessing, batch_of, decode, normalize
from tasks.images.preprocessing import fit as fit_image
from tasks.nets import processes

Pixels = npt.NDArray[np.uint8]  # (C, H, W)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, logits, labels -> scalar


class Labelled(Protocol):
    """What can be trained on: float32 (C, H, W) and a number that the loss knows, such as that of the class.

    `labels` has the class number of each.
    """

    labels: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


EVALUATION_BATCH = 250
KEPT_BYTES = 2**29  # of pixels; a split that has more is decoded in every epoch
SHARED = Path("/dev/shm")  # noqa: S108  # the memory that processes share
SHARED_BYTES = 2**30  # that batches on their way between processes may take


class Images:
    """A split as a map-style dataset: float32 (C, H, W) and class number; augmented if `augment` is given."""

    def __init__(
        self, path: Path, preprocessing: Preprocessing, classes: tuple[str, ...], augment: config.Augment | None = None
    ) -> None:
        self.images: Sequence[bytes]
        self.images, self.labels = splits.read(path, classes)
        self.preprocessing = preprocessing
        self.pixels = _reader(preprocessing, len(self.images))
        plain = _plain(preprocessing, self.pixels)
        self.prepare = _make_augmentation(augment, preprocessing, self.pixels) if augment else plain

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.prepare(self.images[index]), self.labels[index]

    def with_augmentation(self, augment: config.Augment) -> "Images":
        """The same images, changed at random each time."""
        other = copy.copy(self)
        other.prepare = _make_augmentation(augment, self.preprocessing, self.pixels)
        return other


def _reader(preprocessing: Preprocessing, count: int) -> Callable[[bytes], Pixels]:
    """What decodes an image, and remembers it where that many of them fit into each process that decodes."""
    read = functools.partial(fit_image, preprocessing=preprocessing)
    most = KEPT_BYTES // max(1, _workers(device()))
    return functools.cache(read) if count * math.prod(preprocessing.shape) <= most else read


def _plain(preprocessing: Preprocessing, pixels: Callable[[bytes], Pixels]) -> Callable[[bytes], Tensor]:
    return lambda data: torch.from_numpy(normalize(pixels(data), preprocessing))


def _make_augmentation(
    augment: config.Augment, preprocessing: Preprocessing, pixels: Callable[[bytes], Pixels]
) -> Callable[[bytes], Tensor]:
    flip, erase = v2.RandomHorizontalFlip(augment.flip), v2.RandomErasing(augment.erase)
    if augment.crop_scale == 1:  # what evaluation sees; v2's crop takes thrice as long to make it
        plain = _plain(preprocessing, pixels)
        return lambda data: erase(flip(plain(data)))
    crop = v2.RandomResizedCrop(preprocessing.size, scale=(augment.crop_scale, 1.0))
    in_range = v2.ToDtype(torch.float32, scale=True)
    normalize = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    steps = v2.Compose([crop, flip, v2.ToImage(), in_range, normalize, erase])
    return lambda data: steps(decode(data, preprocessing))


def device() -> torch.device:
    """CUDA, else Apple's MPS, which is for one process only, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() and processes.world_size() == 1 else "cpu")


def make_deterministic(seed: int, threads: int | None = None) -> None:
    """Same inputs, same machine, same bytes; `threads`, of all processes here, are as many as cores if None."""
    own = processes.threads(threads)
    if own:
        torch.set_num_threads(own)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def checkpoint_path(stage: str, *inputs: Path, described_by: tuple[BaseModel, ...]) -> Path:
    """Where a run of this stage on these inputs keeps its checkpoint: another input, another file."""
    key = hashlib.sha256("".join(one.model_dump_json() for one in described_by).encode())
    for path in inputs:
        key.update(files.sha256(path).encode())
    return paths.CHECKPOINTS / f"{stage}-{key.hexdigest()[:16]}.pt"


def cross_entropy(label_smoothing: float, weights: Tensor | None = None) -> Loss:
    """The loss of plain supervised training; `weights` are those of the classes, float32 (classes,)."""
    return lambda _images, logits, labels: functional.cross_entropy(
        logits, labels, None if weights is None else weights.to(logits.device), label_smoothing=label_smoothing
    )


def class_weights(params: config.Training, labels: list[int]) -> Tensor | None:
    """What each class counts in the loss, float32 (classes,), 1 on average over the images; None if all count alike.

    A class with half as many images counts twice (G. King, L. Zeng, Logistic regression in rare events data, 2001).
    """
    if params.balance != "loss":
        return None
    counts = torch.bincount(torch.tensor(labels)).clamp(min=1)
    return len(labels) / (len(counts) * counts)


def evaluate(net: nn.Module, images: Images) -> tuple[float, float]:
    """Top-1 as a fraction and mean cross-entropy."""
    correct, loss = _score(net, images, range(len(images)))
    return correct / len(images), loss / len(images)


@torch.inference_mode()
def _score(net: nn.Module, images: Images, chosen: range) -> tuple[int, float]:
    """How many of the chosen images are answered right, and the sum of their cross-entropies."""
    where = next(net.parameters()).device
    net.eval()
    correct, loss, size = 0, 0.0, batch_of(images.preprocessing, EVALUATION_BATCH)
    for batch, labels in DataLoader(Subset(images, chosen), size):  # type: ignore[arg-type]
        logits = net(_to(batch, where)).cpu()
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    return correct, loss


# Seven parameters: what a training run consists of; those that are seldom given are named.
def fit(
    net: nn.Module,
    train: Labelled,
    val: Images,
    loss_of: Loss,
    params: config.Training,
    *,
    checkpoint: Path,
    after_step: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Train in place and leave the weights of the epoch with the best val top-1; returns one row per epoch.

    Where several processes train together, all of them call this, and all have the result. `after_step` runs after
    every optimizer step (masks are applied there). After each epoch everything that the next one needs is in
    `checkpoint`; a run that finds it goes on from there to the same bytes. `StageError` when the loss is not finite.
    """
    batches = Batches(train, params)
    optimizer, scheduler = _optimizer(net, params, steps=params.epochs * len(batches))
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"top1": -1.0, "state": _copy(net)}
    if checkpoint.exists():
        saved = _read(checkpoint, next(net.parameters()).device)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        history, best = saved["history"], saved["best"]
        print(f"resuming after epoch {len(history)} from {checkpoint}", flush=True)
    processes.require_agreement(net, len(history))
    together, loader = processes.average_gradients(net), _loader(train, batches, next(net.parameters()).device)
    while len(history) < params.epochs and not _has_stalled(history, params.patience):
        started = time.monotonic()
        batches.seed = _seed(params, len(history))
        loss = _epoch(together, loader, loss_of, params, optimizer, scheduler, after_step, epoch=len(history))
        processes.copy_statistics(net)
        own = _score(net, val, range(processes.rank(), len(val), processes.world_size()))
        top1, val_loss = (total / len(val) for total in processes.sum_over_processes(*own))
        history.append({"epoch": len(history) + 1, "train_loss": loss, "val_loss": val_loss, "val_top1": top1})
        if top1 > best["top1"]:
            best = {"top1": top1, "state": _copy(net)}
        if processes.rank() == 0:
            _save(checkpoint, net=net, optimizer=optimizer, scheduler=scheduler, history=history, best=best)
        print(
            f"epoch {len(history)}/{params.epochs}: loss {loss:.4f}, val loss {val_loss:.4f}, "
            f"val top-1 {top1:.2%}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    net.load_state_dict(best["state"])
    return history


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """One CSV row per epoch, for `dvc plots`."""
    columns = ("epoch", "train_loss", "val_loss", "val_top1")
    lines = [",".join(columns), *(",".join(f"{row[name]:.6g}" for name in columns) for row in history)]
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())


# Eight parameters: the state of a training run, which `fit` has in its own variables.
def _epoch(
    net: nn.Module,
    loader: "DataLoader[tuple[Tensor, Tensor]]",
    loss_of: Loss,
    params: config.Training,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    after_step: Callable[[], None] | None,
    epoch: int,
) -> float:
    torch.manual_seed(_seed(params, epoch) + processes.rank() * 1_000_003)  # of what the network draws: its dropout
    where = next(net.parameters()).device
    _train_mode(net)
    total, steps = 0.0, len(loader)
    for images, labels in track(loader, f"epoch {epoch + 1}", steps):
        images, labels = _to(images, where), labels.to(where, non_blocking=where.type == "cuda")
        with torch.autocast(where.type, torch.bfloat16, enabled=params.bf16):
            loss = loss_of(images, net(images), labels)
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise StageError(f"the loss became {value} in epoch {epoch + 1}: lower learning_rate in params.yaml")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if after_step:
            after_step()
        total += value
    return processes.sum_over_processes(total)[0] / (steps * processes.world_size())


def _seed(params: config.Training, epoch: int) -> int:
    """What is random in an epoch depends on its number, not on resuming."""
    return params.seed * 10_007 + epoch


class Batches:
    """This process's part of each batch of an epoch, as pairs of an image's number and the seed of its augmentation.

    Both depend on `seed` alone, whatever else is drawn, and however many processes there are.
    """

    def __init__(self, train: Labelled, params: config.Training) -> None:
        self.seed, self.count, self.size = 0, len(train), min(params.batch_size, len(train))
        self.weights = None
        if params.balance == "sampler":
            labels = torch.tensor(train.labels)
            self.weights = (1 / torch.bincount(labels).double())[labels]  # float32 loses count of many images

    def __len__(self) -> int:
        return self.count // self.size  # a last batch of one image would break BatchNorm

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawing = torch.Generator().manual_seed(self.seed)
        if self.weights is None:
            order = torch.randperm(self.count, generator=drawing)
        else:
            order = torch.multinomial(self.weights, self.count, replacement=True, generator=drawing)
        seeds = torch.randint(2**62, (self.count,), generator=drawing)
        for number in range(len(self)):
            own = slice(number * self.size + processes.rank(), (number + 1) * self.size, processes.world_size())
            yield list(zip(order[own].tolist(), seeds[own].tolist(), strict=True))


class SeededImages:
    """Images by pairs of their number and the seed of what is random about them."""

    def __init__(self, train: Labelled) -> None:
        self.train = train

    def __getitems__(self, pairs: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        with torch.random.fork_rng(devices=[]):
            if hasattr(self.train, "__getitems__"):  # of a dataset that makes a batch at once
                torch.default_generator.manual_seed(pairs[0][1])
                return list(self.train.__getitems__([index for index, _ in pairs]))
            return [self._item(*pair) for pair in pairs]

    def _item(self, index: int, seed: int) -> tuple[Tensor, int]:
        torch.default_generator.manual_seed(seed)
        return self.train[index]


def _loader(train: Labelled, batches: Batches, where: torch.device) -> "DataLoader[tuple[Tensor, Tensor]]":
    """Batches of images; where a GPU waits for them, other processes decode and augment them, to the same bits."""
    workers = _workers(where)
    return DataLoader(
        SeededImages(train),  # type: ignore[arg-type]
        batch_sampler=batches,
        generator=torch.Generator(),  # else each start of an epoch would draw from the network's
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # spawned ones would need a picklable dataset
        persistent_workers=workers > 0,
        pin_memory=where.type == "cuda",
    )


def _workers(where: torch.device) -> int:
    """How many processes prepare batches: on a CPU they would take cores from training, and they need shared memory."""
    if where.type != "cuda" or not SHARED.is_dir() or shutil.disk_usage(SHARED).free < SHARED_BYTES:
        return 0
    return min(8, max(1, machine.usable_cores() // processes.local_world_size() - 1))


def _optimizer(
    net: nn.Module, params: config.Training, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Weight decay on weights only, not on biases and normalisation, as timm does."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if params.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=params.learning_rate, momentum=0.9, nesterov=True)
    steps = max(steps, 1)
    if params.schedule == "one-cycle":  # torch divides by 0.2 * steps - 1
        cycle_momentum = params.optimizer == "sgd"
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            params.learning_rate,
            total_steps=steps,
            pct_start=0.2 if steps > 5 else 0.3,
            cycle_momentum=cycle_momentum,
        )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _train_mode(net: nn.Module) -> None:
    """Training mode, but for the normalisation of frozen stages, whose statistics must stay too."""
    net.train()
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _has_stalled(history: list[dict[str, float]], patience: int | None) -> bool:
    if patience is None or len(history) <= patience:
        return False
    before = max(row["val_top1"] for row in history[:-patience])
    return max(row["val_top1"] for row in history[-patience:]) <= before


def _to(images: Tensor, where: torch.device) -> Tensor:
    return images.to(where, memory_format=torch.channels_last, non_blocking=where.type == "cuda")


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _read(path: Path, where: torch.device) -> dict[str, Any]:
    try:
        saved: dict[str, object] = torch.load(path, map_location=where, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise StageError(f"{path} is not a checkpoint of this training run: delete it to start afresh") from None
    return saved


def _save(path: Path, **parts: object) -> None:
    buffer = io.BytesIO()
    content = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    torch.save(content, buffer)
    files.write_bytes(path, buffer.getvalue())
