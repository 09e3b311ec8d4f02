"""Which tensors of a graph share their channels, which channels can go without changing any result, and their removal.

Tensors that must keep the same channels (through Add, activations, pooling, depthwise convolutions, Q/DQ) form a
class. A channel of a class goes when everything that produces it makes exact zeros, or when everything that reads it
has zero weights for it; where convolutions make whole vectors of channels, as many stay as fill one.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from tasks.graphs import graph
from tasks.graphs.graph import Array, Mask

VECTOR = 16  # channels that a kernel takes at once; with some left over it takes up to five times as long


# These hand each channel on by itself, and zero as zero (Clip only where its range holds zero).
CHANNELWISE = {
    "AveragePool",
    "Clip",
    "DequantizeLinear",
    "Flatten",
    "GlobalAveragePool",
    "Identity",
    "MaxPool",
    "QuantizeLinear",
    "Relu",
}


@dataclass
class Layer:
    """A node with weights: a convolution or a matrix product."""

    node: onnx.NodeProto
    weight: Array  # the integer or float values; zero means zero
    bias: Array | None
    out_axis: int
    in_axis: int | None  # None for a depthwise convolution

    @property
    def source(self) -> str:
        return str(self.node.input[0])

    @property
    def target(self) -> str:
        return str(self.node.output[0])


@dataclass
class ChannelClass:
    """Tensors that share their channels, and the layers that write, carry and read them."""

    channels: int
    pinned: bool = False
    producers: list[Layer] = field(default_factory=list)
    depthwise: list[Layer] = field(default_factory=list)
    consumers: list[Layer] = field(default_factory=list)


def unshare(model: onnx.ModelProto) -> None:
    """Give every reader its own copy of a constant with more than one value, so that each can be cut by itself.

    That goes for the DequantizeLinear between a constant and its readers, too.
    """
    dequantized = graph.Constants(model).dequantized
    constants = {name: tensor for name, tensor in graph.initializers(model).items() if tensor.dims}
    nodes: list[onnx.NodeProto] = []
    seen: set[str] = set()

    def own_constants(node: onnx.NodeProto) -> None:
        for position, name in enumerate(node.input):
            if name in seen and name in dequantized:
                twin = onnx.NodeProto()
                twin.CopyFrom(dequantized[name])
                twin.output[0] = node.input[position] = f"{name}.{len(nodes)}"
                own_constants(twin)
                nodes.append(twin)
            elif name in seen and name in constants:
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[position] = f"{name}.{len(model.graph.initializer)}"
            seen.add(name)

    for node in model.graph.node:
        own_constants(node)
        nodes.append(node)
    graph.replace_nodes(model, nodes)


def layers(model: onnx.ModelProto, constants: graph.Constants) -> list[Layer]:
    """Nodes with constant weights whose channels can be told apart; others are left to `classes` to pin."""
    found = []
    for node in model.graph.node:
        weight = constants.read(node.input[1]) if len(node.input) > 1 else None
        if weight is None or constants.read(node.input[0]) is not None:
            continue
        bias = constants.read(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if len(node.input) > 2 and node.input[2] and (bias is None or bias.ndim != 1):
            continue
        groups = graph.attribute(node, "group", 1)
        if node.op_type == "Conv" and groups == 1:
            found.append(Layer(node, weight, bias, out_axis=0, in_axis=1))
        elif node.op_type == "Conv" and groups == weight.shape[0] and weight.shape[1] == 1:
            found.append(Layer(node, weight, bias, out_axis=0, in_axis=None))
        elif node.op_type == "Gemm" and not graph.attribute(node, "transA", 0):
            out = 0 if graph.attribute(node, "transB", 0) else 1
            if bias is None or len(bias) == weight.shape[out]:
                found.append(Layer(node, weight, bias, out_axis=out, in_axis=1 - out))
        elif node.op_type == "MatMul" and weight.ndim == 2:
            found.append(Layer(node, weight, bias, out_axis=1, in_axis=0))
    return found


class UnionFind:
    """Union-find over tensor names."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            self.parent[name] = name = self.parent[self.parent[name]]
        return name

    def join(self, *names: str) -> None:
        for name in names[1:]:
            self.parent[self.root(name)] = self.root(names[0])


def classes(model: onnx.ModelProto, constants: graph.Constants, found: list[Layer]) -> list[ChannelClass]:
    """The classes of tensors that share channels; those touched by any node not understood are pinned.

    Channels are axis 1 everywhere, so a matrix product counts as understood between matrices only.
    """
    tied, pinned = UnionFind(), {value.name for value in (*model.graph.input, *model.graph.output)}
    ranks = {name: len(shape) for name, shape in graph.shapes(model).items()}
    by_target = {layer.target: layer for layer in found}
    for node in model.graph.node:
        layer = by_target.get(node.output[0])
        activations = [name for name in node.input if name and constants.read(name) is None]
        if layer is not None and (node.op_type != "MatMul" or ranks.get(layer.source) == 2):
            if layer.in_axis is None:
                tied.join(layer.source, layer.target)
        elif node.output[0] in constants.dequantized:
            continue
        elif node.op_type in CHANNELWISE and len(activations) == 1 and hands_on(node, constants):
            tied.join(activations[0], node.output[0])
        elif node.op_type == "Add" and len(activations) == 2 and len({ranks.get(name) for name in activations}) == 1:
            tied.join(*activations, node.output[0])
        else:
            pinned.update(activations, node.output)
    return _collect(tied, pinned, found)


