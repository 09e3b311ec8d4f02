"""qat: PyTorch runs the file as ONNX Runtime does, training brings top-1 back, and zeros and scales stay."""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CALIBRATION, CLASSES, MASKED, ROOT, Network, Repository
from onnx import helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from test_reduce import assert_same_bits, shapes

from tasks.core import config, files, paths
from tasks.core.errors import StageError
from tasks.graphs import channels, graph, rounding
from tasks.graphs.calibration import quantize
from tasks.nets import backbone, distillation, masks, qat, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export
from tasks.quantize import trainable, with_codebook
from tasks.reduce import reduce
from tasks.runtime import session

SCHEDULE = {
    "epochs": 6,
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 0.0,
    "schedule": "one-cycle",
    "label_smoothing": 0.0,
    "augment": {"crop_scale": 1.0, "flip": 0.0},
    "seed": 0,
}
QAT = {"max_top1_drop": 0.0, "temperature": 1.0, "teacher_share": 1.0, "training": SCHEDULE}
NARROW = CALIBRATION.model_copy(update={"percentile": 55.0})  # ranges so narrow that calibration alone costs much


@pytest.mark.parametrize("name", MASKED)
def test_pytorch_answers_as_onnx_runtime_does(name: str, networks: Callable[[str], Network]) -> None:
    network = networks(name)
    net = qat.Network(network.quantized, graph.arrays(onnx.load(network.path)), {})
    images = torch.randn(8, *network.preprocessing.shape)
    with torch.inference_mode():
        found = net.eval()(images).numpy()
    expected = session.logits(session.open_session(network.quantized.SerializeToString(), 1), images.numpy())
    assert np.abs(found - expected).mean() < 0.02 * expected.std()
    same = onnx.ModelProto()
    same.CopyFrom(network.quantized)
    net.write(same)
    again = session.logits(session.open_session(same.SerializeToString(), 1), images.numpy())
    assert np.abs(again - expected).mean() < 0.02 * expected.std()  # codes at a rounding's edge may differ by one


@pytest.mark.parametrize("name", MASKED)
def test_whatever_training_leaves_is_reduced_without_changing_a_bit(
    name: str, networks: Callable[[str], Network]
) -> None:
    """Weights far from where they began stand for any training; what was zero is zero still."""
    network = networks(name)
    net = qat.Network(network.quantized, graph.arrays(onnx.load(network.path)), {})
    torch.manual_seed(0)
    with torch.no_grad():
        for values in net.parameters():
            values.add_(torch.randn_like(values) * values.std() / 2)
    trained = onnx.ModelProto()
    trained.CopyFrom(network.quantized)
    net.write(trained)
    reduced, _ = reduce(trained)
    assert sorted(shapes(reduced)) == sorted(network.slim.values())
    assert_same_bits(trained, reduced)


