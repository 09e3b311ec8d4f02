"""gate: thresholds against what the benchmark measured; the verdict is a file, and the exit status is 0 either way.

It fails closed: a value that is missing, is no number or is not finite fails its check.
"""

import math
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
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


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
        check("top1", _at(last, "top1"), ">=", limits.min_top1),
        check("top1_drop", _difference(_at(first, "top1"), _at(last, "top1")), "<=", limits.max_top1_drop),
        check("size_bytes", _at(last, "size_bytes"), "<=", limits.max_size_bytes),
        check("latency_ratio", _ratio(last, first), "<=", limits.max_latency_ratio),
        check("class_recall", _worst(_at(last, "class_recall"), classes), ">=", limits.min_class_recall),
    ]
    if limits.max_latency_ms is not None:
        checks.append(check("latency_ms", _at(last, "latency_p50_ms"), "<=", limits.max_latency_ms))
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


def _difference(before: Any, after: Any) -> float | None:
    if not (_is_number(before) and _is_number(after)):
        return None
    return round(float(before - after), 9)  # 0.91 - 0.90 must not fail a limit of 0.01 by a rounding error


def _ratio(last: Any, first: Any) -> float | None:
    value, base = _at(last, "latency_p50_ms"), _at(first, "latency_p50_ms")
    return value / base if _is_number(value) and _is_number(base) and base > 0 else None


def _worst(recall: Any, classes: tuple[str, ...]) -> float | None:
    values = [_at(recall, name) for name in classes]
    return min(values) if all(_is_number(value) for value in values) else None


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
