"""benchmark: weigh the model of every stage in ONNX Runtime, as the device would run it."""

import csv
import io
import itertools
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.core.report import Latency, Measurements, Report
from tasks.graphs import graph, packing
from tasks.graphs.optimized import optimize
from tasks.images import splits
from tasks.images.preprocessing import batch_of
from tasks.runtime import golden, session
from tasks.runtime.probe import probe

WEIGHED = ("finetune", "prune", "quantize", "reduce")
CHAMPION = "champion"
FLOAT32 = "float32"  # a model of the reduced one's shape: int8 is not always faster
BATCH = 100
TURN = 10


def answers(model: Path, test: Path, threads: int) -> list[str]:
    """The class name that the model answers for each image of the test split, in the split's order.

    `StageError` if an output is not finite.
    """
    ready = session.open_session(model, threads)
    preprocessing, classes = session.description(ready)
    names: list[str] = []
    for images in splits.images(test, preprocessing, batch_of(preprocessing, BATCH)):
        outputs = session.logits(ready, images)
        if not np.isfinite(outputs).all():
            raise StageError(f"{model} answers with NaN or infinite logits on images of {test}")
        names += [classes[code] for code in outputs.argmax(1)]
    return names


def accuracy(actual: list[str], predicted: list[str], classes: tuple[str, ...]) -> dict[str, Any]:
    """`top1`, `balanced_accuracy`, `macro_f1`, `class_recall` and the `confusion` matrix (rows: true class).

    An answer outside `classes` is wrong. The means are what scikit-learn calls balanced_accuracy_score and f1_score.
    """
    codes = {name: code for code, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    for truth, answer in zip(actual, predicted, strict=True):
        if answer in codes:
            confusion[codes[truth], codes[answer]] += 1
    counts = Counter(actual)
    recall = {name: float(confusion[i, i] / counts[name]) if counts[name] else None for name, i in codes.items()}
    right, true, answered = confusion.diagonal(), np.asarray([counts[name] for name in classes]), confusion.sum(0)
    looked_at = true + answered > 0
    f1 = 2 * right[looked_at] / (true + answered)[looked_at]
    return {
        "top1": float(confusion.trace() / len(actual)),
        "balanced_accuracy": float(np.mean(right[true > 0] / true[true > 0])),
        "macro_f1": float(f1.mean()),
        "class_recall": recall,
        "confusion": confusion.tolist(),
    }


def golden_of(model: Path, test: Path, threads: int) -> golden.Arrays:
    """The golden inputs and outputs of the model, from the first images of the test split: see `golden.record`."""
    ready = session.open_session(model, threads)
    preprocessing, _ = session.description(ready)
    return golden.record(ready, next(splits.images(test, preprocessing, max(golden.ODD))))


def latencies(models: dict[str, Path], profile: config.Benchmark) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each timed inference at batch 1, by model.

    The models take short turns, so that noise and throttling of the machine meet all of them alike and ratios
    hold.
    """
    sessions = {name: session.open_session(path, profile.threads) for name, path in models.items()}
    images = {
        name: np.random.default_rng(0).standard_normal((1, *ready.get_inputs()[0].shape[1:]), dtype=np.float32)
        for name, ready in sessions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(-(-profile.warmup // TURN)), "warming up"):
        for name, ready in sessions.items():
            _turn(ready, images[name])
    for _ in track(range(-(-profile.iterations // TURN)), "timing"):
        for name, ready in sessions.items():
            times[name] += _turn(ready, images[name])
    return {name: np.asarray(values[: profile.iterations]) for name, values in times.items()}


def _turn(ready: ort.InferenceSession, image: session.Images) -> list[float]:
    """Milliseconds of TURN inferences, after one that brings the model back into the processor's caches."""
    session.logits(ready, image)
    clock = [time.perf_counter()]
    for _ in range(TURN):
        session.logits(ready, image)
        clock.append(time.perf_counter())
    return [(after - before) * 1e3 for before, after in itertools.pairwise(clock)]


def latency(times_ms: npt.NDArray[np.float64]) -> Latency:
    """Percentiles and the throughput at batch 1."""
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, [50, 90, 99]))
    throughput = float(1e3 / times_ms.mean())
    return Latency(latency_p50_ms=p50, latency_p90_ms=p90, latency_p99_ms=p99, throughput_per_s=throughput)


def weight(model: Path) -> dict[str, Any]:
    """Bytes, parameters, multiply-accumulates and the operators of the optimized graph."""
    data = model.read_bytes()
    proto = packing.unpack(onnx.load_from_string(data))
    params, nonzero = graph.parameters(proto)
    return {
        "sha256": files.sha256(model),
        "size_bytes": len(data),
        "zst_bytes": len(files.pack(data)),
        "params": params,
        "nonzero_params": nonzero,
        "sparsity": 1 - nonzero / params,
        "macs": graph.macs(proto),
        "operators": dict(Counter(node.op_type for node in optimize(model).graph.node)),
    }


