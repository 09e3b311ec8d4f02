"""A quantized network with other codes in its weights, to try the forms in which they are packed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tasks.graphs import graph

Values = npt.NDArray[Any]


def recode(plain: onnx.ModelProto, change: Callable[[Values], Values]) -> onnx.ModelProto:
    """The model with other codes in its int8 weights, and steps that leave each weight as long a vector as it was."""
    made = onnx.ModelProto()
    made.CopyFrom(plain)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    dequantizers = {node.output[0]: node for node in made.graph.node if node.op_type == "DequantizeLinear"}

    def replace(part: onnx.NodeProto, number: int, values: Values) -> None:
        part.input[number] = f"{part.output[0]}.{number}"  # what it had may be another's, too
        made.graph.initializer.append(numpy_helper.from_array(values, part.input[number]))

    for node in made.graph.node:
        parts = [dequantizers[name] for name in node.input[1:] if name in dequantizers]
        if not parts or tensors.get(parts[0].input[0], np.zeros(0)).dtype != np.int8:
            continue
        codes, steps = (tensors[name] for name in parts[0].input[:2])
        changed = change(codes.astype(np.int64)).astype(np.int8)
        longer = np.linalg.norm(codes.astype(np.float32)) / np.linalg.norm(changed.astype(np.float32))
        replace(parts[0], 0, changed)
        replace(parts[0], 1, (steps * longer).astype(np.float16).astype(np.float32))
        for bias in parts[1:]:  # int32, of the image's step times the weight's
            replace(bias, 0, np.rint(tensors[bias.input[0]] / longer).astype(np.int32))
            replace(bias, 1, tensors[bias.input[1]] * longer)
    graph.drop_dead(made)
    return made
