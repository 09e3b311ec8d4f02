"""reduce: what is zero goes physically, and not one bit of any logit changes."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from conftest import CALIBRATION, CLASSES, MASKED, Network, Repository, png, write_split
from onnx import helper, numpy_helper

from tasks.core import files
from tasks.core.errors import StageError
from tasks.graphs import graph, packing
from tasks.graphs.calibration import quantize
from tasks.graphs.channels import ChannelClass, layers, removable
from tasks.graphs.optimized import optimize
from tasks.images.preprocessing import Preprocessing, preprocess
from tasks.nets.export import describe
from tasks.reduce import prove, reduce
from tasks.runtime import session

Logits = npt.NDArray[np.float32]
INPUT = Preprocessing(size=8, channels=3, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.3))


def answer(model: onnx.ModelProto, images: Logits, threads: int = 1, optimized: bool = True) -> Logits:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ready = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.logits(ready, images)


def random_images(model: onnx.ModelProto, count: int = 16, seed: int = 0) -> Logits:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(seed).normal(0, 2, (count, *shape)).astype(np.float32)


def assert_same_bits(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    images = random_images(before)
    for threads in (1, 2):
        for is_optimized in (True, False):
            expected, found = (answer(model, images, threads, is_optimized) for model in (before, after))
            assert expected.std() > 0
            assert expected.tobytes() == found.tobytes(), f"{threads=} {is_optimized=}"


def shapes(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Of all weights, in order."""
    return [layer.weight.shape for layer in layers(model, graph.Constants(model))]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


