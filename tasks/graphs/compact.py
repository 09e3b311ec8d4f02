"""What makes a file smaller and not one result other: constants and names."""

import itertools
import sys
from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from tasks.graphs import graph
from tasks.graphs.rounding import as_half


def drop_implied_constants(model: onnx.ModelProto) -> None:
    """Leave out what ONNX Runtime makes again by itself to the same bits, in place.

    A convolution's bias goes from int32 with scales to float32: the scales are those of input and weights. Zero points
    that are zero go, where int8 kernels do without, and fields that hold their defaults.
    """
    constants = graph.Constants(model)
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        for name in node.input[1:]:
            _drop_zero_point(constants.dequantized.get(name), constants)
        if len(node.input) > 2:
            _float_bias(node, makers, constants)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not constants.tensors[node.input[1]].dims:
            del node.attribute[:]  # the axis, which one scale for all has no use for
        if node.op_type == "Conv":
            _drop_default_attributes(node)
    graph.drop_dead(model)


def _drop_default_attributes(conv: onnx.NodeProto) -> None:
    """What a convolution does without being told, and the size of its kernel, which its weights have."""
    kept = [
        one
        for one in conv.attribute
        if one.name not in ("kernel_shape", "auto_pad")
        and not (one.name in ("strides", "dilations") and set(one.ints) == {1})
        and not (one.name == "pads" and not any(one.ints))
        and not (one.name == "group" and one.i == 1)
    ]
    if all(one.s in (b"", b"NOTSET") for one in conv.attribute if one.name == "auto_pad"):
        del conv.attribute[:]
        conv.attribute.extend(kept)


def _drop_zero_point(dequantizer: onnx.NodeProto | None, constants: graph.Constants) -> None:
    if dequantizer is not None and len(dequantizer.input) > 2:
        zero = constants.read(dequantizer.input[2])
        if zero is not None and not zero.any():
            del dequantizer.input[2]


def round_biases(model: onnx.ModelProto) -> None:
    """Give convolutions float biases that float16 holds, where ONNX Runtime makes the same int32 of them, in place."""
    constants = graph.Constants(model)
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "Conv" and len(node.input) > 2:
            _float_bias(node, makers, constants, as_half)
    graph.drop_dead(model)


def _float_bias(
    conv: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    constants: graph.Constants,
    rounded: Callable[[graph.Array], graph.Array] = np.asarray,
) -> None:
    """Make the bias float32, in place, if ONNX Runtime would come back from it to the same int32."""
    nodes = [makers.get(name) for name in conv.input[:3]]
    scales = [
        constants.read(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None
        for node in nodes
    ]
    codes = constants.read(conv.input[2])
    source, weight, own = scales
    if source is None or weight is None or own is None or codes is None or codes.dtype != np.int32:
        return
    made = np.asarray(source * weight, np.float32)  # by ONNX Runtime, from a float bias
    bias = rounded(np.asarray(codes.astype(np.float32) * own, np.float32))
    if np.array_equal(made, own) and np.array_equal(np.rint(bias / made), codes):
        conv.input[2] = f"{conv.input[2]}.float"
        constants.model.graph.initializer.append(numpy_helper.from_array(bias, conv.input[2]))


def merge_equal_constants(model: onnx.ModelProto) -> None:
    """Keep one copy of constants with the same type, shape and bytes, in place."""
    from onnx_ir.passes import common

    graph.run_passes(model, common.DeduplicateInitializersPass(size_limit=sys.maxsize))


def rename(model: onnx.ModelProto) -> None:
    """Short names for everything but the inputs and outputs, in place; nobody reads them, everybody ships them."""
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    short = {name: name for name in fixed}
    fresh = (name for number in itertools.count() if (name := f"{number:x}") not in fixed)

    def of(name: str) -> str:
        if name not in short:
            short[name] = next(fresh)
        return short[name]

    for node in model.graph.node:
        node.ClearField("name")
        node.input[:] = [of(name) for name in node.input]
        node.output[:] = [of(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = of(tensor.name)
