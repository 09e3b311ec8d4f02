"""What a decision is: its files, its types, and how each version of them that was ever written is read.

A document is read by what it was written with: `decision.json` and `verdict.json` name their schema, and what an older
one lacks is None. Nothing here is judged.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from tasks.core import paths
from tasks.core.config import Sha256
from tasks.core.errors import RegistryError
from tasks.gate import Check

MODEL = paths.onnx("reduce")
DECISION = "decision.json"
SIGNATURE = "bundle.sig"
# What a decision says of how the model was made; a rollback repeats it.
ORIGIN_FILES = ("environment.json", "bom.cdx.json", "provenance.json")
# What a commit of the registry carries of the working copy, under which name.
COPIED_FILES = {
    "verdict.json": paths.report("gate"),
    "metrics.json": paths.report("benchmark"),
    "predictions.csv": paths.PREDICTIONS,
    "champion.json": paths.CHAMPION_RECORD,
    "params.yaml": paths.PARAMS,
    "dvc.yaml": Path("dvc.yaml"),
    "dvc.lock": Path("dvc.lock"),
    ".dvc/config": Path(".dvc/config"),
    "data/device.json": paths.DEVICE,
}
# The files of every decision, by the schema of its decision.json.
REQUIRED_FILES: dict[int, tuple[str, ...]] = {
    0: ("verdict.json", "metrics.json", "params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", "README.md", DECISION),
    1: tuple({*COPIED_FILES, *ORIGIN_FILES, "trusted_keys", "README.md", DECISION, SIGNATURE} - {"data/device.json"}),
    2: (*COPIED_FILES, *ORIGIN_FILES, "trusted_keys", "README.md", DECISION, SIGNATURE),
}

Version = Annotated[str, Field(pattern=r"^v\d+\.\d+\.\d+$")]
Outcome = Literal["promoted", "refused", "held", "approved", "rolled-back"]
Document = TypeVar("Document", bound=BaseModel)


class Code(BaseModel):
    """The revision of the code that ran; dirty if a file that the decision does not carry differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: str | None
    dirty: bool


class Decision(BaseModel):
    """One decision, as `decision.json` has it; deploy/decision.schema.json is its schema.

    Schema 0 stands for the first days, when nothing was signed; schema 1 had the SHA-256 of all code in `tasks/`
    where schema 2 has that of the code that judges.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[0, 1, 2] = 2
    model: str = Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", description="the model's name in the registry")
    outcome: Outcome
    version: Version | None = Field(description="the version that is in production from here on; null if nothing moved")
    replaces: Version | None = Field(description="the version that this one takes production from")
    previous: str | None = Field(description="commit of the decision before this one, of whatever model")
    previous_sha256: Sha256 | None = Field(description="SHA-256 of that one's bundle.sig, which names all its files")
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="UTC")
    by: Annotated[str, Field(min_length=1)] | None = Field(description="who decided, as git knows them")
    reason: str | None = Field(description="why, for an approval or a rollback")
    signer: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")] | None = Field(
        description="fingerprint of the signing key; null in schema 0 only"
    )
    code: Code
    model_sha256: Sha256
    data_sha256: Sha256 = Field(description="of the test split")
    params_sha256: Sha256 | None = Field(description="of params.yaml; null in schema 0 only")
    code_sha256: Sha256 | None = Field(
        description="of what sha256sum prints for the code that judges, sorted by path: the files that dvc.lock names "
        "as dependencies of the stage gate; null where the verdict names no code"
    )
    verdict_sha256: Sha256
    bootstrap: bool = Field(description="there was no champion to compare with, and that was allowed")
    traded: bool = Field(description="accuracy was given for size or speed, within the margin stated for it")
    failed: tuple[str, ...] = Field(description="the names of the gate's checks that failed")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.outcome not in ("refused", "held")) != (self.version is not None):
            raise ValueError("what goes into production has a version, and nothing else has one")
        if self.failed and self.outcome != "refused":
            raise ValueError("only what is refused has failed a check")
        if (self.outcome in ("approved", "rolled-back")) != (self.reason is not None):
            raise ValueError("what people decide has a reason, and nothing else has one")
        if self.schema_version and None in (self.by, self.signer, self.params_sha256):
            raise ValueError("by, signer and params_sha256 are there but in schema 0")
        return self


class Champion(BaseModel):
    """What a challenger is compared with: `champion.json`. Without a version it was written in schema 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = 1
    version: Version | None
    model_sha256: Sha256 | None
    withdrawn: tuple[Sha256, ...] = Field(description="models that a rollback took out of production")
    bootstrap: StrictBool = Field(description="--bootstrap was given: the first promotion goes without a champion")


class Compared(BaseModel):
    """What a decision needs of the comparison."""

    traded: StrictBool


class Verdict(BaseModel):
    """What a decision needs of a verdict of any schema; schema 1 named neither parameters nor code nor champion."""

    schema_version: int = 1
    passed: StrictBool
    checks: tuple[Check, ...] = Field(min_length=1)
    model_sha256: Sha256
    data_sha256: Sha256
    params_sha256: Sha256 | None = None
    code_sha256: Sha256 | None = None
    champion: Champion | None = None
    comparison: Compared | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def is_pass(self) -> bool:
        """Whether the verdict and every check in it passed."""
        return self.passed and not self.failed

    @property
    def bootstrap(self) -> bool:
        """Whether it was judged without a champion."""
        return self.champion is None or self.champion.version is None

    @property
    def traded(self) -> bool:
        """Whether accuracy was given for size or speed."""
        return self.comparison is not None and self.comparison.traded


class Metrics(BaseModel):
    """What the registry tells of one weighed model."""

    top1: float
    size_bytes: int
    latency_p50_ms: float


class Benchmark(BaseModel):
    """What the registry needs of `metrics.json`, of any schema."""

    stages: dict[str, Metrics]
    champion: Metrics | None = None
    classes: tuple[str, ...] = ()  # not named by schema 1 and 2


def parse_document(kind: type[Document], data: bytes | str, name: Path | str) -> Document:
    """A document of that kind; `RegistryError` with its name and the first thing wrong in it."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"{name} is malformed: {where and where + ': '}{first['msg']}") from None


def parse_decision(data: bytes, name: str = DECISION) -> Decision:
    """The decision in a `decision.json` of any schema; `RegistryError` if it is none.

    What was recorded in the first days has no signer, and says schema 1 all the same; it comes out as schema 0.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise RegistryError(f"{name} is malformed: it is not JSON") from None
    if isinstance(content, dict) and content.get("schema_version") == 1 and "signer" not in content:
        missing: dict[str, object] = dict.fromkeys(
            ("replaces", "previous_sha256", "by", "reason", "signer", "params_sha256", "code_sha256")
        )
        content = missing | {"bootstrap": True, "traded": False} | content | {"schema_version": 0}
        data = json.dumps(content).encode()
    return parse_document(Decision, data, name)


def name_decision(commit: str, decision: Decision) -> str:
    """What people call a decision: a version, or what was decided and the commit that says so."""
    if decision.outcome in ("promoted", "approved"):
        return f"{decision.model}@{decision.version}"
    what = {"refused": "refusal", "held": "hold", "rolled-back": f"rollback to {decision.version}"}[decision.outcome]
    return f"{decision.model} {what} ({commit[:12]})"
