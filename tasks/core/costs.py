"""What a layer costs on the device: int8 latency as ONNX Runtime has it there, by operator and widths, and bytes.

Multiply-accumulates mislead at small widths, where a node costs as much as its arithmetic, and at widths that are no
multiple of 16, where a kernel may take twice as long. `weighin profile` measures; the pipeline only reads the table, so
that the same inputs make the same model. Costs of layers add up while all weights stay in the core's cache; so whole
networks are measured too, and what they take beside the sum of their layers is a row by their bytes.
"""

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tasks.core import files, session
from tasks.core.errors import StageError

COPIES = 8
RUNS = 60
STEP = 16  # widths are cut by multiples of it
FRAME_BYTES = 600  # metadata, input and output of a file
NODE_BYTES = 320  # nodes and per-tensor constants of a layer, with short names
SUM_BYTES = 150  # those of a sum
CHANNEL_BYTES = 8  # scale and bias of an output channel

Kind = Literal["frame", "front", "front depthwise", "conv", "depthwise", "linear", "add", "network"]

FRONTS = ("front", "front depthwise")


class Operator(NamedTuple):
    """A layer without its widths: what it does, and on what picture.

    `frame` is what every model has around its layers: the input's quantization, pooling, and the call itself.
    `front` is the convolution that reads the image, and `front depthwise` that one and the 3 x 3 depthwise one after
    it; what they take is the difference of float32 to int8, where it is less: nothing, or below zero.
    `network` is what a whole one takes beside its layers: more, or less. It has its bytes in place of widths.
    """

    kind: Kind
    kernel: int
    stride: int
    height: int  # of the input
    width: int


class Cost(NamedTuple):
    """What something takes on the device."""

    size_bytes: float
    latency_ms: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.size_bytes + other.size_bytes, self.latency_ms + other.latency_ms)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.size_bytes - other.size_bytes, self.latency_ms - other.latency_ms)


NETWORK = Operator("network", 1, 1, 1, 1)

Point = tuple[Operator, int, int]  # the operator, with inputs and outputs
Table = dict[Point, float]  # milliseconds
Curve = tuple[list[float], list[float]]  # bytes and milliseconds, for numpy.interp


def cost(table: Table, operator: Operator, inputs: int, outputs: int) -> Cost:
    """Bytes in the reduced int8 file, and milliseconds at batch 1: bilinear between the widths of the grid.

    `StageError` if the table does not have the operator.
    """
    try:
        latency = sum(share * table[operator, *widths] for widths, share in _around(operator, inputs, outputs))
    except KeyError:
        raise StageError(
            f"the device's table has no {operator.kind} of {inputs} to {outputs} channels, kernel {operator.kernel}, "
            f"on {operator.height} x {operator.width}: `weighin profile` measures what this backbone needs"
        ) from None
    if operator.kind in FRONTS and latency >= 0:
        return Cost(0, 0)
    return Cost(size_bytes(operator, inputs, outputs), latency)


def size_bytes(operator: Operator, inputs: int, outputs: int) -> float:
    """Bytes of the layer in the reduced int8 file; of a front, what float32 adds to it."""
    if operator.kind in FRONTS:
        weights = inputs * operator.kernel**2 + (9 if operator.kind == "front depthwise" else 0)
        return 3 * outputs * weights
    if operator.kind in ("frame", "add"):
        return FRAME_BYTES if operator.kind == "frame" else SUM_BYTES
    reads = 1 if operator.kind == "depthwise" else inputs
    return NODE_BYTES + outputs * (reads * operator.kernel**2 + CHANNEL_BYTES)


def _around(operator: Operator, inputs: int, outputs: int) -> Iterator[tuple[tuple[int, int], float]]:
    """The points of the grid around these widths, with their shares."""
    if operator.kind in ("frame", "depthwise", "add"):  # as many channels come out as go in
        yield from (((width, width), share) for width, share in _neighbours(outputs))
        return
    for (read, first), (made, second) in itertools.product(_neighbours(inputs), _neighbours(outputs)):
        yield (read, made), first * second


