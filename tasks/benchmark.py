"""benchmark: weigh the model of every stage in ONNX Runtime, as the device would run it."""

import csv
import io
import itertools
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import zstandard

from tasks.core import config, dataset, files, graph, paths, session
from tasks.core.errors import StageError, run
from tasks.core.probe import probe
from tasks.core.progress import track

WEIGHED = ("finetune", "prune", "quantize", "reduce")
BATCH = 100
TURN = 10


def accuracy(model: Path, test: Path, threads: int) -> dict[str, Any]:
    """`top1`, `class_recall` and the `confusion` matrix (rows: true class) on the test split.

    `StageError` if an output is not finite.
    """
    ready = session.open_session(model, threads)
    preprocessing, classes = session.description(ready)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    for images, labels in dataset.batches(test, preprocessing, classes, BATCH):
        outputs = session.logits(ready, images)
        if not np.isfinite(outputs).all():
            raise StageError(f"{model} answers with NaN or infinite logits on images of {test}")
        np.add.at(confusion, (labels, outputs.argmax(1)), 1)
    counts = confusion.sum(1)
    recall = {name: float(confusion[i, i] / counts[i]) if counts[i] else None for i, name in enumerate(classes)}
    return {"top1": float(confusion.trace() / counts.sum()), "class_recall": recall, "confusion": confusion.tolist()}


def latencies(models: dict[str, Path], profile: config.Benchmark) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each timed inference at batch 1, by model.

    The models take short turns, so that noise and throttling of the machine meet all of them alike and ratios
    hold.
    """
    sessions = {name: session.open_session(path, profile.threads) for name, path in models.items()}
    shape = next(iter(sessions.values())).get_inputs()[0].shape[1:]
    image = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(-(-profile.warmup // TURN)), "warming up"):
        for ready in sessions.values():
            _turn(ready, image)
    for _ in track(range(-(-profile.iterations // TURN)), "timing"):
        for name, ready in sessions.items():
            times[name] += _turn(ready, image)
    return {name: np.asarray(values[: profile.iterations]) for name, values in times.items()}


def _turn(ready: ort.InferenceSession, image: session.Images) -> list[float]:
    """Milliseconds of TURN inferences, after one that brings the model back into the processor's caches."""
    session.logits(ready, image)
    clock = [time.perf_counter()]
    for _ in range(TURN):
        session.logits(ready, image)
        clock.append(time.perf_counter())
    return [(after - before) * 1e3 for before, after in itertools.pairwise(clock)]


def latency(times_ms: npt.NDArray[np.float64]) -> dict[str, float]:
    """Percentiles and the throughput at batch 1."""
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, [50, 90, 99]))
    return {
        "latency_p50_ms": p50,
        "latency_p90_ms": p90,
        "latency_p99_ms": p99,
        "throughput_per_s": float(1e3 / times_ms.mean()),
    }


def weight(model: Path) -> dict[str, Any]:
    """Bytes, parameters, multiply-accumulates and the operators of the optimized graph."""
    data = model.read_bytes()
    proto = onnx.load_from_string(data)
    params, nonzero = graph.parameters(proto)
    return {
        "sha256": files.sha256(model),
        "size_bytes": len(data),
        "zst_bytes": len(zstandard.ZstdCompressor(level=19).compress(data)),
        "params": params,
        "nonzero_params": nonzero,
        "sparsity": 1 - nonzero / params,
        "macs": graph.macs(proto),
        "operators": dict(Counter(node.op_type for node in session.optimized(model).graph.node)),
    }


def benchmark(models: dict[str, Path], test: Path, profile: config.Benchmark) -> dict[str, Any]:
    """The whole report: for each stage its weight, accuracy, latency and what loading costs."""
    times = latencies(models, profile)
    stages: dict[str, Any] = {}
    for name, model in models.items():
        print(f"weighing {name}", flush=True)
        stages[name] = {
            **accuracy(model, test, profile.threads),
            **latency(times[name]),
            **probe(model, profile.threads, profile.memory_limit_bytes),
            **weight(model),
        }
    return {
        "profile": profile.model_dump(),
        "machine": {"processor": processor(), "system": platform.system(), "onnxruntime": ort.__version__},
        "data_sha256": files.sha256(test),
        "stages": stages,
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_tables(report: dict[str, Any]) -> None:
    """The main numbers for `dvc metrics`, and the stages and the final model's predictions for `dvc plots`."""
    columns = ("top1", "size_bytes", "zst_bytes", "latency_p50_ms")
    stages = report["stages"]
    files.write_json(paths.METRICS, {name: {key: stage[key] for key in columns} for name, stage in stages.items()})
    rows = [[name, *(round(stage[key], 6) for key in columns)] for name, stage in stages.items()]
    _write_csv(paths.STAGES, [["stage", *columns], *rows])
    final = stages["reduce"]
    classes = list(final["class_recall"])
    predictions = [
        [actual, predicted]
        for actual, counts in zip(classes, final["confusion"], strict=True)
        for predicted, count in zip(classes, counts, strict=True)
        for _ in range(count)
    ]
    _write_csv(paths.PREDICTIONS, [["actual", "predicted"], *predictions])


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write_bytes(path, text.getvalue().encode())


def main() -> None:
    params = config.load()
    report = benchmark({name: paths.onnx(name) for name in WEIGHED}, paths.TEST, params.benchmark)
    files.write_json(paths.report("benchmark"), report)
    write_tables(report)
    first, last = report["stages"]["finetune"], report["stages"]["reduce"]
    print(
        f"benchmark: top-1 {last['top1']:.2%}, {first['size_bytes'] / last['size_bytes']:.1f} times smaller and "
        f"{first['latency_p50_ms'] / last['latency_p50_ms']:.1f} times faster than the fine-tuned model"
    )


if __name__ == "__main__":
    run(main)
