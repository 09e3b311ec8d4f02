"""The provenance of a decision: an in-toto Statement v1 with the predicate SLSA Provenance v1.

It is made from what it is given, so the same decision has the same provenance; it claims no SLSA build level.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.registry.bom import serial_number, weighin_version
from flows.registry.decision import SIGNATURE, Decision
from flows.registry.git import Objects
from flows.registry.materials import CODE, Material, Materials, locked_outputs
from tasks.core import config, paths
from tasks.core.config import Sha256
from tasks.core.errors import RegistryError
from tasks.core.files import Json

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:weighin:retrain:v1"
BUILDER = "urn:weighin:local:v1"  # whatever machine the signer ran it on
MOST_SOURCES = 1000

Name = Annotated[str, Field(min_length=1)]


def provenance(
    decision: Decision,
    params: config.Params,
    made_of: Materials,
    environment: Mapping[str, object],
) -> Json:
    """How the model was made: parameters, every input and every output by its SHA-256.

    A dependency's annotation `kind` says what it is: revision, code-digest, code, params, source, sources or weights.
    `sources` stands for more than MOST_SOURCES files: it names only their listing, which is among the outputs. An
    output carries DVC's MD5 as an annotation, since that of a folder ends in .dir and is thus no digest.
    `RegistryError` if the listing is not among the outputs where it is needed.
    """
    facts = {key: value for key, value in environment.items() if key != "packages"}
    return {
        "_type": STATEMENT,
        "subject": [_descriptor(paths.onnx("reduce").as_posix(), decision.model_sha256)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": params.model_dump(mode="json", by_alias=True),
                "internalParameters": {"environment": facts, "weights": made_of.weights},
                "resolvedDependencies": [
                    *_revision(decision, made_of.code),
                    _descriptor(paths.PARAMS.as_posix(), decision.params_sha256, kind="params"),
                    *_sources(made_of.sources, made_of.outputs),
                    *_start(made_of.weights),
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"weighin": weighin_version(environment)}},
                "metadata": {"invocationId": serial_number(decision), "finishedOn": decision.created},
                "byproducts": [
                    _descriptor(one.path, one.sha256, **one.model_dump(include={"stage", "md5", "size_bytes"}))
                    for one in made_of.outputs
                ],
            },
        },
    }


def _descriptor(name: str, sha256: str | None, **annotations: object) -> Json:
    extra = {"annotations": annotations} if annotations else {}
    return {"name": name, "digest": {"sha256": sha256}, **extra}


def _revision(decision: Decision, code: Mapping[str, str]) -> Iterator[Json]:
    commit, dirty = decision.code.commit, decision.code.dirty
    if commit:
        said = {"kind": "revision", "dirty": dirty}
        yield {"name": "code", "digest": {"gitCommit": commit}, "annotations": said}
    yield _descriptor(CODE.as_posix(), decision.code_sha256, kind="code-digest")
    yield from (_descriptor(path, sha256, kind="code") for path, sha256 in sorted(code.items()))


def _sources(sources: Mapping[str, str], outputs: tuple[Material, ...]) -> Iterator[Json]:
    if len(sources) <= MOST_SOURCES:
        yield from (_descriptor(path, sha256, kind="source") for path, sha256 in sorted(sources.items()))
        return
    listing = next((one for one in outputs if one.path == paths.SOURCES.as_posix()), None)
    if listing is None:
        raise RegistryError(f"dvc.lock does not name {paths.SOURCES}: run the pipeline again")
    yield _descriptor(listing.path, listing.sha256, kind="sources")


def _start(weights: Mapping[str, str]) -> Iterator[Json]:
    if "sha256" in weights:
        version = f"{weights['model']}@{weights['version']}" if weights["source"] == "production" else None
        name = version or weights.get("path") or weights.get("package") or weights["source"]
        yield _descriptor(name, weights["sha256"], kind="weights")


class Strict(BaseModel):
    """A part of a provenance that somebody else may have written: nothing is converted, nothing unknown let by."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Digest(Strict):
    sha256: Sha256


