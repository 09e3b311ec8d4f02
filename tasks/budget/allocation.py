"""Which residual blocks go, and how many channels each group keeps, so that a network fits a budget at least damage.

One greedy path over blocks and channels together: what goes next has the least expected rise of the loss, squared, for
the share of the budget that it saves. Costs are those of the device, see `costs`.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.budget import costs
from tasks.budget.costs import Cost, Operator, Table

Scores = npt.NDArray[np.float64]


class Layer(NamedTuple):
    """A layer and what its widths hang on: a group's number, or None where they stay as they are."""

    name: str
    operator: Operator
    reads: int | None
    writes: int | None
    inputs: int
    outputs: int
    block: str | None = None  # the residual block that it goes with


class Network(NamedTuple):
    """What can be allocated. `channels`: by group, the score of each channel; `blocks`: the score of each block."""

    layers: list[Layer]
    channels: list[Scores]
    blocks: dict[str, float]


class Limits(NamedTuple):
    """What the device can take; None: any."""

    size_bytes: float | None
    latency_ms: float | None

    def exceeded(self, now: Cost) -> tuple[bool, bool]:
        """Whether bytes, and whether milliseconds are over the limit."""
        return (
            self.size_bytes is not None and now.size_bytes > self.size_bytes,
            self.latency_ms is not None and now.latency_ms > self.latency_ms,
        )


UNLIMITED, MINIMAL = Limits(None, None), Limits(0.0, 0.0)


class Step(NamedTuple):
    """One removal: of a block (`group` is None), or of a group's channels down to `width`."""

    block: str | None
    group: int | None
    width: int
    score: float
    saves: Cost


class Plan(NamedTuple):
    """What goes, in the order in which it was chosen, and what is left of the widths and the cost."""

    steps: list[Step]
    widths: list[int]
    cost: Cost
    float32: list[str]  # the layers that are faster so than in int8

    @property
    def blocks(self) -> list[str]:
        return [step.block for step in self.steps if step.block is not None]


def allocate(network: Network, limits: Limits, table: Table) -> Plan:
    """The plan that meets the limits; if nothing does, the one in which nothing more can go."""
    widths = [len(scores) for scores in network.channels]
    removed = [np.append(0.0, np.sort(scores).cumsum()) for scores in network.channels]
    full, steps, layers = list(widths), [], list(network.layers)
    beside = costs.overhead_curve(table)
    whole = now = _whole(_total(layers, widths, full, table), beside)
    while any(over := limits.exceeded(now)):
        options = [_without_block(name, score, layers, widths, full, table) for name, score in network.blocks.items()]
        options += [_narrower(group, removed[group], layers, widths, full, table) for group in range(len(widths))]
        options = [_in_whole(option, now.size_bytes, beside) for option in options]
        rated = [(option.score / gain, option) for option in options if (gain := _gain(option.saves, whole, over)) > 0]
        if not rated:
            break
        _, best = min(rated, key=lambda one: one[0])
        if best.block is not None:
            layers = [layer for layer in layers if layer.block != best.block]
        elif best.group is not None:
            widths[best.group] = best.width
        steps.append(best)
        now = now - best.saves
    return Plan(steps, widths, now, _in_float(layers, widths, full, table))


def _in_float(layers: list[Layer], widths: list[int], full: list[int], table: Table) -> list[str]:
    """The layers of the front, if the device is faster with it in float32."""
    front = [layer for layer in layers if layer.operator.kind in costs.FLOAT_STEMS]
    if not front or _total(front, widths, full, table).latency_ms >= 0:
        return []
    names = [layer.name for layer in layers if layer.operator.kind in ("conv", "depthwise")]
    return names[: names.index(front[0].name) + 1]


def _gain(saves: Cost, whole: Cost, over: tuple[bool, bool]) -> float:
    """The share of the whole that is saved, of what is still over its limit."""
    shares = (saves.size_bytes / whole.size_bytes, saves.latency_ms / whole.latency_ms)
    return sum(share for share, counts in zip(shares, over, strict=True) if counts)


def _without_block(
    name: str, score: float, layers: list[Layer], widths: list[int], full: list[int], table: Table
) -> Step:
    mine = [layer for layer in layers if layer.block == name]
    return Step(name, None, 0, score, _total(mine, widths, full, table))


def _narrower(
    group: int, removed: Scores, layers: list[Layer], widths: list[int], full: list[int], table: Table
) -> Step:
    """The group down to the next multiple of costs.STEP; saves nothing if it is there already."""
    width = max((widths[group] - 1) // costs.STEP, 1) * costs.STEP
    if width >= widths[group]:
        return Step(None, group, widths[group], 0.0, Cost(0, 0))
    mine = [layer for layer in layers if group in (layer.reads, layer.writes)]
    after = [width if number == group else one for number, one in enumerate(widths)]
    saves = _total(mine, widths, full, table) - _total(mine, after, full, table)
    score = removed[full[group] - width] - removed[full[group] - widths[group]]
    return Step(None, group, width, float(score), saves._replace(latency_ms=max(0.0, saves.latency_ms)))


def _whole(layers: Cost, beside: costs.Curve) -> Cost:
    """What the network costs that has layers of this cost."""
    return layers + Cost(0.0, float(np.interp(layers.size_bytes, *beside)))


def _in_whole(step: Step, size_bytes: float, beside: costs.Curve) -> Step:
    """The step with what it saves in a network of so many bytes."""
    before, after = np.interp([size_bytes, size_bytes - step.saves.size_bytes], *beside)
    return step._replace(saves=step.saves + Cost(0.0, float(before - after)))


def _total(layers: list[Layer], widths: list[int], full: list[int], table: Table) -> Cost:
    total = Cost(0.0, 0.0)
    for layer in layers:
        inputs = layer.inputs if layer.reads is None else layer.inputs * widths[layer.reads] // full[layer.reads]
        outputs = layer.outputs if layer.writes is None else layer.outputs * widths[layer.writes] // full[layer.writes]
        total += costs.cost(table, layer.operator, inputs, outputs)
    return total


def points_to_measure(network: Network) -> set[costs.Point]:
    """All the measurements that `allocate` could ask the table for."""
    found: set[costs.Point] = set()
    for layer in network.layers:
        inputs, outputs = (
            [full] if group is None else _widths(full, len(network.channels[group]))
            for full, group in ((layer.inputs, layer.reads), (layer.outputs, layer.writes))
        )
        found |= costs.grid(layer.operator, inputs, outputs)
    return found


def _widths(full: int, channels: int) -> list[int]:
    """The widths that a side of `full` features can get when its group of `channels` is cut."""
    return sorted({full * width // channels for width in (*range(costs.STEP, channels, costs.STEP), channels)})
