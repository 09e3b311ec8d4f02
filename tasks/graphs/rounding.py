"""The grids that weights lie on: one factor for all layers (docs/classic_methods.md), or steps that float16 holds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from tasks.core.errors import StageError
from tasks.graphs import graph
from tasks.graphs.codebook import LARGEST
from tasks.graphs.graph import Array

TRIED = np.linspace(0.3, 1, 36)  # shares of a channel's range that a grid of few codes may cover
LEAST_HALF = float(np.finfo(np.float16).smallest_normal)  # below, float16 is less precise


class Grid(NamedTuple):
    """What an int8 weight becomes: its codes and their step, float32, one for all or one for each channel."""

    dequantizer: onnx.NodeProto
    codes: Array
    step: Array


def apply(quantized: onnx.ModelProto, floats: Mapping[str, Array], factor: float) -> None:
    """Make every int8 weight round(w * factor), clipped to -127..127, with the one scale 1 / factor, in place.

    `floats` are the weights and biases before quantization by their names, here and below. Biases follow. `StageError`
    if nothing would be left of a layer's weights, or if a bias is too large for int32.
    """
    grids = []
    for dequantizer, weights in round_weights(quantized, floats):
        codes = np.rint(weights * factor).clip(-LARGEST, LARGEST).astype(np.int8)
        if weights.any() and not codes.any():
            raise StageError(f"quantize.grid.factor {factor:g} leaves nothing of {float_name(dequantizer)}: raise it")
        grids.append(Grid(dequantizer, codes, np.asarray(1 / factor, np.float32)))
    large = _put(quantized, floats, grids, lambda bias: bias)
    if large:
        raise StageError(f"quantize.grid.factor {factor:g} makes {large} too large for int32: lower it")


def round_to_halves(quantized: onnx.ModelProto, floats: Mapping[str, Array]) -> None:
    """Let float16 hold the steps of weights, the biases, and the values of layers in float, in place.

    Then 16 bits of each are exact in the file. A step is rounded up, so that nothing is clipped that was not. Weights
    with a step under LEAST_HALF keep theirs.
    """
    constants, grids = graph.initializers(quantized), []
    for dequantizer, weights in round_weights(quantized, floats):
        codes, step = (numpy_helper.to_array(constants[name]) for name in dequantizer.input[:2])
        rounded, most = half_above(step), int(abs(codes.astype(int)).max())
        if rounded.min() < LEAST_HALF:
            continue
        codes = np.rint(weights / rounded.reshape(_shape(dequantizer, codes, step))).clip(-most, most).astype(np.int8)
        grids.append(Grid(dequantizer, codes, rounded))
    put_halves(quantized, floats, grids)
    for tensor in quantized.graph.initializer:
        if tensor.name in floats and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(as_half(numpy_helper.to_array(tensor)), tensor.name))


def coarsen(quantized: onnx.ModelProto, floats: Mapping[str, Array], bits: Mapping[str, int]) -> None:
    """Put weights on grids of fewer than 8 bits, by their names in float, in place.

    Codes are from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1; the step of each channel is the one of TRIED shares of its
    range with the least squared error.
    """
    constants, grids = graph.initializers(quantized), []
    for dequantizer, weights in round_weights(quantized, floats):
        largest = largest_code(bits.get(float_name(dequantizer), 8))
        if largest == LARGEST:
            continue
        codes, step = (numpy_helper.to_array(constants[name]) for name in dequantizer.input[:2])
        shape = _shape(dequantizer, codes, step)
        others = tuple(axis for axis, size in enumerate(shape) if size == 1)
        tried = [half_above(step * (LARGEST / largest * share)).reshape(shape) for share in TRIED]
        errors = [((np.rint(weights / one).clip(-largest, largest) * one - weights) ** 2).sum(others) for one in tried]
        best = np.argmin(np.reshape(errors, (len(TRIED), -1)), axis=0)
        found = np.reshape(tried, (len(TRIED), -1))[best, np.arange(len(best))].astype(np.float32)
        codes = np.rint(weights / found.reshape(shape)).clip(-largest, largest).astype(np.int8)
        grids.append(Grid(dequantizer, codes, found.reshape(step.shape)))
    put_halves(quantized, floats, grids)


def largest_code(bits: int) -> int:
    """The largest code of a grid of so many bits, on which zero is in the middle."""
    return (1 << bits - 1) - 1


def _shape(dequantizer: onnx.NodeProto, codes: Array, step: Array) -> list[int]:
    """The shape in which a step, one or one for each channel, goes with the codes."""
    axis = int(graph.attribute(dequantizer, "axis", 1)) % codes.ndim
    return [-1 if step.ndim and number == axis else 1 for number in range(codes.ndim)]


def put_halves(quantized: onnx.ModelProto, floats: Mapping[str, Array], grids: list[Grid]) -> None:
    """Write grids, and biases of values that float16 holds; `StageError` if one would be too large for int32."""
    large = _put(quantized, floats, grids, as_half)
    if large:
        raise StageError(f"{large} is too large for int32 on the scale of its layer: its weights are nearly zero")


def as_half(values: Array) -> Array:
    """The closest float32 that float16 holds; what is too large for it stays as it is."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float16).astype(np.float32)
    return np.where(np.isfinite(found), found, values).astype(np.float32)


