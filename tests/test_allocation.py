"""allocation: the plan meets the limits, takes what is missed least for what it saves, and stops there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import profile
from tasks import benchmark
from tasks.budget import allocation, costs
from tasks.budget.allocation import Layer, Limits, Network
from tasks.budget.costs import Operator
from tasks.core import config
from tasks.core.errors import StageError

ROOT = Path(__file__).parents[1]
WIDE, SLOW = Operator("conv", 1, 1, 1, 1), Operator("conv", 1, 1, 64, 64)
ADD = Operator("add", 1, 1, 64, 64)


def table() -> costs.Table:
    """Milliseconds grow with the widths: much in SLOW, hardly in WIDE."""
    widths = (3, 10, 16, 32, 64, 128)
    points = {
        (operator, a, b): a * b * price
        for operator, price in ((WIDE, 1e-6), (SLOW, 1e-3))
        for a in widths
        for b in widths
    }
    return points | {(ADD, width, width): width * 1e-3 for width in widths}


def network(first: float = 1.0, second: float = 1.0, block: float = 1.0) -> Network:
    """Two groups of 64 channels: one written on large pictures, one read by much weight; and a block on the first."""
    layers = [
        Layer("stem", SLOW, None, 0, 3, 64),
        Layer("block.conv", SLOW, 0, 0, 64, 64, "block"),
        Layer("block sum", ADD, 0, 0, 64, 64, "block"),
        Layer("middle", WIDE, 0, 1, 64, 64),
        Layer("head", WIDE, 1, None, 64, 10),
    ]
    ramp = np.linspace(0.5, 1.5, 64)
    return Network(layers, [ramp * first, ramp * second], {"block": block})


def whole() -> costs.Cost:
    return allocation.allocate(network(), allocation.UNLIMITED, table()).cost


def test_nothing_goes_when_everything_fits() -> None:
    plan = allocation.allocate(network(), Limits(whole().size_bytes, whole().latency_ms), table())
    assert (plan.steps, plan.widths) == ([], [64, 64])


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
@pytest.mark.parametrize("which", ["size_bytes", "latency_ms", "both"])
def test_a_plan_meets_its_limits_and_is_no_smaller_than_the_last_step_made_it(share: float, which: str) -> None:
    size, latency = (value * share for value in whole())
    limits = Limits(size if which != "latency_ms" else None, latency if which != "size_bytes" else None)
    plan = allocation.allocate(network(), limits, table())
    assert not any(limits.exceeded(plan.cost))
    assert any(limits.exceeded(plan.cost + plan.steps[-1].saves))


def test_the_cost_of_a_plan_is_that_of_its_widths() -> None:
    plan = allocation.allocate(network(block=100.0), Limits(None, whole().latency_ms * 0.6), table())
    assert plan.blocks == []
    first, second = plan.widths
    layers = [(SLOW, 3, first), (SLOW, first, first), (ADD, first, first), (WIDE, first, second), (WIDE, second, 10)]
    expected = [costs.cost(table(), operator, reads, writes) for operator, reads, writes in layers]
    assert plan.cost.size_bytes == pytest.approx(sum(one.size_bytes for one in expected))
    assert plan.cost.latency_ms == pytest.approx(sum(one.latency_ms for one in expected))


def test_what_a_network_takes_beside_its_layers_counts_and_is_saved() -> None:
    """In a cache that holds all but the last kilobyte, what saves bytes saves time as well."""
    size, latency = whole()
    points = {round(size - 1000): 0.0, round(size): latency}
    dear, cached = (
        network(first=100.0, block=100.0),
        table() | {(costs.NETWORK, at, at): more for at, more in points.items()},
    )
    everything = allocation.allocate(dear, allocation.UNLIMITED, cached)
    assert everything.cost.latency_ms == pytest.approx(2 * latency)
    plan = allocation.allocate(dear, Limits(None, latency * 1.01), cached)
    assert plan.cost.latency_ms <= latency * 1.01
    assert plan.cost.size_bytes <= size - 900
    assert plan.widths[0] == 64  # bytes of the layers that take no time are enough
    ends = allocation.allocate(dear, allocation.MINIMAL, cached).cost
    assert ends == pytest.approx(allocation.allocate(dear, allocation.MINIMAL, table()).cost)


def test_a_clock_that_errs_in_the_middle_does_not_end_a_plan() -> None:
    """As if half of the network took longer than the whole: no step would be worth taking."""
    size, latency = whole()
    uneven = table() | {(costs.NETWORK, round(size / 2), 0): 100 * latency, (costs.NETWORK, round(size), 0): 0.0}
    assert allocation.allocate(network(), allocation.MINIMAL, uneven).widths == [16, 16]


def test_what_is_missed_less_goes_first() -> None:
    size = Limits(whole().size_bytes * 0.7, None)
    assert allocation.allocate(network(second=1e-3, block=100.0), size, table()).widths == [64, 16]
    first, second = allocation.allocate(network(first=1e-3, block=100.0), size, table()).widths
    assert first < 64
    assert second == 64
    assert allocation.allocate(network(block=1e-3), size, table()).blocks == ["block"]


def test_latency_and_bytes_ask_for_different_things() -> None:
    uneven = network(first=10.0, block=100.0)
    fast = allocation.allocate(uneven, Limits(None, whole().latency_ms * 0.7), table())
    small = allocation.allocate(uneven, Limits(whole().size_bytes * 0.7, None), table())
    assert fast.widths[1] == 64  # its layers take no time
    assert small.widths[1] < 64


def test_the_least_that_can_be_left_is_a_step_of_each_group() -> None:
    plan = allocation.allocate(network(), allocation.MINIMAL, table())
    assert plan.widths == [16, 16]
    assert plan.blocks == ["block"]


def test_widths_are_multiples_of_the_step() -> None:
    layers = [Layer("stem", SLOW, None, 0, 3, 40), Layer("head", WIDE, 0, None, 40, 10)]
    odd = Network(layers, [np.ones(40)], {})
    steps = allocation.allocate(odd, allocation.MINIMAL, table()).steps
    assert [step.width for step in steps] == [32, 16]


@pytest.mark.parametrize("gain", [0.05, -0.05])
def test_a_front_that_is_faster_in_float_is_left_so_and_counted(gain: float) -> None:
    front = Operator("front", 1, 1, 64, 64)
    with_front = network()._replace(layers=[*network().layers[:1], network().layers[0]._replace(operator=front)])
    widths = (16, 32, 64)
    fronts = table() | {(front, 3, width): -gain for width in widths}
    plan = allocation.allocate(with_front, allocation.UNLIMITED, fronts)
    plain = allocation.allocate(with_front._replace(layers=with_front.layers[:1]), allocation.UNLIMITED, fronts)
    assert plan.float32 == (["stem"] if gain > 0 else [])
    assert plan.cost.latency_ms == pytest.approx(plain.cost.latency_ms - max(gain, 0))
    assert plain.float32 == []


def test_a_front_goes_with_the_block_that_its_last_layer_is_in() -> None:
    front = Operator("front depthwise", 1, 1, 64, 64)
    stem, block, *_ = network().layers
    layers = [
        stem,
        block._replace(operator=SLOW),
        block._replace(name="block.conv", operator=front, reads=None, inputs=3),
    ]
    fronts = table() | {(front, 3, width): -0.01 for width in (16, 32, 64)}
    small = Network(layers, network().channels, {"block": 1e-9})
    assert allocation.allocate(small, allocation.UNLIMITED, fronts).float32 == ["stem", "block.conv"]
    plan = allocation.allocate(small, allocation.MINIMAL, fronts)
    assert (plan.blocks, plan.float32) == (["block"], [])


def test_what_a_plan_could_ask_for_is_what_is_needed() -> None:
    points = allocation.points_to_measure(network())
    plan = allocation.allocate(network(), allocation.MINIMAL, dict.fromkeys(points, 1.0))
    assert plan.widths == [16, 16]


@pytest.mark.parametrize(
    ("backbone", "front", "last", "block"),
    [
        ("tf_mobilenetv3_large_minimal_100", "front depthwise", "blocks.0.0.conv_dw", "blocks.0.0"),
        ("tf_efficientnet_lite0", "front depthwise", "blocks.0.0.conv_dw", None),
        ("resnet18", "front", "conv1", None),
        ("mlp", None, None, None),
    ],
)
def test_the_front_of_a_backbone(backbone: str, front: str | None, last: str | None, block: str | None) -> None:
    """It goes with the residual block that its last layer is in."""
    params = config.load(ROOT / "params.yaml")
    finetune = params.finetune.model_copy(update={"backbone": backbone})
    layers = profile.network(params.model_copy(update={"finetune": finetune})).layers
    found = [(one.operator.kind, one.name, one.block) for one in layers if one.operator.kind in costs.FLOAT_STEMS]
    assert found == ([] if front is None else [(front, last, block)])


def digits_by(backbone: str, image_size: int = 32) -> config.Params:
    """The digits recipe with another backbone."""
    params = config.load(ROOT / "data/recipes/mlp-digits.yaml")
    finetune = params.finetune.model_copy(update={"backbone": backbone, "image_size": image_size})
    return params.model_copy(update={"finetune": finetune})


def test_a_network_that_was_measured_is_planned_to_take_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is made to say known times: a microsecond for each kilobyte, and a millisecond."""
    files_of: dict[str, int] = {}

    def latencies(models: dict[str, Path], _profile: config.Benchmark) -> dict[str, Any]:
        files_of.update({name: path.stat().st_size for name, path in models.items()})
        return {name: np.full(10, 1 + int(name) * 1e-6) for name in models}

    monkeypatch.setattr(benchmark, "latencies", latencies)
    monkeypatch.setattr(profile, "measure", lambda *_: 1e-3)
    monkeypatch.setattr(profile, "NETWORKS", 2)
    params, path = digits_by("test_resnet"), tmp_path / "device.json"
    about = profile.profile(params, path)
    table, network = costs.read(path, 1), profile.network(params)
    assert about["layers"] + about["networks"] == len(table)
    assert about["networks"] == 2
    for name, size_bytes in files_of.items():
        plan = allocation.allocate(network, Limits(float(name) + 1, None), table)
        assert plan.cost.latency_ms == pytest.approx(1 + plan.cost.size_bytes * 1e-6, rel=1e-3)
        assert size_bytes == pytest.approx(int(name), rel=0.03)  # nothing of it was removed before it was timed
    monkeypatch.setattr(profile, "MAX_SIZE_ERROR", 0.0)
    with pytest.raises(StageError, match=r"test_resnet cut to .* bytes has .* in its file, so budgets cannot be"):
        profile.profile(params, path)


