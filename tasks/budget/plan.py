"""The plan of what pruning takes away, as `plan.json` has it: each block, channel and weight that goes, and why."""

import itertools
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.core import files
from tasks.core.errors import StageError

SCHEMA_VERSION = 2  # plans of schema 1 named no version

Channels = dict[str, dict[str, list[int]]]


class Block(BaseModel):
    """A residual block that goes: what val loses without it, or its score by weight, and what that saves."""

    model_config = ConfigDict(extra="forbid")

    name: str
    val_loss_increase: float | None = None
    score: float | None = None
    size_bytes: float | None = None
    latency_ms: float | None = None


class Group(BaseModel):
    """Channels that are cut together: how many there were, how many are kept, and which of the teacher's went."""

    model_config = ConfigDict(extra="forbid")

    name: str
    channels: int
    kept: int
    removed: list[int]
    last_score: float | None = None  # of the last step that went for a budget


class Plan(BaseModel):
    """What goes. `size_bytes` and `latency_ms` are what is left by the device's table, if there is a budget.

    `channels` are the numbers of those that are zero in the masked network, by module, as its outputs (`out`) and
    inputs (`in`); in the file they are ranges. `float32` names the layers that the device runs faster in float32.
    """

    model_config = ConfigDict(extra="forbid")

    size_bytes: float = 0.0
    latency_ms: float = 0.0
    blocks: list[Block] = Field(default_factory=list)
    block_scores: dict[str, float] | None = None
    channels: Channels = Field(default_factory=dict)
    groups: list[Group] = Field(default_factory=list)
    float32: list[str] = Field(default_factory=list)
    weights: dict[str, int] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        content: dict[str, object] = {"schema_version": SCHEMA_VERSION, **self.model_dump(exclude_none=True)}
        content["channels"] = {
            name: {side: format_ranges(numbers) for side, numbers in sides.items()}
            for name, sides in self.channels.items()
        }
        content["groups"] = [
            group | {"removed": format_ranges(group["removed"])}
            for group in self.model_dump(exclude_none=True)["groups"]
        ]
        return content


class Planned(BaseModel):
    """What later stages read of a plan of any schema."""

    schema_version: Literal[1, 2] = 1
    latency_ms: float = 0.0
    float32: list[str]


def read_plan(path: Path) -> Planned:
    """What later stages need of the plan in a file; `StageError` if it is none."""
    try:
        return Planned.model_validate(files.read_json(path))
    except ValidationError:
        raise StageError(f"{path} is no plan of this version of Weighin: run prune again") from None


def format_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 7] as "0-2,7"."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    bounds = [(run[0][1], run[-1][1]) for _, group in runs if (run := list(group))]
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in bounds)
