"""quantize: int8 throughout, from training images only, the same bytes every time, and clear sentences."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import CALIBRATION, CLASSES, MASKED, ROOT, Network, Repository, png, write_split
from onnx import helper, numpy_helper
from PIL import Image

from tasks.core import config, files
from tasks.core.errors import StageError
from tasks.graphs import compact, graph, rounding
from tasks.graphs.calibration import BATCH, Reader, check_scales, images_at_once, quantize, sensitivities
from tasks.graphs.optimized import float_layers
from tasks.images.preprocessing import Preprocessing, preprocess
from tasks.quantize import calibration_images
from tasks.runtime import session

Networks = Callable[[str], Network]


@pytest.mark.parametrize("name", MASKED)
def test_weights_are_int8_per_channel_and_activations_uint8(name: str, networks: Networks) -> None:
    model = networks(name).quantized
    constants, known = graph.initializers(model), graph.shapes(model)
    readers = {source: node for node in model.graph.node for source in node.input}
    weights = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        kind = constants[node.input[2]].data_type
        values = constants.get(node.input[0])
        if values is None:
            assert scale.ndim == 0, "an activation has one scale"
            assert kind == onnx.TensorProto.UINT8
        elif readers[node.output[0]].input[1] == node.output[0]:
            weights += 1
            assert values.data_type == kind == onnx.TensorProto.INT8
            axis = graph.attribute(node, "axis", 1) % len(values.dims)
            width = known[readers[node.output[0]].output[0]][1]
            assert scale.shape == (values.dims[axis],) == (width,)
            assert not numpy_helper.to_array(constants[node.input[2]]).any()
        else:
            assert values.data_type == onnx.TensorProto.INT32, "a bias"
    assert weights == sum(node.op_type in graph.WEIGHTED for node in model.graph.node) > 1


@pytest.mark.parametrize("name", MASKED)
def test_no_float_layer_is_left(name: str, networks: Networks, tmp_path: Path) -> None:
    onnx.save(networks(name).quantized, tmp_path / "int8.onnx")
    assert float_layers(tmp_path / "int8.onnx") == []
    float_ones = float_layers(networks(name).path)
    assert len(float_ones) == sum(node.op_type in graph.WEIGHTED for node in networks(name).quantized.graph.node)


def test_a_layer_left_in_float_is_named(networks: Networks, tmp_path: Path) -> None:
    """The second convolution reads its weights as float."""
    model = onnx.ModelProto()
    model.CopyFrom(networks("lenet-5").quantized)
    constants = graph.Constants(model)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][1]
    dequantizer = constants.dequantized[conv.input[1]]
    values, scale = (numpy_helper.to_array(constants.tensors[name]) for name in dequantizer.input[:2])
    model.graph.initializer.append(
        numpy_helper.from_array((values * scale.reshape(-1, 1, 1, 1)).astype(np.float32), "float_weight")
    )
    conv.input[1] = "float_weight"
    onnx.save(model, tmp_path / "mixed.onnx")
    left = float_layers(tmp_path / "mixed.onnx")
    assert len(left) == 1
    assert "Conv of float_weight" in left[0]


@pytest.mark.parametrize("name", MASKED)
def test_int8_answers_nearly_as_float(name: str, networks: Networks, tmp_path: Path) -> None:
    network = networks(name)
    onnx.save(network.quantized, tmp_path / "int8.onnx")
    batch = Reader([png(seed) for seed in range(100, 100 + BATCH)], network.preprocessing).get_next()
    assert batch is not None
    expected, found = (
        session.logits(session.open_session(path, 1), batch["image"]) for path in (network.path, tmp_path / "int8.onnx")
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", MASKED)
def test_zeros_stay_zeros(name: str, networks: Networks) -> None:
    (size, before), (same, after) = (
        graph.parameters(model) for model in (onnx.load(networks(name).path), networks(name).quantized)
    )
    assert size == same
    assert 0 < after <= before < 0.8 * size


def test_what_a_device_needs_to_know_stays(networks: Networks, tmp_path: Path) -> None:
    onnx.save(networks("lenet-5").quantized, tmp_path / "int8.onnx")
    before, after = (
        session.description(session.open_session(path, 1))
        for path in (networks("lenet-5").path, tmp_path / "int8.onnx")
    )
    assert before == after == (networks("lenet-5").preprocessing, CLASSES)
    assert networks("lenet-5").quantized.graph.input == onnx.load(networks("lenet-5").path).graph.input


def test_the_same_bytes_twice(networks: Networks, images: list[bytes]) -> None:
    network = networks("lenet-5")
    again = quantize(network.path, images, network.preprocessing, CALIBRATION)
    assert again.SerializeToString() == network.quantized.SerializeToString()


def test_ranges_come_from_every_piece(networks: Networks) -> None:
    """The brightest images are in the second batch: the input's range must hold them."""
    network = networks("lenet-5")
    black, white = (plain(value) for value in (0, 255))
    model = quantize(network.path, [black] * BATCH + [white] * BATCH, network.preprocessing, CALIBRATION)
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale, zero = (numpy_helper.to_array(graph.initializers(model)[name]) for name in node.input[1:])
    assert node.input[0] == "image"
    assert (255 - int(zero)) * float(scale) == pytest.approx(1, abs=0.02)


