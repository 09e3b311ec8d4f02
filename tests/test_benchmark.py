"""benchmark: every number that a device's owner asks for, right, and sentences for models that do not make it."""

import csv
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zstandard
from conftest import CLASSES, Network, Repository, png, write_split
from onnx import helper, numpy_helper
from sklearn.metrics import balanced_accuracy_score, f1_score

from tasks.benchmark import accuracy, answers, benchmark, golden_of, latencies, latency, weight
from tasks.core import config, files
from tasks.core.errors import StageError
from tasks.graphs import graph
from tasks.graphs.optimized import optimize
from tasks.images.preprocessing import preprocess
from tasks.reduce import reduce
from tasks.runtime import session
from tasks.runtime.probe import meet, probe

Networks = Callable[[str], Network]
PROFILE = config.Benchmark(threads=1, warmup=10, iterations=25)
FIELDS = {
    "top1", "balanced_accuracy", "macro_f1", "class_recall", "confusion",
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
    report = benchmark(made, None, test_split, PROFILE, CLASSES)[0].model_dump()
    assert report["champion"] is None
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
    named = answers(network.path, test_split, threads=1)
    found = accuracy([CLASSES[index % 4] for index in range(130)], named, CLASSES)
    images = np.stack([preprocess(png(seed, 28), network.preprocessing) for seed in range(130)])
    predicted = session.logits(session.open_session(network.path, 1), images).argmax(1)
    assert named == [CLASSES[code] for code in predicted]
    labels = np.arange(130) % 4
    confusion = [[int(((labels == row) & (predicted == column)).sum()) for column in range(4)] for row in range(4)]
    assert found["confusion"] == confusion
    assert confusion != np.transpose(confusion).tolist()
    assert found["top1"] == (predicted == labels).mean()
    assert found["class_recall"] == {name: (predicted[labels == row] == row).mean() for row, name in enumerate(CLASSES)}


@pytest.mark.parametrize("seed", range(5))
def test_means_over_the_classes_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    actual = rng.choice(CLASSES[: 2 + seed % 3], 40).tolist()
    predicted = [name if rng.random() < 0.6 else str(rng.choice(CLASSES[:3])) for name in actual]
    found = accuracy(actual, predicted, CLASSES)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(actual, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(actual, predicted, average="macro"), abs=1e-12)


def test_a_class_without_images_has_no_recall() -> None:
    recall = accuracy(["cat", "dog", "owl"] * 2, ["cat", "dog", "cat", "cat", "cat", "fox"], CLASSES)["class_recall"]
    assert recall == {"cat": 1.0, "dog": 0.5, "owl": 0.0, "fox": None}


def test_an_answer_that_is_no_class_is_wrong() -> None:
    found = accuracy(["cat", "cat", "dog", "fox"], ["cat", "emu", "emu", "fox"], CLASSES)
    assert found["top1"] == 0.5
    assert found["class_recall"] == {"cat": 0.5, "dog": 0.0, "owl": None, "fox": 1.0}
    assert np.sum(found["confusion"]) == 2


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
    assert found["operators"] == Counter(node.op_type for node in optimize(path).graph.node)


def test_every_model_is_timed_as_often_as_asked(networks: Networks, tmp_path: Path) -> None:
    times = latencies(models(networks, tmp_path), PROFILE)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(times, 25)
    assert all((values > 0).all() for values in times.values())


def test_percentiles_and_throughput() -> None:
    found = latency(np.arange(1, 102, dtype=np.float64)).model_dump()
    assert found == {
        "latency_p50_ms": 51,
        "latency_p90_ms": 91,
        "latency_p99_ms": 100,
        "throughput_per_s": pytest.approx(1000 / 51),
    }


def poison(network: Network, path: Path, value: float) -> Path:
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
    path = poison(networks("lenet-5"), tmp_path / "model.onnx", value)
    with pytest.raises(
        StageError, match=r"model\.onnx answers with NaN or infinite logits on images of .*test\.parquet"
    ):
        answers(path, test_split, threads=1)


def test_a_model_that_does_not_run_is_told_in_a_sentence() -> None:
    """ONNX Runtime's int8 pooling takes no output range that is a millionth of its input's."""
    steps = [
        ("QuantizeLinear", ["x", "wide", "zero"]),
        ("DequantizeLinear", ["t0", "wide", "zero"]),
        ("GlobalAveragePool", ["t1"]),
        ("QuantizeLinear", ["t2", "tiny", "zero"]),
        ("DequantizeLinear", ["t3", "tiny", "zero"]),
    ]
    nodes = [helper.make_node(kind, names, [f"t{place}"]) for place, (kind, names) in enumerate(steps)]
    entry, result = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 16, side, side])
        for name, side in (("x", 4), ("t4", 1))
    )
    constants = {"wide": np.float32(0.1), "tiny": np.float32(1e-9), "zero": np.uint8(128)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "pool", [entry], [result], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ready = session.open_session(model.SerializeToString(), 1)
    with pytest.raises(StageError, match=r"the model does not run in ONNX Runtime: .*QLinearGlobalAveragePool"):
        session.logits(ready, np.ones((1, 16, 4, 4), np.float32))


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
        answers(tmp_path / "model.onnx", test_split, threads=1)


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


# The champion


def rename(network: Network, path: Path, classes: tuple[str, ...], order: tuple[int, ...] = ()) -> Path:
    """The network with other names for its outputs and, if its last node is a Gemm, with those in another order."""
    model = onnx.load(network.path)
    made = graph.initializers(model)
    for name in model.graph.node[-1].input[1:] if order else ():
        values = numpy_helper.to_array(made[name])
        shuffled = np.ascontiguousarray(values.take(order, values.shape.index(4)))
        made[name].CopyFrom(numpy_helper.from_array(shuffled, name))
    for entry in model.metadata_props:
        if entry.key == "weighin":
            entry.value = json.dumps(json.loads(entry.value) | {"classes": list(classes)})
    onnx.save(model, path)
    return path


def column(table: list[list[str]], name: str) -> list[str]:
    return [row[table[0].index(name)] for row in table[1:]]


def test_a_champion_with_its_classes_in_another_order_answers_the_same(
    networks: Networks, test_split: Path, tmp_path: Path
) -> None:
    made, network = models(networks, tmp_path), networks("lenet-5")
    order = (2, 0, 3, 1)
    champion = rename(network, tmp_path / "champion.onnx", tuple(CLASSES[code] for code in order), order)
    found, table = benchmark(made, champion, test_split, PROFILE, CLASSES)
    report = found.model_dump()
    assert list(report["stages"]) == list(made)
    assert set(report["champion"]) == FIELDS
    assert report["champion"]["sha256"] == files.sha256(champion)
    first = report["stages"]["finetune"]
    assert report["champion"]["confusion"] == first["confusion"]
    assert (report["champion"]["top1"], report["champion"]["class_recall"]) == (first["top1"], first["class_recall"])
    assert table[0] == ["actual", "predicted", "champion"]
    assert column(table, "actual") == [CLASSES[index % 4] for index in range(130)]
    assert column(table, "champion") == answers(network.path, test_split, 1)
    assert column(table, "predicted") == answers(made["reduce"], test_split, 1)


def test_a_champion_with_another_input_and_another_class(networks: Networks, test_split: Path, tmp_path: Path) -> None:
    """mobilenetv2 takes 32 pixels and colours, and what it calls emu is no class any more."""
    known = ("cat", "emu", "owl", "fox")
    champion = rename(networks("mobilenetv2_050"), tmp_path / "champion.onnx", known)
    found, table = benchmark(models(networks, tmp_path), champion, test_split, PROFILE, CLASSES)
    report = found.model_dump()
    said = column(table, "champion")
    right = [actual == answer for actual, answer in zip(column(table, "actual"), said, strict=True)]
    assert set(said) <= set(known)
    assert "emu" in said
    assert report["champion"]["top1"] == np.mean(right)
    assert report["champion"]["class_recall"]["dog"] == 0
    assert np.sum(report["champion"]["confusion"]) == 130 - said.count("emu")


def test_the_table_carries_the_columns_of_the_split(networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    write_split(
        path, [png(seed, 28) for seed in range(4)], columns={"device": ["a", "b", "", "a,b"], "site": ["x"] * 4}
    )
    _, table = benchmark(models(networks, tmp_path), None, path, PROFILE, CLASSES)
    assert table[0] == ["actual", "predicted", "champion", "device", "site"]
    assert [column(table, name) for name in ("champion", "device", "site")] == [
        [""] * 4, ["a", "b", "", "a,b"], ["x"] * 4
    ]  # fmt: skip


# Golden inputs and outputs

INT32 = onnx.TensorProto.INT32
CASES = {"batch-1": 1, "batch-3": 3, "batch-7": 7, "zeros": 2, "noise": 2, "bright": 2, "dark": 2, "huge": 2, "tiny": 2}

MET = {"difference": 0.0, "same_top1": True, "repeatable": True}


def record(model: Path, test: Path, path: Path, **changes: np.ndarray[Any, Any]) -> Path:
    np.savez_compressed(path, **{**golden_of(model, test, 1), **changes})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", ["mlp", "lenet-5", "mobilenetv2_050", "resnet18"])
def test_golden_outputs_are_finite_and_met_in_a_fresh_process(networks: Networks, tmp_path: Path, name: str) -> None:
    """Inputs far outside what images can be saturate an int8 model and do not break it."""
    network, model = networks(name), tmp_path / "model.onnx"
    onnx.save(reduce(network.quantized)[0], model)
    write_split(tmp_path / "test.parquet", [png(seed) for seed in range(9)])
    found = golden_of(model, tmp_path / "test.parquet", 1)
    assert {name: len(found[f"{name}.input"]) for name in CASES} == CASES
    assert len(found) == 2 * len(CASES)
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in found.values())
    assert all(found[f"{name}.output"].shape == (size, 4) for name, size in CASES.items())
    first = np.stack([preprocess(png(seed), network.preprocessing) for seed in range(7)])
    assert np.array_equal(found["batch-7.input"], first)
    assert np.array_equal(found["batch-3.input"], first[:3])
    assert np.abs(found["huge.input"]).max() > 1e37
    assert 0 < np.abs(found["tiny.input"]).max() < np.finfo(np.float32).tiny
    met = meet(record(model, tmp_path / "test.parquet", tmp_path / "golden.npz"), model, 1, None)
    assert met == dict.fromkeys(CASES, MET)


@pytest.fixture
def recording(networks: Networks, test_split: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A reduced model and its golden file."""
    model = models(networks, tmp_path)["reduce"]
    return model, record(model, test_split, tmp_path / "golden.npz")


def test_a_model_with_one_changed_weight_does_not_meet(recording: tuple[Path, Path], tmp_path: Path) -> None:
    path, outputs = recording
    model = onnx.load(path)
    bias = next(one for one in graph.initializers(model).values() if (one.data_type, *one.dims) == (INT32, 4))
    values = numpy_helper.to_array(bias).copy()
    values[2] += 100_000
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "changed.onnx")
    met = meet(outputs, tmp_path / "changed.onnx", 1, None)
    assert set(met) == set(CASES)
    assert min(case["difference"] for case in met.values()) > 0.01
    assert all(case["repeatable"] for case in met.values())


def test_another_output_is_told_by_its_case(recording: tuple[Path, Path], test_split: Path, tmp_path: Path) -> None:
    model, _ = recording
    outputs = golden_of(model, test_split, 1)
    near = outputs["noise.output"].copy()
    near[1, near[1].argmin()] -= 0.25
    other = outputs["zeros.output"].copy()
    other[1] = other[1, ::-1]
    nan = outputs["dark.output"].copy()
    nan[0, 0] = np.nan
    changes = {"noise.output": near, "zeros.output": other, "dark.output": nan}
    met = meet(record(model, test_split, tmp_path / "other.npz", **changes), model, 1, None)
    assert met["noise"] == {"difference": pytest.approx(0.25), "same_top1": True, "repeatable": True}
    assert met["zeros"]["same_top1"] is False
    assert met["dark"]["difference"] is None
    assert met["huge"] == MET


def test_a_model_that_differs_from_run_to_run_is_told(recording: tuple[Path, Path], tmp_path: Path) -> None:
    _, outputs = recording
    with np.load(outputs) as arrays:
        shape = [None, *arrays["zeros.input"].shape[1:]]
    noise = onnx.helper.make_node("RandomUniformLike", ["flat"], ["out"], low=0.0, high=1.0)
    flat = onnx.helper.make_node("Flatten", ["in"], ["flat"])
    starts, ends, axes = (onnx.helper.make_tensor(n, 7, [1], [v]) for n, v in (("from", 0), ("to", 4), ("axis", 1)))
    cut = onnx.helper.make_node("Slice", ["out", "from", "to", "axis"], ["logits"])
    made = onnx.helper.make_graph(
        [flat, noise, cut],
        "random",
        [onnx.helper.make_tensor_value_info("in", 1, shape)],
        [onnx.helper.make_tensor_value_info("logits", 1, [None, 4])],
        [starts, ends, axes],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "random.onnx")
    met = meet(outputs, tmp_path / "random.onnx", 1, None)
    assert not any(case["repeatable"] for case in met.values())


def damage_output(outputs: Path, path: Path, damage: str) -> Path:
    data = outputs.read_bytes()
    match damage:
        case "empty":
            data = b""
        case "no archive":
            data = b"no archive at all"
        case "cut":
            data = data[: len(data) // 2]
        case "a changed byte":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        case "an input without its output":
            with np.load(outputs) as arrays:
                kept = {name: arrays[name] for name in arrays.files if name != "noise.output"}
            stream = io.BytesIO()
            np.savez_compressed(stream, **kept)
            data = stream.getvalue()
        case "pickled objects":
            stream = io.BytesIO()
            np.savez_compressed(stream, **{"a.input": np.array([{}]), "a.output": np.array([{}])})  # type: ignore[arg-type]
            data = stream.getvalue()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "damage", ["empty", "no archive", "cut", "a changed byte", "an input without its output", "pickled objects"]
)
def test_damaged_golden_outputs_are_a_sentence(recording: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    model, outputs = recording
    with pytest.raises(StageError, match=r"reduce\.onnx does not load and run in a clean process: .+") as caught:
        meet(damage_output(outputs, tmp_path / "damaged.npz", damage), model, 1, None)
    assert ("Object arrays cannot be loaded" in str(caught.value)) == (damage == "pickled objects")
    assert "\n" not in str(caught.value)


def test_golden_outputs_are_met_within_the_memory_of_the_device(
    networks: Networks, test_split: Path, tmp_path: Path
) -> None:
    limit = 150_000_000
    small, large = networks("lenet-5").path, networks("resnet18").path
    assert meet(record(small, test_split, tmp_path / "small.npz"), small, 1, limit).keys() == CASES.keys()
    with pytest.raises(StageError, match=r"resnet18\.onnx does not load and run .* within 150,000,000 bytes: "):
        meet(record(large, test_split, tmp_path / "large.npz"), large, 1, limit)


def packed(repository: Repository) -> Path:
    return repository.model("reduce").with_name("model.onnx.zst")


def prepare(repository: Repository, made: dict[str, Path]) -> None:
    repository.params(benchmark=PROFILE.model_dump())
    for stage, path in made.items():
        repository.model(stage).write_bytes(path.read_bytes())
    packed(repository).write_bytes(files.pack(made["reduce"].read_bytes()))
    repository.split("test", [png(seed, 28) for seed in range(30)])


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_stage_leaves_report_and_tables(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    prepare(repository, models(networks, tmp_path))
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
    assert report["champion"] is None
    own, plain = report["stages"]["reduce"], report["float32"]
    assert set(plain) == {"latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "throughput_per_s"}
    told = "slower than the same shape in float32" in done.stdout
    assert told == (own["latency_p50_ms"] > plain["latency_p50_ms"])
    assert report["packed_sha256"] == files.sha256(packed(repository))
    for name in ("predictions.csv", "golden.npz"):
        assert report[f"{name.split('.')[0]}_sha256"] == files.sha256(repository.root / "data/reports" / name)
    model, outputs = repository.model("reduce"), repository.root / "data/reports/golden.npz"
    met = meet(outputs, model, 1, None)
    assert met == dict.fromkeys(CASES, MET)


def test_the_champion_that_lies_there_is_weighed_and_the_tables_are_those_of_the_stages(
    repository: Repository, networks: Networks, tmp_path: Path
) -> None:
    """Made twice, what is not a matter of time is the same to the byte; the archive holds no time of day."""
    made = models(networks, tmp_path)
    prepare(repository, made)
    champion = repository.root / "data/champion/model.onnx"
    champion.parent.mkdir()
    champion.write_bytes(made["quantize"].read_bytes())
    reports, found = repository.root / "data/reports", []
    for _ in range(2):
        done = repository.run("benchmark")
        assert done.returncode == 0, done.stderr
        found.append([(reports / name).read_bytes() for name in ("golden.npz", "predictions.csv")])
    assert found[0] == found[1]
    with zipfile.ZipFile(reports / "golden.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {Path(name).stem for name in archive.namelist()} == {
            f"{case}.{part}" for case in CASES for part in ("input", "output")
        }
    report = json.loads(repository.report("benchmark").read_text())
    assert report["champion"]["sha256"] == files.sha256(champion)
    table = rows(reports / "predictions.csv")
    assert len(table) == 30
    right = [row["champion"] == row["actual"] for row in table]
    assert report["champion"]["top1"] == np.mean(right)
    assert [row["stage"] for row in rows(reports / "stages.csv")] == list(made)
    assert list(json.loads((reports / "metrics.json").read_text())) == list(made)


def test_a_champion_that_does_not_load_is_an_error(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    prepare(repository, models(networks, tmp_path))
    champion = repository.root / "data/champion/model.onnx"
    champion.parent.mkdir()
    champion.write_bytes(b"no model")
    assert "data/champion/model.onnx does not load in ONNX Runtime" in repository.sentence("benchmark")


def test_the_stage_refuses_nan_without_a_report(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    made = models(networks, tmp_path)
    prepare(repository, made | {"prune": poison(networks("lenet-5"), tmp_path / "nan.onnx", np.nan)})
    done = repository.run("benchmark")
    assert done.returncode == 1
    said = "answers with NaN or infinite logits on images of data/prepared/test.parquet"
    assert done.stderr.splitlines()[-1] == f"error: data/models/prune/model.onnx {said}"
    assert not repository.report("benchmark").exists()


def test_the_stage_refuses_another_model_as_the_packed_one(
    repository: Repository, networks: Networks, tmp_path: Path
) -> None:
    prepare(repository, models(networks, tmp_path))
    packed(repository).write_bytes(files.pack(networks("mlp").quantized.SerializeToString()))
    said = "data/models/reduce/model.onnx.zst does not unpack to data/models/reduce/model.onnx: run reduce again"
    assert repository.sentence("benchmark") == said
    packed(repository).write_bytes(b"no frame")
    assert "data/models/reduce/model.onnx.zst does not unpack as Zstandard" in repository.sentence("benchmark")
    assert not repository.report("benchmark").exists()


def test_the_stage_refuses_a_file_that_is_no_model(repository: Repository, networks: Networks, tmp_path: Path) -> None:
    prepare(repository, models(networks, tmp_path))
    repository.model("reduce").write_bytes(b"no model")
    assert "data/models/reduce/model.onnx does not load in ONNX Runtime" in repository.sentence("benchmark")