class Builder:
    """Writes a float network of 3x8x8 images, layer by layer; every method returns the name of its result.

    `dead` are output channels with zero weights and bias, `ignored` input channels with zero weights.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.width = {"image": 3}  # channels of each result
        self.side = {"image": 8}  # height and width of each result; 0 after flatten

    def constant(self, values: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(values, f"w{len(self.constants)}"))
        return self.constants[-1].name

    def node(self, kind: str, *inputs: str, width: int = 0, side: int = -1, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        self.width[name] = width or self.width[inputs[0]]
        self.side[name] = self.side[inputs[0]] if side < 0 else side
        return name

    def weights(self, *shape: int, dead: Any = (), ignored: Any = ()) -> npt.NDArray[np.float32]:
        values = self.rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        values[list(dead)] = 0
        values[:, list(ignored)] = 0
        return values

    def bias(self, width: int, dead: Any = ()) -> str:
        values = self.rng.normal(0, 0.1, width).astype(np.float32)
        values[list(dead)] = 0
        return self.constant(values)

    def conv(
        self, x: str, width: int, dead: Any = (), ignored: Any = (), size: int = 3, groups: int = 1, bias: bool = True
    ) -> str:
        weight = self.weights(width, self.width[x] // groups, size, size, dead=dead, ignored=ignored)
        inputs = [self.constant(weight)] + ([self.bias(width, dead)] if bias else [])
        return self.node("Conv", x, *inputs, width=width, group=groups, pads=[size // 2] * 4)

    def depthwise(self, x: str, dead: Any = (), bias: bool = True) -> str:
        return self.conv(x, self.width[x], dead, groups=self.width[x], bias=bias)

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def clip(self, x: str, low: float, high: float) -> str:
        return self.node("Clip", x, *(self.constant(np.asarray(bound, np.float32)) for bound in (low, high)))

    def pool(self, x: str, kind: str = "MaxPool") -> str:
        return self.node(kind, x, side=self.side[x] // 2, kernel_shape=[2, 2], strides=[2, 2])

    def mean(self, x: str) -> str:
        return self.node("GlobalAveragePool", x, side=1)

    def flatten(self, x: str) -> str:
        return self.node("Flatten", x, width=self.width[x] * self.side[x] ** 2, side=0, axis=1)

    def gemm(self, x: str, width: int, dead: Any = (), ignored: Any = (), transposed: bool = True) -> str:
        weight = self.weights(width, self.width[x], dead=dead, ignored=ignored)
        name = self.constant(weight if transposed else np.ascontiguousarray(weight.T))
        return self.node("Gemm", x, name, self.bias(width, dead), width=width, transB=int(transposed))

    def matmul(self, x: str, width: int, dead: Any = (), ignored: Any = ()) -> str:
        weight = self.weights(width, self.width[x], dead=dead, ignored=ignored)
        return self.node("MatMul", x, self.constant(np.ascontiguousarray(weight.T)), width=width)

    def head(self, x: str, **options: Any) -> str:
        return self.gemm(self.flatten(self.mean(x)), 4, **options)

    def model(self, logits: str) -> onnx.ModelProto:
        shape: list[str | int | None] = ["batch", 3, 8, 8]
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        made = helper.make_model(
            helper.make_graph(
                self.nodes,
                "network",
                [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
                [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", self.width[logits]])],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        describe(made, {"classes": CLASSES, **asdict(INPUT)})
        onnx.checker.check_model(made, full_check=True)
        return made


@pytest.fixture
def int8(tmp_path: Path, images: list[bytes]) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
        onnx.save(model, tmp_path / "float.onnx")
        return quantize(tmp_path / "float.onnx", images, INPUT, CALIBRATION)

    return quantized


Int8 = Callable[[onnx.ModelProto], onnx.ModelProto]


@pytest.mark.parametrize("kept", [["conv_stem"], ["conv_stem", "blocks.0.0.conv_dw"]])
def test_layers_left_in_float_shrink_without_changing_a_bit(
    kept: list[str], networks: Callable[[str], Network], images: list[bytes]
) -> None:
    network = networks("mobilenetv2_050")
    mixed = quantize(network.path, images, network.preprocessing, CALIBRATION, kept)
    reduced, _ = reduce(mixed)
    assert sorted(shapes(reduced)) == sorted(network.slim.values())
    assert_same_bits(mixed, reduced)


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_network_shrinks_to_its_plan_without_changing_a_bit(
    name: str, networks: Callable[[str], Network]
) -> None:
    network = networks(name)
    argument = network.quantized.SerializeToString(deterministic=True)
    reduced, record = reduce(network.quantized)
    assert network.quantized.SerializeToString(deterministic=True) == argument
    assert_same_bits(network.quantized, reduced)
    assert sorted(shapes(reduced)) == sorted(network.slim.values())
    assert reduced.ByteSize() < 0.75 * network.quantized.ByteSize()
    before, after = (sum(np.prod(shape) for shape in shapes(model)) for model in (network.quantized, reduced))
    assert after < 0.6 * before
    gone = [np.prod(row["weight_before"]) - np.prod(row["weight_after"]) for row in record["layers"]]
    assert min(gone) > 0
    folded = biases(reduced).count("float32")  # each had a DequantizeLinear, which is no structure
    assert folded == kinds(reduced).count("Conv")
    assert record["nodes_removed"] == len(network.quantized.graph.node) - len(reduced.graph.node) - folded
    blocks = len(MASKED[name][1])
    assert len(record["residual_sums_removed"]) == blocks
    assert kinds(reduced).count("Add") == kinds(network.quantized).count("Add") - blocks
    assert reduced.graph.input == network.quantized.graph.input
    assert reduced.graph.output == network.quantized.graph.output
    assert [entry.key for entry in reduced.metadata_props] == ["weighin"]


@pytest.mark.parametrize("name", MASKED)
def test_a_network_rounded_by_a_factor_shrinks_as_exactly(
    name: str, networks: Callable[[str], Network], images: list[bytes]
) -> None:
    network = networks(name)
    params = CALIBRATION.model_copy(update={"factor": 24.0})
    quantized = quantize(network.path, images, network.preprocessing, params)
    reduced, record = reduce(quantized)
    assert_same_bits(quantized, reduced)
    assert len(record["residual_sums_removed"]) == len(MASKED[name][1])
    sizes = [sum(np.prod(shape) for shape in found) for found in (shapes(reduced), network.slim.values())]
    assert sizes[0] <= sizes[1]  # rounding may leave channels without weights


@pytest.mark.parametrize("name", MASKED)
def test_reducing_twice_removes_nothing_more(name: str, networks: Callable[[str], Network]) -> None:
    once, _ = reduce(networks(name).quantized)
    twice, record = reduce(once)
    assert record == {"residual_sums_removed": [], "layers": [], "nodes_removed": 0}
    assert twice.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", MASKED)
def test_the_reduced_network_still_runs_in_integers(
    name: str, networks: Callable[[str], Network], tmp_path: Path
) -> None:
    reduced, _ = reduce(networks(name).quantized)
    for file, model in (("before", networks(name).quantized), ("after", reduced)):
        onnx.save(model, tmp_path / f"{file}.onnx")
    before, after = (kinds(optimize(tmp_path / f"{file}.onnx")) for file in ("before", "after"))
    assert {kind for kind in after if kind not in before} == set()
    assert after.count("QLinearConv") == sum(len(shape) == 4 for shape in networks(name).slim.values())


def chain(b: Builder, middle: Callable[[str], str], dead: Any = (1, 3, 4)) -> onnx.ModelProto:
    """Eight channels, some of them dead, then `middle`, a second convolution and the head."""
    return b.model(b.head(b.relu(b.conv(middle(b.conv("image", 8, dead=dead)), 6))))


HANDED_ON: dict[str, Callable[[Builder, str], str]] = {
    "nothing": lambda b, x: x,
    "Relu": lambda b, x: b.relu(x),
    "Clip that holds zero": lambda b, x: b.clip(x, -0.5, 6),
    "MaxPool": lambda b, x: b.pool(x),
    "AveragePool": lambda b, x: b.pool(x, "AveragePool"),
    "Identity": lambda b, x: b.node("Identity", x),
    "depthwise": lambda b, x: b.depthwise(b.relu(x), dead=(1, 3, 4)),
    "depthwise without bias": lambda b, x: b.depthwise(x, bias=False),
    "residual": lambda b, x: b.node("Add", x, b.conv(b.relu(b.conv(x, 5)), 8, dead=(1, 3, 4))),
    "twice itself": lambda b, x: b.node("Add", x, x),
}

KEPT: dict[str, Callable[[Builder, str], str]] = {
    "Sigmoid": lambda b, x: b.node("Sigmoid", x),
    "Mul": lambda b, x: b.node("Mul", x, b.node("Sigmoid", x)),
    "Add of a constant": lambda b, x: b.node("Add", x, b.constant(b.weights(1, 8, 1, 1))),
    "Concat": lambda b, x: b.node("Concat", x, b.conv(x, 2), width=10, axis=1),
    "grouped convolution": lambda b, x: b.conv(x, 8, groups=2),
    "channel multiplier": lambda b, x: b.conv(x, 16, groups=8),
    "depthwise with bias": lambda b, x: b.depthwise(x),
    "residual with other zeros": lambda b, x: b.node("Add", x, b.conv(x, 8, dead=(0, 2))),
    "broadcast of one channel": lambda b, x: b.node("Add", x, b.conv(x, 1)),
    "Transpose": lambda b, x: b.node("Transpose", x, width=8, perm=[0, 2, 1, 3]),
    "matrix product over the width": lambda b, x: b.node("MatMul", x, b.constant(b.weights(8, 8, dead=(0, 1, 2)))),
}


@pytest.mark.parametrize("middle", HANDED_ON.values(), ids=HANDED_ON)
def test_zero_channels_go_through_what_hands_them_on(middle: Callable[[Builder, str], str], int8: Int8) -> None:
    b = Builder()
    model = int8(chain(b, lambda x: middle(b, x)))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced)[0] == (5, 3, 3, 3)
    assert (6, 5, 3, 3) in shapes(reduced)
    groups = [graph.attribute(node, "group", 1) for node in reduced.graph.node if node.op_type == "Conv"]
    assert set(groups) <= {1, 5}


@pytest.mark.parametrize("middle", KEPT.values(), ids=KEPT)
def test_channels_stay_where_they_cannot_be_told_apart_or_do_not_stay_zero(
    middle: Callable[[Builder, str], str], int8: Int8
) -> None:
    b = Builder()
    model = int8(chain(b, lambda x: middle(b, x)))
    reduced, record = reduce(model)
    assert_same_bits(model, reduced)
    assert record["layers"] == []
    assert shapes(reduced) == shapes(model)


@pytest.mark.parametrize(("low", "high", "left"), [(0, 6, 5), (-1, 0, 5), (0.25, 6, 8), (-6, -0.25, 8)])
def test_a_clip_hands_zero_on_only_if_it_lets_zero_through(low: float, high: float, left: int) -> None:
    b = Builder()
    model = chain(b, lambda x: b.clip(x, low, high))  # in float: calibration would make the Clip a part of the scale
    reduced, _ = reduce(model)
    assert shapes(reduced) == [(left, 3, 3, 3), (6, left, 3, 3), (4, 6)]
    images = random_images(model)
    np.testing.assert_allclose(answer(model, images), answer(reduced, images), rtol=1e-4, atol=1e-5)


def test_a_sum_that_lines_up_other_axes_ties_no_channels() -> None:
    """Features (8, 8) are added along height and width of (8, 8, 8, 8), not to its channels."""
    b = Builder()
    row = b.gemm(b.flatten(b.mean("image")), 8, dead=[1, 3])
    model = b.model(b.head(b.node("Add", b.conv("image", 8, dead=[1, 3]), row)))
    reduced, _ = reduce(model)
    assert shapes(reduced) == shapes(model)
    images = random_images(model, count=8)
    assert answer(model, images).tobytes() == answer(reduced, images).tobytes()


def test_a_channel_that_nobody_reads_goes(int8: Int8) -> None:
    b = Builder()
    x = b.depthwise(b.relu(b.conv("image", 8)))
    left, right = (b.relu(b.conv(x, 6, ignored=ignored)) for ignored in ([2, 5, 6], [2, 6, 7]))
    model = int8(b.model(b.head(b.node("Add", left, right))))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(6, 3, 3, 3), (6, 1, 3, 3), (6, 6, 3, 3), (6, 6, 3, 3), (4, 6)]


def test_what_only_dead_channels_read_goes_in_turn(int8: Int8) -> None:
    b = Builder()
    x = b.relu(b.conv("image", 8))
    y = b.relu(b.conv(x, 8, ignored=[3], dead=[0, 1]))
    z = b.relu(b.conv(y, 8, ignored=[4]))
    model = int8(b.model(b.head(z, ignored=[0, 1, 2, 3])))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(7, 3, 3, 3), (5, 7, 3, 3), (4, 5, 3, 3), (4, 4)]


@pytest.mark.parametrize(
    ("width", "dead", "left"), [(32, 1, 32), (32, 15, 32), (32, 16, 16), (32, 27, 16), (24, 1, 23)]
)
def test_whole_vectors_of_channels_stay_whole(width: int, dead: int, left: int, int8: Int8) -> None:
    """A kernel takes several times as long for 31 channels as for 32."""
    b = Builder()
    gone = range(width - dead, width)
    model = int8(b.model(b.head(b.depthwise(b.relu(b.conv("image", width, dead=gone)), dead=gone))))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(left, 3, 3, 3), (left, 1, 3, 3), (4, left)]
    assert reduce(reduced)[1]["layers"] == []


def test_one_channel_stays_when_all_are_zero(int8: Int8) -> None:
    b = Builder()
    dead = b.relu(b.conv("image", 8, dead=range(8)))
    alive = b.relu(b.conv("image", 6))
    model = int8(b.model(b.head(b.node("Add", b.conv(dead, 6), alive))))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert sorted(shapes(reduced)) == sorted([(1, 3, 3, 3), (6, 3, 3, 3), (6, 1, 3, 3), (4, 6)])


@pytest.mark.parametrize("relu", [False, True])
def test_a_dead_residual_block_goes_with_its_sum(relu: bool, int8: Int8) -> None:
    b = Builder()
    x = b.relu(b.conv("image", 6))
    x = b.node("Add", b.conv(b.relu(b.conv(x, 9)), 6, dead=range(6)), x)
    model = int8(b.model(b.head(b.relu(x) if relu else x)))
    reduced, record = reduce(model)
    assert_same_bits(model, reduced)
    assert len(record["residual_sums_removed"]) == 1
    assert "Add" not in kinds(reduced)
    assert shapes(reduced) == [(6, 3, 3, 3), (4, 6)]


def hand_made(relu: bool, zero_point: int, broadcast: bool = False) -> onnx.ModelProto:
    """Quantized by hand: Q -> DQ -> Add of a silent convolution -> (Relu ->) Q -> DQ, all with one scale."""
    constants: dict[str, npt.NDArray[Any]] = {
        "scale": np.asarray(0.1, np.float32),
        "zero": np.asarray(zero_point, np.uint8),
        "weight": np.zeros((2, 2, 1, 1), np.float32),
    }
    source = "small" if broadcast else "image"
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["small"]),
        helper.make_node("QuantizeLinear", [source, "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("Conv", ["image", "weight"], ["silent"]),
        helper.make_node("Add", ["x", "silent"], ["sum"]),
        *([helper.make_node("Relu", ["sum"], ["relu"])] if relu else []),
        helper.make_node("QuantizeLinear", ["relu" if relu else "sum", "scale", "zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "scale", "zero"], ["logits"]),
    ]
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("image", "logits")]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph_ = helper.make_graph(nodes, "hand", [value[0]], [value[1]], initializers)
    return helper.make_model(graph_, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("model", "removed"),
    [
        (hand_made(relu=False, zero_point=100), 1),
        (hand_made(relu=True, zero_point=0), 1),
        (hand_made(relu=True, zero_point=100), 0),
        (hand_made(relu=False, zero_point=100, broadcast=True), 0),
    ],
    ids=["sum", "idle relu", "relu at work", "sum that broadcasts"],
)
def test_a_sum_goes_only_if_it_changes_nothing(model: onnx.ModelProto, removed: int) -> None:
    reduced, record = reduce(model)
    assert len(record["residual_sums_removed"]) == removed
    images = random_images(model, count=1)
    assert answer(model, images, optimized=False).tobytes() == answer(reduced, images, optimized=False).tobytes()


def test_dead_residual_blocks_behind_a_max_pooling_go(int8: Int8) -> None:
    """What is pooled has another percentile than what it was, so each sum needs the scale of what it passes on."""
    b = Builder()
    x = b.pool(b.relu(b.conv("image", 8)))
    for _ in range(2):
        x = b.relu(b.node("Add", b.conv(b.relu(b.conv(x, 8)), 8, dead=range(8)), x))
    model = int8(b.model(b.head(b.conv(x, 6))))
    reduced, record = reduce(model)
    assert_same_bits(model, reduced)
    assert len(record["residual_sums_removed"]) == 2
    assert shapes(reduced) == [(8, 3, 3, 3), (6, 8, 3, 3), (4, 6)]
    assert "Add" not in kinds(reduced)


def test_a_block_that_leaves_with_its_channels(int8: Int8) -> None:
    """The block's last layer reads dead channels only, so it is silent once they are gone."""
    b = Builder()
    x = b.relu(b.conv("image", 6))
    hidden = b.relu(b.conv(x, 8, dead=[5, 6, 7]))
    silent = b.conv(hidden, 6, ignored=range(5), bias=False)
    model = int8(b.model(b.head(b.node("Add", x, silent))))
    reduced, record = reduce(model)
    assert_same_bits(model, reduced)
    assert len(record["residual_sums_removed"]) == 1
    assert shapes(reduced) == [(6, 3, 3, 3), (4, 6)]
    assert reduce(reduced)[1]["layers"] == []


