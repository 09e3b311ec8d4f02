"""Sums that add nothing, and their removal from a quantized graph."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from tasks.graphs import channels, graph


def remove_blocks(model: onnx.ModelProto) -> list[str]:
    """Remove each Add whose one side is always zero, where its quantized result equals its other side; in place.

    Returns the names of the removed sums. That side and the result must share shape, scale and zero point.
    """
    removed = []
    known = graph.shapes(model)
    while (found := _dead_sum(model, known)) is not None:
        addition, source, result = found
        for node in model.graph.node:
            node.input[:] = [source if name == result else name for name in node.input]
        removed.append(str(addition.output[0]))
        graph.drop_dead(model)
    return removed


class Sum(NamedTuple):
    """A sum whose one side is always zero: its Add, the dequantized other side, and what quantizes the result."""

    addition: onnx.NodeProto
    origin: onnx.NodeProto
    quantizer: onnx.NodeProto


def idle_sums(model: onnx.ModelProto, constants: graph.Constants) -> Iterator[Sum]:
    """The sums that add nothing to a tensor that is quantized before them, in the order of the graph."""
    makers = {output: node for node in model.graph.node for output in node.output}
    outputs = {value.name for value in model.graph.output}
    silent = {layer.target for layer in channels.layers(model, constants) if _is_silent(layer)}
    for quantizer in model.graph.node:
        if quantizer.op_type != "QuantizeLinear" or quantizer.output[0] in outputs:
            continue
        addition = makers.get(quantizer.input[0])
        if addition is not None and addition.op_type == "Relu" and _starts_at_zero(quantizer, constants):
            addition = makers.get(addition.input[0])
        if addition is None or addition.op_type != "Add":
            continue
        for live, dead in (addition.input, reversed(addition.input)):
            origin = makers.get(live)
            if origin is None or origin.op_type != "DequantizeLinear" or origin.input[0] not in makers:
                continue
            if _always_zero(dead, makers, silent, constants):
                yield Sum(addition, origin, quantizer)


def _dead_sum(model: onnx.ModelProto, known: dict[str, list[int]]) -> tuple[onnx.NodeProto, str, str] | None:
    """A sum that changes nothing, the quantized tensor it passes on, and the one it makes of that."""
    constants = graph.Constants(model)
    for addition, origin, quantizer in idle_sums(model, constants):
        source, result = origin.input[0], quantizer.output[0]
        if source in known and known[source] == known.get(result) and _same_scale(origin, quantizer, constants):
            return addition, source, result
    return None


def _starts_at_zero(quantizer: onnx.NodeProto, constants: graph.Constants) -> bool:
    """True if the quantized range has nothing below zero, so that a Relu in front of it does nothing."""
    zero = constants.read(quantizer.input[2]) if len(quantizer.input) > 2 else np.zeros((), np.uint8)
    return zero is not None and bool((zero == np.iinfo(zero.dtype).min).all())


def _same_scale(first: onnx.NodeProto, second: onnx.NodeProto, constants: graph.Constants) -> bool:
    pairs = list(itertools.zip_longest(first.input[1:], second.input[1:], fillvalue=""))
    values = [(constants.read(a), constants.read(b)) for a, b in pairs]
    return all(a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b) for a, b in values)


def _is_silent(layer: channels.Layer) -> bool:
    return not layer.weight.any() and (layer.bias is None or not layer.bias.any())


def _always_zero(name: str, makers: dict[str, onnx.NodeProto], silent: set[str], constants: graph.Constants) -> bool:
    while name not in silent:
        node = makers.get(name)
        if node is None or node.op_type not in channels.CHANNELWISE or not channels.hands_on(node, constants):
            return False
        name = node.input[0]
    return True