def plain(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (28, 28), value).save(stream, "PNG")
    return stream.getvalue()


PEAK = """
import sys
from pathlib import Path
from tasks.core import config
from tasks.runtime import probe, session
from tasks.graphs.calibration import quantize
model, image, count = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
preprocessing, _ = session.description(session.open_session(model, 1))
quantize(model, [image] * count, preprocessing, config.Quantize(calibration_images=count, percentile=99.9))
print(probe.peak_rss_bytes())
"""


def test_memory_does_not_grow_with_the_calibration_images(networks: Networks, tmp_path: Path) -> None:
    """All features of 1,024 images are over 100 MB; those of one batch are 4 MB."""
    (tmp_path / "image.png").write_bytes(png(0, 28))

    def peak(count: int) -> int:
        command = [sys.executable, "-c", PEAK, str(networks("lenet-5").path), str(tmp_path / "image.png"), str(count)]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert peak(1024) - peak(64) < 40_000_000


def test_images_are_decoded_batch_by_batch(networks: Networks, images: list[bytes]) -> None:
    reader = Reader([*images, *images, b"never decoded"], networks("lenet-5").preprocessing)
    assert len(reader) == 2
    reader.set_range(1, 2)
    batch = reader.get_next()
    assert batch is not None
    assert batch["image"].shape == (BATCH, 1, 28, 28)
    assert batch["image"].dtype == np.float32
    assert reader.get_next() is None


def test_percentile_and_reduced_range_are_obeyed(networks: Networks, images: list[bytes]) -> None:
    network = networks("lenet-5")

    def scales(**changes: object) -> tuple[float, int]:
        model = quantize(network.path, images, network.preprocessing, CALIBRATION.model_copy(update=changes))
        constants = graph.initializers(model)
        image = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        weights = [numpy_helper.to_array(t) for t in constants.values() if t.data_type == 3 and len(t.dims) > 1]
        return float(numpy_helper.to_array(constants[image.input[1]])), max(int(abs(w).max()) for w in weights)

    full, wide = scales()
    cut, narrow = scales(percentile=60.0, grid=config.Int7(kind="int7"))
    assert cut < 0.9 * full
    assert (wide, narrow) == (127, 64)


def by_factor(factor: float) -> config.Quantize:
    return config.Quantize(calibration_images=32, percentile=99.99, grid=config.ByFactor(kind="factor", factor=factor))


