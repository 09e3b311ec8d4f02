"""gate: thresholds, the champion, slices and a fresh process; the verdict is a file, the exit status 0 either way.

It fails closed: a value that is missing, is no number or is not finite fails its check. The verdict is a pure function
of the evidence, so that an audit can come to it again, and it is void for any other model, data, parameters or code
than those whose SHA-256 it names.
"""

import bisect
import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, JsonValue, StrictBool, ValidationError

from tasks.core import config, files, noninferiority, paths, shares
from tasks.core.errors import StageError, run
from tasks.runtime import probe

SCHEMA_VERSION = 5
TEST_PART = "test_part"  # the column that tells images that came with the last growth from those of before
NONE = "bootstrap"  # what stands for the champion where there is none yet, and that is allowed

Operator = Literal[">", ">=", "<=", "=="]
Table = list[dict[str, str]]
Answers = npt.NDArray[np.bool_]


class Check(BaseModel):
    """One line of a verdict. Only a true `passed` passes: "yes" and 1 are not verdicts."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: JsonValue  # None if it was missing or not finite
    operator: str
    limit: JsonValue
    where: str | None = None  # the slice, or the golden case, that the value comes from
    passed: StrictBool


class Difference(BaseModel):
    """The difference in top-1 on the images of a slice: see `noninferiority.Difference`."""

    model_config = ConfigDict(frozen=True)

    images: int
    wins: int
    losses: int
    difference: float
    lower: float
    upper: float


class Comparison(Difference):
    """The difference to the champion on all test images, and the margin that holds for it."""

    champion: str
    wrong: int  # images that ours gets wrong
    confidence: float
    margin: float
    traded: bool  # the margin is the wider one, which holds for what is much smaller or faster
    times_smaller: float | None
    times_faster: float | None


class SliceResult(BaseModel):
    """One value of a column; a slice with too few images is listed and not judged."""

    model_config = ConfigDict(frozen=True)

    value: str
    images: int
    judged: bool
    top1: float | None
    lower: float
    upper: float
    difference: Difference | None = None  # to the champion, if there is one


class ClassChange(BaseModel):
    """What is different in what the model can answer, against the champion."""

    model_config = ConfigDict(frozen=True)

    added: tuple[str, ...]
    removed: tuple[str, ...]


class Verdict(BaseModel):
    """The gate's verdict, as `gate.json` has it: whether it passed, each check, and the numbers behind them."""

    model_config = ConfigDict(frozen=True)

    schema_version: int
    passed: StrictBool
    checks: tuple[Check, ...]
    model_sha256: str
    data_sha256: str
    params_sha256: str
    code_sha256: str
    champion: JsonValue
    comparison: Comparison | None
    class_change: ClassChange | None  # None if the classes are the champion's, or there is none
    slices: dict[str, list[SliceResult]]
    test_parts: list[SliceResult]  # frozen and new: what was tested on before, and what came with the last growth
    infra: JsonValue

    def to_json(self) -> dict[str, Any]:
        """The content of `gate.json`."""
        return self.model_dump(mode="json", exclude_unset=True)  # a slice without a champion has no difference


class Subject(NamedTuple):
    """What the verdict is about, each by its SHA-256; of the code, that of what judges: see `judging_code`."""

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
    infra: object  # how the shipped file met the golden outputs in a fresh process
    subject: Subject


def check(name: str, value: object, operator: Operator, limit: Any, where: str | None = None) -> Check:
    """Compare a value with its limit; a value that is missing or not finite fails, and is None in the result."""
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
    return Check(name=name, value=value, operator=operator, limit=limit, where=where, passed=bool(passed))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def share(value: Any) -> Any:
    """A measured share; None if it cannot be one."""
    return value if _is_number(value) and 0 <= value <= 1 else None


def _distance(value: Any) -> Any:
    """A measured distance; None if it cannot be one."""
    return value if _is_number(value) and value >= 0 else None


def amount(value: Any) -> Any:
    """A measured size or time; None if it cannot be one: what weighs nothing was not weighed."""
    return value if _is_number(value) and value > 0 else None