class Case:
    """An mlp that knows four digits, with a quarter of its units dead; and its int8, of ranges that are too narrow."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, paths.onnx("prune")
        preprocessing = backbone.preprocessing("mlp", 8)
        self.spec = Spec(backbone="mlp", classes=CLASSES, preprocessing=preprocessing, weights={"source": "none"})
        digits = load_digits(n_class=len(CLASSES))
        for name, rows in {"train": slice(0, 512), "val": slice(512, None)}.items():
            self.write(name, digits.images[rows], digits.target[rows])
        training.make_deterministic(0)
        self.teacher = backbone.create("mlp", len(CLASSES), preprocessing)
        with torch.no_grad():
            for name in ("1.weight", "1.bias"):
                self.teacher.get_parameter(name)[:32] = 0
        schedule = config.Training.model_validate(SCHEDULE | {"learning_rate": 0.01})
        hold = masks.hold_zeros(self.teacher, backbone.head(self.teacher))
        loss, checkpoint = training.cross_entropy(0.0), root / "teacher.pt"
        images = [self.images(name) for name in ("train", "val")]
        training.fit(self.teacher, *images, loss, schedule, checkpoint=checkpoint, after_step=hold)  # type: ignore[arg-type, misc]
        export(self.teacher, self.spec, root / self.path)

    def write(self, name: str, images: Any, codes: Any) -> None:
        content = []
        for pixels in images:
            stream = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).save(stream, "PNG")
            content.append(stream.getvalue())
        self.split(name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": content, "label": [CLASSES[code] for code in codes]}), self.split(name))

    def split(self, name: str) -> Path:
        return self.root / "data/prepared" / f"{name}.parquet"

    def images(self, name: str) -> training.Images:
        return training.Images(self.split(name), self.spec.preprocessing, CLASSES)

    def tensors(self, name: str) -> torch.Tensor:
        images = self.images(name)
        return torch.stack([images[index][0] for index in range(len(images))])

    def train(
        self, model: onnx.ModelProto, levels: int | None = None, floats: Any = MappingProxyType({})
    ) -> list[dict[str, float]]:
        """Train the model's weights, in place; some of those before quantization may be given otherwise."""
        before = graph.arrays(onnx.load(self.root / self.path)) | dict(floats)
        images, params = [self.images(name) for name in ("train", "val")], config.Qat.model_validate(QAT)
        net = trainable(model, before, self.tensors("val")[:32], {})
        if levels:
            net.share_codes(levels)
        history = distillation.distill(net, self.teacher, params, *images, checkpoint=self.root / "checkpoint.pt")
        net.write(model)
        return history

    def lay(self, repository: Repository, **options: Any) -> None:
        """What the stage reads, in the repository."""
        files.write_json(repository.root / paths.PLAN, {"float32": []})
        repository.params(quantize={"calibration_images": 64, "percentile": NARROW.percentile} | options)

    def quantized(self, params: config.Quantize = NARROW) -> onnx.ModelProto:
        return quantize(self.root / self.path, list(self.images("train").images[:64]), self.spec.preprocessing, params)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def top1(case: Case, model: onnx.ModelProto) -> float:
    """In ONNX Runtime, on images that training has not seen."""
    logits = session.logits(session.open_session(model.SerializeToString(), 1), case.tensors("val").numpy())
    return float((logits.argmax(1) == np.asarray(case.images("val").labels)).mean())


def test_training_brings_top1_back_and_zeros_and_scales_stay(case: Case) -> None:
    calibrated = case.quantized()
    trained = copy.deepcopy(calibrated)
    history = case.train(trained)
    assert len(history) == SCHEDULE["epochs"]
    assert top1(case, trained) > top1(case, calibrated) + 0.05
    assert top1(case, trained) == pytest.approx(max(row["val_top1"] for row in history), abs=0.01)
    constants, dead = graph.Constants(trained), 0
    for name, tensor in graph.initializers(onnx.load(case.root / case.path)).items():
        codes = constants.read(f"{name}_DequantizeLinear_Output")
        if codes is not None:
            masked = numpy_helper.to_array(tensor) == 0
            assert not codes[masked].any()
            dead += int(masked.sum())
    assert dead == 32 * 64  # the weights of the dead units
    integers = {tensor.name for tensor in trained.graph.initializer if tensor.data_type != onnx.TensorProto.FLOAT}
    same, others = (graph.initializers(model) for model in (calibrated, trained))
    assert {name for name in same if same[name] != others[name]} <= integers
    reduced, _ = reduce(trained)
    images = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
    first, second = (session.logits(session.open_session(m.SerializeToString(), 1), images) for m in (trained, reduced))
    assert first.tobytes() == second.tobytes()
    assert reduced.ByteSize() < 0.85 * trained.ByteSize()


def test_the_stage_keeps_the_calibrated_model_where_training_makes_it_worse(repository: Repository) -> None:
    case = Case(repository.root)
    worse = QAT | {"training": SCHEDULE | {"epochs": 1, "learning_rate": 50.0}}
    case.lay(repository, grid={"kind": "int8", "qat": worse})
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    assert "training on the int8 grid has made it worse: the calibrated model stays" in done.stdout
    kept = repository.model("quantize").read_bytes()
    case.lay(repository, grid={"kind": "int8"})
    assert repository.run("quantize").returncode == 0
    assert repository.model("quantize").read_bytes() == kept


def test_training_keeps_to_a_codebook(case: Case) -> None:
    """Three codes a tensor: too few for what was trained without them, enough for what is trained with them."""
    model = case.quantized(CALIBRATION)
    before = top1(case, with_codebook(model, config.Int8(codebook=3)))
    case.train(model, levels=3)
    counts = [len(np.unique(codes[codes != 0])) for codes in codes_of(model)]
    assert len(counts) == 2
    assert max(counts) == 3
    assert top1(case, model) > before
    assert top1(case, with_codebook(model, config.Int8(codebook=3))) == top1(case, model)