@pytest.mark.parametrize(("name", "factor"), [*((name, 24.0) for name in MASKED), ("lenet-5", 700.0)])
def test_by_a_factor_every_weight_is_its_product_rounded_and_clipped(
    name: str, factor: float, networks: Networks, images: list[bytes], tmp_path: Path
) -> None:
    network = networks(name)
    model = quantize(network.path, images, network.preprocessing, by_factor(factor))
    constants, floats = graph.Constants(model), graph.initializers(onnx.load(network.path))
    makers = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type in graph.WEIGHTED]
    exact, codes = [], []
    for node in layers:
        source, weight, *bias = (makers[name] for name in node.input)
        original = weight.input[0].removesuffix("_quantized")
        exact.append(numpy_helper.to_array(floats[original]).astype(np.float64).ravel() * factor)
        codes.append(numpy_helper.to_array(constants.tensors[weight.input[0]]).ravel())
        scale = numpy_helper.to_array(constants.tensors[weight.input[1]])
        assert scale == np.float32(1 / factor)
        for one in bias:
            step = numpy_helper.to_array(constants.tensors[one.input[1]])
            assert step == numpy_helper.to_array(constants.tensors[source.input[1]]) * scale
            values = numpy_helper.to_array(constants.tensors[one.input[0]])
            assert values.dtype == np.int32
            wanted = numpy_helper.to_array(floats[one.input[0].removesuffix("_quantized")])
            assert np.array_equal(values, np.rint(wanted / np.float64(step)))
            assert values.any() == wanted.any()
    found, products = np.concatenate(codes), np.concatenate(exact)
    assert found.dtype == np.int8
    assert np.array_equal(found, np.clip(np.rint(products), -127, 127))
    if factor == 700:
        assert (abs(products) > 127.5).any()
        assert set(found[abs(products) > 127.5]) == {-127, 127}
    onnx.save(model, tmp_path / "int8.onnx")
    assert float_layers(tmp_path / "int8.onnx") == []


