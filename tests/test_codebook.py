"""codebook: the fewest errors that so many shared codes allow, zeros kept, and a plain int8 file that packs better."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
import zstandard
from conftest import CALIBRATION, CLASSES, Network
from onnx import helper, numpy_helper

from tasks.graphs import graph
from tasks.graphs.calibration import quantize
from tasks.graphs.codebook import apply, cluster
from tasks.graphs.optimized import float_layers
from tasks.nets import backbone
from tasks.nets.export import export
from tasks.reduce import reduce

NAMES = ("mlp", "lenet-5", "mobilenetv2_050")
Codes = npt.NDArray[np.int8]
Networks = Callable[[str], Network]


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def codes_of(model: onnx.ModelProto) -> list[Codes]:
    """The int8 weights of every layer."""
    constants = graph.Constants(model)
    stored = [constants.read(node.input[1]) for node in model.graph.node if node.op_type in graph.WEIGHTED]
    return [np.asarray(values, np.int8) for values in stored if values is not None and values.dtype == np.int8]


def scales_of(model: onnx.ModelProto) -> list[npt.NDArray[np.float32]]:
    constants = graph.Constants(model)
    weights = [constants.dequantized[node.input[1]] for node in model.graph.node if node.op_type in graph.WEIGHTED]
    return [numpy_helper.to_array(constants.tensors[weight.input[1]]) for weight in weights]


def answer(model: onnx.ModelProto, images: npt.NDArray[np.float32], optimized: bool = True) -> npt.NDArray[np.float32]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ready = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(ready.run(None, {ready.get_inputs()[0].name: images})[0])


def zst_bytes(model: onnx.ModelProto) -> int:
    return len(zstandard.ZstdCompressor(level=19).compress(model.SerializeToString()))


def noise(network: Network) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1, (8, *network.preprocessing.shape)).astype(np.float32)


def error(codes: Codes, shared: Codes) -> int:
    return int(((codes.astype(int) - shared) ** 2).sum())


def least_error(codes: Codes, levels: int) -> int:
    """By trying every choice of nonzero integers."""
    kept = codes[codes != 0].astype(int)
    if not len(kept):
        return 0
    choices = [level for level in range(kept.min(), kept.max() + 1) if level != 0]
    return min(
        int(((kept[:, None] - np.array(chosen)) ** 2).min(axis=1).sum())
        for chosen in itertools.combinations(choices, min(levels, len(choices)))
    )


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_no_choice_of_shared_codes_has_less_error(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(60):
        codes = rng.integers(-7, 8, rng.integers(1, 12)).astype(np.int8)
        shared = cluster(codes, levels)
        assert len(np.unique(shared[shared != 0])) <= levels
        assert error(codes, shared) == least_error(codes, levels), codes


def test_zeros_stay_and_nothing_else_becomes_zero() -> None:
    everything = np.arange(-128, 128).astype(np.int8)
    for levels in (1, 2, 7, 16):
        shared = cluster(everything.reshape(16, 16), levels)
        assert shared.shape == (16, 16)
        assert shared.dtype == np.int8
        assert np.array_equal(shared.ravel() == 0, everything == 0)
    assert cluster(np.array([-1, 0, 1], np.int8), 1).tolist() in ([-1, 0, -1], [1, 0, 1])


def test_counts_decide_where_the_shared_codes_lie() -> None:
    codes = np.array([10] * 99 + [20, 100], np.int8)
    assert np.unique(cluster(codes, 2)).tolist() == [10, 100]
    assert cluster(codes, 1)[0] == 11


def test_enough_levels_change_nothing() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (20, 30)).astype(np.int8)
    assert np.array_equal(cluster(codes, 254), codes)
    assert np.array_equal(cluster(codes, 1000), codes)
    for empty in (np.zeros((3, 2), np.int8), np.zeros((0, 4), np.int8)):
        assert np.array_equal(cluster(empty, 4), empty)


def test_sums_of_many_codes_do_not_overflow() -> None:
    codes = np.repeat(np.array([-127, 126, 127], np.int8), 300_000)
    assert np.unique(cluster(codes, 2)).tolist() in ([-127, 126], [-127, 127])


def test_a_codebook_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="levels is 0"):
        cluster(np.array([1], np.int8), 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_network_keeps_its_zeros_and_its_integer_kernels_and_packs_better(
    name: str, networks: Networks, tmp_path: Path
) -> None:
    before = networks(name).quantized
    after = copy(before)
    apply(after, 16)
    onnx.checker.check_model(after, full_check=True)
    assert len(codes_of(after)) == len(codes_of(before)) == len(scales_of(before))
    for old, new in zip(codes_of(before), codes_of(after), strict=True):
        assert old.shape == new.shape
        assert not new[old == 0].any(), "what pruning zeroed stays zero"
        assert len(np.unique(new[new != 0])) <= 16
    assert zst_bytes(after) < 0.85 * zst_bytes(before)
    onnx.save(after, tmp_path / "shared.onnx")
    assert float_layers(tmp_path / "shared.onnx") == []
    inputs = noise(networks(name))
    reduced, _ = reduce(after)
    assert answer(reduced, inputs).tobytes() == answer(after, inputs).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_many_levels_answer_alike(name: str, networks: Networks) -> None:
    model, inputs = copy(networks(name).quantized), noise(networks(name))
    expected = answer(model, inputs)
    apply(model, 64)
    assert np.linalg.norm(answer(model, inputs) - expected) < 0.1 * np.linalg.norm(expected)


def test_each_layer_has_its_own_codebook(networks: Networks) -> None:
    model = copy(networks("lenet-5").quantized)
    apply(model, 8)
    assert len(np.unique(np.concatenate([codes.ravel() for codes in codes_of(model)]))) > 1 + 8


def train(values: list[float], tmp_path: Path, images: list[bytes], tiny: float = 1.0) -> onnx.ModelProto:
    """A quantized perceptron whose weights are plus or minus these values; channel 0 has them times `tiny`."""
    preprocessing = backbone.preprocessing("mlp", 28)
    torch.manual_seed(0)
    net = backbone.create("mlp", len(CLASSES), preprocessing)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                for channel, row in enumerate(parameter):
                    row.copy_(torch.tensor(values[: 2 + channel % 4])[torch.randint(2 + channel % 4, row.shape)])
                    row.mul_(torch.randint(2, row.shape) * 2 - 1)
                parameter[0] *= tiny
    spec = backbone.Spec(backbone="mlp", classes=CLASSES, preprocessing=preprocessing, weights={})
    export(net, spec, tmp_path / "mlp.onnx")
    return quantize(tmp_path / "mlp.onnx", images, preprocessing, CALIBRATION)


def test_weights_trained_on_a_codebook_come_back_under_one_scale(tmp_path: Path, images: list[bytes]) -> None:
    before = train([0.01, 0.02, 0.03, 0.04, 0.05], tmp_path, images)
    assert all(len(np.unique(abs(codes))) > 5 for codes in codes_of(before)), "own scales hide the codebook"
    after = copy(before)
    apply(after, 10)
    for codes, scale in zip(codes_of(after), scales_of(after), strict=True):
        assert scale.ndim == 0
        magnitudes = np.unique(abs(codes * float(scale)))
        assert magnitudes == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05], rel=0.02)
    inputs = np.random.default_rng(0).random((64, 1, 28, 28)).astype(np.float32)
    expected = answer(before, inputs)
    for optimized in (True, False):  # the optimized graph takes the bias as lying on input scale times weight scale
        assert answer(after, inputs, optimized) == pytest.approx(expected, abs=0.03 * float(np.ptp(expected)))


def test_a_channel_too_small_for_one_scale_keeps_its_own(tmp_path: Path, images: list[bytes]) -> None:
    model = train([0.01, 0.02, 0.03, 0.04, 0.05], tmp_path, images, tiny=1e-4)
    before = [codes * scale[:, None] for codes, scale in zip(codes_of(model), scales_of(model), strict=True)]
    apply(model, 10)
    for old, codes, scale in zip(before, codes_of(model), scales_of(model), strict=True):
        assert scale.shape == (len(codes),)
        assert codes * scale[:, None] == pytest.approx(old, rel=0.5)


def tied_network(biased: bool) -> onnx.ModelProto:
    """Two layers that read one dequantized weight, whose codes become few under one scale."""
    scale = np.array([1, 0.5, 0.35, 0.2], np.float32) / 127
    exact = np.random.default_rng(0).choice([0.1, 0.2], (4, 4))
    constants = {
        "w": np.rint(exact / scale).clip(-127, 127).astype(np.int8),
        "ws": scale,
        "wz": np.zeros(4, np.int8),
        "xs": np.asarray(0.02, np.float32),
        "xz": np.asarray(0, np.uint8),
        "b": np.array([50, -60, 70, 80], np.int32),
        "bs": scale * np.float32(0.02),
        "bz": np.zeros(4, np.int32),
    }
    bias = ["bf"] if biased else []
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=1),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bf"], axis=0),
        helper.make_node("QuantizeLinear", ["image", "xs", "xz"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "xs", "xz"], ["d0"]),
        helper.make_node("Gemm", ["d0", "wf", *bias], ["t0"]),
        helper.make_node("QuantizeLinear", ["t0", "xs", "xz"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "xs", "xz"], ["d1"]),
        helper.make_node("Gemm", ["d1", "wf", *bias], ["logits"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in ("image", "logits")]
    stored = [numpy_helper.from_array(values, name) for name, values in constants.items()]  # type: ignore[arg-type]
    made = helper.make_graph(nodes, "tied", ends[:1], ends[1:], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("biased", [True, False])
def test_what_two_layers_read_keeps_its_scales(biased: bool) -> None:
    model = tied_network(biased)
    inputs = np.random.default_rng(1).random((16, 4)).astype(np.float32)
    expected = answer(model, inputs, optimized=False)
    apply(model, 4)
    assert [scale.shape for scale in scales_of(model)] == [(4,), (4,)]
    assert answer(model, inputs, optimized=False) == pytest.approx(expected, abs=0.05)


def test_weights_with_a_zero_point_are_left_alone() -> None:
    model = tied_network(biased=False)
    graph.initializers(model)["wz"].CopyFrom(numpy_helper.from_array(np.full(4, 3, np.int8), "wz"))
    before = [numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer if tensor.name[0] == "w"]
    apply(model, 1)
    after = [numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer if tensor.name[0] == "w"]
    assert before == after