def gate(
    evidence: Evidence, limits: config.Gate, classes: tuple[str, ...], missing_is_a_slice: bool = False
) -> Verdict:
    """Judge the reduced model by the evidence and the limits.

    The files must be the ones that the benchmark weighed, so a swapped file fails as a slow one does. Up to schema 3
    images without a value in a column were a slice of their own (`missing_is_a_slice`), on which it could pass.
    """
    table = rows(evidence.predictions)
    compared = compare(evidence, table, limits.champion)
    slices = {column: slice_by(column, table, limit, limits, classes) for column, limit in limits.slices.items()}
    if not missing_is_a_slice:
        slices = {column: [one for one in found if one.value] for column, found in slices.items()}
    checks = [
        *_same_files(evidence, table),
        *_thresholds(evidence.report, limits),
        *_balanced_accuracy(table, limits, classes),
        *_against_champion(evidence, compared, limits),
        *(one for column, found in slices.items() for one in _slices(column, found, limits.slices[column], compared)),
        *infra_checks(evidence.infra, limits.max_golden_difference),
    ]
    return Verdict(
        schema_version=SCHEMA_VERSION,
        passed=all(one.passed for one in checks),
        checks=tuple(checks),
        **evidence.subject._asdict(),
        champion=evidence.champion,
        comparison=compared,
        class_change=_class_change(evidence.report),
        slices=slices,
        test_parts=slice_by(TEST_PART, table, config.Slice(min_top1=0), limits, classes),
        infra=evidence.infra,
    )


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


def compare(evidence: Evidence, table: Table, limits: config.Comparison) -> Comparison | None:
    """Compare the challenger with the champion in top-1 on the same images.

    None if there is no champion, or no table of predictions with its answer to every image. A trade is used only where
    the margin itself is missed.
    """
    version = at(evidence.champion, "version")
    if not isinstance(version, str) or not version or not table or not all(row["champion"] for row in table):
        return None
    right = _right(table, "predicted")
    found = noninferiority.difference(right, _right(table, "champion"), limits.confidence)
    ours, theirs = at(evidence.report, "stages", "reduce"), at(evidence.report, "champion")
    smaller = _times(at(theirs, "size_bytes"), at(ours, "size_bytes"))
    faster = _times(at(theirs, "latency_p50_ms"), at(ours, "latency_p50_ms"))
    trade = limits.trade
    traded = (
        trade is not None
        and not found.lower > -limits.margin
        and smaller is not None
        and faster is not None
        and smaller >= trade.min_times_smaller
        and faster >= trade.min_times_faster
    )
    return Comparison(
        champion=version,
        **found._asdict(),
        wrong=int((~right).sum()),
        confidence=limits.confidence,
        margin=trade.margin if trade and traded else limits.margin,
        traded=traded,
        times_smaller=smaller,
        times_faster=faster,
    )


def _times(theirs: object, ours: Any) -> float | None:
    theirs, ours = amount(theirs), amount(ours)
    return None if theirs is None or ours is None else amount(theirs / ours)


def slice_by(
    column: str, table: Table, limit: config.Slice, limits: config.Gate, classes: tuple[str, ...]
) -> list[SliceResult]:
    """One entry per value of the column, the empty one too: images, top-1 with its interval, loss to the champion.

    Every class counts as a value of `label`, whether it has images or not. A slice with fewer images than
    `min_count` is listed and not judged.
    """
    name = "actual" if column == "label" else column
    if not table or name not in table[0]:
        return []
    found = {row[name] for row in table}
    values = (*classes, *sorted(found - {*classes})) if column == "label" else tuple(sorted(found))
    return [_slice(value, [row for row in table if row[name] == value], limit, limits) for value in values]


def _slice(value: str, table: Table, limit: config.Slice, limits: config.Gate) -> SliceResult:
    right, confidence = _right(table, "predicted"), limits.champion.confidence
    lower, upper = noninferiority.proportion(int(right.sum()), len(table), confidence)
    entry: dict[str, object] = {
        "value": value,
        "images": len(table),
        "judged": len(table) >= limit.min_count,
        "top1": float(right.mean()) if table else None,
        "lower": lower,
        "upper": upper,
    }
    if table and all(row["champion"] for row in table):
        found = noninferiority.difference(right, _right(table, "champion"), confidence)
        entry["difference"] = Difference(**found._asdict())
    return SliceResult(**entry)


