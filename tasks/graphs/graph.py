"""ONNX graphs: what is rewritten, stripped and counted."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from onnx_ir.passes import PassBase

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    """The values of the model's initializers by name."""
    return {name: numpy_helper.to_array(tensor) for name, tensor in initializers(model).items()}


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The sizes of each tensor whose shape can be inferred; an unknown size, such as the batch, counts as one."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


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
    """Drop what no runtime reads, in place: doc strings, metadata, value_info, functions, what nobody uses."""
    from onnx_ir.passes import common

    run_passes(
        model,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.ClearMetadataAndDocStringPass(),
    )
    for part in (model, *model.graph.input, *model.graph.output):  # onnx_ir leaves these as they are
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def drop_dead(model: onnx.ModelProto) -> None:
    """Drop nodes whose results nobody reads and constants that no node reads, in place."""
    from onnx_ir.passes import common

    run_passes(model, common.RemoveUnusedNodesPass())


def run_passes(model: onnx.ModelProto, *passes: "PassBase") -> None:
    """Run passes of onnx_ir over the model, in place; its value_info goes.

    Nodes and constants that were taken from it before are no longer its own.
    """
    import onnx_ir

    changed = onnx_ir.serde.deserialize_model(model)
    for one in passes:
        one(changed)
    model.CopyFrom(onnx_ir.serde.serialize_model(changed))
    del model.graph.value_info[:]  # onnx_ir writes the shapes of constants there, which may be cut


Cuts = list[tuple[str, int, Mask]]  # of constants by their names: along which axis, and what stayed


class Constants:
    """The model's initializers by name, and the way to one through its DequantizeLinear."""

    def __init__(self, model: onnx.ModelProto, cuts: Cuts | None = None) -> None:
        self.model = model
        self.cuts = cuts
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
        if self.cuts is not None:
            self.cuts.append((name, axis, mask))
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
