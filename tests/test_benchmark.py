"""benchmark: every number that a device's owner asks for, right, and sentences for models that do not make it."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zstandard
from conftest import CLASSES, Network, Repository, png, write_split
from onnx import numpy_helper

from tasks.benchmark import accuracy, benchmark, latencies, latency, weight
from tasks.core import config, dataset, files, graph, session
from tasks.core.errors import StageError
from tasks.core.probe import probe
from tasks.reduce import reduce

Networks = Callable[[str], Network]
PROFILE = config.Benchmark(threads=1, warmup=10, iterations=25)
FIELDS = {
    "top1", "class_recall", "confusion",
    "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "throughput_per_s",
    "load_ms", "first_inference_ms", "peak_rss_bytes",
    "sha256", "size_bytes", "zst_bytes", "params", "nonzero_params", "sparsity", "macs", "operators",
}  # fmt: skip


def models(networks: Networks, root: Path) -> dict[str, Path]:
    """lenet-5 after every stage; pruning is in the first already."""
    network = networks("lenet-5")
    made = {"finetune": network.path, "prune": network.path}
    for stage, model in (("quantize", network.quantized), ("reduce", reduce(network.quantized)[0])):
        made[stage] = root / f"{stage}.onnx"
        onnx.save(model, made[stage])
    return made


@pytest.fixture
def test_split(tmp_path: Path) -> Path:
    """130 images, of which the last class has fewer."""
    write_split(tmp_path / "test.parquet", [png(seed, 28) for seed in range(130)])
    return tmp_path / "test.parquet"


def test_the_report_has_every_field_of_every_stage(networks: Networks, test_split: Path, tmp_path: Path) -> None:
    made = models(networks, tmp_path)
    report = benchmark(made, test_split, PROFILE)
    json.dumps(report, allow_nan=False)
    assert report["profile"] == PROFILE.model_dump()
    assert set(report["machine"]) == {"processor", "system", "onnxruntime"}
    assert all(report["machine"].values())
    assert report["data_sha256"] == files.sha256(test_split)
    assert list(report["stages"]) == ["finetune", "prune", "quantize", "reduce"]
    for name, stage in report["stages"].items():
        assert set(stage) == FIELDS
        assert stage["sha256"] == files.sha256(made[name])
        assert 0 < stage["latency_p50_ms"] <= stage["latency_p90_ms"] <= stage["latency_p99_ms"]
        assert min(stage["throughput_per_s"], stage["load_ms"], stage["first_inference_ms"]) > 0
        assert 2**24 < stage["peak_rss_bytes"] < 2**28
    quantized, reduced = report["stages"]["quantize"], report["stages"]["reduce"]
    assert quantized["confusion"] == reduced["confusion"]
    assert all(reduced[key] < quantized[key] for key in ("size_bytes", "zst_bytes", "params", "macs", "sparsity"))
    assert "QLinearConv" in reduced["operators"]


def test_accuracy_is_that_of_numpy(networks: Networks, test_split: Path) -> None:
    network = networks("lenet-5")
    found = accuracy(network.path, test_split, threads=1)
    images = np.stack([dataset.tensor(png(seed, 28), network.preprocessing) for seed in range(130)])
    predicted = session.logits(session.open_session(network.path, 1), images).argmax(1)
    labels = np.arange(130) % 4
    confusion = [[int(((labels == row) & (predicted == column)).sum()) for column in range(4)] for row in range(4)]
    assert found["confusion"] == confusion
    assert confusion != np.transpose(confusion).tolist()
    assert found["top1"] == (predicted == labels).mean()
    assert found["class_recall"] == {name: (predicted[labels == row] == row).mean() for row, name in enumerate(CLASSES)}


def test_a_class_without_images_has_no_recall(networks: Networks, tmp_path: Path) -> None:
    write_split(tmp_path / "test.parquet", [png(seed, 28) for seed in range(6)], classes=CLASSES[:3])
    recall = accuracy(networks("lenet-5").path, tmp_path / "test.parquet", 1)["class_recall"]
    assert recall["fox"] is None
    assert None not in [recall[name] for name in CLASSES[:3]]


def test_weight_counts_bytes_parameters_and_operators(networks: Networks, tmp_path: Path) -> None:
    path = models(networks, tmp_path)["reduce"]
    found, model = weight(path), onnx.load(path)
    data = path.read_bytes()
    assert found["size_bytes"] == len(data)
    assert zstandard.ZstdDecompressor().decompress(zstandard.ZstdCompressor(level=19).compress(data)) == data
    assert found["zst_bytes"] == len(zstandard.ZstdCompressor(level=19).compress(data)) < len(data)
    assert (found["params"], found["nonzero_params"]) == graph.parameters(model)
    assert found["sparsity"] == pytest.approx(1 - found["nonzero_params"] / found["params"])
    assert found["macs"] == graph.macs(model)
    assert found["operators"] == Counter(node.op_type for node in session.optimized(path).graph.node)


def test_every_model_is_timed_as_often_as_asked(networks: Networks, tmp_path: Path) -> None:
    times = latencies(models(networks, tmp_path), PROFILE)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(times, 25)
    assert all((values > 0).all() for values in times.values())


def test_percentiles_and_throughput() -> None:
    found = latency(np.arange(1, 102, dtype=np.float64))
    assert found == {
        "latency_p50_ms": 51,
        "latency_p90_ms": 91,
        "latency_p99_ms": 100,
        "throughput_per_s": pytest.approx(1000 / 51),
    }


def poisoned(network: Network, path: Path, value: float) -> Path:
    """The bias of the last layer holds a number that is none."""
    model = onnx.load(network.path)
    bias = graph.initializers(model)[model.graph.node[-1].input[2]]
    values = numpy_helper.to_array(bias).copy()
    values[3] = value
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(
    value: float, networks: Networks, test_split: Path, tmp_path: Path
) -> None:
    path = poisoned(networks("lenet-5"), tmp_path / "model.onnx", value)
    with pytest.raises(
        StageError, match=r"model\.onnx answers with NaN or infinite logits on images of .*test\.parquet"
    ):
        accuracy(path, test_split, threads=1)


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_model_that_does_not_load_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(StageError, match=r"model\.onnx does not load in ONNX Runtime"):
        latencies({"reduce": path}, PROFILE)
    with pytest.raises(StageError, match=r"model\.onnx does not load and run in a clean process: ") as caught:
        probe(path, 1, None)
    assert "\n" not in str(caught.value)


def test_a_model_without_preprocessing_is_refused(networks: Networks, test_split: Path, tmp_path: Path) -> None:
    model = onnx.load(networks("lenet-5").path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(StageError, match="has no preprocessing in its metadata"):
        accuracy(tmp_path / "model.onnx", test_split, threads=1)


def test_a_device_with_too_little_memory_is_told(networks: Networks) -> None:
    """resnet18 has 45 MB of weights, so it cannot fit; mlp fits the same device."""
    limit = 150_000_000
    assert probe(networks("mlp").path, 1, limit)["load_ms"] > 0
    with pytest.raises(
        StageError, match=r"resnet18\.onnx does not load and run .* within 150,000,000 bytes: "
    ) as caught:
        probe(networks("resnet18").path, 1, limit)
    assert "\n" not in str(caught.value)


def test_memory_is_that_of_the_model_and_not_of_who_asks(networks: Networks) -> None:
    ballast = np.ones(2**26)  # 512 MiB
    small, large = (probe(networks(name).path, 1, None)["peak_rss_bytes"] for name in ("mlp", "resnet18"))
    assert small < ballast.nbytes / 4
    assert large > small + networks("resnet18").path.stat().st_size


def prepared(repository: Repository, made: dict[str, Path]) -> None:
    repository.params(benchmark=PROFILE.model_dump())
    for stage, path in made.items():
        repository.model(stage).write_bytes(path.read_bytes())
    repository.split("test", [png(seed, 28) for seed in range(30)])


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_stage_leaves_report_and_tables(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    prepared(repository, models(networks, tmp_path))
    done = repository.run("benchmark")
    assert done.returncode == 0, done.stderr
    report = json.loads(repository.report("benchmark").read_text())
    assert {name: set(stage) for name, stage in report["stages"].items()} == dict.fromkeys(report["stages"], FIELDS)
    stages = rows(repository.root / "data/reports/stages.csv")
    assert [(row["stage"], int(row["size_bytes"])) for row in stages] == [
        (name, stage["size_bytes"]) for name, stage in report["stages"].items()
    ]
    predictions = Counter(
        (row["actual"], row["predicted"]) for row in rows(repository.root / "data/reports/predictions.csv")
    )
    confusion = report["stages"]["reduce"]["confusion"]
    assert [[predictions[actual, predicted] for predicted in CLASSES] for actual in CLASSES] == confusion


def test_the_stage_refuses_nan_without_a_report(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    made = models(networks, tmp_path)
    prepared(repository, made | {"prune": poisoned(networks("lenet-5"), tmp_path / "nan.onnx", np.nan)})
    done = repository.run("benchmark")
    assert done.returncode == 1
    said = "answers with NaN or infinite logits on images of data/prepared/test.parquet"
    assert done.stderr.splitlines()[-1] == f"error: data/models/prune/model.onnx {said}"
    assert not repository.report("benchmark").exists()


def test_the_stage_refuses_a_file_that_is_no_model(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    prepared(repository, models(networks, tmp_path))
    repository.model("reduce").write_bytes(b"no model")
    assert "data/models/reduce/model.onnx does not load in ONNX Runtime" in repository.sentence("benchmark")