def _same_files(evidence: Evidence, table: Table) -> Iterator[Check]:
    report, subject = evidence.report, evidence.subject
    yield check("model_sha256", at(report, "stages", "reduce", "sha256"), "==", subject.model_sha256)
    yield check("data_sha256", at(report, "data_sha256"), "==", subject.data_sha256)
    yield check("predictions_sha256", at(report, "predictions_sha256"), "==", files.sha256_of(evidence.predictions))
    yield check("golden_sha256", at(report, "golden_sha256"), "==", evidence.golden_sha256)
    yield check("packed_sha256", at(report, "packed_sha256"), "==", evidence.packed_sha256)
    counted = int(_right(table, "predicted").sum()) / len(table) if table else None
    yield check("top1_of_predictions", counted, "==", share(at(report, "stages", "reduce", "top1")) or "a top-1")


def _thresholds(report: object, limits: config.Gate) -> Iterator[Check]:
    first, last = (at(report, "stages", name) for name in ("finetune", "reduce"))
    yield check("top1", share(at(last, "top1")), ">=", limits.min_top1)
    yield check("top1_drop", drop(first, last), "<=", limits.max_top1_drop)
    yield check("size_bytes", amount(at(last, "size_bytes")), "<=", limits.max_size_bytes)
    if limits.max_zst_bytes is not None:
        yield check("zst_bytes", amount(at(last, "zst_bytes")), "<=", limits.max_zst_bytes)
    yield check("latency_ratio", ratio(first, last), "<=", limits.max_latency_ratio)
    if limits.max_latency_ms is not None:
        yield check("latency_ms", amount(at(last, "latency_p50_ms")), "<=", limits.max_latency_ms)


def _balanced_accuracy(table: Table, limits: config.Gate, classes: tuple[str, ...]) -> Iterator[Check]:
    """Counted from the predictions; a class without images fails."""
    if limits.min_balanced_accuracy is None:
        return
    right = _right(table, "predicted")
    labels = dict.fromkeys((*classes, *(row["actual"] for row in table)))
    recalls = [right[[row["actual"] == name for row in table]] for name in labels] if table else []
    usable = bool(recalls) and all(len(one) for one in recalls)
    mean = float(sum(Fraction(int(one.sum()), len(one)) for one in recalls) / len(recalls)) if usable else None
    yield check("balanced_accuracy", mean, ">=", limits.min_balanced_accuracy)


def _class_change(report: object) -> ClassChange | None:
    ours, theirs = (_names(at(report, key)) for key in ("classes", "champion_classes"))
    if not ours or not theirs or set(ours) == set(theirs):
        return None
    return ClassChange(
        added=tuple(name for name in ours if name not in theirs),
        removed=tuple(name for name in theirs if name not in ours),
    )


def _names(value: object) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else ()


def classes_of(declared: object, report: object) -> tuple[str, ...]:
    """The classes that params.yaml lists or, where it leaves them to the data, those that the benchmark names.

    None at all if it names none; then nothing passes that looks at classes.
    """
    return tuple(declared) if isinstance(declared, list | tuple) else _names(at(report, "classes"))


def _against_champion(evidence: Evidence, compared: Comparison | None, limits: config.Gate) -> Iterator[Check]:
    """The first promotion has no champion and needs the word for it; every other one has to face it."""
    champion = evidence.champion
    version, allowed = at(champion, "version"), at(champion, "bootstrap") is True or limits.bootstrap
    none_yet = isinstance(champion, dict) and "version" in champion and version is None
    if none_yet and at(evidence.report, "champion") is None:
        yield check("champion", NONE if allowed else None, "==", NONE)
        return
    yield check("champion", version, "==", version if isinstance(version, str) else "a version in production")
    found, wanted = at(evidence.report, "champion", "sha256"), at(champion, "model_sha256")
    yield check("champion_sha256", found, "==", wanted if isinstance(wanted, str) else "a SHA-256")
    margin = compared.margin if compared else limits.champion.margin
    yield check("top1_vs_champion", compared and compared.lower, ">", -margin)
    withdrawn = at(champion, "withdrawn")
    rolled_back = float(evidence.subject.model_sha256 in withdrawn) if isinstance(withdrawn, list) else None
    yield check("rolled_back", rolled_back, "<=", 0)


