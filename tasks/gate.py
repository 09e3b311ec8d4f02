"""gate: thresholds against what the benchmark measured; the verdict is a file, and the exit status is 0 either way.

It fails closed: a value that is missing, is no number or is not finite fails its check.
"""

import sys
from pathlib import Path
from typing import Any

from tasks.core import config, files, paths
from tasks.core.errors import run

Check = dict[str, Any]


def check(name: str, value: Any, operator: str, limit: Any) -> Check:
    """One comparison: `>=`, `<=` or `==`. `value` is None in the result if it was missing or not finite."""
    usable = isinstance(value, str) if isinstance(limit, str) else _is_number(value)
    value = value if usable else None
    match operator:
        case ">=":
            passed = usable and value >= limit
        case "<=":
            passed = usable and value <= limit
        case _:
            passed = usable and value == limit
    return {"name": name, "value": value, "operator": operator, "limit": limit, "passed": bool(passed)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _share(value: Any) -> Any:
    """A measured share; None if it cannot be one."""
    return value if _is_number(value) and 0 <= value <= 1 else None


def _amount(value: Any) -> Any:
    """A measured size or time; None if it cannot be one: what weighs nothing was not weighed."""
    return value if _is_number(value) and value > 0 else None


def gate(
    report: Any, limits: config.Gate, classes: tuple[str, ...], model_sha256: str, data_sha256: str
) -> dict[str, Any]:
    """The verdict on the reduced model: `passed`, `checks`, and the SHA-256 of the model and data it judged.

    The files must be the ones that the benchmark weighed, so a swapped file fails as a slow one does.
    """
    first, last = (_at(report, "stages", name) for name in ("finetune", "reduce"))
    checks = [
        check("model_sha256", _at(last, "sha256"), "==", model_sha256),
        check("data_sha256", _at(report, "data_sha256"), "==", data_sha256),
        check("top1", _share(_at(last, "top1")), ">=", limits.min_top1),
        check("top1_drop", _drop(first, last), "<=", limits.max_top1_drop),
        check("size_bytes", _amount(_at(last, "size_bytes")), "<=", limits.max_size_bytes),
        check("latency_ratio", _ratio(first, last), "<=", limits.max_latency_ratio),
        check("class_recall", _worst(_at(last, "class_recall"), classes), ">=", limits.min_class_recall),
    ]
    if limits.max_latency_ms is not None:
        checks.append(check("latency_ms", _amount(_at(last, "latency_p50_ms")), "<=", limits.max_latency_ms))
    return {
        "passed": all(one["passed"] for one in checks),
        "checks": checks,
        "model_sha256": model_sha256,
        "data_sha256": data_sha256,
    }


def _at(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _drop(first: Any, last: Any) -> float | None:
    before, after = _share(_at(first, "top1")), _share(_at(last, "top1"))
    if before is None or after is None:
        return None
    return round(float(before - after), 9)  # 0.91 - 0.90 must not fail a limit of 0.01 by a rounding error


def _ratio(first: Any, last: Any) -> float | None:
    value, base = _amount(_at(last, "latency_p50_ms")), _amount(_at(first, "latency_p50_ms"))
    return None if value is None or base is None else value / base


def _worst(recall: Any, classes: tuple[str, ...]) -> float | None:
    values = [_share(_at(recall, name)) for name in classes]
    return None if None in values else min(values)


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict in one line."""
    failed = [one for one in verdict["checks"] if not one["passed"]]
    if not failed:
        return f"makes weight: all {len(verdict['checks'])} checks passed"
    reasons = [f"{one['name']} is {one['value']} but must be {one['operator']} {one['limit']}" for one in failed]
    return "refused: " + "; ".join(reasons)


def main() -> None:
    params = config.load()
    model, data = (files.sha256(Path(path)) for path in (paths.onnx("reduce"), paths.TEST))
    verdict = gate(files.read_json(paths.report("benchmark")), params.gate, params.classes, model, data)
    files.write_json(paths.report("gate"), verdict)
    print(f"gate: {sentence(verdict)}")


if __name__ == "__main__":
    run(main)
