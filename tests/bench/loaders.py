"""Does training wait for images? `python tests/bench/loaders.py [--side PIXELS]... [--network NAME]`.

Images a second of an epoch of fine-tuning, beside a bare PyTorch loop: a dataset that decodes with Pillow and augments
with torchvision, PyTorch's DataLoader with as many processes, the same network, optimizer and batch size. On a GPU if
there is one. JPEG images of noise, 1.15 times as wide and high as the network sees them, at 64, 128 and 224 pixels. The
two take turns; the first epoch of each is not counted. Prints the median of the rounds and the ratio with its range,
writes data/reports/bench/loaders.json, and ends with status 1 if Weighin is slower than 0.8 of the bare loop.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import v2

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import config, files, machine, paths
from tasks.images.preprocessing import Preprocessing
from tasks.nets import backbone, training

TARGET = ROOT / paths.REPORTS / "bench" / "loaders.json"
SIDES, CLASSES, LARGER = (64, 128, 224), ("a", "b"), 1.15
AUGMENT = config.Augment(crop_scale=0.7, flip=0.5)
LEAST = 0.8


def lay(path: Path, side: int, images: int) -> list[bytes]:
    """The images, also as a split."""
    random, found = np.random.default_rng(0), []
    for _ in range(images):
        stream, wide = io.BytesIO(), round(side * LARGER)
        coarse = Image.fromarray(random.integers(0, 256, (wide // 8, wide // 8, 3), dtype=np.uint8))
        coarse.resize((wide, wide)).save(stream, "JPEG")
        found.append(stream.getvalue())
    pq.write_table(pa.table({"image": found, "label": [CLASSES[index % 2] for index in range(images)]}), path)
    return found


class Bare:
    """What one would write without Weighin."""

    def __init__(self, images: list[bytes], preprocessing: Preprocessing) -> None:
        self.images, self.mode = images, "L" if preprocessing.channels == 1 else "RGB"
        self.steps = v2.Compose(
            [
                v2.RandomResizedCrop(preprocessing.size, scale=(AUGMENT.crop_scale, 1.0)),
                v2.RandomHorizontalFlip(AUGMENT.flip),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.steps(Image.open(io.BytesIO(self.images[index])).convert(self.mode)), index % 2


def steps(net: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, where: torch.device) -> None:
    """An epoch of the bare loop."""
    net.train()
    for images, labels in loader:
        found = net(images.to(where, memory_format=torch.channels_last, non_blocking=True))
        loss = functional.cross_entropy(found, labels.to(where, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def compare(side: int, network: str, params: config.Training, images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of both, round by round."""
    preprocessing, where = backbone.preprocessing(network, side), training.device()
    nets = [backbone.create(network, len(CLASSES), preprocessing).to(where) for _ in range(2)]
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        path = Path(scratch) / "train.parquet"
        encoded = lay(path, side, images)
        train = training.Images(path, preprocessing, CLASSES, AUGMENT)
    batches = training.Batches(train, params)
    ours = training._loader(train, batches, where)
    bare: Any = DataLoader(
        Bare(encoded, preprocessing),  # type: ignore[arg-type]
        params.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=ours.num_workers,
        persistent_workers=ours.num_workers > 0,
        pin_memory=where.type == "cuda",
    )
    total = (rounds + 1) * len(batches)
    optimizer, scheduler = training._optimizer(nets[0], params, total)
    plain = torch.optim.AdamW(nets[1].parameters(), params.learning_rate, fused=True)
    loss = training.cross_entropy(0.0)

    def own() -> None:
        training._epoch(nets[0], ours, loss, params, optimizer, scheduler, None, epoch=0)

    def other() -> None:
        steps(nets[1], bare, plain, where)

    turns: dict[str, Callable[[], None]] = {"weighin": own, "bare": other}
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            began = time.monotonic()
            turn()
            if where.type == "cuda":
                torch.cuda.synchronize()
            if number:
                found[name].append(len(batches) * params.batch_size / (time.monotonic() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--side", type=int, action="append", help="pixels; may be repeated")
    parser.add_argument("--network", default="tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path, default=TARGET, help="the file of results")
    arguments = parser.parse_args()
    params = config.load(ROOT / paths.PARAMS).finetune.training
    training.make_deterministic(0)
    where, load = training.device(), os.getloadavg()[0]
    name = torch.cuda.get_device_name() if where.type == "cuda" else machine.processor()
    print(f"{name}, {machine.usable_cores()} cores, load before {load:.2f}")
    print(f"{'pixels':>6} {'weighin':>9} {'bare':>9} images/s   ratio", flush=True)
    rows: dict[int, dict[str, list[float]]] = {}
    slow = False
    for side in arguments.side or SIDES:
        found = rows[side] = compare(side, arguments.network, params, arguments.images, arguments.rounds)
        ratios = [one / other for one, other in zip(found["weighin"], found["bare"], strict=True)]
        slow |= median(ratios) < LEAST
        own, other = (median(found[one]) for one in ("weighin", "bare"))
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{side:6} {own:9.0f} {other:9.0f}            {spread}", flush=True)
    about = {"device": name, "cores": machine.usable_cores(), "load_before": load}
    files.write_json(arguments.report, about | {"images_per_s": {str(side): row for side, row in rows.items()}})
    sys.exit(slow)


if __name__ == "__main__":
    main()
