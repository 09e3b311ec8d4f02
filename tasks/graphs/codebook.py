"""Weight sharing on the int8 grid: few distinct codes, so that the same plain ONNX file compresses far better.

Weight sharing: Han et al. 2016, Deep Compression, arXiv:1510.00149, section 3.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tasks.graphs import graph
from tasks.graphs.graph import Array

Codes = npt.NDArray[np.int8]
Numbers = npt.NDArray[np.int64]
LARGEST = 127  # of the int8 grid, which is symmetric here


def cluster(codes: Codes, levels: int) -> Codes:
    """The codes with each nonzero one replaced by the nearest of `levels` shared ones: int8, of the same shape.

    Zeros stay zero, and nothing else becomes zero. The shared codes are the nonzero integers with the least squared
    error that there is, by dynamic programming over the distinct codes and their counts (Wang & Song 2011,
    Ckmeans.1d.dp). `ValueError` if `levels` is under 1.
    """
    if levels < 1:
        raise ValueError(f"levels is {levels}: a codebook needs at least 1")
    kept = codes != 0
    values, places, counts = np.unique(codes[kept], return_inverse=True, return_counts=True)
    shared = np.zeros_like(codes)
    if len(values):
        shared[kept] = _cluster(values.astype(np.int64), counts.astype(np.int64), min(levels, len(values)))[places]
    return shared


def _cluster(values: Numbers, counts: Numbers, levels: int) -> Numbers:
    """The shared code of each of the sorted distinct values, of which there are at least `levels`."""
    centres, errors = _intervals(values, counts)
    least, firsts = errors[0], []  # least[last]: the error of the best intervals that cover the values up to `last`
    for _ in range(levels - 1):
        split = least[:-1, None] + errors[1:]
        firsts.append(split.argmin(axis=0) + 1)
        least = split.min(axis=0)
    shared, last = np.empty_like(values), len(values) - 1
    for starts in (*reversed(firsts), np.zeros_like(values)):
        first = int(starts[last])
        shared[first : last + 1] = centres[first, last]
        last = first - 1
    return shared


def _intervals(values: Numbers, counts: Numbers) -> tuple[Numbers, npt.NDArray[np.float64]]:
    """Of the values first..last, at [first, last]: the best nonzero integer centre, and the squared error with it.

    The error is infinite where first is above last.
    """
    number, total, square = (np.append(0, np.cumsum(counts * values**power)) for power in range(3))
    n, s, q = (sums[None, 1:] - sums[:-1, None] for sums in (number, total, square))
    mean = s / np.maximum(n, 1)
    centres = np.where(abs(mean) > 0.5, np.rint(mean), np.where(mean < 0, -1, 1)).astype(np.int64)
    return centres, np.where(n > 0, (q - 2 * centres * s + centres**2 * n).astype(np.float64), np.inf)


def apply(model: onnx.ModelProto, levels: int) -> None:
    """Share codes in every int8 weight of convolutions and matrix products, in place: one codebook for each tensor.

    Codes of channels with scales of their own have few values in common. So a tensor gets one scale, and its bias
    follows, where that comes as close to the weights as sharing under its own scales does: weights that were trained
    on a codebook do, those with normalisation folded into them seldom. What the one scale is too coarse for becomes
    zero. `ValueError` if `levels` is under 1.
    """
    constants = graph.Constants(model)
    for node in model.graph.node:
        weight = constants.dequantized.get(node.input[1]) if node.op_type in graph.WEIGHTED else None
        codes = constants.read(node.input[1]) if weight is not None else None
        if weight is None or codes is None or codes.dtype != np.int8:  # wider where the zero point is not zero
            continue
        scale = _read(constants, weight.input[1])
        axis = int(graph.attribute(weight, "axis", 1)) % codes.ndim
        steps = scale.reshape([-1 if other == axis else 1 for other in range(codes.ndim)] if scale.ndim else [])
        exact, shared = codes * steps.astype(np.float64), cluster(codes, levels)
        one = np.float32(abs(exact).max() / LARGEST)
        if one > 0 and (source := _source(model, node, constants)) is not None:
            coarse = cluster(np.rint(exact / one).astype(np.int8), levels)
            if _distance(exact, coarse * one, axis) <= _distance(exact, shared * steps, axis):
                shared = coarse
                _put_scale(constants, weight, one)
                for name in (name for name in node.input[2:] if name in constants.dequantized):
                    _move(constants, constants.dequantized[name], np.float32(one * _read(constants, source.input[1])))
        _put(constants, weight, 0, shared)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def _source(model: onnx.ModelProto, node: onnx.NodeProto, constants: graph.Constants) -> onnx.NodeProto | None:
    """What dequantizes the layer's input, if the scales of its weight and bias are nobody else's: they may change."""
    readers = Counter(name for each in model.graph.node for name in each.input)
    if any(readers[name] > 1 for name in node.input[1:] if name in constants.dequantized):
        return None
    maker = next((each for each in model.graph.node if node.input[0] in each.output), None)
    known = maker is not None and maker.op_type == "DequantizeLinear" and maker.input[1] in constants.tensors
    return maker if known else None


def _distance(exact: Array, shared: Array, axis: int) -> float:
    """The squared error over the squared weights, summed over the channels along `axis` that have any weights."""
    others = tuple(other for other in range(exact.ndim) if other != axis)
    size = (exact**2).sum(axis=others)
    error = ((exact - shared) ** 2).sum(axis=others)
    return float((error[size > 0] / size[size > 0]).sum())


def _move(constants: graph.Constants, bias: onnx.NodeProto, scale: np.float32) -> None:
    """The same bias on another grid."""
    values = _read(constants, bias.input[0]) * _read(constants, bias.input[1]).astype(np.float64)
    _put(constants, bias, 0, np.rint(values / scale).astype(np.int32))
    _put_scale(constants, bias, scale)


def _put_scale(constants: graph.Constants, dequantizer: onnx.NodeProto, scale: np.float32) -> None:
    _put(constants, dequantizer, 1, np.asarray(scale))
    if len(dequantizer.input) > 2:  # as many zero points as scales
        _put(constants, dequantizer, 2, np.zeros((), _read(constants, dequantizer.input[0]).dtype))


def _put(constants: graph.Constants, node: onnx.NodeProto, position: int, values: Array) -> None:
    """Give the node a constant of its own, since others may read the one it has."""
    name = f"{node.output[0]}:{position}"
    if name not in constants.tensors:
        constants.tensors[name] = constants.model.graph.initializer.add()
    constants.tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    node.input[position] = name


def _read(constants: graph.Constants, name: str) -> Array:
    return numpy_helper.to_array(constants.tensors[name])