def _slices(column: str, found: list[SliceResult], limit: config.Slice, compared: Comparison | None) -> Iterator[Check]:
    """The worst judged slice of the column. A class without any image, or nothing to judge, fails."""
    judged = [entry for entry in found if entry.judged]
    empty = next((entry.value for entry in found if not entry.images), None)
    worst = min(judged, key=lambda entry: entry.top1 or 0.0, default=None) if empty is None else None
    yield check(f"top1_by_{column}", worst and worst.top1, ">=", limit.min_top1, where=worst.value if worst else empty)
    if compared is None or limit.max_regression is None:
        return
    changes = {entry.value: entry.difference.difference if entry.difference else -2.0 for entry in judged}
    where = min(changes, key=changes.__getitem__, default=None)
    loss = None if where is None or changes[where] < -1 else shares.subtract(0, changes[where])
    yield check(f"regression_by_{column}", loss, "<=", limit.max_regression, where)


def infra_checks(infra: object, max_golden_difference: float) -> Iterator[Check]:
    """How the shipped file met the golden outputs in a fresh process; nothing to meet fails."""
    cases = infra if isinstance(infra, dict) and infra else {"no case": None}
    differences = {name: _distance(at(case, "difference")) for name, case in cases.items()}
    where = max(differences, key=lambda name: math.inf if differences[name] is None else differences[name])
    yield check("golden_difference", differences[where], "<=", max_golden_difference, where)
    for name in ("same_top1", "repeatable"):
        failed = [case for case, met in cases.items() if at(met, name) is not True]
        yield check(f"golden_not_{name}", float(len(failed)), "<=", 0, failed[0] if failed else None)