def _neighbours(width: int) -> list[tuple[int, float]]:
    """The grid has every width up to STEP, and from there the powers of two."""
    if width <= STEP:
        return [(width, 1.0)]
    low = STEP
    while low * 2 <= width:
        low *= 2
    share = (width - low) / low
    return [(low, 1 - share), (2 * low, share)] if share else [(low, 1.0)]


def grid(operator: Operator, inputs: Iterable[int], outputs: Iterable[int]) -> set[Point]:
    """What has to be measured so that `cost` knows the operator at each of these widths."""
    pairs = itertools.product(inputs, outputs)
    return {(operator, *widths) for read, made in pairs for widths, _ in _around(operator, read, made)}


def beside(table: Table) -> Curve:
    """By the bytes of a network, what it takes beside its layers; nothing if no network was measured.

    It never falls, whatever the clock said: else leaving bytes out would cost time, and a plan would stop there.
    """
    rows = sorted((float(size), latency) for (operator, size, _), latency in table.items() if operator == NETWORK)
    sizes, latencies = ([list(column) for column in zip(*rows, strict=True)]) if rows else ([0.0], [0.0])
    return sizes, list(itertools.accumulate(latencies, max))


def read(path: Path, threads: int | None = None) -> Table:
    """The table in a file that `write` made; `StageError` if it is missing, is not one, or is not of these threads."""
    if not path.exists():
        raise StageError(f"{path} does not exist: `weighin profile` measures this machine's")
    try:
        found = files.read_json(path)
        measured, rows = found["threads"], found["latency_ms"]
        table = {(Operator(*row[:5]), row[5], row[6]): float(row[7]) for row in rows}
    except (KeyError, TypeError, ValueError, IndexError):
        raise StageError(f"{path} is not a device's table: `weighin profile` measures one") from None
    if threads not in (None, measured):
        raise StageError(
            f"{path} is of {measured} threads, but benchmark.threads in params.yaml is {threads}: `weighin profile` "
            "measures the device again"
        )
    return table


def write(path: Path, table: Table, about: dict[str, Any]) -> None:
    """The table as JSON, one line for each measurement, and what it is about."""
    rows = sorted([*operator, inputs, outputs, round(value, 6)] for (operator, inputs, outputs), value in table.items())
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    text = files.to_json(about | {"latency_ms": []}).decode().replace("[]", f"[\n{lines}\n  ]")
    files.write_bytes(path, text.encode())


def measure(operator: Operator, inputs: int, outputs: int, threads: int) -> float:
    """Milliseconds of one int8 layer at batch 1: the median of what COPIES more of it add to a run.

    Of a frame: the median of a whole run. Of a front: what float32 adds to the run, or takes from it.
    """
    if operator.kind == "frame":
        return _times([session.open_session(_frame(operator, inputs), threads)])[0]
    if operator.kind in FRONTS:
        both = [
            session.open_session(_front(operator, inputs, outputs, in_float), threads) for in_float in (False, True)
        ]
        in_int8, in_float = _times(both)
        return in_float - in_int8
    pair = [session.open_session(_layers(operator, inputs, outputs, copies), threads) for copies in (1, 1 + COPIES)]
    one, more = _times(pair)
    return max(0.0, more - one) / COPIES


def _times(sessions: list[ort.InferenceSession]) -> list[float]:
    """Median milliseconds of a run of each; they take turns."""
    random = np.random.default_rng(0)
    feeds = []
    for ready in sessions:
        entry = ready.get_inputs()[0]
        image = random.integers(0, 255, entry.shape)
        feeds.append({entry.name: image.astype(np.float32 if "float" in entry.type else np.uint8)})
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(RUNS):
        for place, (ready, feed) in enumerate(zip(sessions, feeds, strict=True)):
            started = time.perf_counter()
            ready.run(None, feed)
            times[place].append((time.perf_counter() - started) * 1e3)
    return [float(np.median(one)) for one in times]


def _frame(operator: Operator, channels: int) -> bytes:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node(
            "QLinearGlobalAveragePool", ["t", "s", "z", "s", "z"], ["p"], domain="com.microsoft", channels_last=1
        ),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y0"]),
    ]
    return _model(nodes, {}, [1, channels, operator.height, operator.width], TensorProto.FLOAT, 1)