class Revision(Strict):
    git_commit: str = Field(alias="gitCommit", pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")


class Stored(Strict):
    """What DVC knows of an output."""

    stage: Name
    md5: str = Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")
    size_bytes: int = Field(ge=0)


class Kind(Strict):
    kind: Literal["revision", "code-digest", "code", "params", "source", "sources", "weights"]
    dirty: bool | None = None


class Subject(Strict):
    name: Name
    digest: Digest


class Output(Strict):
    name: Name
    digest: Digest
    annotations: Stored


class Dependency(Strict):
    name: Name
    digest: Digest | Revision
    annotations: Kind


class Internal(Strict):
    environment: dict[str, object]
    weights: dict[str, str]


class Definition(Strict):
    build_type: Literal["urn:weighin:retrain:v1"] = Field(alias="buildType")
    external: dict[str, object] = Field(alias="externalParameters")
    internal: Internal = Field(alias="internalParameters")
    dependencies: list[Dependency] = Field(alias="resolvedDependencies")


class Run(Strict):
    builder: dict[str, object]
    metadata: dict[str, object]
    byproducts: list[Output]


class Predicate(Strict):
    definition: Definition = Field(alias="buildDefinition")
    run: Run = Field(alias="runDetails")


class Statement(Strict):
    """A provenance as `provenance` makes it."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject] = Field(min_length=1, max_length=1)
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    predicate: Predicate


def outputs_of(contents: Mapping[str, bytes]) -> tuple[Material, ...]:
    """The artifacts that a decision's files name; `RegistryError` or `ValueError` if they do not.

    A record of the first days has no provenance: there they are those of dvc.lock, without SHA-256.
    """
    if "provenance.json" in contents:
        return materials_of(json.loads(contents["provenance.json"])).outputs
    return locked_outputs(contents.get("dvc.lock", b""))


def read_materials(objects: Objects, commit: str) -> Materials:
    """What the decision in a commit was made of, as far as it was recorded."""
    if objects.find(f"{commit}:{SIGNATURE}") is None:  # of the first days
        return Materials(locked_outputs(objects.read(f"{commit}:dvc.lock")), {}, {}, {})
    return materials_of(json.loads(objects.read(f"{commit}:provenance.json")))


def materials_of(provenance: object) -> Materials:
    """What a provenance says that the model was made of; no sources if it names only their listing.

    The paths of outputs and code lead nowhere outside the repository; a source's is as the parameters had it, so it
    may. `RegistryError` if the provenance is malformed, names a file twice, or contradicts itself.
    """
    statement = _statement(provenance)
    definition, byproducts = statement.predicate.definition, statement.predicate.run.byproducts
    _require_distinct(one.name for one in byproducts)
    outputs = tuple(
        Material(path=one.name, sha256=one.digest.sha256, **one.annotations.model_dump()) for one in byproducts
    )
    sources, listing, code, start = (
        _digests_by_name(definition.dependencies, kind) for kind in ("source", "sources", "code", "weights")
    )
    if listing and (sources or not listing.items() <= {(one.path, one.sha256) for one in outputs}):
        raise _malformed_provenance("the listing of the sources stands beside sources, or is not an output")
    if any(sha256 != definition.internal.weights.get("sha256") for sha256 in start.values()):
        raise _malformed_provenance("the starting weights have two SHA-256")
    for name in (*code, *(one.path for one in outputs)):
        _require_inside(name)
    return Materials(outputs, sources, code, definition.internal.weights)


def _digests_by_name(dependencies: Iterable[Dependency], kind: str) -> dict[str, str]:
    """SHA-256 by name of the dependencies of that kind."""
    chosen = [one for one in dependencies if one.annotations.kind == kind]
    _require_distinct(one.name for one in chosen)
    found = {one.name: one.digest.sha256 for one in chosen if isinstance(one.digest, Digest)}
    if len(found) < len(chosen):
        raise _malformed_provenance(f"a dependency of kind {kind} has no SHA-256")
    return found


def _malformed_provenance(reason: str) -> RegistryError:
    return RegistryError(f"provenance.json is malformed: {reason}")


def _statement(provenance: object) -> Statement:
    try:
        return Statement.model_validate(provenance)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _malformed_provenance(f"{where and where + ': '}{first['msg']}") from None


def _require_distinct(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _malformed_provenance(f"it names {name!r} twice")
        seen.add(name)


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    odd = path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "."
    if odd or re.search(r"[\x00-\x1f\x7f]", name):
        raise _malformed_provenance(f"{name!r} is not a plain path inside the repository")