def hands_on(node: onnx.NodeProto, constants: graph.Constants) -> bool:
    """True if each channel passes by itself, whatever the other channels are, and a zero stays a zero."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = constants.read(node.input[1])
        return scale is not None and scale.ndim == 0
    if node.op_type == "Clip":
        low, high = (constants.read(name) if name else np.zeros(()) for name in (*node.input[1:], "", "")[:2])
        return low is not None and high is not None and bool(low <= 0 <= high)
    return len(node.output) == 1 and (node.op_type != "Flatten" or graph.attribute(node, "axis", 1) == 1)


def _collect(tied: UnionFind, pinned: set[str], found: list[Layer]) -> list[ChannelClass]:
    members: dict[str, ChannelClass] = defaultdict(lambda: ChannelClass(0))
    for layer in found:
        carrier, channels = members[tied.root(layer.target)], layer.weight.shape[layer.out_axis]
        if carrier.channels not in (0, channels):  # an Add that broadcasts one channel, or sums after a Flatten
            carrier.pinned = True
        carrier.channels = channels
        (carrier.depthwise if layer.in_axis is None else carrier.producers).append(layer)
        if layer.in_axis is not None:
            members[tied.root(layer.source)].consumers.append(layer)
    for name in pinned:
        members[tied.root(name)].pinned = True
    return [member for member in members.values() if not member.pinned and member.producers]


def removable(member: ChannelClass) -> Mask:
    """Channels that can go without changing any result, bool (channels,); at least one always stays."""
    zero = np.ones(member.channels, bool)
    for layer in (*member.producers, *member.depthwise):
        if layer.in_axis is not None:
            zero &= ~layer.weight.any(axis=_others(layer.weight, layer.out_axis))
        if layer.bias is not None:
            zero &= layer.bias == 0
    unread = np.ones(member.channels, bool)
    for layer in member.consumers:
        unread &= ~_per_channel(layer, member.channels).any(axis=1)
    gone = zero | (unread if member.consumers else False)
    if gone.all():
        gone[0] = False
    return np.asarray(gone, bool)


def _others(weight: Array, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(weight.ndim) if other != axis)


def _per_channel(layer: Layer, channels: int) -> Array:
    """The reader's weights by channel it reads, (channels, everything else); after Flatten a channel is a run."""
    return np.moveaxis(layer.weight, int(layer.in_axis or 0), 0).reshape(channels, -1)


def remove_channels(model: onnx.ModelProto, cuts: graph.Cuts | None = None) -> bool:
    """Remove every removable channel, in place; returns whether there was any, and adds to `cuts` what went where."""
    unshare(model)
    found = False
    while _cut_all(model, cuts):
        found = True
    return found


def _cut_all(model: onnx.ModelProto, cuts: graph.Cuts | None) -> bool:
    """One pass over the classes: what is zero, or is not read, stays so when channels of other classes go."""
    constants, found = graph.Constants(model, cuts), False
    for member in classes(model, constants, layers(model, constants)):
        gone = removable(member)
        if _in_vectors(member):
            spare = -np.count_nonzero(~gone) % VECTOR
            gone[np.flatnonzero(gone)[:spare]] = False
        if gone.any():
            _cut(member, ~gone, constants)
            found = True
    return found


def _in_vectors(member: ChannelClass) -> bool:
    """True if convolutions make whole vectors of channels, which a few dead ones are not worth breaking up for."""
    return member.channels % VECTOR == 0 and any(layer.node.op_type == "Conv" for layer in member.producers)


def _cut(member: ChannelClass, kept: Mask, constants: graph.Constants) -> None:
    for layer in (*member.producers, *member.depthwise):
        constants.keep(layer.node.input[1], layer.out_axis, kept)
        if layer.bias is not None:
            constants.keep(layer.node.input[2], 0, kept)
    for layer in member.depthwise:
        next(a for a in layer.node.attribute if a.name == "group").i = int(kept.sum())
    for layer in member.consumers:
        run_length = layer.weight.shape[int(layer.in_axis or 0)] // member.channels
        constants.keep(layer.node.input[1], int(layer.in_axis or 0), np.repeat(kept, run_length))


Places = dict[str, tuple[Array, ...]]  # of a constant that was cut: where it lies in the one before, as np.ix_ has it


def cut(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Places]:
    """The model without its removable channels, and where in the old constants those of the new one lie.

    The argument keeps all of them, but each reader gets a copy of its own.
    """
    unshare(model)
    slim, cuts = onnx.ModelProto(), graph.Cuts()
    slim.CopyFrom(model)
    remove_channels(slim, cuts)
    kept = {name: [np.arange(size) for size in tensor.dims] for name, tensor in graph.initializers(model).items()}
    for name, axis, mask in cuts:
        kept[name][axis] = kept[name][axis][mask]
    return slim, {name: np.ix_(*kept[name]) for name in {name for name, *_ in cuts}}


def paste(model: onnx.ModelProto, slim: onnx.ModelProto, places: Places) -> None:
    """Put the constants of the slim model back where they were cut from, in place; what was cut off stays."""
    tensors = graph.initializers(model)
    for name, tensor in graph.initializers(slim).items():
        if name in tensors:
            values = numpy_helper.to_array(tensor)
            if name in places:
                whole = numpy_helper.to_array(tensors[name]).copy()
                whole[places[name]] = values
                values = whole
            tensors[name].CopyFrom(numpy_helper.from_array(values, name))