def _front(operator: Operator, inputs: int, outputs: int, in_float: bool) -> bytes:
    """The front between the image and an int8 layer, as QDQ or with its own layers in float32."""
    random = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    constants: dict[str, Any] = {"low": np.float32(0), "high": np.float32(6), "ws": np.full(outputs, 0.01, np.float32)}

    def add(kind: str, names: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, names, [f"t{len(nodes)}"], **attributes))
        return f"t{len(nodes) - 1}"

    def quantized(source: str) -> str:
        return add("DequantizeLinear", [add("QuantizeLinear", [source, "s", "z"]), "s", "z"])

    layers = [("front", operator.kernel, operator.stride, 1), ("depthwise", 3, 1, outputs), ("next", 1, 1, 1)]
    if operator.kind == "front":
        del layers[1]
    picture = [1, inputs, operator.height, operator.width]
    source = "x"
    for name, kernel, stride, groups in layers:
        plain = in_float and name != "next"
        codes = random.integers(-127, 127, (outputs, inputs // groups, kernel, kernel), np.int8)
        constants |= {name: codes * np.float32(0.01) if plain else codes, f"{name} bias": np.zeros(outputs, np.float32)}
        weight = name if plain else add("DequantizeLinear", [name, "ws"], axis=0)
        before, after = (kernel - 1) // 2, kernel // 2
        place = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [before, before, after, after]}
        source = add("Conv", [source if plain else quantized(source), weight, f"{name} bias"], group=groups, **place)
        if plain:
            source = add("Clip", [source, "low", "high"])
        inputs = outputs
    nodes.append(helper.make_node("Identity", [quantized(add("GlobalAveragePool", [quantized(source)]))], ["y0"]))
    return _model(nodes, constants, picture, TensorProto.FLOAT, 1)


def _layers(operator: Operator, inputs: int, outputs: int, copies: int) -> bytes:
    """A model of so many equal layers beside each other, in the form that ONNX Runtime brings int8 layers to."""
    random = np.random.default_rng(0)
    groups = outputs if operator.kind == "depthwise" else 1
    shape = (inputs, outputs) if operator.kind == "linear" else (outputs, inputs // groups, *[operator.kernel] * 2)
    constants = {
        "w": random.integers(-127, 127, shape, np.int8),
        "ws": np.full(outputs, 0.01, np.float32),
        "wz": np.zeros(outputs, np.int8),
        "b": np.zeros(outputs, np.int32),
    }
    before, after = (operator.kernel - 1) // 2, operator.kernel // 2
    nodes = []
    for copy in range(copies):
        target = [f"y{copy}"]
        if operator.kind == "add":
            names = ["x", "s", "z", "x", "s", "z", "s", "z"]
            node = helper.make_node("QLinearAdd", names, target, domain="com.microsoft")
        elif operator.kind == "linear":
            names = ["x", "s", "z", "w", "ws", "wz", "b", "s", "z"]
            node = helper.make_node("QGemm", names, target, domain="com.microsoft")
        else:
            node = helper.make_node(
                "QLinearConv",
                ["x", "s", "z", "w", "ws", "wz", "s", "z", "b"],
                target,
                domain="com.microsoft",
                kernel_shape=[operator.kernel] * 2,
                strides=[operator.stride] * 2,
                pads=[before, before, after, after],
                group=groups,
                channels_last=1,
            )
        nodes.append(node)
    picture = [1, inputs] if operator.kind == "linear" else [1, operator.height, operator.width, inputs]
    return _model(nodes, constants, picture, TensorProto.UINT8, copies)


def _model(nodes: list[NodeProto], constants: dict[str, Any], shape: list[int], kind: int, outputs: int) -> bytes:
    used = {name for node in nodes for name in node.input}
    constants = {"s": np.float32(0.02), "z": np.uint8(128)} | constants
    made = TensorProto.FLOAT if kind == TensorProto.FLOAT else TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(f"y{place}", made, None) for place in range(outputs)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