def test_channels_are_runs_of_features_after_flatten(int8: Int8) -> None:
    b = Builder()
    x = b.pool(b.relu(b.conv("image", 8, dead=[0, 7])))
    ignored = np.arange(3 * 16, 4 * 16)  # every feature of channel 3, and one of channel 4
    x = b.relu(b.gemm(b.flatten(x), 10, ignored=[*ignored, 4 * 16]))
    model = int8(b.model(b.gemm(x, 4)))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(5, 3, 3, 3), (10, 5 * 16), (4, 10)]


@pytest.mark.parametrize("kind", ["transposed", "plain", "matmul"])
def test_matrix_products_of_every_layout(kind: str, int8: Int8) -> None:
    b = Builder()
    x = b.flatten("image")
    for dead, ignored in (([1, 2], []), ([0, 5], [3])):
        if kind == "matmul":
            x = b.relu(b.matmul(x, 8, dead=dead, ignored=ignored))
        else:
            x = b.relu(b.gemm(x, 8, dead=dead, ignored=ignored, transposed=kind == "transposed"))
    model = int8(b.model(b.gemm(x, 4)))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    expected = [(5, 192), (6, 5), (4, 6)]
    flipped = [shape if kind == "transposed" else shape[::-1] for shape in expected[:2]]
    assert shapes(reduced) == [*flipped, expected[2]]


