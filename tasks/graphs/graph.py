"""ONNX graphs: what is folded, stripped and removed."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The sizes of each tensor whose shape can be inferred; an unknown size, such as the batch, counts as one."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def fold_pads(model: onnx.ModelProto) -> None:
    """Make each constant zero Pad part of the convolution that reads it, in place; pads may be asymmetric."""
    constants = initializers(model)
    outputs = {value.name for value in model.graph.output}
    for node in [node for node in model.graph.node if node.op_type == "Pad"]:
        users = [user for user in model.graph.node if node.output[0] in user.input]
        sizes = _zero_pads(node, constants)
        if sizes is None or node.output[0] in outputs or not all(_can_pad(user, node.output[0]) for user in users):
            continue
        for user in users:
            _add_pads(user, sizes)
            user.input[0] = node.input[0]
        model.graph.node.remove(node)


def _zero_pads(pad: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[int] | None:
    """The sizes a Pad adds around height and width; None if it does anything else than surround them with zeros."""
    amount, value, axes = (*pad.input[1:], "", "")[:3]
    if attribute(pad, "mode", b"constant") != b"constant" or amount not in constants or axes:
        return None
    if value and (value not in constants or numpy_helper.to_array(constants[value]).any()):
        return None
    sizes: list[int] = numpy_helper.to_array(constants[amount]).tolist()
    rank = len(sizes) // 2
    if any(sizes[:2]) or any(sizes[rank : rank + 2]) or min(sizes) < 0:
        return None
    return sizes[2:rank] + sizes[rank + 2 :]


def _can_pad(user: onnx.NodeProto, name: str) -> bool:
    automatic = attribute(user, "auto_pad", b"NOTSET") != b"NOTSET"
    return user.op_type == "Conv" and name not in user.input[1:] and not automatic


def _add_pads(conv: onnx.NodeProto, sizes: list[int]) -> None:
    own = next((a for a in conv.attribute if a.name == "pads"), None)
    if own is None:
        conv.attribute.append(onnx.helper.make_attribute("pads", sizes))
    else:
        own.ints[:] = [a + b for a, b in zip(own.ints, sizes, strict=True)]


def pool_means(model: onnx.ModelProto) -> None:
    """Write each mean over height and width as the GlobalAveragePool it is, in place: that one has an int8 kernel."""
    constants, known = initializers(model), shapes(model)
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        if len(known.get(node.input[0], [])) != 4:
            continue
        axes = sorted(axis % 4 for axis in numpy_helper.to_array(constants[node.input[1]]).tolist())
        if axes == [2, 3] and attribute(node, "keepdims", 1) == 1:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


def flatten_reshapes(model: onnx.ModelProto) -> None:
    """Write each Reshape to (batch, everything else) as the Flatten it is, in place."""
    constants, known = initializers(model), shapes(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).tolist()
        if len(shape) == 2 and shape[0] == -1 and shape[1] == math.prod(known.get(node.input[0], [])[1:]):
            node.op_type = "Flatten"
            del node.input[1:], node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", 1))


def attribute(node: onnx.NodeProto, name: str, default: object) -> Any:
    """The value of a node's attribute, or the operator's default."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def strip(model: onnx.ModelProto) -> None:
    """Drop what no runtime reads, in place: doc strings, node metadata, value_info, unused initializers."""
    graph = model.graph
    model.ClearField("doc_string")
    graph.ClearField("doc_string")
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:], model.functions[:]
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        del item.metadata_props[:]


class Constants:
    """The model's initializers by name, and the way to one through its DequantizeLinear."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.tensors = initializers(model)
        self.dequantized = {
            node.output[0]: node
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in self.tensors
        }

    def read(self, name: str) -> Array | None:
        """The stored values behind a node's input, or None if that input is not constant.

        Integer values have their zero point subtracted, so that zero means zero.
        """
        node = self.dequantized.get(name)
        if node is None:
            return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None
        values = numpy_helper.to_array(self.tensors[node.input[0]])
        if len(node.input) > 2:
            zero = numpy_helper.to_array(self.tensors[node.input[2]]).astype(np.int32)
            if zero.any():
                shape = [-1 if axis == _axis(node, values.ndim) else 1 for axis in range(values.ndim)]
                values = values.astype(np.int32) - zero.reshape(shape if zero.ndim else [])
        return values

    def keep(self, name: str, axis: int, mask: Mask) -> None:
        """Keep part of the constant behind a node's input along one axis, with its scales and zero points."""
        node = self.dequantized.get(name)
        if node is None:
            self._slice(name, axis, mask)
            return
        self._slice(node.input[0], axis, mask)
        if _axis(node, len(self.tensors[node.input[0]].dims)) == axis:
            for parameter in node.input[1:]:
                if len(self.tensors[parameter].dims) == 1 and self.tensors[parameter].dims[0] == len(mask):
                    self._slice(parameter, 0, mask)

    def _slice(self, name: str, axis: int, mask: Mask) -> None:
        values = np.compress(mask, numpy_helper.to_array(self.tensors[name]), axis)
        self.tensors[name].CopyFrom(numpy_helper.from_array(values, name))