def benchmark(
    models: dict[str, Path], champion: Path | None, test: Path, profile: config.Benchmark, classes: tuple[str, ...]
) -> tuple[Report, list[list[str]]]:
    """The whole report: for each stage and the champion its weight, accuracy, latency and what loading costs, and the
    latency of the reduced model's shape in float32; and the table of predictions: one row per test image with what the
    reduced model and the champion answered.
    """
    weighed = models | ({CHAMPION: champion} if champion else {})
    session.open_session(models["reduce"], profile.threads)  # a file that is no model ends here, in one sentence
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        in_float = Path(scratch) / "float32.onnx"
        in_float.write_bytes(graph.in_float(packing.unpack(onnx.load(models["reduce"]))).SerializeToString())
        times = latencies(weighed | {FLOAT32: in_float}, profile)
    actual, columns = splits.columns(test, classes)
    predicted: dict[str, list[str]] = {}
    entries: dict[str, Measurements] = {}
    for name, model in weighed.items():
        print(f"weighing {name}", flush=True)
        predicted[name] = answers(model, test, profile.threads)
        entries[name] = Measurements(
            **accuracy(actual, predicted[name], classes),
            **latency(times[name]).model_dump(),
            **probe(model, profile.threads, profile.memory_limit_bytes),
            **weight(model),
        )
    rows = zip(actual, predicted["reduce"], predicted.get(CHAMPION, [""] * len(actual)), *columns.values(), strict=True)
    report = Report(
        profile=profile.model_dump(),
        machine={"processor": machine.processor(), "system": platform.system(), "onnxruntime": ort.__version__},
        data_sha256=files.sha256(test),
        classes=classes,
        champion_classes=session.description(session.open_session(champion, 1))[1] if champion else None,
        champion=entries.pop(CHAMPION, None),
        float32=latency(times[FLOAT32]),
        stages=entries,
    )
    return report, [["actual", "predicted", CHAMPION, *columns], *map(list, rows)]


def write_tables(report: Report) -> None:
    """The main numbers of the stages for `dvc metrics` and `dvc plots`."""
    columns = ("top1", "size_bytes", "zst_bytes", "latency_p50_ms")
    stages = {name: {key: getattr(stage, key) for key in columns} for name, stage in report.stages.items()}
    files.write_json(paths.METRICS, stages)
    rows = [[name, *(round(value, 6) for value in stage.values())] for name, stage in stages.items()]
    _write_csv(paths.STAGES, [["stage", *columns], *rows])


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write_bytes(path, text.getvalue().encode())


def main() -> None:
    params = config.load()
    models = {name: paths.onnx(name) for name in WEIGHED}
    champion = paths.CHAMPION_MODEL if paths.CHAMPION_MODEL.exists() else None
    report, predictions = benchmark(models, champion, paths.TEST, params.benchmark, config.class_names(params))
    if files.unpack(paths.PACKED) != models["reduce"].read_bytes():
        raise StageError(f"{paths.PACKED} does not unpack to {models['reduce']}: run reduce again")
    reduced = report.stages["reduce"].model_copy(update={"zst_bytes": paths.PACKED.stat().st_size})
    _write_csv(paths.PREDICTIONS, predictions)
    with files.replacing(paths.GOLDEN) as (temporary,), temporary.open("wb") as file:
        np.savez_compressed(
            file, allow_pickle=False, **golden_of(models["reduce"], paths.TEST, params.benchmark.threads)
        )
    written = {"predictions": paths.PREDICTIONS, "golden": paths.GOLDEN, "packed": paths.PACKED}
    hashes = {f"{name}_sha256": files.sha256(path) for name, path in written.items()}
    report = report.model_copy(update={"stages": report.stages | {"reduce": reduced}, **hashes})
    files.write_json(paths.report("benchmark"), report.model_dump(mode="json"))
    write_tables(report)
    first, own, plain = report.stages["finetune"], reduced.latency_p50_ms, report.float32.latency_p50_ms
    if own > plain:
        print(
            f"benchmark: slower than the same shape in float32, {own:.3f} against {plain:.3f} ms: int8 buys bytes only"
        )
    print(
        f"benchmark: top-1 {reduced.top1:.2%}, {first.size_bytes / reduced.size_bytes:.1f} times smaller and "
        f"{first.latency_p50_ms / own:.1f} times faster than the fine-tuned model"
    )


if __name__ == "__main__":
    run(main)
