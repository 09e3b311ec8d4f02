"""costs: what the table says between its points, what it refuses, and that ONNX Runtime runs what is measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Network

from flows import profile
from tasks.budget import costs
from tasks.budget.costs import Operator
from tasks.core.errors import StageError
from tasks.reduce import reduce

CONV = Operator("conv", 1, 1, 8, 8)
TABLE: costs.Table = {
    (CONV, 16, 16): 1.0,
    (CONV, 16, 32): 2.0,
    (CONV, 32, 16): 3.0,
    (CONV, 32, 32): 5.0,
    (CONV, 3, 16): 0.5,
}


@pytest.mark.parametrize(
    ("inputs", "outputs", "latency_ms"),
    [(16, 16, 1.0), (32, 32, 5.0), (16, 24, 1.5), (24, 16, 2.0), (24, 24, 2.75), (3, 16, 0.5)],
)
def test_latency_is_bilinear_between_the_points_of_the_grid(inputs: int, outputs: int, latency_ms: float) -> None:
    assert costs.cost(TABLE, CONV, inputs, outputs).latency_ms == pytest.approx(latency_ms)


def test_what_was_not_measured_is_told_in_a_sentence() -> None:
    with pytest.raises(StageError, match=r"no conv of 16 to 64 channels, kernel 1, on 8 x 8: `weighin profile`"):
        costs.cost(TABLE, CONV, 16, 64)


def test_the_grid_is_what_cost_asks_for() -> None:
    points = costs.grid(CONV, [3, 24, 48], [16, 40])
    for inputs in (3, 24, 48):
        for outputs in (16, 40):
            costs.cost(dict.fromkeys(points, 1.0), CONV, inputs, outputs)
    assert {(inputs, outputs) for _, inputs, outputs in points} == {
        (inputs, outputs) for inputs in (3, 16, 32, 64) for outputs in (16, 32, 64)
    }


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    costs.write(path, TABLE, {"threads": 1})
    assert costs.read(path, 1) == TABLE
    assert len(path.read_text().splitlines()) == len(TABLE) + 5  # one line each, so that a diff can be read


def test_what_whole_networks_take_beside_their_layers_goes_by_bytes() -> None:
    """Straight between the measured ones, and level beyond them."""
    table = TABLE | {(costs.NETWORK, 3000, 3000): 0.5, (costs.NETWORK, 1000, 1000): -0.1}
    found = np.interp([10, 1000, 2000, 3000, 1e9], *costs.overhead_curve(table))
    assert found.tolist() == pytest.approx([-0.1, -0.1, 0.2, 0.5, 0.5])
    assert np.interp(5.0, *costs.overhead_curve(TABLE)) == 0


def test_a_table_of_other_threads_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    costs.write(path, TABLE, {"threads": 1})
    with pytest.raises(
        StageError, match=r"is of 1 threads, but benchmark\.threads in params\.yaml is 4: `weighin prof"
    ):
        costs.read(path, 4)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"latency_ms": []}',
        '{"threads": 1, "latency_ms": [["conv"]]}',
        '{"threads": 1, "latency_ms": {"a": 1}}',
    ],
)
def test_a_file_that_is_no_table_is_told_in_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    with pytest.raises(StageError, match="does not exist: `weighin profile`"):
        costs.read(path, 1)
    path.write_text(content)
    with pytest.raises(StageError, match="is not a device's table: `weighin profile` measures one"):
        costs.read(path, 1)


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs"),
    [
        (Operator("frame", 1, 1, 32, 32), 3, 3),
        (Operator("conv", 3, 2, 32, 32), 3, 16),
        (Operator("depthwise", 5, 2, 16, 16), 32, 32),
        (Operator("linear", 1, 1, 1, 1), 64, 10),
        (Operator("add", 1, 1, 8, 8), 32, 32),
    ],
)
def test_every_kind_of_layer_runs_in_onnx_runtime(operator: Operator, inputs: int, outputs: int) -> None:
    assert profile.measure(operator, inputs, outputs, threads=1) >= 0
    assert costs.size_bytes(operator, inputs, outputs) > 0


@pytest.mark.parametrize("kind", costs.FLOAT_STEMS)
def test_both_forms_of_a_front_run_in_onnx_runtime(kind: costs.Kind) -> None:
    assert abs(profile.measure(Operator(kind, 3, 2, 64, 64), 3, 16, threads=1)) < 100


@pytest.mark.parametrize(("kind", "weights"), [("front", 3 * 9), ("front depthwise", 3 * 9 + 9)])
def test_a_front_is_left_in_float_only_where_that_is_faster(kind: costs.Kind, weights: int) -> None:
    """And then each weight of it has three bytes more."""
    front = Operator(kind, 3, 2, 64, 64)
    table = {(front, 3, 16): -0.5, (front, 3, 32): 0.25}
    assert costs.cost(table, front, 3, 16) == (3 * 16 * weights, -0.5)
    assert costs.cost(table, front, 3, 32) == (0, 0)


def layer(shape: tuple[int, ...]) -> tuple[Operator, int, int]:
    """The layer that has weights of this shape."""
    outputs, inputs, *kernel = shape
    if not kernel:
        return Operator("linear", 1, 1, 1, 1), inputs, outputs
    if inputs == 1:
        return Operator("depthwise", kernel[0], 1, 8, 8), outputs, outputs
    return Operator("conv", kernel[0], 1, 8, 8), inputs, outputs


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet18"])
def test_bytes_foretell_the_reduced_file(name: str, networks: Callable[[str], Network]) -> None:
    network = networks(name)
    reduced, _ = reduce(network.quantized)
    sums = [node.op_type for node in reduced.graph.node].count("Add")
    expected = costs.size_bytes(Operator("frame", 1, 1, 32, 32), 3, 3)
    expected += sums * costs.size_bytes(Operator("add", 1, 1, 8, 8), 32, 32)
    expected += sum(costs.size_bytes(*layer(shape)) for shape in network.slim.values())
    assert len(reduced.SerializeToString()) == pytest.approx(expected, rel=0.005)


def test_much_more_work_takes_longer() -> None:
    small, large = (profile.measure(Operator("conv", 3, 1, 32, 32), width, width, threads=1) for width in (16, 256))
    assert large > 5 * small  # 256 times the arithmetic