def _axis(dequantizer: onnx.NodeProto, rank: int) -> int:
    """The axis along which a DequantizeLinear has its scales."""
    return int(attribute(dequantizer, "axis", 1)) % rank


def in_float(quantized: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the same shape that computes in float32: weights as their codes mean, activations without steps.

    A range that begins at zero stays, as a Clip: there quantization does the work of an activation.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    constants, outputs = Constants(model), {value.name for value in model.graph.output}
    sources: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
        result = node.output[0]
        if result in constants.dequantized:
            model.graph.initializer.append(numpy_helper.from_array(meaning(node, constants), result))
        elif node.op_type == "QuantizeLinear" and (top := _top(node, constants)) is not None:
            bounds = {f"{result}.low": np.zeros((), np.float32), f"{result}.high": top}
            model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in bounds.items())
            nodes.append(onnx.helper.make_node("Clip", [node.input[0], *bounds], [result]))
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
        elif result in outputs:
            nodes.append(onnx.helper.make_node("Identity", node.input[:1], [result]))
        else:
            sources[result] = node.input[0]
    replace_nodes(model, nodes)
    strip(model)
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in quantized.metadata_props})
    return model


def meaning(dequantizer: onnx.NodeProto, constants: Constants) -> npt.NDArray[np.float32]:
    """The float32 values of a constant that is stored in integers."""
    values: Any = constants.read(dequantizer.output[0])
    scale = numpy_helper.to_array(constants.tensors[dequantizer.input[1]])
    shape = [-1 if axis == _axis(dequantizer, values.ndim) else 1 for axis in range(values.ndim)] if scale.ndim else []
    return np.asarray(values * scale.reshape(shape), np.float32)


def _top(quantizer: onnx.NodeProto, constants: Constants) -> Array | None:
    """The largest value of a range that begins at zero; None if it does not."""
    scale = constants.read(quantizer.input[1])
    zero = constants.read(quantizer.input[2]) if len(quantizer.input) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or zero.any():
        return None
    return np.asarray(scale * np.iinfo(zero.dtype).max, np.float32)


def replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Make these the model's nodes, in place; they may be its own."""
    copies = onnx.GraphProto(node=nodes)
    del model.graph.node[:]
    model.graph.node.extend(copies.node)


WEIGHTED = ("Conv", "Gemm", "MatMul")


def parameters(model: onnx.ModelProto) -> tuple[int, int]:
    """Weights and biases of convolutions and matrix products: how many, and how many are not zero."""
    constants = Constants(model)
    names = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input[1:] if name}
    values = [value for name in sorted(names) if (value := constants.read(name)) is not None]
    return sum(value.size for value in values), sum(int(np.count_nonzero(value)) for value in values)


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image."""
    constants, known = Constants(model), shapes(model)
    total = 0
    for node in model.graph.node:
        weight = constants.read(node.input[1]) if node.op_type in WEIGHTED else None
        if weight is None:
            continue
        if node.op_type == "Conv":
            total += weight.size * int(np.prod(known[node.output[0]][2:]))
        else:
            total += weight.size * int(np.prod(known[node.output[0]][1:-1]))
    return total


def drop_dead(model: onnx.ModelProto) -> int:
    """Drop nodes whose results nobody reads, in place; returns how many."""
    dropped = 0
    while True:
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        dead = [node for node in model.graph.node if not read.intersection(node.output)]
        for node in dead:
            model.graph.node.remove(node)
        dropped += len(dead)
        if not dead:
            return dropped
