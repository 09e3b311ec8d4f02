"""The parameters that a decision was made with, as far as the registry uses them.

They are read by what the registry needs of them and by nothing else, so a key of params.yaml may be renamed or dropped
without breaking what was recorded with it. A key that is read here and gets another name keeps its old one as an alias.
"""

import functools
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tasks.core import config, paths
from tasks.core.errors import ParamsError, RegistryError


class Part(BaseModel):
    """A section of what was recorded: what is not named here is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Split(Part):
    val: float
    test: float


class Ingest(Part):
    kind: str
    path: str
    seed: int
    split: Split


class Weights(Part):
    source: str
    path: str | None = None
    sha256: str | None = None
    model: str | None = None
    stage: str = "finetune"


class Finetune(Part):
    backbone: str
    image_size: int
    weights: Weights


class Benchmark(Part):
    threads: int
    memory_limit_bytes: int | None = None


class Trade(Part):
    margin: float


class Comparison(Part):
    margin: float
    trade: Trade | None = None


class Gate(Part):
    approval: bool = False
    champion: Comparison | None = None  # the gate of the first days compared with none
    slices: dict[str, object] = Field(default_factory=dict)
    max_golden_difference: float = 0.001


class Registry(Part):
    reproduce_tolerance: float = 0.01


class Recorded(Part):
    """What the registry uses of a recorded `params.yaml`; `content` is all of it."""

    model: str
    classes: Annotated[tuple[str, ...] | None, BeforeValidator(config.read_auto)] = None
    ingest: Ingest
    finetune: Finetune
    benchmark: Benchmark
    gate: Gate
    registry: Registry = Registry()
    content: dict[str, object]


class Home(Part):
    remote: config.Remote | None = None


class Place(Part):
    """Which registry a working copy belongs to."""

    model: str
    registry: Home = Home()


def read_place(root: Path) -> Place:
    """The model and the remote that the params.yaml at `root` names, whatever else is in it.

    So a rollback or an audit works right after an upgrade, too, when the file may still have keys of before.
    """
    content = config.parse_yaml(config.read_bytes(root / paths.PARAMS), paths.PARAMS)
    try:
        return Place.model_validate(content)
    except ValidationError as error:
        raise ParamsError(f"{paths.PARAMS}: {_first_problem(error)}") from None


@functools.lru_cache(maxsize=16)  # most decisions have the parameters of the one before
def read_recorded(data: bytes, name: str) -> Recorded:
    """The parameters in a recorded `params.yaml` of any age; `RegistryError` if it lacks what the registry uses."""
    try:
        content = config.parse_yaml(data, Path(name))
        return Recorded.model_validate({**content, "content": content})
    except ParamsError as error:
        raise RegistryError(str(error)) from None
    except ValidationError as error:
        raise RegistryError(f"{name}: {_first_problem(error)}") from None
    except TypeError:
        raise RegistryError(f"{name}: the file is no mapping") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
