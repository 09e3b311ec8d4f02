"""Judges: a verdict is judged again by the judge of its own schema, which is kept here as long as there are records.

Recorded code is never run. Schema 5 is judged by the gate of today; schema 4 did not tell new test images from others;
up to schema 3 images without a value in a column were a slice; schema 2 knew no packed file; schema 1, which named no
version, compared with no champion.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tasks import gate
from tasks.core import config
from tasks.core.errors import RegistryError
from tasks.core.files import Json
from tasks.gate import Evidence

# The schemas of verdicts that a decision may have of its own, by the schema of decision.json.
# These are numbers and not the gate's own: what was once recorded stays allowed when the gate's schema moves on.
VERDICTS = {0: (1,), 1: (2, 3), 2: (3, 4, 5)}


class Unjudged(RegistryError):
    """A verdict cannot be judged again; the message says why."""


def judge_again(schema: int, evidence: Evidence, params: Any) -> Json:
    """The verdict that the judge of that schema comes to, as its JSON; `Unjudged` if there is none for it.

    `params` is the content of the recorded params.yaml.
    """
    try:
        classes = gate.classes_of(params.get("classes"), evidence.report)
        if schema == 1:
            return _judge_1(evidence, params["gate"], classes)
        if schema not in (2, 3, 4, 5):
            raise Unjudged(f"there is no judge for verdicts of schema {schema} here")
        limits = config.Gate.model_validate(params["gate"])
    except ValidationError as error:
        first = error.errors()[0]
        raise Unjudged(f"gate.{'.'.join(map(str, first['loc']))} in its params.yaml: {first['msg']}") from None
    except (KeyError, TypeError) as error:
        raise Unjudged(f"its params.yaml lacks what the gate of then read: {error}") from None
    verdict = gate.gate(evidence, limits, classes, missing_is_a_slice=schema < 4).to_json()
    if schema < 5:
        del verdict["test_parts"], verdict["class_change"]
    return (verdict if schema > 2 else _without_packed_file(verdict)) | {"schema_version": schema}


def _without_packed_file(verdict: Json) -> Json:
    checks = [one for one in verdict["checks"] if one["name"] != "packed_sha256"]
    changed: dict[str, object] = json.loads(json.dumps(verdict | {"checks": checks}))
    return changed | {"passed": all(one["passed"] for one in checks)}


def _judge_1(evidence: Evidence, limits: dict[str, object], classes: tuple[str, ...]) -> Json:
    checks = list(_checks_1(evidence, limits, classes))
    return {
        "passed": all(one["passed"] for one in checks),
        "checks": checks,
        "model_sha256": evidence.subject.model_sha256,
        "data_sha256": evidence.subject.data_sha256,
    }


def _checks_1(evidence: Evidence, limits: dict[str, object], classes: tuple[str, ...]) -> Iterator[Json]:
    report = evidence.report
    first, last = (gate.at(report, "stages", name) for name in ("finetune", "reduce"))
    recalls = [gate.share(gate.at(last, "class_recall", name)) for name in classes]
    compared: list[tuple[str, object, gate.Operator, object]] = [
        ("model_sha256", gate.at(last, "sha256"), "==", evidence.subject.model_sha256),
        ("data_sha256", gate.at(report, "data_sha256"), "==", evidence.subject.data_sha256),
        ("top1", gate.share(gate.at(last, "top1")), ">=", limits["min_top1"]),
        ("top1_drop", gate.drop(first, last), "<=", limits["max_top1_drop"]),
        ("size_bytes", gate.amount(gate.at(last, "size_bytes")), "<=", limits["max_size_bytes"]),
        ("latency_ratio", gate.ratio(first, last), "<=", limits["max_latency_ratio"]),
        ("class_recall", None if None in recalls else min(recalls), ">=", limits["min_class_recall"]),
    ]
    if limits.get("max_latency_ms") is not None:
        p50 = gate.amount(gate.at(last, "latency_p50_ms"))
        compared.append(("latency_ms", p50, "<=", limits["max_latency_ms"]))
    for name, value, operator, limit in compared:
        yield gate.check(name, value, operator, limit).model_dump(exclude={"where"})