def at(content: object, *keys: str) -> Any:
    """The value under the keys in nested mappings; None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def drop(first: object, last: object) -> float | None:
    """Top-1 lost from one model of a report to another; None if one of them is not usable."""
    before, after = share(at(first, "top1")), share(at(last, "top1"))
    if before is None or after is None:
        return None
    return shares.subtract(before, after)


def ratio(first: object, last: object) -> float | None:
    """The p50 latency of a model of a report over that of another; None if one of them is not usable."""
    value, base = amount(at(last, "latency_p50_ms")), amount(at(first, "latency_p50_ms"))
    return None if value is None or base is None else value / base


MEANINGS = {
    "model_sha256": "the file to be shipped is the one that the benchmark weighed",
    "data_sha256": "the test split is the one that the benchmark used",
    "predictions_sha256": "the table of predictions is the one that the benchmark wrote",
    "golden_sha256": "the golden outputs are those that the benchmark recorded",
    "packed_sha256": "the packed file is the one that the benchmark unpacked to the model",
    "top1_of_predictions": "the predictions, counted again, give the top-1 of the report",
    "top1": "top-1 on the test split",
    "balanced_accuracy": "mean over the classes of the share of their test images that is right",
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


def explain(verdict: Verdict) -> list[tuple[Check, str, str]]:
    """Each check of a verdict with what it means, and what would pass it (or what there is to spare)."""
    return [(one, _meaning(one.name), _remedy(one, verdict.comparison)) for one in verdict.checks]


def _meaning(name: str) -> str:
    return next(text for key, text in MEANINGS.items() if name == key or (key[-1] == "_" and name.startswith(key)))


def _remedy(one: Check, compared: Comparison | None) -> str:
    value, limit = one.value, one.limit
    if value is None and limit != NONE and not one.passed:
        return "the value is missing or not a finite number: run the pipeline again"
    if not one.passed and one.name in REMEDIES:
        return REMEDIES[one.name]
    if one.operator == "==" or not (_is_number(value) and _is_number(limit)):
        return "" if one.passed else "run the pipeline again, so that what is judged is what was measured"
    off = f"{abs(float(str(limit)) - float(str(value))):.6g}"
    if one.passed:
        return f"{off} to spare"
    if one.name == "top1_vs_champion" and compared:
        return _images_missing(compared)
    return f"at least {limit:.6g}: {off} short" if one.operator == ">=" else f"at most {limit:.6g}: {off} over"


def _images_missing(compared: Comparison) -> str:
    """How many more images would have to be right at least; those first that the champion has right count most."""
    wrong = range(compared.wrong + 1)

    def lower(more: int) -> float:
        won = max(0, more - compared.losses)
        wins, losses = compared.wins + won, compared.losses - more + won
        return noninferiority.lower_bound(wins, losses, compared.images, compared.confidence)

    more = bisect.bisect_right(wrong, -compared.margin, key=lower)
    if more == len(wrong):
        return f"a wider margin than {compared.margin:.6g}, or more test images than {compared.images}"
    first = ", those first that the champion has right" if compared.losses else ""
    return f"{more} more of {compared.images} images right{first}; or more test images, or a wider margin"


def sentence(verdict: Verdict) -> str:
    """The verdict in one line; a trade of accuracy for size or speed is never left out of it."""
    failed = [one for one in verdict.checks if not one.passed]
    if failed:
        return "refused: " + "; ".join(map(reason, failed))
    compared = verdict.comparison
    given = f", with accuracy traded within a margin of {compared.margin:g}" if compared and compared.traded else ""
    return f"makes weight: all {len(verdict.checks)} checks passed{given}{_class_change_words(verdict.class_change)}"


def _class_change_words(change: ClassChange | None) -> str:
    added, removed = (", ".join(names) for names in (change.added, change.removed)) if change else ("", "")
    told = [f"with {added}, which the champion cannot answer"] if added else []
    return "".join(f"; {one}" for one in [*told, *([f"without {removed}, which it can"] if removed else [])])


def reason(one: Check) -> str:
    """Why a check failed, in a few words."""
    where = f" ({one.where})" if one.where is not None else ""
    return f"{one.name}{where} is {one.value} but must be {one.operator} {one.limit}"


def evidence(profile: config.Benchmark) -> Evidence:
    """The evidence as it lies here, and the shipped file met with its golden outputs in a fresh process."""
    model = paths.onnx("reduce")
    try:
        infra: object = probe.meet(paths.GOLDEN, model, profile.threads, profile.memory_limit_bytes)
    except StageError as error:
        print(f"gate: {error}")
        infra = {"load": {"difference": None, "same_top1": False, "repeatable": False}}
    code = files.digest(judging_code(Path()))
    subject = Subject(files.sha256(model), files.sha256(paths.TEST), files.sha256(paths.PARAMS), code)
    return Evidence(
        report=files.read_json(paths.report("benchmark")),
        predictions=paths.PREDICTIONS.read_bytes(),
        champion=files.read_json(paths.CHAMPION_RECORD),
        golden_sha256=files.sha256(paths.GOLDEN),
        packed_sha256=files.sha256(paths.PACKED),
        infra=infra,
        subject=subject,
    )


def judging_code(root: Path) -> dict[str, str]:
    """SHA-256 by path of the code that judges: what dvc.yaml names as dependencies of this stage."""
    from ruamel.yaml import YAML

    dependencies = YAML(typ="safe").load((root / "dvc.yaml").read_bytes())["stages"]["gate"]["deps"]
    return {path: files.sha256(root / path) for path in dependencies if path.endswith(".py")}


def confirm(params: config.Params) -> Verdict:
    """The verdict that lies here; `StageError` if it is not what the evidence that lies here comes to.

    DVC would not run the gate again for a verdict that somebody wrote by hand and committed to dvc.lock.
    """
    path = paths.report("gate")
    recorded, verdict, now = files.read_json(path), read(path), evidence(params.benchmark)
    # Another processor may give another last bit, so the fresh process has to pass, not to be the same once more.
    again = gate(now._replace(infra=verdict.infra), params.gate, classes_of(params.classes, now.report))
    fails = [reason(one) for one in infra_checks(now.infra, params.gate.max_golden_difference) if not one.passed]
    if json.loads(json.dumps(again.to_json())) != recorded or (verdict.passed and fails):
        anew = "`dvc repro --force --single-item gate` judges anew"
        raise StageError(f"{path} is not what its evidence comes to: {'; '.join(fails) or anew}")
    return again


def read(path: Path) -> Verdict:
    """A verdict; `StageError` if the file does not hold one of this version of the gate."""
    content = files.read_json(path)
    if isinstance(content, dict) and content.get("schema_version") == SCHEMA_VERSION:
        with contextlib.suppress(ValidationError):
            return Verdict.model_validate(content)
    raise StageError(f"{path} is no verdict of this version of Weighin: `weighin run` makes one")


def main() -> None:
    params = config.load()
    found = evidence(params.benchmark)
    verdict = gate(found, params.gate, classes_of(params.classes, found.report))
    files.write_json(paths.report("gate"), verdict.to_json())
    print(f"gate: {sentence(verdict)}")


if __name__ == "__main__":
    run(main)