def codes_of(model: onnx.ModelProto) -> list[graph.Array]:
    constants = graph.Constants(model)
    found = [constants.read(node.input[1]) for node in model.graph.node if node.op_type in graph.WEIGHTED]
    return [codes for codes in found if codes is not None]


@pytest.mark.parametrize(("scale", "zero"), [(0.02, 0), (0.5, 7), (0.013, 128), (3.0, 255)])
def test_rounding_is_that_of_pytorch_to_the_bit(scale: float, zero: int) -> None:
    torch.manual_seed(0)
    scale = float(np.float32(scale))  # as files have it
    values = torch.cat([torch.randn(1000), torch.randn(1000) * 100, torch.arange(-300, 300) * scale / 2])
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = qat.Quantized.apply(ours, scale, zero)
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero, 0, 255)
    assert torch.equal(found, expected)
    weights = torch.randn_like(values)
    for result in (found, expected):
        (result * weights).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_an_operator_that_is_not_known_is_told(case: Case) -> None:
    model = case.quantized()
    model.graph.node.append(helper.make_node("Softplus", ["logits"], ["soft"]))
    with pytest.raises(
        StageError, match=r"quantize\.grid\.qat cannot train a network with Softplus: choose kind int8 without"
    ):
        qat.Network(model, {}, {})


def test_a_network_that_pytorch_runs_otherwise_is_refused(case: Case) -> None:
    model = case.quantized()
    floats = graph.arrays(onnx.load(case.root / case.path))
    name = next(name for name, values in floats.items() if values.ndim == 2)
    with pytest.raises(StageError, match="PyTorch runs it otherwise than ONNX Runtime"):
        case.train(model, floats={name: -floats[name]})


def of_all_but_the_last(model: onnx.ModelProto, bits: int) -> dict[str, int]:
    """So many bits for each layer by the name of its weights, but for the last."""
    dequantized = graph.Constants(model).dequantized
    read = [node.input[1] for node in model.graph.node if node.op_type in graph.WEIGHTED]
    return {rounding.float_name(dequantized[name]): bits for name in read[:-1] if name in dequantized}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", MASKED)
