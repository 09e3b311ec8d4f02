"""Round-to-integer quantization by a factor: one scale for the weights of all layers, see docs/classic_methods.md."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from tasks.core.errors import StageError
from tasks.graphs import graph
from tasks.graphs.codebook import LARGEST


def apply(quantized: onnx.ModelProto, original: onnx.ModelProto, factor: float) -> None:
    """Make every int8 weight round(w * factor), clipped to -127..127, with the one scale 1 / factor, in place.

    Biases follow, on the scale of their layer's input times that of its weights. `StageError` if nothing would be left
    of a layer's weights, or if a bias would be too large for int32.
    """
    constants, scale = graph.Constants(quantized), np.float32(1 / factor)
    floats, makers = graph.initializers(original), {node.output[0]: node for node in quantized.graph.node}

    def put(dequantizer: onnx.NodeProto, codes: npt.NDArray[Any], scale: np.float32) -> None:
        for name, values in zip(dequantizer.input, (codes, np.asarray(scale), np.zeros((), codes.dtype)), strict=True):
            constants.tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    for dequantizer, weights in round_weights(quantized, original):
        codes = np.rint(weights * factor).clip(-LARGEST, LARGEST).astype(np.int8)
        if weights.any() and not codes.any():
            raise StageError(f"quantize.factor {factor:g} leaves nothing of {_name(dequantizer)}: raise it")
        put(dequantizer, codes, scale)
    for node in quantized.graph.node:
        bias = constants.dequantized.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type not in graph.WEIGHTED or node.input[1] not in constants.dequantized or bias is None:
            continue
        codes, old, source = (
            numpy_helper.to_array(constants.tensors[name]) for name in (*bias.input[:2], makers[node.input[0]].input[1])
        )
        # ONNX Runtime gives a bias that layers share to each under a new name; then what it made of it has to do.
        exact = numpy_helper.to_array(floats[_name(bias)]) if _name(bias) in floats else codes * old
        step = np.float32(source * scale)
        codes = np.rint(exact.astype(np.float64) / step)
        if abs(codes).max() > np.iinfo(np.int32).max:
            raise StageError(f"quantize.factor {factor:g} makes {_name(bias)} too large for int32: lower it")
        put(bias, codes.astype(np.int32), step)


def round_weights(
    quantized: onnx.ModelProto, original: onnx.ModelProto
) -> list[tuple[onnx.NodeProto, npt.NDArray[Any]]]:
    """What dequantizes each int8 weight of convolutions and matrix products, and its float64 values before."""
    dequantized, floats = graph.Constants(quantized).dequantized, graph.initializers(original)
    read = {node.input[1]: None for node in quantized.graph.node if node.op_type in graph.WEIGHTED}
    found = [dequantized[name] for name in read if name in dequantized]
    return [(node, numpy_helper.to_array(floats[_name(node)]).astype(np.float64)) for node in found]


def _name(dequantizer: onnx.NodeProto) -> str:
    """The name that the constant had in float."""
    return str(dequantizer.input[0]).removesuffix(TENSOR_NAME_QUANT_SUFFIX)


def lost(quantized: onnx.ModelProto, original: onnx.ModelProto, factor: float) -> dict[str, int | float]:
    """Of the int8 weights that are not zero: how many there are, how many the factor clips, how many become zero."""
    exact = np.concatenate([np.rint(w[w != 0] * factor) for _, w in round_weights(quantized, original)])
    clipped, zeroed = int((abs(exact) > LARGEST).sum()), int((exact == 0).sum())
    return {
        "rounded_weights": exact.size,
        "clipped_weights": clipped,
        "zeroed_weights": zeroed,
        "zeroed_share": zeroed / max(1, exact.size),
    }