def test_scales_and_zero_points_are_cut_with_their_weights(int8: Int8) -> None:
    b = Builder()
    model = int8(chain(b, b.relu))
    reduced, _ = reduce(model)
    constants = graph.initializers(reduced)
    per_channel = [
        (constants[node.input[0]].dims, constants[node.input[1]].dims, graph.attribute(node, "axis", 1))
        for node in reduced.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    ]
    assert len(per_channel) == 4  # the convolutions' biases are float
    assert all(list(scale) == [weight[axis if len(weight) > 1 else 0]] for weight, scale, axis in per_channel)
    assert all(
        list(constants[node.input[1]].dims) == [] for node in reduced.graph.node if node.op_type == "QuantizeLinear"
    )


def biases(model: onnx.ModelProto) -> list[str]:
    """The type of each convolution's bias: behind its DequantizeLinear, if it has one."""
    constants = graph.initializers(model)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    names = [node.input[2] for node in model.graph.node if node.op_type == "Conv"]
    return [numpy_helper.to_array(constants[sources.get(name, name)]).dtype.name for name in names]


def test_what_the_runtime_makes_again_is_not_shipped(int8: Int8) -> None:
    b = Builder()
    model = int8(chain(b, b.relu, dead=()))
    reduced, _ = reduce(model)
    assert biases(model) == ["int32", "int32"]
    assert biases(reduced) == ["float32", "float32"]
    convolutions = {name for node in reduced.graph.node if node.op_type == "Conv" for name in node.input[1:]}
    weights = [node for node in reduced.graph.node if node.output[0] in convolutions]
    assert [len(node.input) for node in weights] == [2, 2]