def test_few_bits_hold_the_codes_of_all_but_the_last_layer(
    name: str, bits: int, networks: Callable[[str], Network]
) -> None:
    network = networks(name)
    coarse, floats = onnx.ModelProto(), graph.arrays(onnx.load(network.path))
    coarse.CopyFrom(network.quantized)
    rounding.coarsen(coarse, floats, of_all_but_the_last(coarse, bits))
    found, before = codes_of(coarse), codes_of(network.quantized)
    assert all(0 < abs(codes.astype(int)).max() < 2 ** (bits - 1) for codes in found[:-1] if codes.any())
    assert np.array_equal(found[-1], before[-1])
    assert all(not codes[old == 0].any() for codes, old in zip(found, before, strict=True))
    net = qat.Network(coarse, floats, of_all_but_the_last(coarse, bits))
    images = torch.randn(4, *network.preprocessing.shape)
    with torch.inference_mode():
        answered = net(images).numpy()
    expected = session.logits(session.open_session(coarse.SerializeToString(), 1), images.numpy())
    assert np.abs(answered - expected).mean() < 0.05 * max(expected.std(), 1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_what_is_trained_without_dead_channels_goes_back_to_its_places(
    name: str, networks: Callable[[str], Network]
) -> None:
    model, original = onnx.ModelProto(), graph.arrays(onnx.load(networks(name).path))
    model.CopyFrom(networks(name).quantized)
    slim, places = channels.cut(model)
    suffix = "_quantized"
    floats = {one: values[places.get(one + suffix, ...)] for one, values in original.items()}
    net = qat.Network(slim, floats, of_all_but_the_last(slim, 4))
    torch.manual_seed(0)
    with torch.no_grad():
        for values in net.parameters():
            values.add_(torch.randn_like(values) * values.std().nan_to_num() / 2)
    net.write(slim)
    assert any(tensor.dims != before.dims for tensor, before in zip_tensors(slim, model))
    channels.paste(model, slim, places)
    assert_same_bits(model, slim)


def zip_tensors(one: onnx.ModelProto, other: onnx.ModelProto) -> list[tuple[onnx.TensorProto, onnx.TensorProto]]:
    tensors = graph.initializers(other)
    return [(tensor, tensors[name]) for name, tensor in graph.initializers(one).items() if name in tensors]


def test_the_stage_trains_weights_of_two_bits(repository: Repository) -> None:
    case = Case(repository.root)
    case.lay(repository, percentile=99.99, grid={"kind": "mixed", "mean_bits": 2, "qat": QAT})
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(repository.report("quantize").read_text())
    model = onnx.load(repository.model("quantize"))
    assert len(report["qat"]) == SCHEDULE["epochs"]
    assert set(report["bits"].values()) == {2}
    assert all(abs(codes.astype(int)).max() <= 1 for codes in codes_of(model)[:-1])
    constants = graph.Constants(model)
    for node in model.graph.node:
        if node.op_type in graph.WEIGHTED:
            steps = numpy_helper.to_array(constants.tensors[constants.dequantized[node.input[1]].input[1]])
            assert np.array_equal(steps, steps.astype(np.float16).astype(np.float32))
    coarse = case.quantized(NARROW.model_copy(update={"percentile": 99.99}))
    floats = graph.arrays(onnx.load(case.root / case.path))
    rounding.coarsen(coarse, floats, of_all_but_the_last(coarse, 2))
    ready = session.open_session(coarse.SerializeToString(), 1)
    labels = np.asarray(case.images("val").labels)
    before = (session.logits(ready, case.tensors("val").numpy()).argmax(1) == labels).mean()
    assert report["val_top1"] > before


@pytest.mark.parametrize("allowed", [0.0, 1.0])
def test_the_stage_trains_where_calibration_costs_too_much(repository: Repository, allowed: float) -> None:
    case = Case(repository.root)
    case.lay(repository, grid={"kind": "int8", "qat": QAT | {"max_top1_drop": allowed}})
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(repository.report("quantize").read_text())
    told = next(line for line in done.stdout.splitlines() if "calibrated" in line and "val top-1" in line)
    calibrated = float(told.split("calibrated ")[1].rstrip("%")) / 100
    if allowed == 1.0:
        assert report["qat"] == []
        assert report["val_top1"] == pytest.approx(calibrated, abs=1e-4)
    else:
        assert len(report["qat"]) == SCHEDULE["epochs"]
        assert report["val_top1"] > calibrated
    assert not list((repository.root / paths.CHECKPOINTS).glob("quantize*"))


def test_trained_epochs_are_kept_until_the_results_are_written(repository: Repository) -> None:
    Case(repository.root).lay(repository, grid={"kind": "int8", "qat": QAT | {"max_top1_drop": 0.0}})
    blocked = repository.root / paths.onnx("quantize").parent
    blocked.touch()
    assert "data/models/quantize" in repository.sentence("quantize")
    blocked.unlink()
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resuming after epoch {SCHEDULE['epochs']}" in done.stdout


def test_the_bench_of_bits_runs(repository: Repository) -> None:
    case = Case(repository.root)
    digits = load_digits(n_class=len(CLASSES))
    case.write("test", digits.images[512:], digits.target[512:])
    case.lay(repository, percentile=99.99, grid={"kind": "mixed", "mean_bits": 4, "qat": QAT})
    command = [sys.executable, str(ROOT / "tests/bench/bits.py"), "--seeds", "2"]
    done = subprocess.run([*command, "--row", "3 bits on average"], cwd=case.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    int8, few = done.stdout.splitlines()[-2:]
    assert int8.split()[0] == "int8"
    assert "3 bits on average" in few
    table = json.loads((case.root / "data/reports/bench/bits.json").read_text())["rows"]
    assert [len(rows) for rows in table.values()] == [1, 2]
    assert all(row["size_bytes"] < table["int8"][0]["size_bytes"] for row in table["3 bits on average"])
    assert all(row["top1"] > 0.8 for rows in table.values() for row in rows)
    done = subprocess.run([*command, "--row", "9 bits"], cwd=case.root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no row '9 bits'; there are: int8, not packed, int8, int8, trained, 4.5 bits" in done.stderr