@pytest.mark.parametrize("name", ["mlp", "mobilenetv2_050"])
def test_by_a_fine_factor_the_network_answers_as_the_float_one(
    name: str, networks: Networks, images: list[bytes], tmp_path: Path
) -> None:
    """One that clips nothing: so the biases must be right, too."""
    network = networks(name)
    weights = [numpy_helper.to_array(one) for one in onnx.load(network.path).graph.initializer if len(one.dims) > 1]
    factor = 127 / max(float(abs(weight).max()) for weight in weights)
    onnx.save(quantize(network.path, images, network.preprocessing, by_factor(factor)), tmp_path / "int8.onnx")
    batch = Reader([png(seed) for seed in range(100, 100 + BATCH)], network.preprocessing).get_next()
    assert batch is not None
    expected, found = (
        session.logits(session.open_session(path, 1), batch["image"]) for path in (network.path, tmp_path / "int8.onnx")
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97


def test_what_a_factor_loses_is_counted(networks: Networks, images: list[bytes]) -> None:
    network = networks("lenet-5")
    original = onnx.load(network.path)
    weights = [numpy_helper.to_array(one).astype(np.float64) for one in original.graph.initializer if len(one.dims) > 1]
    every = np.concatenate([weight.ravel() for weight in weights])
    every = every[every != 0]
    model = quantize(network.path, images, network.preprocessing, by_factor(900.0))
    clipped, zeroed = int((abs(np.rint(every * 900)) > 127).sum()), int((abs(every * 900) <= 0.5).sum())
    assert min(clipped, zeroed) > 0
    assert rounding.lost(model, graph.arrays(original), 900.0) == {
        "rounded_weights": len(every),
        "clipped_weights": clipped,
        "zeroed_weights": zeroed,
        "zeroed_share": zeroed / len(every),
    }


def test_a_factor_that_leaves_nothing_of_a_layer_is_refused(networks: Networks, images: list[bytes]) -> None:
    network = networks("lenet-5")
    with pytest.raises(StageError) as caught:
        quantize(network.path, images, network.preprocessing, by_factor(0.5))
    assert str(caught.value) == "quantize.grid.factor 0.5 leaves nothing of 0.weight: raise it"


def test_a_factor_for_which_a_bias_is_too_large_is_refused(
    networks: Networks, images: list[bytes], tmp_path: Path
) -> None:
    network = networks("lenet-5")
    path = poison(network, 1, 1e4, tmp_path / "model.onnx")
    with pytest.raises(StageError) as caught:
        quantize(path, images, network.preprocessing, by_factor(1e6))
    assert str(caught.value) == "quantize.grid.factor 1e+06 makes 0.bias too large for int32: lower it"


def test_layers_that_share_weight_and_bias_are_rounded_by_the_factor(images: list[bytes], tmp_path: Path) -> None:
    """ONNX Runtime copies the bias, since its scale hangs on each layer's input."""
    shape: list[str | int | None] = ["batch", 3, 8, 8]
    weight = np.random.default_rng(0).normal(0, 0.2, (3, 3, 3, 3)).astype(np.float32)
    bias = np.asarray([0.5, -0.25, 1.0], np.float32)
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    nodes = [
        helper.make_node("Conv", [source, "weight", "bias"], [target], name=target, pads=[1] * 4)
        for source, target in (("image", "first"), ("first", "logits"))
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("image", "logits")]
    made = helper.make_model(
        helper.make_graph(nodes, "twice", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(made, tmp_path / "float.onnx")
    preprocessing = Preprocessing(size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = quantize(tmp_path / "float.onnx", images, preprocessing, by_factor(40.0))
    stored = graph.Constants(model)
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert layers[0].input[2] != layers[1].input[2]
    for node in layers:
        own = stored.dequantized[node.input[2]]
        codes, step = (numpy_helper.to_array(stored.tensors[name]) for name in own.input[:2])
        assert codes * step == pytest.approx(bias, abs=2 * float(step))
        assert np.array_equal(stored.read(node.input[1]), np.rint(weight.astype(np.float64) * 40))  # type: ignore[arg-type]


def test_calibration_images_are_spread_over_the_split_in_its_order(tmp_path: Path) -> None:
    every = [bytes([index]) for index in range(101)]
    write_split(tmp_path / "train.parquet", every)
    chosen = calibration_images(tmp_path / "train.parquet", CLASSES, 70)
    assert len(chosen) == 64
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (every[0], every[-1])
    assert max(b[0] - a[0] for a, b in itertools.pairwise(chosen)) == 2
    assert chosen == calibration_images(tmp_path / "train.parquet", CLASSES, 70)
    assert len(calibration_images(tmp_path / "train.parquet", CLASSES, 1000)) == 96


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", [b""] * (BATCH - 1))
    with pytest.raises(StageError, match=f"has {BATCH - 1} images: calibration needs at least {BATCH}"):
        calibration_images(tmp_path / "train.parquet", CLASSES, 512)


def poison(network: Network, position: int, value: float, path: Path) -> Path:
    model = onnx.load(network.path)
    tensor = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT][position]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("position", range(8))
def test_weights_that_are_not_finite_are_refused(
    position: int, value: float, networks: Networks, images: list[bytes], tmp_path: Path
) -> None:
    network = networks("lenet-5")
    path = poison(network, position, value, tmp_path / "model.onnx")
    with pytest.raises(StageError, match="finite"):
        quantize(path, images, network.preprocessing, CALIBRATION)


@pytest.mark.parametrize("change", [{"mean": (float("nan"),)}, {"std": (0.0,)}], ids=["nan", "infinite"])
def test_images_that_are_not_finite_are_refused(
    change: dict[str, tuple[float]], networks: Networks, images: list[bytes]
) -> None:
    network = networks("lenet-5")
    with pytest.raises(StageError, match=r"cannot be calibrated on these images: .* not finite"):
        quantize(network.path, images, replace(network.preprocessing, **change), CALIBRATION)  # type: ignore[arg-type]


def test_float16_holds_steps_and_biases(networks: Networks, images: list[bytes]) -> None:
    """A step is the next one up, so that no code is clipped; each code is that of the weight on the new step."""
    network = networks("mobilenetv2_050")
    made = quantize(network.path, images, network.preprocessing, CALIBRATION)
    floats, constants = graph.initializers(onnx.load(network.path)), graph.Constants(made)
    makers = {node.output[0]: node for node in made.graph.node}
    seen = 0
    for node in made.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        weight, bias = (constants.dequantized[name] for name in node.input[1:3])
        codes, step = (numpy_helper.to_array(constants.tensors[name]) for name in weight.input[:2])
        assert np.array_equal(step, step.astype(np.float16).astype(np.float32))
        exact = numpy_helper.to_array(floats[weight.input[0].removesuffix("_quantized")])
        shaped = step.reshape(-1, 1, 1, 1)
        assert (abs(exact - codes * shaped).max(axis=(1, 2, 3)) <= step * 0.5001).all()
        source = numpy_helper.to_array(constants.tensors[makers[node.input[0]].input[1]])
        number, own = (numpy_helper.to_array(constants.tensors[name]) for name in bias.input[:2])
        assert np.array_equal(own, np.asarray(source * step, np.float32))
        value = numpy_helper.to_array(floats[bias.input[0].removesuffix("_quantized")])
        assert np.array_equal(number, np.rint(value.astype(np.float16).astype(np.float64) / own).astype(np.int32))
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    nodes = [helper.make_node("QuantizeLinear", ["features", "scale"], ["codes"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(np.asarray(scale, np.float32), "scale")])
    )
    with pytest.raises(StageError, match="the range of features is not finite"):
        check_scales(model)


FRONT = ["conv_stem", "blocks.0.0.conv_dw"]


@pytest.mark.parametrize("kept", [FRONT[:1], FRONT])
def test_layers_that_are_left_in_float(
    kept: list[str], networks: Networks, images: list[bytes], tmp_path: Path
) -> None:
    network = networks("mobilenetv2_050")
    mixed = quantize(network.path, images, network.preprocessing, CALIBRATION, kept)
    constants, original = graph.initializers(mixed), graph.initializers(onnx.load(network.path))
    for name in kept:
        values = numpy_helper.to_array(original[f"{name}.weight"])
        halves = values.astype(np.float16).astype(np.float32)
        assert np.array_equal(numpy_helper.to_array(constants[f"{name}.weight"]), halves)
    onnx.save(mixed, tmp_path / "mixed.onnx")
    assert len(float_layers(tmp_path / "mixed.onnx")) == len(kept)


def prepare(repository: Repository, source: Path, train: int = 70, float32: Sequence[str] = ()) -> None:
    path = repository.root / "data/models/prune/plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"float32": float32}))
    repository.params(quantize={"calibration_images": 64})
    repository.model("prune").write_bytes(source.read_bytes())
    repository.split("train", [png(seed) for seed in range(train)])
    repository.split("val", [png(seed) for seed in range(200, 220)])


def test_the_stage_leaves_the_model_and_its_numbers(repository: Repository, networks: Networks) -> None:
    network = networks("lenet-5")
    prepare(repository, network.path)
    repository.split("test", []).write_bytes(b"whoever reads this fails")
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    chosen = [png(int(seed)) for seed in np.linspace(0, 69, 64).astype(int)]
    params = CALIBRATION.model_copy(update={"percentile": 99.999})
    expected = quantize(network.path, chosen, network.preprocessing, params)
    compact.round_biases(expected)
    assert repository.model("quantize").read_bytes() == expected.SerializeToString()
    report = json.loads(repository.report("quantize").read_text())
    ready = session.open_session(repository.model("quantize"), 1)
    val = np.stack([preprocess(png(seed), network.preprocessing) for seed in range(200, 220)])
    right = session.logits(ready, val).argmax(1) == np.arange(20) % len(CLASSES)
    listed = report.pop("sensitivities")
    assert report.pop("val_top1") == right.mean()
    assert report == {"calibration_images": 64, "float32": [], "float_layers": 0, "bits": {}, "qat": []}
    assert sorted(row["layer"] for row in listed) == ["0", "3", "7", "9"]


def test_the_layer_that_int8_harms_most_is_listed_first(networks: Networks, images: list[bytes]) -> None:
    """The one whose weights lie on a grid that is far too coarse."""
    network = networks("mobilenetv2_050")
    model = onnx.ModelProto()
    model.CopyFrom(network.quantized)
    constants = graph.Constants(model)
    tensor = constants.tensors["blocks.4.1.conv_pw.weight_quantized"]
    codes = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((codes // 64 * 64).astype(np.int8), tensor.name))
    for coarse, source in ((False, network.quantized), (True, model)):
        found = sensitivities(network.path, source, images, network.preprocessing)
        assert [row["output_db"] for row in found] == sorted(row["output_db"] for row in found)
        noisy = min(found, key=lambda row: float(row["weights_db"]))
        assert (noisy["layer"] == "blocks.4.1.conv_pw") == coarse
        assert all(row["weights_db"] > 30 for row in found if row["layer"] != "blocks.4.1.conv_pw")


def test_the_stage_shares_codes_where_it_is_asked_to(repository: Repository, networks: Networks) -> None:
    prepare(repository, networks("lenet-5").path)
    sizes = {}
    for levels in (None, 8):
        repository.params(quantize={"calibration_images": 64, "grid": {"kind": "int8", "codebook": levels}})
        done = repository.run("quantize")
        assert (done.returncode, done.stderr) == (0, "")
        sizes[levels] = len(files.pack(repository.model("quantize").read_bytes()))
        model = onnx.load(repository.model("quantize"))
        constants = graph.Constants(model)
        weights = [constants.read(node.input[1]) for node in model.graph.node if node.op_type in graph.WEIGHTED]
        counts = [len(np.unique(codes[codes != 0])) for codes in weights if codes is not None]
        assert len(counts) == 4
        assert max(counts) > 8 if levels is None else max(counts) == 8
    assert sizes[8] < 0.6 * sizes[None]


def test_the_stage_leaves_in_float_what_the_plan_says(repository: Repository, networks: Networks) -> None:
    network = networks("mobilenetv2_050")
    prepare(repository, network.path, float32=FRONT)
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"faster in float32 on the device, and left so: {', '.join(FRONT)}" in done.stdout
    assert json.loads(repository.report("quantize").read_text())["float32"] == FRONT
    assert len(float_layers(repository.model("quantize"))) == len(FRONT)


def test_the_stage_tells_what_a_factor_loses(repository: Repository, networks: Networks) -> None:
    network = networks("lenet-5")
    prepare(repository, network.path)
    repository.params(quantize={"calibration_images": 64, "grid": {"kind": "factor", "factor": 100}})
    done = repository.run("quantize")
    assert (done.returncode, done.stderr) == (0, "")
    model = onnx.load(repository.model("quantize"))
    report = json.loads(repository.report("quantize").read_text())
    told = rounding.lost(model, graph.arrays(onnx.load(network.path)), 100)
    assert report.items() >= told.items()
    assert 0 < report["zeroed_share"] < 1
    says = (
        f"factor 100: of {told['rounded_weights']:,} weights {told['clipped_weights']:,} are clipped "
        f"and {told['zeroed_weights']:,} become 0 ({told['zeroed_share']:.1%})"
    )
    assert says in done.stdout.splitlines()


def test_the_stage_needs_images_to_calibrate_on(repository: Repository, networks: Networks) -> None:
    prepare(repository, networks("lenet-5").path, train=31)
    said = repository.sentence("quantize")
    assert said == "data/prepared/train.parquet has 31 images: calibration needs at least 32"


def test_the_stage_refuses_a_model_with_nan_and_keeps_its_last_output(
    repository: Repository, networks: Networks, tmp_path: Path
) -> None:
    prepare(repository, poison(networks("lenet-5"), 2, np.nan, tmp_path / "nan.onnx"))
    repository.model("quantize").write_bytes(b"the last good model")
    assert "data/models/prune/model.onnx cannot be calibrated" in repository.sentence("quantize")
    assert repository.model("quantize").read_bytes() == b"the last good model"


def test_the_stage_refuses_a_model_that_stays_in_float(repository: Repository, networks: Networks) -> None:
    """A convolution's bias that follows the image has no int8 form."""
    model = onnx.load(networks("lenet-5").path)
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    level = helper.make_node("ReduceMean", ["image"], ["level"], keepdims=0)
    bias = helper.make_node("Mul", [conv.input[2], "level"], ["bias"])
    conv.input[2] = "bias"
    model.graph.node.insert(0, bias)
    model.graph.node.insert(0, level)
    path = repository.root / "float.onnx"
    onnx.save(model, path)
    prepare(repository, path)
    assert "data/models/quantize/model.onnx still computes in float: Conv of " in repository.sentence("quantize")
    assert not repository.model("quantize").exists()


def test_large_images_go_through_in_smaller_batches(tmp_path: Path, networks: Networks) -> None:
    """As many as training holds more of; small ones, 32 at once, as ever."""
    counts = {}
    for side in (32, 224, 1024):
        model = onnx.load(networks("mobilenetv2_050").path)
        for axis in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
        del model.graph.value_info[:]
        onnx.save(model, tmp_path / "model.onnx")
        counts[side] = images_at_once(tmp_path / "model.onnx", BATCH)
    assert counts == {32: 32, 224: 4, 1024: 1}
