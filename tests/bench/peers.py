"""Weighin beside its peers, from one fine-tuned checkpoint: `python tests/bench/peers.py`, after `make run`.

Each peer makes its model from data/models/finetune (onnxsim: from the masked int8 model of the stage `quantize`), with
the same 512 calibration images, in a process of its own; all but Torch-Pruning in an environment of their own, which is
made in ~/.cache/weighin/peers from peers.txt (6 GB, minutes) if it is not there. Then all models are weighed in one
run. Prints a table, and writes data/reports/bench/peers.json. A peer that fails is a line with its reason.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks import benchmark, quantize
from tasks.core import config, files, machine, paths
from tasks.core.errors import StageError, first_line, run
from tasks.graphs import calibration
from tasks.images import splits
from tasks.runtime import session

HERE = Path(__file__).parent
TARGET = ROOT / paths.REPORTS / "bench" / "peers.json"
PINS = HERE / "peers.txt"
ENVIRONMENT = Path.home() / ".cache" / "weighin" / "peers"
REFERENCE, OWN = "fine-tuned", "Weighin"
PEERS = {
    "ORT static": "ort-default",
    "ORT U8S8": "ort-u8s8",
    "Olive": "olive",
    "NNCF": "nncf",
    "onnxsim": "onnxsim",
    "Torch-Pruning": "torch-pruning",
}
INSIDE = "torch-pruning"  # the peer that Weighin has in its own environment
CALIBRATION_IMAGES = 512
REPETITIONS = 7
LIMIT_S = 3600
WITHIN = 0.01
SILENT = {"OLIVE_DISABLE_TELEMETRY": "1", "NNCF_CI": "1", "DO_NOT_TRACK": "1"}  # nothing is sent from here

HEADER = f"{'model':13} {'bytes':>10} {'zst':>10} {'p50 ms':>7} {'p90 ms':>7} {'top-1':>7} {'smaller':>7} {'faster':>7}"
LEGEND = f"""\
fine-tuned     the fp32 model that all start from; `smaller` and `faster` (p50) are against it
ORT static     ONNX Runtime's quantize_static with its defaults
ORT U8S8       the same after quant_pre_process, activations QUInt8, weights QInt8 per channel
Olive, NNCF    their static quantization with its defaults
onnxsim        its structured pruning of QDQ graphs and its simplification, on Weighin's masked int8 model
Torch-Pruning  alone, in fp32: half of all channels by global magnitude, recovered by cross-entropy
zst: bytes under zstd, level 19. Milliseconds at batch 1: the medians of {REPETITIONS} interleaved runs."""


def environment() -> Path:
    """The Python of the peers' environment, which is made first unless it is there with these very pins.

    `StageError` if that cannot be done.
    """
    python, ready, pins = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready", files.sha256(PINS)
    if not ready.exists() or ready.read_text() != pins:
        print(f"installing the peers into {ENVIRONMENT}", flush=True)
        ready.unlink(missing_ok=True)
        call(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
        call(str(python), "-m", "pip", "install", "--quiet", "--requirement", str(PINS))
        files.write_bytes(ready, pins.encode())
    return python


def call(*command: str) -> None:
    """Run a process in silence; `StageError` with the last line of its errors if it fails."""
    try:
        ended = subprocess.run(command, env=os.environ | SILENT, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise StageError(f"not done after {LIMIT_S} s") from None
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise StageError(lines[-1].strip() if lines else f"ended with status {ended.returncode}")


def hand_over(folder: Path) -> None:
    """Put into the folder what the peers start from: two models, and the calibration images batch by batch."""
    for stage in ("finetune", "quantize"):
        (folder / f"{stage}.onnx").write_bytes((ROOT / paths.onnx(stage)).read_bytes())
    preprocessing, classes = session.description(session.open_session(folder / "finetune.onnx", threads=1))
    images = quantize.calibration_images(ROOT / paths.TRAIN, classes, CALIBRATION_IMAGES)
    batches = iter(calibration.Reader(images, preprocessing).get_next, None)
    np.save(folder / "calibration.npy", np.stack([batch["image"] for batch in batches]))


def make_peers(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The peers' models in the folder by name, and why the others are missing."""
    models: dict[str, Path] = {}
    reasons: dict[str, str] = {}
    try:
        python = str(environment())
    except StageError as error:
        reasons = {name: f"not installed: {error}" for name, peer in PEERS.items() if peer != INSIDE}
    for name, peer in PEERS.items():
        if name in reasons:
            continue
        print(f"making {name}", flush=True)
        try:
            if peer == INSIDE:
                call(sys.executable, str(HERE / "peer_torch_pruning.py"), str(folder))
            else:
                call(python, str(HERE / "peer_models.py"), peer, str(folder))
        except StageError as error:
            reasons[name] = str(error)
        else:
            models[name] = folder / f"{peer}.onnx"
    return models, reasons


def describe(source: Path, target: Path, original: onnx.ModelProto) -> None:
    """Copy a model with the original's metadata, which some peers drop and `benchmark` needs."""
    model = onnx.load(source)
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in original.metadata_props})
    files.write_bytes(target, model.SerializeToString())


