"""gate: thresholds, the champion, slices and a fresh process; the verdict is a file, the exit status 0 either way.

It fails closed: a value that is missing, is no number or is not finite fails its check. The verdict is a pure function
of the evidence, so that an audit can come to it again, and it is void for any other model, data, parameters or code
than those whose SHA-256 it names.
"""

import bisect
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.core import comparison, config, files, materials, paths, probe
from tasks.core.errors import StageError, run

SCHEMA_VERSION = 3
NONE = "bootstrap"  # what stands for the champion where there is none yet, and that is allowed

Check = dict[str, Any]
Table = list[dict[str, str]]
Answers = npt.NDArray[np.bool_]


class Judged(NamedTuple):
    """What the verdict is about, each by its SHA-256; all of the code in tasks/ counts, see `files.digest`."""

    model_sha256: str
    data_sha256: str
    params_sha256: str
    code_sha256: str


class Evidence(NamedTuple):
    """All that a verdict is made from, besides the limits."""

    report: Any  # benchmark.json
    predictions: bytes  # predictions.csv
    champion: Any  # champion.json
    golden_sha256: str | None
    packed_sha256: str | None  # of the shipped file packed for the way there
    infra: Any  # how the shipped file met the golden outputs in a fresh process
    judged: Judged


def check(name: str, value: Any, operator: str, limit: Any, where: str | None = None) -> Check:
    """One comparison: `>`, `>=`, `<=` or `==`. `value` is None in the result if it was missing or not finite.

    `where` names the slice that the value comes from.
    """
    usable = isinstance(value, str) if isinstance(limit, str) else _is_number(value)
    value = value if usable else None
    match operator:
        case ">":
            passed = usable and value > limit
        case ">=":
            passed = usable and value >= limit
        case "<=":
            passed = usable and value <= limit
        case _:
            passed = usable and value == limit
    return {"name": name, "value": value, "operator": operator, "limit": limit, "where": where, "passed": bool(passed)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _share(value: Any) -> Any:
    """A measured share; None if it cannot be one."""
    return value if _is_number(value) and 0 <= value <= 1 else None


def _distance(value: Any) -> Any:
    """A measured distance; None if it cannot be one."""
    return value if _is_number(value) and value >= 0 else None


def _amount(value: Any) -> Any:
    """A measured size or time; None if it cannot be one: what weighs nothing was not weighed."""
    return value if _is_number(value) and value > 0 else None


def gate(evidence: Evidence, limits: config.Gate, classes: tuple[str, ...]) -> dict[str, Any]:
    """The verdict on the reduced model: `passed`, `checks`, the numbers behind them, and what it judged.

    The files must be the ones that the benchmark weighed, so a swapped file fails as a slow one does.
    """
    table = rows(evidence.predictions)
    compared = compare(evidence, table, limits.champion)
    slices = {column: slice_by(column, table, limit, limits, classes) for column, limit in limits.slices.items()}
    checks = [
        *_same_files(evidence, table),
        *_thresholds(evidence.report, limits),
        *_against_champion(evidence, compared, limits),
        *(one for column, found in slices.items() for one in _slices(column, found, limits.slices[column], compared)),
        *infra_checks(evidence.infra, limits),
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": all(one["passed"] for one in checks),
        "checks": checks,
        **evidence.judged._asdict(),
        "champion": evidence.champion,
        "comparison": compared,
        "slices": slices,
        "infra": evidence.infra,
    }


def rows(predictions: bytes) -> Table:
    """The table of predictions; empty if it is not one, or if a row of it is not whole."""
    try:
        table = list(csv.DictReader(io.StringIO(predictions.decode())))
    except (UnicodeDecodeError, csv.Error):
        return []
    whole = all(None not in row and None not in row.values() for row in table)  # DictReader's marks of an odd row
    return table if table and whole and {"actual", "predicted", "champion"} <= table[0].keys() else []


def _right(table: Table, column: str) -> Answers:
    return np.asarray([row[column] == row["actual"] for row in table], bool)


def compare(evidence: Evidence, table: Table, limits: config.Comparison) -> dict[str, Any] | None:
    """Challenger minus champion in top-1 on the same images, with its bounds and the margin that holds for it.

    None if there is no champion, or no table of predictions with its answer to every image. `wrong` counts the images
    that ours gets wrong. A trade is used only where the margin itself is missed.
    """
    version = _at(evidence.champion, "version")
    if not version or not table or not all(row["champion"] for row in table):
        return None
    right = _right(table, "predicted")
    found = comparison.difference(right, _right(table, "champion"), limits.confidence)
    ours, theirs = _at(evidence.report, "stages", "reduce"), _at(evidence.report, "champion")
    smaller = _times(_at(theirs, "size_bytes"), _at(ours, "size_bytes"))
    faster = _times(_at(theirs, "latency_p50_ms"), _at(ours, "latency_p50_ms"))
    trade = limits.trade
    traded = (
        trade is not None
        and not found.lower > -limits.margin
        and smaller is not None
        and faster is not None
        and smaller >= trade.min_times_smaller
        and faster >= trade.min_times_faster
    )
    return {
        "champion": version,
        **found._asdict(),
        "wrong": int((~right).sum()),
        "confidence": limits.confidence,
        "margin": trade.margin if trade and traded else limits.margin,
        "traded": traded,
        "times_smaller": smaller,
        "times_faster": faster,
    }


def _times(theirs: Any, ours: Any) -> float | None:
    theirs, ours = _amount(theirs), _amount(ours)
    return None if theirs is None or ours is None else _amount(theirs / ours)


def slice_by(
    column: str, table: Table, limit: config.Slice, limits: config.Gate, classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One entry per value of the column: images, top-1 with its interval, and the difference to the champion.

    Every class counts as a value of `label`, whether it has images or not. A slice with fewer images than
    `min_count` is listed and not judged.
    """
    name = "actual" if column == "label" else column
    if not table or name not in table[0]:
        return []
    values = classes if column == "label" else tuple(sorted({row[name] for row in table}))
    return [_slice(value, [row for row in table if row[name] == value], limit, limits) for value in values]


def _slice(value: str, table: Table, limit: config.Slice, limits: config.Gate) -> dict[str, Any]:
    right, confidence = _right(table, "predicted"), limits.champion.confidence
    lower, upper = comparison.proportion(int(right.sum()), len(table), confidence)
    entry = {
        "value": value,
        "images": len(table),
        "judged": len(table) >= limit.min_count,
        "top1": float(right.mean()) if table else None,
        "lower": lower,
        "upper": upper,
    }
    if table and table[0]["champion"]:
        entry["difference"] = comparison.difference(right, _right(table, "champion"), confidence)._asdict()
    return entry


def _same_files(evidence: Evidence, table: Table) -> Iterator[Check]:
    report, judged = evidence.report, evidence.judged
    yield check("model_sha256", _at(report, "stages", "reduce", "sha256"), "==", judged.model_sha256)
    yield check("data_sha256", _at(report, "data_sha256"), "==", judged.data_sha256)
    yield check("predictions_sha256", _at(report, "predictions_sha256"), "==", files.sha256_of(evidence.predictions))
    yield check("golden_sha256", _at(report, "golden_sha256"), "==", evidence.golden_sha256)
    yield check("packed_sha256", _at(report, "packed_sha256"), "==", evidence.packed_sha256)
    counted = int(_right(table, "predicted").sum()) / len(table) if table else None
    yield check("top1_of_predictions", counted, "==", _share(_at(report, "stages", "reduce", "top1")) or "a top-1")


def _thresholds(report: Any, limits: config.Gate) -> Iterator[Check]:
    first, last = (_at(report, "stages", name) for name in ("finetune", "reduce"))
    yield check("top1", _share(_at(last, "top1")), ">=", limits.min_top1)
    yield check("top1_drop", _drop(first, last), "<=", limits.max_top1_drop)
    yield check("size_bytes", _amount(_at(last, "size_bytes")), "<=", limits.max_size_bytes)
    if limits.max_zst_bytes is not None:
        yield check("zst_bytes", _amount(_at(last, "zst_bytes")), "<=", limits.max_zst_bytes)
    yield check("latency_ratio", _ratio(first, last), "<=", limits.max_latency_ratio)
    if limits.max_latency_ms is not None:
        yield check("latency_ms", _amount(_at(last, "latency_p50_ms")), "<=", limits.max_latency_ms)


def _against_champion(evidence: Evidence, compared: dict[str, Any] | None, limits: config.Gate) -> Iterator[Check]:
    """The first promotion has no champion and needs the word for it; every other one has to face it."""
    champion = evidence.champion
    version, allowed = _at(champion, "version"), _at(champion, "bootstrap") is True or limits.bootstrap
    none_yet = isinstance(champion, dict) and "version" in champion and version is None
    if none_yet and _at(evidence.report, "champion") is None:
        yield check("champion", NONE if allowed else None, "==", NONE)
        return
    yield check("champion", version, "==", version if isinstance(version, str) else "a version in production")
    found, wanted = _at(evidence.report, "champion", "sha256"), _at(champion, "model_sha256")
    yield check("champion_sha256", found, "==", wanted if isinstance(wanted, str) else "a SHA-256")
    margin = compared["margin"] if compared else limits.champion.margin
    yield check("top1_vs_champion", compared and compared["lower"], ">", -margin)
    withdrawn = _at(champion, "withdrawn")
    rolled_back = float(evidence.judged.model_sha256 in withdrawn) if isinstance(withdrawn, list) else None
    yield check("rolled_back", rolled_back, "<=", 0)


def _slices(
    column: str, found: list[dict[str, Any]], limit: config.Slice, compared: dict[str, Any] | None
) -> Iterator[Check]:
    """The worst judged slice of the column. A class without any image, or nothing to judge, fails."""
    judged = [entry for entry in found if entry["judged"]]
    empty = next((entry["value"] for entry in found if not entry["images"]), None)
    worst = min(judged, key=lambda entry: entry["top1"], default=None) if empty is None else None
    where = worst["value"] if worst else empty
    yield check(f"top1_by_{column}", worst and worst["top1"], ">=", limit.min_top1, where)
    if compared is None or limit.max_regression is None:
        return
    lost = {entry["value"]: _at(entry, "difference", "difference") for entry in judged}
    where = min(lost, key=lambda value: lost[value] if lost[value] is not None else -2, default=None)
    worst_loss = None if where is None or lost[where] is None else round(-lost[where], 9)
    yield check(f"regression_by_{column}", worst_loss, "<=", limit.max_regression, where)


def infra_checks(infra: Any, limits: config.Gate) -> Iterator[Check]:
    """How the shipped file met the golden outputs in a fresh process; nothing to meet fails."""
    cases = infra if isinstance(infra, dict) and infra else {"no case": None}
    differences = {name: _distance(_at(case, "difference")) for name, case in cases.items()}
    where = max(differences, key=lambda name: math.inf if differences[name] is None else differences[name])
    yield check("golden_difference", differences[where], "<=", limits.max_golden_difference, where)
    for name in ("same_top1", "repeatable"):
        failed = [case for case, met in cases.items() if _at(met, name) is not True]
        yield check(f"golden_not_{name}", float(len(failed)), "<=", 0, failed[0] if failed else None)


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


MEANINGS = {
    "model_sha256": "the file to be shipped is the one that the benchmark weighed",
    "data_sha256": "the test split is the one that the benchmark used",
    "predictions_sha256": "the table of predictions is the one that the benchmark wrote",
    "golden_sha256": "the golden outputs are those that the benchmark recorded",
    "packed_sha256": "the packed file is the one that the benchmark unpacked to the model",
    "top1_of_predictions": "the predictions, counted again, give the top-1 of the report",
    "top1": "top-1 on the test split",
    "top1_drop": "top-1 lost against the fine-tuned fp32 model",
    "size_bytes": "bytes of the file",
    "zst_bytes": "bytes of the file packed by Zstandard",
    "latency_ratio": "p50 over that of the fine-tuned fp32 model in the same run",
    "latency_ms": "p50 at batch 1 in milliseconds",
    "champion": "there is a version in production to compare with, or leave to go without",
    "champion_sha256": "the benchmark weighed the version that is in production",
    "top1_vs_champion": "lower bound of top-1 minus the champion's, on the same images",
    "rolled_back": "this very model was taken out of production by a rollback",
    "golden_difference": "largest difference of a logit between the benchmark and a fresh process",
    "golden_not_same_top1": "golden cases with another answer in a fresh process",
    "golden_not_repeatable": "golden cases that differ from run to run",
    "top1_by_": "top-1 of the worst slice",
    "regression_by_": "top-1 of the champion minus ours in the slice that lost most",
}
REMEDIES = {
    "champion": "put bootstrap: true under gate in params.yaml, or give --bootstrap, for the first promotion",
    "rolled_back": "`weighin rollback` to that version by name, if it shall come back",
    "golden_difference": "find out what this process does otherwise: threads, processor, ONNX Runtime version",
}


def explain(verdict: dict[str, Any]) -> list[tuple[Check, str, str]]:
    """Each check of a verdict with what it means, and what would pass it (or what there is to spare)."""
    return [(one, _meaning(one["name"]), _remedy(one, verdict["comparison"])) for one in verdict["checks"]]


def _meaning(name: str) -> str:
    return next(text for key, text in MEANINGS.items() if name == key or (key[-1] == "_" and name.startswith(key)))


def _remedy(one: Check, compared: dict[str, Any] | None) -> str:
    name, value, limit = one["name"], one["value"], one["limit"]
    if one["passed"]:
        return "" if one["operator"] == "==" else f"{abs(limit - value):.6g} to spare"
    if value is None and limit != NONE:
        return "the value is missing or not a finite number: run the pipeline again"
    if name in REMEDIES:
        return REMEDIES[name]
    if one["operator"] == "==":
        return "run the pipeline again, so that what is judged is what was measured"
    if name == "top1_vs_champion" and compared:
        return _images_missing(compared)
    off = f"{abs(limit - value):.6g}"
    return f"at least {limit:.6g}: {off} short" if one["operator"] == ">=" else f"at most {limit:.6g}: {off} over"


def _images_missing(compared: dict[str, Any]) -> str:
    """How many more images would have to be right at least; those first that the champion has right count most."""
    images, wins, losses = (compared[name] for name in ("images", "wins", "losses"))
    wrong = range(compared["wrong"] + 1)

    def lower(more: int) -> float:
        won = max(0, more - losses)
        return comparison.lower_bound(wins + won, losses - more + won, images, compared["confidence"])

    more = bisect.bisect_right(wrong, -compared["margin"], key=lower)
    if more == len(wrong):
        return f"a wider margin than {compared['margin']:.6g}, or more test images than {images}"
    first = ", those first that the champion has right" if losses else ""
    return f"{more} more of {images} images right{first}; or more test images, or a wider margin"


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict in one line; a trade of accuracy for size or speed is never left out of it."""
    failed = [one for one in verdict["checks"] if not one["passed"]]
    if failed:
        return "refused: " + "; ".join(map(reason, failed))
    traded = verdict["comparison"] and verdict["comparison"]["traded"]
    given = f", with accuracy traded within a margin of {verdict['comparison']['margin']:g}" if traded else ""
    return f"makes weight: all {len(verdict['checks'])} checks passed{given}"


def reason(one: Check) -> str:
    """Why a check failed, in a few words."""
    where = f" ({one['where']})" if one["where"] is not None else ""
    return f"{one['name']}{where} is {one['value']} but must be {one['operator']} {one['limit']}"


def evidence(profile: config.Benchmark) -> Evidence:
    """The evidence as it lies here, and the shipped file met with its golden outputs in a fresh process."""
    model = paths.onnx("reduce")
    try:
        infra: Any = probe.meet(paths.GOLDEN, model, profile.threads, profile.memory_limit_bytes)
    except StageError as error:
        print(f"gate: {error}")
        infra = {"load": {"difference": None, "same_top1": False, "repeatable": False}}
    code = files.digest(materials.code(Path()))
    judged = Judged(files.sha256(model), files.sha256(paths.TEST), files.sha256(paths.PARAMS), code)
    return Evidence(
        report=files.read_json(paths.report("benchmark")),
        predictions=paths.PREDICTIONS.read_bytes(),
        champion=files.read_json(paths.CHAMPION_RECORD),
        golden_sha256=files.sha256(paths.GOLDEN),
        packed_sha256=files.sha256(paths.PACKED),
        infra=infra,
        judged=judged,
    )


def confirmed(params: config.Params) -> dict[str, Any]:
    """The verdict that lies here; `StageError` if it is not what the evidence that lies here comes to.

    DVC would not run the gate again for a verdict that somebody wrote by hand and committed to dvc.lock.
    """
    verdict, now = read(paths.report("gate")), evidence(params.benchmark)
    # Another processor may give another last bit, so the fresh process has to pass, not to be the same once more.
    again = json.loads(json.dumps(gate(now._replace(infra=verdict["infra"]), params.gate, params.classes)))
    fails = [reason(one) for one in infra_checks(now.infra, params.gate) if not one["passed"]]
    if again != verdict or (verdict["passed"] and fails):
        anew = "`dvc repro --force --single-item gate` judges anew"
        raise StageError(f"{paths.report('gate')} is not what its evidence comes to: {'; '.join(fails) or anew}")
    return verdict


def read(path: Path) -> dict[str, Any]:
    """A verdict; `StageError` if the file does not hold one of this version of the gate."""
    verdict = files.read_json(path)
    if not isinstance(verdict, dict) or verdict.get("schema_version") != SCHEMA_VERSION:
        raise StageError(f"{path} is no verdict of this version of Weighin: `weighin run` makes one")
    return verdict


def main() -> None:
    params = config.load()
    verdict = gate(evidence(params.benchmark), params.gate, params.classes)
    files.write_json(paths.report("gate"), verdict)
    print(f"gate: {sentence(verdict)}")


if __name__ == "__main__":
    run(main)
