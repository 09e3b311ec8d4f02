"""reduce: remove from the quantized ONNX what pruning zeroed, and prove that no logit changes by one bit.

Tensors that must keep the same channels (through Add, activations, pooling, depthwise convolutions, Q/DQ) form a
class. A channel of a class goes when everything that produces it makes exact zeros, or when everything that
reads it has zero weights for it; where convolutions make whole vectors of channels, as many stay as fill one. With
integer accumulation the removal is exact; that is then checked on every test image. (With its optimizations turned
off ONNX Runtime computes the same file in float32, and splits a long sum by its place: that is exact, too, where what
goes comes last, as `prune` leaves it. Elsewhere a value may then be rounded otherwise by a step.)
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tasks.core import config, dataset, files, graph, paths, session
from tasks.core.errors import StageError, run
from tasks.core.graph import Array, Mask

BATCH = 250
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


class Tied:
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
    tied, pinned = Tied(), {value.name for value in (*model.graph.input, *model.graph.output)}
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
        elif node.op_type in CHANNELWISE and len(activations) == 1 and _hands_on(node, constants):
            tied.join(activations[0], node.output[0])
        elif node.op_type == "Add" and len(activations) == 2 and len({ranks.get(name) for name in activations}) == 1:
            tied.join(*activations, node.output[0])
        else:
            pinned.update(activations, node.output)
    return _collect(tied, pinned, found)


def _hands_on(node: onnx.NodeProto, constants: graph.Constants) -> bool:
    """True if each channel passes by itself, whatever the other channels are, and a zero stays a zero."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = constants.read(node.input[1])
        return scale is not None and scale.ndim == 0
    if node.op_type == "Clip":
        low, high = (constants.read(name) if name else np.zeros(()) for name in (*node.input[1:], "", "")[:2])
        return low is not None and high is not None and bool(low <= 0 <= high)
    return len(node.output) == 1 and (node.op_type != "Flatten" or graph.attribute(node, "axis", 1) == 1)


def _collect(tied: Tied, pinned: set[str], found: list[Layer]) -> list[ChannelClass]:
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


def remove_channels(model: onnx.ModelProto) -> bool:
    """Remove every removable channel, in place; returns whether there was any."""
    unshare(model)
    found = False
    while _cut_all(model):
        found = True
    return found


def _cut_all(model: onnx.ModelProto) -> bool:
    """One pass over the classes: what is zero, or is not read, stays so when channels of other classes go."""
    constants, found = graph.Constants(model), False
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
        drop_dead(model)
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
    silent = {layer.target for layer in layers(model, constants) if _is_silent(layer)}
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


def _is_silent(layer: Layer) -> bool:
    return not layer.weight.any() and (layer.bias is None or not layer.bias.any())


def _always_zero(name: str, makers: dict[str, onnx.NodeProto], silent: set[str], constants: graph.Constants) -> bool:
    while name not in silent:
        node = makers.get(name)
        if node is None or node.op_type not in CHANNELWISE or not _hands_on(node, constants):
            return False
        name = node.input[0]
    return True


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


def lighten(model: onnx.ModelProto) -> None:
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
        if len(node.input) > 2 and (bias := _float_bias(node, makers, constants)) is not None:
            node.input[2] = f"{node.input[2]}.float"
            model.graph.initializer.append(numpy_helper.from_array(bias, node.input[2]))
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not constants.tensors[node.input[1]].dims:
            del node.attribute[:]  # the axis, which one scale for all has no use for
    drop_dead(model)


def _drop_zero_point(dequantizer: onnx.NodeProto | None, constants: graph.Constants) -> None:
    if dequantizer is not None and len(dequantizer.input) > 2:
        zero = constants.read(dequantizer.input[2])
        if zero is not None and not zero.any():
            del dequantizer.input[2]


def _float_bias(
    conv: onnx.NodeProto, makers: dict[str, onnx.NodeProto], constants: graph.Constants
) -> npt.NDArray[np.float32] | None:
    """The bias as float32; None if ONNX Runtime would not come back from it to the same int32."""
    nodes = [makers.get(name) for name in conv.input[:3]]
    scales = [
        constants.read(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None
        for node in nodes
    ]
    codes = constants.read(conv.input[2])
    source, weight, own = scales
    if source is None or weight is None or own is None or codes is None or codes.dtype != np.int32:
        return None
    made = np.asarray(source * weight, np.float32)  # by ONNX Runtime, from a float bias
    bias = np.asarray(codes.astype(np.float32) * own, np.float32)
    same = np.array_equal(made, own) and np.array_equal(np.rint(bias / made), codes)
    return bias if same else None


def share(model: onnx.ModelProto) -> None:
    """Keep one copy of constants with the same type, shape and bytes, in place."""
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        names[tensor.name] = first.setdefault((tensor.data_type, values.shape, values.tobytes()), tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


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


def reduce(quantized: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The same function without what is dead, and the record of what went; the argument stays as it is."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    nodes, before = len(model.graph.node), _weight_shapes(model)
    drop_dead(model)
    sums = remove_blocks(model)
    while remove_channels(model):
        sums += remove_blocks(model)  # a layer may have read nothing but channels that are gone
    cut = [
        {"layer": name, "weight_before": before[name], "weight_after": after}
        for name, after in _weight_shapes(model).items()
        if before[name] != after
    ]
    nodes -= len(model.graph.node)
    lighten(model)
    graph.strip(model)
    share(model)
    graph.strip(model)
    rename(model)
    onnx.helper.set_model_props(model, {key: value for key, value in properties.items() if key == "weighin"})
    onnx.checker.check_model(model, full_check=True)
    record = {"residual_sums_removed": sums, "layers": cut, "nodes_removed": nodes}
    return model, record


def _weight_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {layer.target: list(layer.weight.shape) for layer in layers(model, graph.Constants(model))}


def prove(before: Path, after: Path, test: Path, threads: int) -> int:
    """Compare the logits of two models bit by bit on every image; returns how many images were compared.

    `StageError` names the first image and logit that differ.
    """
    first, second = (session.open_session(path, threads) for path in (before, after))
    preprocessing, names = session.description(first)
    count = 0
    for images, _ in dataset.batches(test, preprocessing, names, BATCH):
        expected, found = session.logits(first, images), session.logits(second, images)
        different = np.argwhere(expected.view(np.uint32) != found.view(np.uint32))
        if len(different):
            row, column = different[0]
            raise StageError(
                f"{after} is not bit-identical to {before}: image {count + row} of {test}, logit {column} "
                f"({names[column]}) is {found[row, column]!r}, not {expected[row, column]!r}"
            )
        count += len(images)
    if count == 0:
        raise StageError(f"{test} has no images: they are what the proof is made on")
    return count


def main() -> None:
    config.load()
    source, target = paths.onnx("quantize"), paths.onnx("reduce")
    session.open_session(source, threads=1)  # a file that is no model ends here, in one sentence
    model, record = reduce(onnx.load(source))
    with files.replacing(target) as (temporary,):
        temporary.write_bytes(model.SerializeToString())
        images = prove(source, temporary, paths.TEST, threads=1)
    files.write_bytes(paths.PACKED, files.packed(target.read_bytes()))
    sizes = {"size_bytes_before": source.stat().st_size, "size_bytes_after": target.stat().st_size}
    files.write_json(paths.report("reduce"), {"bit_identical_images": images, **sizes, **record})
    print(
        f"reduce: {sizes['size_bytes_before']:,} to {sizes['size_bytes_after']:,} bytes, "
        f"logits bit-identical on {images} test images"
    )


if __name__ == "__main__":
    run(main)
