"""Time and memory of `prune`, `quantize` and `reduce` over networks: `python tests/bench/scaling.py [--only NAME]`.

Networks of random weights, at 96 and 224 pixels, on random images. Every stage runs in a process of its own, with one
thread, as DVC runs it. `prune` removes half of the channels and does not recover: what it takes here is deciding,
masking and export; recovery takes what its epochs take. Seconds are the processor's, those of the imports among them:
on a quiet machine they are what passes. Then the int8 network is trained on its own grid for an epoch, and both, as
calibrated and as trained, are compared with what `reduce` makes of them, at one and two threads: on how many of the
images all logits are the same to the bit, with ONNX Runtime's optimizations, and without, where it computes in float32.
Then the same of the last run's own network, on the test split. Prints a table, writes data/reports/bench/scaling.json,
and ends with status 1 if bits differ either way. About a quarter of an hour.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.runtime.probe import peak_rss_bytes

REPORT = ROOT / paths.REPORTS / "bench" / "scaling.json"
NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "resnet18", "mobilenetv2_100")
SIDES = (96, 224)
STAGES = ("prune", "quantize", "reduce")
EXACT = "exact"
LEVELS = {"optimized": 99, "not optimized": 0}  # ONNX Runtime's ORT_ENABLE_ALL and ORT_DISABLE_ALL
BATCH = 250
CLASSES = tuple("0123456789")
SPLITS = {"train": 64, "val": 32, "test": 32}
PRUNE = config.Prune(channels=config.Channels(ratio=0.5), recovery=None)
QUANTIZE = config.Quantize(calibration_images=32, percentile=99.99)
QAT = config.Qat(
    max_top1_drop=0,
    temperature=1,
    teacher_share=1,
    training=config.Training(
        epochs=1,
        batch_size=32,
        optimizer="adamw",
        learning_rate=0.001,
        weight_decay=0,
        schedule="one-cycle",
        label_smoothing=0,
        augment=config.Augment(crop_scale=1, flip=0.5),
        seed=0,
    ),
)
HEADER = (
    f"{'network':22} {'px':>4} {'parameters':>10} | {'prune s':>8} {'MB':>6} | {'quantize s':>10} {'MB':>6} | "
    f"{'reduce s':>8} {'MB':>6} | {'bytes before':>12} {'after':>10} | {'same bits':>9} {'float32':>7}"
)


def start(network: str, side: int) -> dict[str, Any]:
    """Write splits of noise and the random network into the working directory; returns how many parameters it has."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    from tasks.nets import backbone

    random = np.random.default_rng(0)
    for name, count in SPLITS.items():
        images = []
        for _ in range(count):
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
            images.append(stream.getvalue())
        labels = [CLASSES[number % len(CLASSES)] for number in range(count)]
        path = Path(paths.TRAIN).with_name(f"{name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "label": labels}), path)
    torch.manual_seed(0)
    preprocessing = backbone.preprocessing(network, side)
    spec = backbone.Spec(backbone=network, classes=CLASSES, preprocessing=preprocessing, weights={"source": "none"})
    net = backbone.create(network, len(CLASSES), preprocessing)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # as after training, so that normalisation does something
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    backbone.save(net, spec, paths.weights("finetune"), paths.spec("finetune"))
    return {"parameters": sum(parameter.numel() for parameter in net.parameters())}


def prune() -> dict[str, Any]:
    from tasks import prune
    from tasks.nets import backbone
    from tasks.nets.export import export

    teacher, spec = backbone.load(paths.weights("finetune"), paths.spec("finetune"))
    found = prune.prune(teacher, spec, PRUNE, paths.TRAIN, paths.VAL, Path("checkpoint.pt"))
    backbone.save(found.net, spec, paths.weights("prune"), paths.spec("prune"))
    export(found.net, spec, paths.onnx("prune"))
    return {}


def quantize() -> dict[str, Any]:
    from tasks import quantize
    from tasks.graphs import calibration
    from tasks.runtime import session

    source = paths.onnx("prune")
    preprocessing, classes = session.description(session.open_session(source, threads=1))
    images = quantize.calibration_images(paths.TRAIN, classes, QUANTIZE.calibration_images)
    files.write_bytes(
        paths.onnx("quantize"), calibration.quantize(source, images, preprocessing, QUANTIZE).SerializeToString()
    )
    return {}


def reduce() -> dict[str, Any]:
    import onnx

    from tasks import reduce

    source, target = paths.onnx("quantize"), paths.onnx("reduce")
    began = time.process_time()
    files.write_bytes(target, reduce.reduce(onnx.load(source))[0].SerializeToString())
    removed = time.process_time() - began
    images = reduce.prove(source, target, paths.TEST, threads=1)
    sizes = {"size_bytes_before": source.stat().st_size, "size_bytes_after": target.stat().st_size}
    return {**sizes, "bit_identical_images": images, "removal_seconds": removed}


def exact() -> dict[str, Any]:
    """By way to train and to run: the share of images on which the reduced network has the very logits of the other."""
    import onnx

    from tasks import quantize, reduce
    from tasks.images import splits
    from tasks.runtime import session

    calibrated = onnx.load(paths.onnx("quantize"))
    trained = onnx.load(paths.onnx("quantize"))
    quantize.train_qat(trained, QAT, None, bits={})
    preprocessing, _ = session.description(session.open_session(paths.onnx("quantize"), threads=1))
    images = next(splits.images(paths.TEST, preprocessing, SPLITS["test"]))
    found: dict[str, Any] = {level: {} for level in LEVELS}
    for name, model in {"calibrated": calibrated, "trained": trained}.items():
        pair = [one.SerializeToString() for one in (model, reduce.reduce(model)[0])]
        for level, shares in same(pair, images).items():
            found[level] |= {f"{name}, {threads}": share for threads, share in shares.items()}
    return found


def same(pair: list[bytes], images: Any) -> dict[str, dict[int, float]]:
    """By level of optimization and threads: the share of images on which two models have the very same logits."""
    import numpy as np
    import onnxruntime as ort

    from tasks.runtime import session

    found: dict[str, dict[int, float]] = {level: {} for level in LEVELS}
    for threads, (level, value) in itertools.product((1, 2), LEVELS.items()):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.graph_optimization_level = threads, ort.GraphOptimizationLevel(value)
        ready = [ort.InferenceSession(one, options, providers=["CPUExecutionProvider"]) for one in pair]
        before, after = (session.logits(one, images).view(np.uint32) for one in ready)
        found[level][threads] = float((before == after).all(axis=1).mean())
    return found


def own_files() -> dict[str, dict[int, float]]:
    """`same` of the last run's quantized and reduced network, on all of the test split."""
    import numpy as np

    from tasks.images import splits
    from tasks.runtime import session

    source, target = (ROOT / paths.onnx(name) for name in ("quantize", "reduce"))
    preprocessing, _ = session.description(session.open_session(source, threads=1))
    images = np.concatenate(list(splits.images(ROOT / paths.TEST, preprocessing, BATCH)))
    return same([source.read_bytes(), target.read_bytes()], images)


def stage(name: str) -> None:
    """Run one stage in this process, in the working directory, and print what it took."""
    began = time.perf_counter()
    found = {"prune": prune, "quantize": quantize, "reduce": reduce, EXACT: exact}[name]()
    took = {"seconds": time.process_time(), "wall_seconds": time.perf_counter() - began}
    print(json.dumps(found | took | {"peak_rss_bytes": peak_rss_bytes()}))


def alone(folder: Path, *arguments: str) -> dict[str, Any]:
    """What this script prints with these arguments, in a process of its own; `StageError` if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise StageError(f"{' '.join(arguments)}: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(network: str, side: int) -> dict[str, Any]:
    """A row: what every stage takes, and what `reduce` makes of the network."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        row = {"network": network, "pixels": side} | alone(Path(scratch), "--start", network, str(side))
        return row | {name: alone(Path(scratch), "--stage", name) for name in (*STAGES, EXACT)}


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    took = " | ".join(
        f"{row[name]['seconds']:{width}.1f} {row[name]['peak_rss_bytes'] / 1e6:6.0f}"
        for name, width in zip(STAGES, (8, 10, 8), strict=True)
    )
    reduced = row["reduce"]
    least = (min(row[EXACT][level].values()) for level in LEVELS)
    return (
        f"{row['network']:22} {row['pixels']:4} {row['parameters']:10,} | {took} | "
        f"{reduced['size_bytes_before']:12,} {reduced['size_bytes_after']:10,} | "
        "{:9.1%} {:7.1%}".format(*least)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=NETWORKS, help="this network alone")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=(*STAGES, EXACT), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start[0], int(arguments.start[1]))))
        return
    if arguments.stage:
        stage(arguments.stage)
        return
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for network in [arguments.only] if arguments.only else NETWORKS:
        for side in SIDES:
            rows.append(measure(network, side))
            print(line(rows[-1]), flush=True)
    from tasks.core.machine import processor

    about = {"splits": SPLITS, "prune": PRUNE.model_dump(), "quantize": QUANTIZE.model_dump(), "threads": 1}
    compared = [row[EXACT] for row in rows]
    if (ROOT / paths.onnx("reduce")).exists():
        compared.append(own_files())
        for level, shares in compared[-1].items():
            print(f"the last run's network, {level}: the same bits on {min(shares.values()):.1%} of the test images")
    files.write_json(REPORT, about | {"processor": processor(), "rows": rows, "own": compared[len(rows) :]})
    sys.exit(any(share < 1 for one in compared for level in LEVELS for share in one[level].values()))


if __name__ == "__main__":
    run(main)