def weigh_copy(model: Path, copy: Path, original: onnx.ModelProto, params: config.Params) -> dict[str, Any]:
    """Top-1 on the test split and `benchmark.weight`, of a copy with metadata; `StageError` if it does not run."""
    test = ROOT / paths.TEST
    actual, _ = splits.columns(test, config.class_names(params))
    try:
        describe(model, copy, original)
        predicted = benchmark.answers(copy, test, params.benchmark.threads)
        return {
            "top1": benchmark.accuracy(actual, predicted, config.class_names(params))["top1"],
            **benchmark.weight(copy),
        }
    except Exception as error:
        # what may be wrong with a file of others has no common base but Exception
        raise StageError(first_line(error)) from None


def medians(models: dict[str, Path], profile: config.Benchmark) -> dict[str, dict[str, float]]:
    """p50 and p90 in milliseconds by model, each the median of the repetitions."""
    runs = []
    for _ in range(REPETITIONS):
        runs.append(
            {
                name: benchmark.latency(times).model_dump()
                for name, times in benchmark.latencies(models, profile).items()
            }
        )
    keys = ("latency_p50_ms", "latency_p90_ms")
    return {name: {key: float(np.median([run[name][key] for run in runs])) for key in keys} for name in models}


def weigh(models: dict[str, Path], folder: Path, params: config.Params) -> tuple[dict[str, Any], dict[str, str]]:
    """What each model weighs, and why some peers' could not be weighed."""
    original = onnx.load(models[REFERENCE])
    ready: dict[str, Path] = {}
    entries: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, model in models.items():
        print(f"weighing {name}", flush=True)
        copy = folder / f"weighed-{model.name}"
        try:
            entries[name], ready[name] = weigh_copy(model, copy, original, params), copy
        except StageError as error:
            if name not in PEERS:
                raise
            reasons[name] = str(error)
    times = medians(ready, params.benchmark)
    return {name: entry | times[name] for name, entry in entries.items()}, reasons


def line(name: str, row: dict[str, Any], reference: dict[str, Any]) -> str:
    """A model's numbers as text under HEADER."""
    smaller = reference["size_bytes"] / row["size_bytes"]
    faster = reference["latency_p50_ms"] / row["latency_p50_ms"]
    return (
        f"{name:13} {row['size_bytes']:10,} {row['zst_bytes']:10,} {row['latency_p50_ms']:7.3f} "
        f"{row['latency_p90_ms']:7.3f} {row['top1']:7.2%} {smaller:6.1f}x {faster:6.1f}x"
    )


def best(entries: dict[str, Any], key: str) -> dict[str, Any]:
    """The peer with the least of `key`: how many times Weighin's it is, and Weighin's top-1 minus its."""
    own = entries[OWN]
    name = min((name for name in PEERS if name in entries), key=lambda name: entries[name][key])
    peer = entries[name]
    return {"peer": name, "times_own": peer[key] / own[key], "top1_difference": own["top1"] - peer["top1"]}


def sentence(what: str, found: dict[str, Any]) -> str:
    """A comparison with one peer as text."""
    difference = found["top1_difference"]
    return (
        f"{what}: {found['peer']}, {found['times_own']:.2f} times Weighin's; Weighin's top-1 minus its is "
        f"{difference * 100:+.2f} points, {'within' if difference >= -WITHIN else 'NOT within'} {WITHIN * 100:.1f}"
    )


def main() -> None:
    for path in (*(ROOT / paths.onnx(stage) for stage in benchmark.WEIGHED), ROOT / paths.weights("finetune")):
        if not path.exists():
            raise StageError(f"{path.relative_to(ROOT)} is missing: run `make run` first")
    params = config.load(ROOT / paths.PARAMS)
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        folder = Path(scratch)
        hand_over(folder)
        peers, reasons = make_peers(folder)
        own = folder / "weighin.onnx"
        own.write_bytes((ROOT / paths.onnx("reduce")).read_bytes())
        entries, failed = weigh({REFERENCE: folder / "finetune.onnx", **peers, OWN: own}, folder, params)
    reasons |= failed
    print(LEGEND, HEADER, sep="\n\n")
    for name in (REFERENCE, *PEERS, OWN):
        print(f"{name:13} {reasons[name]}" if name in reasons else line(name, entries[name], entries[REFERENCE]))
    print()
    bests = {}
    if len(reasons) < len(PEERS):
        bests = {key: best(entries, key) for key in ("size_bytes", "latency_p50_ms")}
        print(sentence("bytes of the smallest peer", bests["size_bytes"]))
        print(sentence("p50 of the fastest peer", bests["latency_p50_ms"]))
    here = {"processor": machine.processor(), "cores": os.cpu_count()}
    profile = params.benchmark.model_dump() | {"repetitions": REPETITIONS}
    files.write_json(TARGET, {"profile": profile, "machine": here, "models": entries, "failed": reasons, "best": bests})


if __name__ == "__main__":
    run(main)