def half_above(steps: Array) -> Array:
    """The smallest float32 that float16 holds and that is not below; what is too large for it stays as it is."""
    with np.errstate(over="ignore"):
        found = np.asarray(steps).astype(np.float16)
        found = np.where(found.astype(np.float32) < steps, np.nextafter(found, np.float16(np.inf)), found)
    return np.where(np.isfinite(found), found.astype(np.float32), steps).astype(np.float32)


def _put(
    quantized: onnx.ModelProto, floats: Mapping[str, Array], grids: list[Grid], of_bias: Callable[[Array], Array]
) -> str | None:
    """Write the grids, and biases on the scale of their layer's input times the step; in place.

    `floats` has the biases by their names in float. Returns the name of the first one that would be too large for
    int32, and then leaves off.
    """
    constants = graph.Constants(quantized)
    makers = {node.output[0]: node for node in quantized.graph.node}

    def write(grid: Grid) -> None:
        for name, values in zip(
            grid.dequantizer.input, (grid.codes, grid.step, np.zeros(grid.step.shape, grid.codes.dtype)), strict=False
        ):
            constants.tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(values), name))

    steps = {grid.dequantizer.output[0]: grid.step for grid in grids}
    for grid in grids:
        write(grid)
    for node in quantized.graph.node:
        bias = constants.dequantized.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type not in graph.WEIGHTED or node.input[1] not in steps or bias is None:
            continue
        codes, old, source = (
            numpy_helper.to_array(constants.tensors[name]) for name in (*bias.input[:2], makers[node.input[0]].input[1])
        )
        # ONNX Runtime gives a bias that layers share to each under a new name; then what it made of it has to do.
        exact = floats[float_name(bias)] if float_name(bias) in floats else codes * old
        step = np.asarray(source * steps[node.input[1]], np.float32)
        codes = np.rint(of_bias(exact).astype(np.float64) / step)
        if abs(codes).max() > np.iinfo(np.int32).max:
            return float_name(bias)
        write(Grid(bias, codes.astype(np.int32), step))
    return None


def round_weights(
    quantized: onnx.ModelProto, floats: Mapping[str, Array]
) -> list[tuple[onnx.NodeProto, npt.NDArray[Any]]]:
    """What dequantizes each int8 weight of convolutions and matrix products, and its float64 values before."""
    dequantized = graph.Constants(quantized).dequantized
    read = {node.input[1]: None for node in quantized.graph.node if node.op_type in graph.WEIGHTED}
    found = [dequantized[name] for name in read if name in dequantized]
    return [(node, floats[float_name(node)].astype(np.float64)) for node in found]


def float_name(dequantizer: onnx.NodeProto) -> str:
    """The name that the constant had in float."""
    return str(dequantizer.input[0]).removesuffix(TENSOR_NAME_QUANT_SUFFIX)


def lost(quantized: onnx.ModelProto, floats: Mapping[str, Array], factor: float) -> dict[str, int | float]:
    """Of the int8 weights that are not zero: how many there are, how many the factor clips, how many become zero."""
    exact = np.concatenate([np.rint(w[w != 0] * factor) for _, w in round_weights(quantized, floats)])
    clipped, zeroed = int((abs(exact) > LARGEST).sum()), int((exact == 0).sum())
    return {
        "rounded_weights": exact.size,
        "clipped_weights": clipped,
        "zeroed_weights": zeroed,
        "zeroed_share": zeroed / max(1, exact.size),
    }
