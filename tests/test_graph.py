"""graph: what is folded computes the same, what is not the same is left alone, and counts are those of the paper."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from conftest import MASKED, Network
from onnx import helper, numpy_helper

from tasks.graphs import graph
from tasks.nets import backbone
from tasks.nets.backbone import Spec
from tasks.nets.export import export
from tasks.reduce import reduce

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def build(nodes: list[onnx.NodeProto], shape: tuple[int, ...] = (2, 3, 7, 9), **constants: Any) -> onnx.ModelProto:
    """A model from `image` to `logits` whose output shape is inferred."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ("batch", *shape[1:]))
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    body = helper.make_graph(nodes, "network", [image], [logits], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def answer(model: onnx.ModelProto, image: Array) -> Array:
    ready = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = ready.run(None, {"image": image})[0]
    return result


def fold_weights(fold: Callable[[onnx.ModelProto], None], model: onnx.ModelProto) -> list[str]:
    """The operators left after folding, which must not change what the model answers."""
    shape = [dim.dim_value or 2 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = answer(model, image)
    fold(model)
    onnx.checker.check_model(model, full_check=True)
    found = answer(model, image)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return [node.op_type for node in model.graph.node]


def weights(*shape: int) -> npt.NDArray[np.float32]:
    return RNG.normal(size=shape).astype(np.float32)


def test_exported_paddings_are_part_of_their_convolutions(tmp_path: Path) -> None:
    """TensorFlow's padding is asymmetric at a stride; PyTorch's exporter sees to it."""
    name, classes = "tf_mobilenetv3_small_minimal_100", ("a", "b", "c")
    preprocessing = backbone.preprocessing(name, 64)
    spec = Spec(backbone=name, classes=classes, preprocessing=preprocessing, weights={})
    export(backbone.create(name, len(classes), preprocessing), spec, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert "Pad" not in {node.op_type for node in nodes}
    assert [0, 0, 1, 1] in [graph.attribute(node, "pads", None) for node in nodes]


def mean(axes: list[int], shape: tuple[int, ...] = (2, 3, 7, 9), **options: Any) -> onnx.ModelProto:
    return build(
        [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], **options)], shape, axes=np.asarray(axes)
    )


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2]])
def test_a_mean_over_height_and_width_is_a_pool(axes: list[int]) -> None:
    assert fold_weights(graph.pool_means, mean(axes)) == ["GlobalAveragePool"]


@pytest.mark.parametrize(
    "model",
    [mean([2, 3], keepdims=0), mean([1, 2]), mean([3]), mean([-1, -2], (2, 3, 7)), mean([2, 3], (2, 3, 4, 5, 6))],
    ids=["without keepdims", "other axes", "one axis", "three dimensions", "five dimensions"],
)
def test_other_means_stay(model: onnx.ModelProto) -> None:
    assert fold_weights(graph.pool_means, model) == ["ReduceMean"]


def reshape(target: list[int], shape: tuple[int, ...] = (2, 3, 7, 9)) -> onnx.ModelProto:
    return build([helper.make_node("Reshape", ["image", "target"], ["logits"])], shape, target=np.asarray(target))


def test_a_reshape_to_batch_and_features_is_a_flatten() -> None:
    model = reshape([-1, 3 * 7 * 9])
    assert fold_weights(graph.flatten_reshapes, model) == ["Flatten"]
    assert graph.attribute(model.graph.node[0], "axis", None) == 1


@pytest.mark.parametrize("target", [[-1, 9], [-1, 3, 63], [2, -1], [-1]])
def test_other_reshapes_stay(target: list[int]) -> None:
    assert fold_weights(graph.flatten_reshapes, reshape(target)) == ["Reshape"]


def test_strip_leaves_only_what_a_runtime_reads() -> None:
    nodes = [helper.make_node("Relu", ["image"], ["a"]), helper.make_node("Conv", ["a", "weight"], ["logits"])]
    nodes.append(helper.make_node("Neg", ["image"], ["dead"]))
    model = build(nodes, weight=weights(4, 3, 3, 3))
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "long"
    model.graph.node[0].metadata_props.add(key="stack", value="trace")
    helper.set_model_props(model, {"key": "value"})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(100), "unused"))
    assert model.graph.value_info
    before = model.ByteSize()
    assert fold_weights(graph.strip, model) == ["Relu", "Conv"]
    assert before - model.ByteSize() > 500
    assert sorted(graph.initializers(model)) == ["weight"]
    assert not model.metadata_props
    assert not model.graph.value_info
    assert b"long" not in model.SerializeToString()
    assert b"trace" not in model.SerializeToString()