@pytest.mark.parametrize("code", [2**24 + 1, 2**31 - 1])
def test_a_bias_that_a_float_cannot_hold_stays_an_integer(code: int, int8: Int8) -> None:
    b = Builder()
    model = int8(chain(b, b.relu, dead=()))
    constants = graph.initializers(model)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    tensor = constants[sources[first.input[2]]]
    codes = numpy_helper.to_array(tensor).copy()
    codes[0] = code
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    reduced, _ = reduce(model)
    assert biases(reduced) == ["int32", "float32"]


def per_tensor(model: onnx.ModelProto) -> onnx.ModelProto:
    """One scale for each weight and bias: the largest."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = graph.initializers(made)
    for node in made.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(scale.max(), node.input[1]))
            constants[node.input[2]].CopyFrom(numpy_helper.from_array(zero.flat[0], node.input[2]))
            del node.attribute[:]
    return made


def test_weights_with_one_scale_for_all_channels(int8: Int8) -> None:
    b = Builder()
    model = per_tensor(int8(chain(b, b.relu)))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(5, 3, 3, 3), (6, 5, 3, 3), (4, 6)]


def test_layers_that_share_their_weights_are_cut_each_by_itself(int8: Int8) -> None:
    b = Builder()
    weight, bias = b.constant(b.weights(8, 8, 3, 3, dead=[1, 2])), b.bias(8, [1, 2])
    first = b.relu(b.node("Conv", b.conv("image", 8, dead=[5]), weight, bias, pads=[1] * 4))
    second = b.relu(b.node("Conv", first, weight, bias, pads=[1] * 4))
    model = int8(b.model(b.head(second, ignored=[7])))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(7, 3, 3, 3), (6, 7, 3, 3), (5, 6, 3, 3), (4, 5)]


def test_dead_nodes_neither_pin_nor_read(int8: Int8) -> None:
    b = Builder()
    x = b.relu(b.conv("image", 8, dead=[2]))
    b.node("Sigmoid", x)
    model = int8(b.model(b.head(x)))
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(7, 3, 3, 3), (4, 7)]


def test_outputs_keep_their_channels_and_names(int8: Int8) -> None:
    b = Builder()
    made = b.model(b.gemm(b.flatten("image"), 4, dead=[1, 2]))
    made.graph.output[0].name = made.graph.node[-1].output[0] = "0"  # a name that shortening would take
    model = int8(made)
    reduced, _ = reduce(model)
    assert_same_bits(model, reduced)
    assert shapes(reduced) == [(4, 192)]
    assert reduced.graph.output == model.graph.output


def test_a_network_with_nothing_to_remove_stays_the_same(int8: Int8) -> None:
    b = Builder()
    model = int8(chain(b, b.relu, dead=()))
    reduced, record = reduce(model)
    assert_same_bits(model, reduced)
    assert record["layers"] == []
    assert shapes(reduced) == shapes(model)


FRONT = {"one float layer": 1, "two float layers": 2}  # how many of the first layers are left in float


KINDS = {
    "Add of a constant",
    "Clip",
    "Concat",
    "Flatten of a mean",
    "Flatten of a picture",
    "Gemm",
    "MatMul",
    "chain",
    "depthwise",
    "gate",
    "grouped convolution",
    "hidden Gemm",
    "pooling",
    "residual",
    "residual with Relu",
    "shared weights",
    *FRONT,
}


class Drawn(NamedTuple):
    """A quantized network of random structure, and the kinds of structure in it."""

    seed: int
    model: onnx.ModelProto
    kinds: set[str]


class Move(NamedTuple):
    """A piece of a network that goes on from a tensor, and how often it is drawn."""

    often: int
    make: Callable[..., str]


def some(rng: np.random.Generator, channels: dict[int, Any], width: int, share: float) -> Any:
    """The channels of this width, as often as `share` says."""
    return channels.get(width, ()) if rng.random() < share else ()


def random_moves(b: Builder, dead: dict[int, Any], ignored: dict[int, Any]) -> dict[str, Move]:
    """The kinds of structure that a network may get; most layers agree on the dead channels of a width."""
    rng = b.rng

    def conv(x: str, width: int = 0, **options: Any) -> str:
        width = width or int(rng.choice([4, 6, 8]))
        gone = {"dead": some(rng, dead, width, 0.85), "ignored": some(rng, ignored, b.width[x], 0.7)} | options
        return b.conv(x, width, size=int(rng.choice([1, 3])), bias=bool(rng.random() < 0.7), **gone)

    def depthwise(x: str) -> str:
        return b.depthwise(x, dead=some(rng, dead, b.width[x], 0.8), bias=bool(rng.random() < 0.5))

    def grouped(x: str) -> str:
        groups = int(rng.choice([2, b.width[x] // 2]))
        return b.relu(b.conv(x, b.width[x], dead=some(rng, dead, b.width[x], 0.8), groups=groups))

    def residual(x: str) -> str:
        last = {"dead": range(b.width[x])} if rng.random() < 0.4 else {}
        inner = conv(b.relu(conv(x)), b.width[x], **last)
        return b.node("Add", *((x, inner) if rng.random() < 0.5 else (inner, x)))

    def shared(x: str) -> str:
        width = b.width[x]
        weight = b.constant(b.weights(width, width, 1, 1, dead=some(rng, dead, width, 0.9)))
        return b.relu(b.node("Conv", b.relu(b.node("Conv", x, weight)), weight))

    def pool(x: str) -> str:
        return b.pool(x, str(rng.choice(["MaxPool", "AveragePool"])))

    return {
        "convolution": Move(1, conv),
        "chain": Move(2, lambda x: b.relu(conv(b.relu(conv(x))))),
        "residual": Move(2, residual),
        "residual with Relu": Move(1, lambda x: b.relu(residual(x))),
        "depthwise": Move(2, depthwise),
        "Clip": Move(1, lambda x: b.clip(conv(x), *sorted(rng.normal(0, 2, 2)))),
        "Clip that holds zero": Move(1, lambda x: b.clip(conv(x), 0, 6)),
        "Concat": Move(2, lambda x: b.node("Concat", x, conv(x, 4), width=b.width[x] + 4, axis=1)),
        "grouped convolution": Move(1, grouped),
        "gate": Move(1, lambda x: b.node("Mul", x, b.node("Sigmoid", x))),
        "Add of a constant": Move(1, lambda x: b.node("Add", x, b.constant(b.weights(1, b.width[x], 1, 1)))),
        "pooling": Move(1, pool),
        "shared weights": Move(1, shared),
    }


def random_network(seed: int) -> tuple[onnx.ModelProto, set[str], list[str]]:
    """A float network in which each width has dead channels that most of its layers agree on.

    Also the kinds of structure in it, and the layers to be left in float.
    """
    b = Builder(seed)
    rng = b.rng
    dead = {width: np.flatnonzero(rng.random(width) < 0.4) for width in (4, 6, 8, 10, 12)}
    ignored = {width: np.flatnonzero(rng.random(width) < 0.2) for width in dead}
    moves = random_moves(b, dead, ignored)
    kinds: set[str] = set()
    x, float32 = b.relu(moves["convolution"].make("image", 8)), []
    if rng.random() < 0.5:
        front = str(rng.choice(list(FRONT)))
        kinds.add(front)
        x = moves["depthwise"].make(x) if FRONT[front] == 2 else x
        float32 = [node.input[1] for node in b.nodes if node.op_type == "Conv"]
    for _ in range(int(rng.integers(2, 6))):
        barred = {"Concat"} if b.width[x] > 8 else {"pooling"} if b.side[x] <= 2 else set()
        names = [name for name, move in moves.items() for _ in range(move.often) if name not in barred]
        name = str(rng.choice(names))
        kinds.add(name)
        x = moves[name].make(x)
    features = rng.random() < 0.5
    kinds.add("Flatten of a picture" if features and b.side[x] > 1 else "Flatten of a mean")
    x = b.flatten(x if features else b.mean(x))
    if rng.random() < 0.5:
        kinds.add("hidden Gemm")
        x = b.relu(b.gemm(x, 8, dead=some(rng, dead, 8, 0.9), transposed=bool(rng.random() < 0.5)))
    last = "MatMul" if rng.random() < 0.3 else "Gemm"
    kinds.add(last)
    logits = b.matmul(x, 4) if last == "MatMul" else b.gemm(x, 4, ignored=some(rng, ignored, b.width[x], 0.5))
    return b.model(logits), kinds, float32


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> list[Drawn]:
    path, made = tmp_path_factory.mktemp("random") / "float.onnx", []
    for seed in range(80):
        model, kinds, float32 = random_network(seed)
        onnx.save(model, path)
        made.append(Drawn(seed, quantize(path, images, INPUT, CALIBRATION, float32), kinds))
    return made


def differs(one: Drawn, reduced: onnx.ModelProto) -> str:
    """Where the reduced network answers otherwise, or nothing."""
    images = random_images(one.model, seed=one.seed)
    for threads, is_optimized in itertools.product((1, 2), (True, False)):
        expected, found = (answer(model, images, threads, is_optimized) for model in (one.model, reduced))
        if expected.tobytes() != found.tobytes():
            return f"{one.seed=} {threads=} {is_optimized=} {one.kinds}"
    return ""


def test_no_random_network_is_a_counterexample(drawn: list[Drawn]) -> None:
    occurred, shrunk, sums = Counter[str](), Counter[str](), 0
    for one in drawn:
        reduced, record = reduce(one.model)
        assert differs(one, reduced) == ""
        again = reduce(reduced)[1]
        assert again == {"residual_sums_removed": [], "layers": [], "nodes_removed": 0}, f"{one.seed=}"
        occurred.update(one.kinds)
        shrunk.update(one.kinds if record["layers"] else ())
        sums += len(record["residual_sums_removed"])
    assert min(occurred[kind] for kind in KINDS) >= 8
    assert min(shrunk[kind] / occurred[kind] for kind in KINDS) >= 0.6
    assert sums >= 8


def biases_do_not_count(member: ChannelClass) -> graph.Mask:
    made, carried = ([replace(layer, bias=None) for layer in some] for some in (member.producers, member.depthwise))
    return removable(replace(member, producers=made, depthwise=carried))


def depthwise_layers_do_not_count(member: ChannelClass) -> graph.Mask:
    return removable(replace(member, depthwise=[]))


def one_maker_is_enough(member: ChannelClass) -> graph.Mask:
    return removable(replace(member, producers=member.producers[-1:]))


def one_reader_is_enough(member: ChannelClass) -> graph.Mask:
    return removable(replace(member, consumers=member.consumers[:1]))


def one_zero_weight_is_enough(member: ChannelClass) -> graph.Mask:
    gone = removable(member)
    for layer in member.consumers:
        weight = np.moveaxis(layer.weight, int(layer.in_axis or 0), 0).reshape(member.channels, -1)
        gone |= (weight == 0).any(axis=1)
    gone[0] &= not gone.all()
    return gone


def the_next_channel_goes(member: ChannelClass) -> graph.Mask:
    return np.roll(removable(member), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        biases_do_not_count,
        depthwise_layers_do_not_count,
        one_maker_is_enough,
        one_reader_is_enough,
        one_zero_weight_is_enough,
        the_next_channel_goes,
    ],
)
def test_random_networks_tell_a_wrong_removal(
    wrong: Callable[[ChannelClass], graph.Mask], drawn: list[Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.graphs.channels.removable", wrong)
    assert any(differs(one, reduce(one.model)[0]) for one in drawn)


def wrongly_reduced(model: onnx.ModelProto) -> onnx.ModelProto:
    """One row of the last layer has its signs turned."""
    wrong, _ = reduce(model)
    constants = graph.Constants(wrong)
    last = layers(wrong, constants)[-1]
    tensor = constants.tensors[constants.dequantized[last.node.input[1]].input[0]]
    values = numpy_helper.to_array(tensor).copy()
    values[2] *= -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return wrong


def test_proof_names_the_image_and_the_logit_that_differ(
    networks: Callable[[str], Network], images: list[bytes], tmp_path: Path
) -> None:
    network = networks("mlp")
    onnx.save(network.quantized, tmp_path / "before.onnx")
    onnx.save(wrongly_reduced(network.quantized), tmp_path / "after.onnx")
    write_split(tmp_path / "test.parquet", images)
    before, after = (session.open_session(tmp_path / f"{name}.onnx", 1) for name in ("before", "after"))
    data = np.stack([preprocess(image, network.preprocessing) for image in images])
    rows, columns = np.nonzero(session.logits(before, data) != session.logits(after, data))
    assert set(columns) == {2}
    with pytest.raises(StageError, match=rf"image {rows[0]} of .*, logit 2 \(owl\)"):
        prove(tmp_path / "before.onnx", tmp_path / "after.onnx", tmp_path / "test.parquet", threads=1)
    assert prove(tmp_path / "before.onnx", tmp_path / "before.onnx", tmp_path / "test.parquet", 1) == len(images)


def test_no_images_prove_nothing(networks: Callable[[str], Network], tmp_path: Path) -> None:
    onnx.save(networks("mlp").quantized, tmp_path / "model.onnx")
    write_split(tmp_path / "test.parquet", [])
    with pytest.raises(StageError, match="has no images"):
        prove(tmp_path / "model.onnx", tmp_path / "model.onnx", tmp_path / "test.parquet", 1)


def test_the_stage_leaves_the_model_and_its_proof(
    repository: Repository, networks: Callable[[str], Network], images: list[bytes]
) -> None:
    source = repository.model("quantize")
    onnx.save(networks("lenet-5").quantized, source)
    repository.split("test", images)
    done = repository.run("reduce")
    assert done.returncode == 0, done.stderr
    report = json.loads(repository.report("reduce").read_text())
    target = repository.model("reduce")
    assert report["bit_identical_images"] == len(images)
    assert report["size_bytes_before"] == source.stat().st_size
    assert files.unpack(target.with_name("model.onnx.zst")) == target.read_bytes()
    assert report["size_bytes_after"] == target.stat().st_size < source.stat().st_size
    assert [row["weight_after"][0] for row in report["layers"]] == [10, 24, 250, 4]
    plain = reduce(networks("lenet-5").quantized)[0]
    assert onnx.load(target) == packing.pack(plain)
    assert report["size_bytes_after"] < report["size_bytes_plain"] == plain.ByteSize()
    assert "bit-identical on 32 test images" in done.stdout


WRONG = """
import onnx, tasks.reduce as stage
from tasks.graphs import channels
from tasks.core.errors import run
right = channels.removable
def removable(member):
    gone = right(member)
    gone[: len(gone) // 4] = True  # channels that are alive
    return gone if member.channels > 20 else gone & False
channels.removable = removable
run(stage.main)
"""


def test_a_wrong_removal_leaves_the_last_output_as_it_was(
    repository: Repository, networks: Callable[[str], Network], images: list[bytes]
) -> None:
    onnx.save(networks("lenet-5").quantized, repository.model("quantize"))
    repository.split("test", [png(seed) for seed in range(8)])
    repository.model("reduce").write_bytes(b"the last good model")
    repository.report("reduce").write_text("{}")
    (repository.root / "wrong.py").write_text(WRONG)
    done = repository.run("wrong.py")
    assert done.returncode == 1
    assert (
        "is not bit-identical to data/models/quantize/model.onnx: image 0 of data/prepared/test.parquet, logit 0 (cat)"
        in (done.stderr)
    )
    assert repository.model("reduce").read_bytes() == b"the last good model"
    assert repository.report("reduce").read_text() == "{}"
    assert [path.name for path in repository.model("reduce").parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_source_that_is_no_model_is_told_in_a_sentence(repository: Repository, content: bytes | None) -> None:
    repository.split("test", [png(0)])
    if content is not None:
        repository.model("quantize").write_bytes(content)
    assert "data/models/quantize/model.onnx does not load in ONNX Runtime" in repository.sentence("reduce")