def test_profile_refuses_a_backbone_whose_channels_reduce_cannot_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut, its file would be small; masked, what squeeze and excitation scale keeps its channels."""
    monkeypatch.setattr(profile, "measure", lambda _, inputs, outputs, _threads: 1e-6 * inputs * outputs)
    monkeypatch.setattr(profile, "NETWORKS", 1)
    with pytest.raises(StageError, match=r"in its file, so budgets cannot be .* it: `reduce` cannot remove all that"):
        profile.profile(digits_by("test_efficientnet"), tmp_path / "device.json")
    assert not (tmp_path / "device.json").exists()


def test_profile_measures_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is about one backbone; small networks that come out alike are measured once."""
    monkeypatch.setattr(profile, "ROUNDS", 1)
    params, path = config.load(ROOT / "data/recipes/mlp-digits.yaml"), tmp_path / "device.json"
    costs.write(path, {(ADD, 16, 16): 1.0}, {})
    about = profile.profile(params, path)
    table = costs.read(path, 1)
    assert (ADD, 16, 16) not in table
    measured = [point for point in table if point[0] == costs.NETWORK]
    assert about["networks"] == len(measured) < profile.NETWORKS
    network = profile.network(params)
    most, least = (allocation.allocate(network, end, table).cost for end in (allocation.UNLIMITED, allocation.MINIMAL))
    assert most.latency_ms > least.latency_ms > 0


@pytest.mark.parametrize(
    ("backbone", "image_size", "says"),
    [
        ("vit_tiny_patch16_224", 224, "compress knows layers that read pictures or vectors, not "),
        ("ghostnet_100", 64, "cannot be made, so budgets cannot be planned for it: "),
    ],
)
def test_a_backbone_that_compress_does_not_know_is_told_in_a_sentence(
    backbone: str, image_size: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "measure", lambda _, inputs, outputs, threads: 1e-6 * (inputs + outputs))
    monkeypatch.setattr(profile, "NETWORKS", 2)
    with pytest.raises(StageError, match=says):
        profile.profile(digits_by(backbone, image_size), tmp_path / "device.json")
    assert not (tmp_path / "device.json").exists()