def counted_network() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["image", "dense", "bias"], ["a"], strides=[2, 2]),  # 4 x 3 x 4
        helper.make_node("Conv", ["a", "depthwise"], ["b"], group=4, pads=[1] * 4),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "gemm", "gemm_bias"], ["d"], transB=1),
        helper.make_node("MatMul", ["d", "matmul"], ["logits"]),
    ]
    arrays: dict[str, Any] = {
        "dense": weights(4, 3, 3, 3),
        "bias": weights(4),
        "depthwise": weights(4, 1, 3, 3),
        "gemm": weights(6, 48),
        "gemm_bias": np.zeros(6, np.float32),
        "matmul": weights(6, 5),
    }
    arrays["dense"][1] = 0
    return build(nodes, **arrays)


def test_parameters_are_weights_and_biases() -> None:
    sizes = 4 * 27 + 4 + 4 * 9 + 6 * 48 + 6 + 6 * 5
    assert graph.parameters(counted_network()) == (sizes, sizes - 27 - 6)


def test_macs_are_those_by_hand() -> None:
    assert graph.macs(counted_network()) == 4 * 27 * (3 * 4) + 4 * 9 * (3 * 4) + 6 * 48 + 6 * 5


def test_macs_of_a_matrix_product_count_its_rows() -> None:
    model = build([helper.make_node("MatMul", ["image", "matmul"], ["logits"])], (2, 10, 6), matmul=weights(6, 5))
    assert graph.macs(model) == 10 * 6 * 5


def test_lenet_5_counts_as_in_the_literature(networks: Callable[[str], Network]) -> None:
    """20 and 50 filters of 5x5, 500 units; here with four classes, in float and in int8 alike."""
    convolutions = {(20, 1, 5, 5): 24 * 24, (50, 20, 5, 5): 8 * 8}
    dense = 500 * 800 + 4 * 500
    expected = sum(math.prod(shape) * places for shape, places in convolutions.items()) + dense
    biases = 20 + 50 + 500 + 4
    for model in (onnx.load(networks("lenet-5").path), networks("lenet-5").quantized):
        assert graph.macs(model) == expected
        total, nonzero = graph.parameters(model)
        assert total == sum(math.prod(shape) for shape in convolutions) + dense + biases
        assert 0.2 * total < nonzero < 0.3 * total


def test_integer_constants_are_read_relative_to_their_zero_points() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["weight"], axis=-4),
        helper.make_node("Conv", ["image", "weight"], ["logits"]),
    ]
    codes = RNG.integers(0, 200, (4, 3, 3, 3), dtype=np.uint8)
    zero = np.asarray([0, 100, 7, 255], np.uint8)
    scale = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    codes[1] = 100
    model = build(nodes, codes=codes, scale=scale, zero=zero)
    read = graph.Constants(model).read("weight")
    assert read is not None
    assert np.array_equal(read, codes.astype(int) - zero.reshape(4, 1, 1, 1))
    kept = np.asarray([True, False, True, True])
    graph.Constants(model).keep("weight", 0, kept)
    left = {name: numpy_helper.to_array(tensor) for name, tensor in graph.initializers(model).items()}
    assert np.array_equal(left["codes"], codes[kept])
    assert np.array_equal(left["scale"], scale[kept])
    assert np.array_equal(left["zero"], zero[kept])


@pytest.mark.parametrize("name", MASKED)
def test_a_model_in_float_has_the_shape_and_nearly_the_answers_of_its_int8(
    name: str, networks: Callable[[str], Network]
) -> None:
    reduced, _ = reduce(networks(name).quantized)
    plain = graph.in_float(reduced)
    onnx.checker.check_model(plain, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in plain.graph.node}
    assert graph.macs(plain) == graph.macs(reduced)
    assert list(plain.metadata_props) == list(reduced.metadata_props)
    assert {tensor.data_type for tensor in plain.graph.initializer} == {onnx.TensorProto.FLOAT}
    shape = [dim.dim_value for dim in reduced.graph.input[0].type.tensor_type.shape.dim[1:]]
    image = np.random.default_rng(2).normal(size=(8, *shape)).astype(np.float32)
    expected, found = answer(reduced, image), answer(plain, image)
    assert np.abs(expected - found).mean() < 0.2 * expected.std()


def test_cutting_inputs_leaves_the_scales_of_outputs() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["weight"], axis=0),
        helper.make_node("Conv", ["image", "weight"], ["logits"]),
    ]
    model = build(
        nodes,
        codes=RNG.integers(0, 9, (3, 3, 3, 3), dtype=np.uint8),
        scale=weights(3),
        zero=np.zeros(3, np.uint8),
    )
    graph.Constants(model).keep("weight", 1, np.asarray([True, False, True]))
    sizes = {name: list(tensor.dims) for name, tensor in graph.initializers(model).items()}
    assert sizes == {"codes": [3, 2, 3, 3], "scale": [3], "zero": [3]}
