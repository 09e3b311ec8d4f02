"""What a layer costs on the device: int8 latency as ONNX Runtime has it there, by operator and widths, and bytes.

Multiply-accumulates mislead at small widths, where a node costs as much as its arithmetic, and at widths that are no
multiple of 16, where a kernel may take twice as long. `weighin profile` measures; the pipeline only reads the table, so
that the same inputs make the same model. Costs of layers add up while all weights stay in the core's cache; so whole
networks are measured too, and what they take beside the sum of their layers is a row by their bytes.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tasks.core import files
from tasks.core.errors import StageError

STEP = 16  # widths are cut by multiples of it
FRAME_BYTES = 600  # metadata, input and output of a file
CONVOLUTION_BYTES = 215  # nodes and per-tensor constants of a layer, with short names
LINEAR_BYTES = 320  # the bias of a matrix product stays int32, with scales of its own
SUM_BYTES = 150  # those of a sum
CHANNEL_BYTES = 8  # scale and bias of an output channel

Kind = Literal["frame", "front", "front depthwise", "conv", "depthwise", "linear", "add", "network"]

FLOAT_STEMS = ("front", "front depthwise")


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
    if operator.kind in FLOAT_STEMS and latency >= 0:
        return Cost(0, 0)
    return Cost(size_bytes(operator, inputs, outputs), latency)


def size_bytes(operator: Operator, inputs: int, outputs: int) -> float:
    """Bytes of the layer in the reduced int8 file, before it is packed; of a front, what float32 adds to it."""
    if operator.kind in FLOAT_STEMS:
        weights = inputs * operator.kernel**2 + (9 if operator.kind == "front depthwise" else 0)
        return 3 * outputs * weights
    if operator.kind in ("frame", "add"):
        return FRAME_BYTES if operator.kind == "frame" else SUM_BYTES
    reads = 1 if operator.kind == "depthwise" else inputs
    nodes = LINEAR_BYTES if operator.kind == "linear" else CONVOLUTION_BYTES
    return nodes + outputs * (reads * operator.kernel**2 + CHANNEL_BYTES)


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


def overhead_curve(table: Table) -> Curve:
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


def write(path: Path, table: Table, about: dict[str, object]) -> None:
    """The table as JSON, one line for each measurement, and what it is about."""
    rows = sorted([*operator, inputs, outputs, round(value, 6)] for (operator, inputs, outputs), value in table.items())
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    text = files.to_json(about | {"latency_ms": []}).decode().replace("[]", f"[\n{lines}\n  ]")
    files.write_bytes(path, text.encode())
