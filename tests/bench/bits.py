"""What fewer bits of weights cost: `python tests/bench/bits.py [--seeds N]`, after `make run`, in the same folder.

Every row is the pruned network of the last run, quantized on another grid, reduced and packed. Where weights are
trained on their grid, that is done as the recipe says, with each of the seeds. Top-1 is that of the final file on the
test split, and all files are timed in one run. Each core makes one file at a time, with one thread; what was trained is
found again by the next call. Prints the mean and the range over the seeds, and how far each row is from int8 as
calibrated; writes data/reports/bench/bits.json. 20 minutes on 2 cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import onnx
from joblib import Parallel, delayed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import benchmark, quantize, reduce
from tasks.budget.plan import read_plan
from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, run
from tasks.graphs import calibration, compact, graph, packing, rounding
from tasks.images import splits
from tasks.runtime import session

REPORT = paths.REPORTS / "bench" / "bits.json"
PLAIN, INT8, TRAINED = "int8, not packed", "int8", "int8, trained"
MEAN_BITS = (4.5, 4.0, 3.0)
UNIFORM = (4,)
HEADER = (
    f"{'':24} {'val top-1':>26} {'test top-1':>26} {'points from int8':>24} {'bytes':>26} {'p50 ms':>8} {'of int8':>8}"
)


def uniform(quantized: onnx.ModelProto, floats: dict[str, graph.Array], bits: int) -> dict[str, int]:
    """So many bits for each layer's weights, but for the last."""
    return {rounding.float_name(node): bits for node, _ in rounding.round_weights(quantized, floats)[:-1]}


def rows(params: config.Quantize) -> dict[str, Any]:
    """By name, the mean bits of a mixed grid (float), the bits of all layers (int), or None for what is calibrated."""
    own = [params.grid.mean_bits] if isinstance(params.grid, config.Mixed) else []
    mixed = sorted({*MEAN_BITS, *own}, reverse=True)
    return {
        PLAIN: None,
        INT8: None,
        TRAINED: 8,
        **{f"{bits:g} bits on average": float(bits) for bits in mixed},
        **{f"{bits} bits in all layers": bits for bits in UNIFORM},
    }


def make(name: str, kind: float | int | None, seed: int, calibrated: Path, folder: Path) -> dict[str, Any]:
    """Quantize, reduce and pack the network; returns the row's name, its val top-1 and the path of the file."""
    params = config.load()
    original, quantized = onnx.load(paths.onnx("prune")), onnx.load(calibrated)
    preprocessing, classes = session.description(session.open_session(calibrated, threads=1))
    if kind is not None:
        qat = params.quantize.grid.qat
        if qat is None:
            raise StageError(f"{paths.PARAMS} has no quantize.grid.qat, which says how weights are trained")
        qat = qat.model_copy(update={"training": qat.training.model_copy(update={"seed": seed, "threads": 1})})
        floats = graph.arrays(original)
        if isinstance(kind, float):
            images = quantize.calibration_images(paths.TRAIN, classes, quantize.SENSITIVITY_IMAGES)
            grid = config.Mixed(kind="mixed", mean_bits=kind, qat=qat)
            bits = quantize.choose_bits(quantized, original, grid, images, preprocessing)
        else:
            bits = uniform(quantized, floats, kind)
        rounding.coarsen(quantized, floats, bits)
        quantize.train_qat(quantized, qat, None, bits)
    compact.round_biases(quantized)
    model, _ = reduce.reduce(quantized)
    path = folder / f"{name}, seed {seed}.onnx"
    path.write_bytes((model if name == PLAIN else packing.pack(model)).SerializeToString())
    ready = session.open_session(path, threads=1)
    val_top1 = session.top1(ready, splits.batches(paths.VAL, preprocessing, classes, quantize.BATCH))
    print(f"{name}, seed {seed}: val top-1 {val_top1:.2%}, {path.stat().st_size:,} bytes", flush=True)
    return {"name": name, "seed": seed, "val_top1": val_top1, "path": path}


def weigh(made: list[dict[str, Any]], params: config.Params) -> dict[str, list[dict[str, float]]]:
    """By row, its files' accuracy, bytes and milliseconds; all of them take turns."""
    classes = config.class_names(params)
    actual, _ = splits.columns(paths.TEST, classes)
    times = benchmark.latencies({str(one["path"]): one["path"] for one in made}, params.benchmark)
    table: dict[str, list[dict[str, float]]] = {}
    for one in made:
        predicted = benchmark.answers(one["path"], paths.TEST, params.benchmark.threads)
        row = {
            "seed": one["seed"],
            "val_top1": one["val_top1"],
            "top1": benchmark.accuracy(actual, predicted, classes)["top1"],
            "size_bytes": one["path"].stat().st_size,
            "latency_p50_ms": benchmark.latency(times[str(one["path"])]).latency_p50_ms,
        }
        table.setdefault(one["name"], []).append(row)
    return table


def line(name: str, found: list[dict[str, float]], reference: dict[str, float]) -> str:
    """A row of the table: mean (least to most)."""

    def cell(values: list[float], form: str) -> str:
        shown = form.format(mean(values))
        return (
            shown
            if min(values) == max(values)
            else f"{shown} ({form.format(min(values))} to {form.format(max(values))})"
        )

    columns = {key: [row[key] for row in found] for key in found[0]}
    points = [(value - reference["top1"]) * 100 for value in columns["top1"]]
    p50 = mean(columns["latency_p50_ms"])
    return (
        f"{name:24} {cell(columns['val_top1'], '{:.2%}'):>26} {cell(columns['top1'], '{:.2%}'):>26} "
        f"{cell(points, '{:+.2f}'):>24} {cell(columns['size_bytes'], '{:,.0f}'):>26} {p50:8.3f} "
        f"{p50 / reference['latency_p50_ms']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each row")
    parser.add_argument("--row", action="append", help="this row alone, beside int8; may be repeated")
    arguments = parser.parse_args()
    params = config.load()
    source = paths.onnx("prune")
    if not source.exists():
        raise StageError(f"{source} is missing: run `make run` first")
    chosen = rows(params.quantize)
    if unknown := set(arguments.row or ()) - set(chosen):
        raise StageError(f"there is no row {min(unknown)!r}; there are: {', '.join(chosen)}")
    chosen = {name: kind for name, kind in chosen.items() if not arguments.row or name in {INT8, *arguments.row}}
    preprocessing, classes = session.description(session.open_session(source, threads=1))
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, Parallel(n_jobs=-1) as cores:
        calibrated = Path(scratch) / "calibrated.onnx"
        images = quantize.calibration_images(paths.TRAIN, classes, params.quantize.calibration_images)
        in_float = read_plan(paths.PLAN).float32
        onnx.save(calibration.quantize(source, images, preprocessing, params.quantize, in_float), calibrated)
        jobs = [
            (name, kind, seed)
            for name, kind in chosen.items()
            for seed in range(arguments.seeds if kind is not None else 1)
        ]
        table = weigh(list(cores(delayed(make)(*job, calibrated, Path(scratch)) for job in jobs)), params)
    files.write_json(REPORT, {"seeds": arguments.seeds, "processor": machine.processor(), "rows": table})
    print("", HEADER, *(line(name, found, table[INT8][0]) for name, found in table.items()), sep="\n")


if __name__ == "__main__":
    run(main)
