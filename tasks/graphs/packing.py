"""Files that unpack themselves: constants in fewer bits, and the nodes that bring them back when a session is opened.

ONNX Runtime folds constants once, at load: what runs afterwards are the same integer kernels on the same numbers. Only
operators that every ONNX Runtime since 1.18 has are used (BitShift, BitwiseAnd, Gather, CumSum, ScatterElements), none
of its own. With its optimizations off the file is unpacked at each call, to the same bits.

Three forms, each of many tensors at once, since every node costs 20 bytes or so:

- Half: float32 constants whose values float16 holds lie side by side as float16.
- Indexed: int8 weights with up to 2, 4 or 16 different codes are indices of 1, 2 or 4 bits into a table of codes. The
  indices of a table's tensors lie side by side; byte i has those at i, i + m, i + 2m and so on, of all m bytes, so that
  whole columns are unpacked at once.
- Sparse: an int8 weight that is mostly zero is its other codes, and one byte for the gap before each (Han et al. 2016,
  arXiv:1510.00149, section 2: a gap that is too long is filled with zeros).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tasks.graphs import compact, graph
from tasks.graphs.graph import Array

LEAST = 64  # bytes that a tensor must save by itself: a Reshape and its shape
LONGEST_GAP = 255
LEAST_OPSET = 18  # of BitwiseAnd
TABLES = {bits: np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8) for bits in (2, 4)}


class Sheet:
    """A model whose constants are being replaced: new nodes come first, in the order in which they are added."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.names = (f"packed.{number}" for number in itertools.count())
        self.nodes: list[onnx.NodeProto] = []

    def constant(self, values: Array) -> str:
        name = next(self.names)
        self.model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.nodes_of(kind, [next(self.names)], *inputs, **attributes)[0]

    def nodes_of(self, kind: str, outputs: list[str], *inputs: str, **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs

    def hand_out(self, flat: str, tensors: dict[str, Array]) -> None:
        """Cut the flat tensor into these, which go by their old names."""
        shaped = {name: values for name, values in tensors.items() if values.ndim != 1}
        parts = [next(self.names) if name in shaped else name for name in tensors]
        if len(parts) > 1:
            sizes = self.constant(np.array([values.size for values in tensors.values()], np.int64))
            self.nodes_of("Split", parts, flat, sizes)
        elif shaped:
            parts = [flat]
        else:
            self.nodes[-1].output[0] = parts[0]
        for part, (name, values) in zip(parts, tensors.items(), strict=True):
            if name in shaped:
                self.nodes_of("Reshape", [name], part, self.constant(np.array(values.shape, np.int64)))
        kept = [one for one in self.model.graph.initializer if one.name not in tensors]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def finish(self) -> onnx.ModelProto:
        rest = list(self.model.graph.node)
        del self.model.graph.node[:]
        self.model.graph.node.extend([*self.nodes, *rest])
        compact.merge_equal_constants(self.model)
        compact.rename(self.model)
        return self.model


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the smallest of these forms, or as it is but for its names; the argument stays as it is.

    What is chosen is chosen by the bytes of the whole file: a form that does not pay for its nodes is left out.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    chosen: list[Callable[[Sheet], None]] = []
    best = _rewrite(model, chosen)
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    for form in _forms(tensors) if opset >= LEAST_OPSET else ():
        tried = _rewrite(model, [*chosen, form])
        if tried.ByteSize() < best.ByteSize():
            chosen, best = [*chosen, form], tried
    return best


def _rewrite(model: onnx.ModelProto, forms: list[Callable[[Sheet], None]]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    sheet = Sheet(copy)
    for form in forms:
        form(sheet)
    return sheet.finish()


def _forms(tensors: dict[str, Array]) -> Iterator[Callable[[Sheet], None]]:
    """What could be packed, the form that may save most first."""
    halves = {name: values for name, values in tensors.items() if _is_half(values)}
    if halves:
        yield lambda sheet: _pack_halves(sheet, halves)
    groups: dict[tuple[int, bytes], dict[str, Array]] = {}
    for name, values in tensors.items():
        if values.dtype != np.int8 or values.size < LEAST:
            continue
        bits, table = _table(values)
        sparse = _sparse_bytes(values)
        if sparse < min(values.size * bits / 8, values.size - LEAST):
            yield lambda sheet, name=name, values=values: _pack_sparse(sheet, name, values)  # type: ignore[misc]
        elif bits < 8 and values.size * (1 - bits / 8) > LEAST:
            groups.setdefault((bits, table.tobytes()), {})[name] = values
    for (bits, codes), group in groups.items():
        yield lambda sheet, bits=bits, codes=codes, group=group: _pack_indexed(  # type: ignore[misc]
            sheet, bits, np.frombuffer(codes, np.int8), group
        )


def _is_half(values: Array) -> bool:
    if values.dtype != np.float32 or values.ndim == 0 or values.size < 2:
        return False
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def _table(codes: Array) -> tuple[int, Array]:
    """The bits that an index needs, and the codes that it stands for; those of small numbers are common to many."""
    found = np.unique(codes)
    for bits in (1, 2, 4):
        if bits in TABLES and found[0] >= TABLES[bits][0] and found[-1] <= TABLES[bits][-1]:
            return bits, TABLES[bits]
        if len(found) <= 2**bits:
            return bits, np.resize(found, 2**bits)
    return 8, found


def _pack_halves(sheet: Sheet, tensors: dict[str, Array]) -> None:
    flat = np.concatenate([values.ravel() for values in tensors.values()]).astype(np.float16)
    sheet.hand_out(sheet.node("Cast", sheet.constant(flat), to=TensorProto.FLOAT), tensors)


def _pack_indexed(sheet: Sheet, bits: int, table: Array, tensors: dict[str, Array]) -> None:
    flat = np.concatenate([values.ravel() for values in tensors.values()])
    found = _gather(sheet, flat, bits, table)
    spare = -flat.size % (8 // bits)
    sheet.hand_out(found, tensors | ({next(sheet.names): np.zeros(spare, np.int8)} if spare else {}))


def _gather(sheet: Sheet, codes: Array, bits: int, table: Array) -> str:
    """The name of a tensor with the codes, int8 (n,), and with what fills up the last byte of each column."""
    order = np.argsort(table, kind="stable")
    indices = order[np.searchsorted(table[order], codes)].astype(np.uint8)
    columns = np.append(indices, np.zeros(-len(codes) % (8 // bits), np.uint8)).reshape(8 // bits, -1)
    stored = np.bitwise_or.reduce([column << (bits * number) for number, column in enumerate(columns)], axis=0)
    source, mask, parts = sheet.constant(stored.astype(np.uint8)), sheet.constant(np.array(2**bits - 1, np.uint8)), []
    for number in range(8 // bits):
        part = source
        if number:
            shift = sheet.constant(np.array(bits * number, np.uint8))
            part = sheet.node("BitShift", part, shift, direction="RIGHT")
        if number < 8 // bits - 1:
            part = sheet.node("BitwiseAnd", part, mask)
        parts.append(part)
    whole = sheet.node("Cast", sheet.node("Concat", *parts, axis=0), to=TensorProto.INT32)
    return sheet.node("Gather", sheet.constant(table), whole)


def _gaps(codes: Array) -> tuple[Array, Array]:
    """How far each stored code is from the one before, uint8, and the codes; zeros fill gaps that are too long.

    The first is as far from a place in front of the tensor. Zeros at the end make whole bytes of indices, if there are.
    """
    places = np.flatnonzero(codes)
    stops: list[int] = []
    last = -1
    for place in places.tolist():
        stops += range(last + LONGEST_GAP, place, LONGEST_GAP)
        stops.append(place)
        last = place
    stops += range(last + 1, min(last + 1 + -len(stops) % 8, len(codes)))
    return np.diff(stops, prepend=-1).astype(np.uint8), codes[stops]


def _sparse_bytes(codes: Array) -> float:
    """About the bytes of the sparse form, its ten nodes and their constants included."""
    steps, kept = _gaps(codes.ravel())
    return len(steps) * (1 + (_table(kept)[0] if len(kept) else 8) / 8) + 400


def _pack_sparse(sheet: Sheet, name: str, values: Array) -> None:
    steps, kept = _gaps(values.ravel())
    bits, table = _table(kept)
    whole = bits < 8 and not len(kept) % (8 // bits)
    codes = _gather(sheet, kept, bits, table) if whole else sheet.constant(kept)
    ahead = sheet.node("Cast", sheet.constant(steps), to=TensorProto.INT32)
    axis = sheet.constant(np.array(0, np.int64))
    places = sheet.node("Sub", sheet.node("CumSum", ahead, axis), sheet.constant(np.array(1, np.int32)))
    empty = sheet.node(
        "ConstantOfShape",
        sheet.constant(np.array([values.size], np.int64)),
        value=numpy_helper.from_array(np.zeros(1, np.int8)),
    )
    sheet.hand_out(sheet.node("ScatterElements", empty, places, codes, axis=0), {name: values})


def unpack(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with plain constants again, as ONNX Runtime has it when it has opened the file."""
    import onnxruntime as ort

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = set(graph.initializers(copy))
    folded = []
    for node in copy.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and known.issuperset(filter(None, node.input)):
            folded.append(node)
            known.update(node.output)
    if not folded:
        return copy
    made = {name for node in folded for name in node.output}
    wanted = sorted({name for node in copy.graph.node if node not in folded for name in node.input if name in made})
    part = helper.make_model(
        helper.make_graph(
            folded, "constants", [], [helper.make_empty_tensor_value_info(name) for name in wanted],
            list(copy.graph.initializer),
        ),
        opset_imports=copy.opset_import,
        ir_version=copy.ir_version,
    )  # fmt: skip
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(wanted, {})
    rest = [node for node in copy.graph.node if node not in folded]
    del copy.graph.node[:]
    copy.graph.node.extend(rest)
    copy.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in zip(wanted, values, strict=True)
    )
    graph.drop_dead(copy)
    return copy
