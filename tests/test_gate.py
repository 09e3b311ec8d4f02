"""gate: every limit from both sides, everything that is no usable number is refused, and so is what is not from here.

The challenger of `evidence()` and its champion answer 200 images, 50 of each class. Either is right on its own where
the other is wrong, as `WINS` and `LOSSES` say.
"""

import copy
import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import CLASSES, ROOT, Network, Repository, png
from onnx import numpy_helper
from pydantic import ValidationError

from tasks.benchmark import golden_of
from tasks.core import config, files, noninferiority
from tasks.core.errors import StageError
from tasks.gate import (
    Check,
    ClassChange,
    Evidence,
    Subject,
    Verdict,
    amount,
    classes_of,
    confirm,
    evidence,
    explain,
    gate,
    judging_code,
    read,
    reason,
    rows,
    sentence,
)
from tasks.graphs import graph
from tasks.reduce import reduce
from tasks.runtime import probe

MODEL, DATA, PARAMS, CODE, CHAMPION, GOLDEN, PACKED = (letter * 64 for letter in "abcdef0")
SUBJECT = Subject(MODEL, DATA, PARAMS, CODE)
MARGIN = 0.08
LIMITS: dict[str, Any] = {
    "min_top1": 0.9,
    "max_top1_drop": 0.01,
    "max_size_bytes": 1000,
    "max_zst_bytes": 900,
    "max_latency_ratio": 0.5,
    "max_latency_ms": 2.0,
    "max_golden_difference": 0.001,
    "champion": {"margin": MARGIN},
    "slices": {
        "label": {"min_count": 50, "min_top1": 0.84, "max_regression": 0.1},
        "device": {"min_count": 40, "min_top1": 0.875, "max_regression": 0.025},
    },
}
SAME = ["model_sha256", "data_sha256", "predictions_sha256", "golden_sha256", "packed_sha256", "top1_of_predictions"]
THRESHOLDS = ["top1", "top1_drop", "size_bytes", "zst_bytes", "latency_ratio", "latency_ms"]
FACED = ["champion", "champion_sha256", "top1_vs_champion", "rolled_back"]
BY_COLUMN = ["top1_by_label", "regression_by_label", "top1_by_device", "regression_by_device"]
MET = ["golden_difference", "golden_not_same_top1", "golden_not_repeatable"]
CHECKS = [*SAME, *THRESHOLDS, *FACED, *BY_COLUMN, *MET]
# Images of the challenger and of the champion that are wrong: `owl` has 8 of ours (0.84), and 3 of the champion.
OURS = (0, 1, 2, 50, 51, 52, 150, 151, 152, 153, 154, 155, *range(100, 108))
THEIRS = (3, 4, 5, *range(50, 58), *range(100, 103), 150, 151, 156)
WINS, LOSSES = len(set(THEIRS) - set(OURS)), len(set(OURS) - set(THEIRS))
FEW = {0, 60, 110, 161}  # photographed with a device that is too rare to be judged


def device(index: int) -> str:
    return "scanner" if index in FEW else ("phone", "camera")[index % 2]


def table(ours: Any = OURS, theirs: Any = THEIRS) -> list[list[str]]:
    """The predictions as benchmark has them; a wrong answer is the class after the right one."""
    made = [["actual", "predicted", "champion", "device"]]
    for index in range(200):
        code = index // 50
        answers = [CLASSES[(code + (index in wrong)) % 4] if wrong is not None else "" for wrong in (ours, theirs)]
        made.append([CLASSES[code], *answers, device(index)])
    return made


def text(cells: list[list[str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(cells)
    return stream.getvalue().encode()


def evidence_of(predictions: bytes, **changes: Any) -> Evidence:
    """Evidence on every limit, with predictions that the report names and has the top-1 of."""
    found = rows(predictions)
    top1 = sum(row["predicted"] == row["actual"] for row in found) / len(found) if found else 0.9
    report = {
        "data_sha256": DATA,
        "predictions_sha256": files.sha256_of(predictions),
        "golden_sha256": GOLDEN,
        "packed_sha256": PACKED,
        "champion": {"sha256": CHAMPION, "size_bytes": 1500, "latency_p50_ms": 3.0},
        "stages": {
            "finetune": {"top1": 0.91, "latency_p50_ms": 4.0},
            "reduce": {"sha256": MODEL, "top1": top1, "size_bytes": 1000, "zst_bytes": 900, "latency_p50_ms": 2.0},
        },
    }
    champion = {"version": "v3", "model_sha256": CHAMPION, "withdrawn": ["9" * 64], "bootstrap": False}
    good = {"difference": 0.0, "same_top1": True, "repeatable": True}
    infra = {"batch-1": good, "huge": good | {"difference": 0.001}}
    return Evidence(report, predictions, champion, GOLDEN, PACKED, infra, SUBJECT)._replace(**changes)


def full() -> Evidence:
    return evidence_of(text(table()))


def judge(given: Evidence, **changes: Any) -> Verdict:
    return gate(given, config.Gate.model_validate(LIMITS | changes), CLASSES)


def failures(given: Evidence, **changes: Any) -> list[str]:
    verdict = judge(given, **changes)
    names = [check.name for check in verdict.checks if not check.passed]
    assert verdict.passed is (not names)
    explained = explain(verdict)
    assert [one for one, _, _ in explained] == list(verdict.checks)
    assert all(meaning for _, meaning, _ in explained)
    assert all(remedy for one, _, remedy in explained if not one.passed)
    return names


def one_check(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


def with_value(value: Any, *keys: str, given: Evidence | None = None) -> Evidence:
    """The evidence with one value changed; the first key is the part of the evidence."""
    given = given or full()
    if len(keys) == 1:
        return given._replace(**{keys[0]: value})
    part: Any = copy.deepcopy(getattr(given, keys[0]))
    inner = part
    for key in keys[1:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return given._replace(**{keys[0]: part})


def without(*keys: str) -> Evidence:
    part: Any = copy.deepcopy(getattr(full(), keys[0]))
    inner = part
    for key in keys[1:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return full()._replace(**{keys[0]: part})


def with_table(change: Callable[[list[list[str]]], object]) -> Evidence:
    """Other predictions, and the report that names them, with the top-1 that the limits want."""
    cells = table()
    change(cells)
    return evidence_of(text(cells))


LAST = ("report", "stages", "reduce")
FIRST = ("report", "stages", "finetune")


def test_on_every_limit_it_passes() -> None:
    verdict = judge(full())
    assert verdict.passed is True
    assert [check.name for check in verdict.checks] == CHECKS
    assert {name: getattr(verdict, name) for name in SUBJECT._fields} == SUBJECT._asdict()
    assert (verdict.champion, verdict.infra) == (full().champion, full().infra)
    assert sentence(verdict) == f"makes weight: all {len(CHECKS)} checks passed"
    on_limit = ("top1", "size_bytes", "latency_ratio", "latency_ms", "top1_by_label", "golden_difference")
    assert all(one_check(verdict, name).value == one_check(verdict, name).limit for name in on_limit)


def test_the_same_evidence_gives_the_same_verdict_and_so_does_what_json_keeps_of_it() -> None:
    verdict = judge(full())
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert text == json.dumps(judge(full()).to_json())
    assert Verdict.model_validate_json(text) == verdict
    assert Verdict.model_validate_json(text).to_json() == verdict.to_json()
    given = full()
    kept = {name: json.loads(json.dumps(getattr(given, name))) for name in ("report", "champion", "infra")}
    assert judge(given._replace(**kept)) == verdict
    assert explain(Verdict.model_validate_json(text)) == explain(verdict)


def test_nothing_in_a_verdict_can_be_changed_afterwards() -> None:
    verdict: Any = judge(full())
    owl = verdict.slices["label"][2]
    change = ClassChange(added=("owl",), removed=())
    for part, name in (
        (verdict, "passed"), (verdict.checks[0], "passed"), (verdict.comparison, "lower"), (owl, "top1"),
        (owl.difference, "lower"), (change, "added"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)


def test_what_is_written_of_a_verdict_is_what_readers_expect() -> None:
    """Its schema, and no difference where there is no champion; `tests/records` has verdicts that were written so."""
    faced, first = (judge(given).to_json() for given in (full(), first_promotion()))
    assert faced["schema_version"] == first["schema_version"] == 5
    assert "difference" in faced["slices"]["label"][0]
    assert "difference" not in first["slices"]["label"][0]


def test_the_largest_number_is_one() -> None:
    assert amount(sys.float_info.max) == sys.float_info.max
    assert amount(float("inf")) is None


def test_judging_leaves_the_evidence_as_it_was() -> None:
    given = full()
    before = copy.deepcopy(given)
    judge(given)
    assert given == before


@pytest.mark.parametrize(
    ("keys", "value", "names"),
    [
        ((*LAST, "top1"), 0.8999, ["top1_of_predictions", "top1", "top1_drop"]),
        ((*LAST, "top1"), 0.905, ["top1_of_predictions"]),
        ((*FIRST, "top1"), 0.9101, ["top1_drop"]),
        ((*LAST, "size_bytes"), 1001, ["size_bytes"]),
        ((*LAST, "zst_bytes"), 901, ["zst_bytes"]),
        ((*LAST, "latency_p50_ms"), 2.001, ["latency_ratio", "latency_ms"]),
        ((*FIRST, "latency_p50_ms"), 3.999, ["latency_ratio"]),
        ((*LAST, "sha256"), "0" * 64, ["model_sha256"]),
        (("report", "data_sha256"), MODEL, ["data_sha256"]),
        (("report", "predictions_sha256"), MODEL, ["predictions_sha256"]),
        (("report", "golden_sha256"), MODEL, ["golden_sha256"]),
        (("golden_sha256",), MODEL, ["golden_sha256"]),
        (("report", "packed_sha256"), MODEL, ["packed_sha256"]),
        (("packed_sha256",), MODEL, ["packed_sha256"]),
        (("packed_sha256",), None, ["packed_sha256"]),
        (("subject",), SUBJECT._replace(model_sha256=DATA), ["model_sha256"]),
        (("subject",), SUBJECT._replace(data_sha256=MODEL), ["data_sha256"]),
        (("subject",), SUBJECT._replace(model_sha256="9" * 64), ["model_sha256", "rolled_back"]),
        (("report", "champion", "sha256"), MODEL, ["champion_sha256"]),
        (("champion", "model_sha256"), MODEL, ["champion_sha256"]),
        (("champion", "withdrawn"), ["9" * 64, MODEL], ["rolled_back"]),
        (("infra", "batch-1", "difference"), 0.0011, ["golden_difference"]),
        (("infra", "huge", "difference"), 0.0011, ["golden_difference"]),
        (("infra", "huge", "same_top1"), False, ["golden_not_same_top1"]),
        (("infra", "batch-1", "repeatable"), False, ["golden_not_repeatable"]),
    ],
)
def test_just_beyond_a_limit_it_fails(keys: tuple[str, ...], value: Any, names: list[str]) -> None:
    assert failures(with_value(value, *keys)) == names


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        ({"min_count": 50, "min_top1": 0.8401}, ["top1_by_label"]),
        ({"min_count": 50, "min_top1": 0.8, "max_regression": 0.0999}, ["regression_by_label"]),
        ({"min_count": 50, "min_top1": 0.8}, []),
        ({"min_count": 51, "min_top1": 0.8, "max_regression": 0.1}, ["top1_by_label", "regression_by_label"]),
    ],
)
def test_the_worst_class_has_to_hold(limit: dict[str, Any], names: list[str]) -> None:
    assert failures(full(), slices={"label": limit}) == names


USELESS: list[Any] = [None, float("nan"), float("inf"), float("-inf"), True, False, "0.95", [], {}, 10**400, -(10**400)]


@pytest.mark.parametrize("value", USELESS, ids=lambda value: str(value)[:5])
@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (("report",), [*SAME, *THRESHOLDS, "champion_sha256"]),
        (("report", "stages"), ["model_sha256", "top1_of_predictions", *THRESHOLDS]),
        (LAST, ["model_sha256", "top1_of_predictions", *THRESHOLDS]),
        ((*LAST, "sha256"), ["model_sha256"]),
        ((*LAST, "top1"), ["top1_of_predictions", "top1", "top1_drop"]),
        ((*LAST, "size_bytes"), ["size_bytes"]),
        ((*LAST, "zst_bytes"), ["zst_bytes"]),
        ((*LAST, "latency_p50_ms"), ["latency_ratio", "latency_ms"]),
        (FIRST, ["top1_drop", "latency_ratio"]),
        ((*FIRST, "top1"), ["top1_drop"]),
        ((*FIRST, "latency_p50_ms"), ["latency_ratio"]),
        (("report", "data_sha256"), ["data_sha256"]),
        (("report", "predictions_sha256"), ["predictions_sha256"]),
        (("report", "golden_sha256"), ["golden_sha256"]),
        (("report", "packed_sha256"), ["packed_sha256"]),
        (("report", "champion"), ["champion_sha256"]),
        (("report", "champion", "sha256"), ["champion_sha256"]),
        (("champion",), FACED),
        (("champion", "model_sha256"), ["champion_sha256"]),
        (("infra",), MET),
        (("infra", "huge"), MET),
        (("infra", "huge", "difference"), ["golden_difference"]),
    ],
)
def test_what_is_no_usable_value_is_refused(keys: tuple[str, ...], names: list[str], value: Any) -> None:
    given = with_value(value, *keys)
    assert failures(given) == names
    if keys[0] == "report":
        json.dumps(judge(given).to_json(), allow_nan=False)


@pytest.mark.parametrize("value", [value for value in USELESS if value is not True], ids=lambda value: str(value)[:5])
def test_only_true_is_true(value: Any) -> None:
    assert failures(with_value(value, "infra", "huge", "same_top1")) == ["golden_not_same_top1"]
    assert failures(with_value(value, "infra", "huge", "repeatable")) == ["golden_not_repeatable"]
    assert failures(with_value(value, "champion", "bootstrap", given=first_promotion())) == ["champion"]


@pytest.mark.parametrize("value", [value for value in USELESS if value != []], ids=lambda value: str(value)[:5])
def test_what_was_withdrawn_is_a_list(value: Any) -> None:
    assert failures(with_value(value, "champion", "withdrawn")) == ["rolled_back"]


@pytest.mark.parametrize("value", [value for value in USELESS if not isinstance(value, str)], ids=lambda v: str(v)[:5])
def test_a_version_is_a_string(value: Any) -> None:
    assert "champion" in failures(with_value(value, "champion", "version"))


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ((*LAST, "top1"), ["top1_of_predictions", "top1", "top1_drop"]),
        ((*LAST, "size_bytes"), ["size_bytes"]),
        ((*LAST, "zst_bytes"), ["zst_bytes"]),
        ((*LAST, "sha256"), ["model_sha256"]),
        ((*FIRST, "latency_p50_ms"), ["latency_ratio"]),
        (("report", "data_sha256"), ["data_sha256"]),
        (("report", "predictions_sha256"), ["predictions_sha256"]),
        (("report", "golden_sha256"), ["golden_sha256"]),
        (("report", "packed_sha256"), ["packed_sha256"]),
        (("report", "champion"), ["champion_sha256"]),
        (("champion", "version"), ["champion", "top1_vs_champion"]),
        (("champion", "model_sha256"), ["champion_sha256"]),
        (("champion", "withdrawn"), ["rolled_back"]),
        (("infra", "huge", "difference"), ["golden_difference"]),
        (("infra", "batch-1", "same_top1"), ["golden_not_same_top1"]),
        (("infra", "batch-1", "repeatable"), ["golden_not_repeatable"]),
    ],
)
def test_what_is_missing_is_refused(keys: tuple[str, ...], names: list[str]) -> None:
    assert failures(without(*keys)) == names


@pytest.mark.parametrize("content", [{}, [], None, "passed", 1.0, True, {"stages": []}, {"stages": {"reduce": 1}}])
def test_a_report_that_is_none_is_refused(content: Any) -> None:
    assert failures(with_value(content, "report")) == [*SAME, *THRESHOLDS, "champion_sha256"]


def test_nothing_at_all_is_refused() -> None:
    nothing = Evidence(None, b"", None, "", "", None, SUBJECT)
    assert failures(nothing) == [*SAME, *THRESHOLDS, *FACED, "top1_by_label", "top1_by_device", *MET]


@pytest.mark.parametrize("base", [0, 0.0, -4.0])
def test_a_ratio_needs_a_base_above_zero(base: float) -> None:
    assert failures(with_value(base, *FIRST, "latency_p50_ms")) == ["latency_ratio"]


@pytest.mark.parametrize("amount", [-1, 0])
def test_what_weighs_nothing_was_not_weighed(amount: int) -> None:
    assert failures(with_value(amount, *LAST, "size_bytes")) == ["size_bytes"]
    assert failures(with_value(amount, *LAST, "latency_p50_ms")) == ["latency_ratio", "latency_ms"]


def test_less_than_a_millisecond_is_an_amount() -> None:
    assert failures(with_value(0.001, *LAST, "latency_p50_ms")) == []


@pytest.mark.parametrize("share", [-0.1, 1.1, 91])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    assert failures(with_value(share, *LAST, "top1")) == ["top1_of_predictions", "top1", "top1_drop"]
    assert failures(with_value(share, *FIRST, "top1")) == ["top1_drop"]


def test_a_share_may_be_0_or_1() -> None:
    assert failures(with_value(0, *FIRST, "top1")) == []
    assert failures(evidence_of(text(table(ours=())))) == []


def test_a_difference_below_zero_is_none() -> None:
    assert failures(with_value(-0.5, "infra", "huge", "difference")) == ["golden_difference"]


def test_of_several_cases_the_first_that_failed_is_named() -> None:
    bad = {"difference": None, "same_top1": False, "repeatable": False}
    verdict = judge(with_value({"fine": full().infra["huge"], "one": bad, "other": bad}, "infra"))  # type: ignore[index]
    found = [one_check(verdict, name) for name in MET]
    assert [(check.value, check.where) for check in found] == [(None, "one"), (2.0, "one"), (2.0, "one")]


def test_a_drop_on_the_limit_passes_in_spite_of_rounding() -> None:
    assert 0.91 - 0.9 > 0.01
    assert failures(full()) == []
    assert failures(with_value(0.910001, *FIRST, "top1")) == ["top1_drop"]


def test_a_better_model_has_a_drop_below_zero() -> None:
    verdict = judge(with_value(0.86, *FIRST, "top1"), max_top1_drop=0.0)
    assert verdict.passed
    assert one_check(verdict, "top1_drop").value == pytest.approx(-0.04)


def test_a_limit_of_null_is_left_out() -> None:
    given = with_value(1e6, *LAST, "latency_p50_ms", given=with_value(1e9, *FIRST, "latency_p50_ms"))
    assert failures(given) == ["latency_ms"]
    verdict = judge(given, max_latency_ms=None, max_zst_bytes=None)
    assert verdict.passed
    left_out = {"latency_ms", "zst_bytes"}
    assert [check.name for check in verdict.checks] == [name for name in CHECKS if name not in left_out]


def test_the_sentence_names_what_was_and_what_must_be() -> None:
    verdict = judge(with_value(1001, *LAST, "size_bytes"))
    assert sentence(verdict) == "refused: size_bytes is 1001 but must be <= 1000"
    verdict = judge(with_value(False, "infra", "huge", "same_top1"))
    assert sentence(verdict) == "refused: golden_not_same_top1 (huge) is 1.0 but must be <= 0"
    assert reason(one_check(verdict, "golden_not_same_top1")) in sentence(verdict)


# The table of predictions


PREDICTIONS: dict[str, bytes] = {
    "none": b"",
    "no row": text(table()[:1]),
    "no CSV": b"\xff\xfe\x00",
    "no header": text(table()[1:]),
    "a cut line": text(table())[:-12],
    "a longer line": text([*table()[:-1], [*table()[-1], "more"]]),
    "a bare carriage return": text(table()).replace(b"cat,cat", b"cat\r,cat", 1),
}


@pytest.mark.parametrize("predictions", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_what_is_no_table_of_predictions_is_refused(predictions: bytes) -> None:
    """Even if the report names it."""
    given = with_value(0.9, *LAST, "top1", given=evidence_of(predictions))
    names = ["top1_of_predictions", "top1_vs_champion", "top1_by_label", "top1_by_device"]
    assert rows(predictions) == []
    assert failures(given) == names
    stale = with_value(predictions, "predictions")
    assert failures(stale) == ["predictions_sha256", *names]


def test_one_image_is_a_table_too() -> None:
    assert rows(text(table()[:2])) == [dict(zip(*table()[:2], strict=True))]
    assert [entry.images for entry in judge(evidence_of(text(table()[:2]))).slices["device"]] == [1]


def test_predictions_of_another_run_are_refused() -> None:
    other = text(table(ours=OURS[1:]))
    assert failures(full()._replace(predictions=other)) == ["predictions_sha256", "top1_of_predictions"]


@pytest.mark.parametrize("column", ["actual", "predicted", "champion"])
def test_predictions_without_a_column_are_none(column: str) -> None:
    cells = table()
    cells[0][cells[0].index(column)] = "other"
    assert rows(text(cells)) == []


def test_names_with_commas_quotes_and_other_letters_are_counted_right() -> None:
    odd = {"cat": 'a, "cat"', "dog": "größe\nzwei", "owl": "=1+1", "fox": " fox "}
    cells = [[odd.get(cell, cell) for cell in row] for row in table()]
    verdict = gate(evidence_of(text(cells)), config.Gate.model_validate(LIMITS), tuple(odd[name] for name in CLASSES))
    assert verdict.passed
    assert [entry.value for entry in verdict.slices["label"]] == [odd[name] for name in CLASSES]


# The champion


def test_the_bound_and_the_counts_are_those_of_the_paired_comparison() -> None:
    found = judge(full()).comparison
    assert found is not None
    assert (found.images, found.wins, found.losses, found.wrong) == (200, WINS, LOSSES, len(OURS))
    assert found.difference == pytest.approx((WINS - LOSSES) / 200)
    assert (found.lower, found.upper) == (
        noninferiority.lower_bound(WINS, LOSSES, 200, 0.95),
        -noninferiority.lower_bound(LOSSES, WINS, 200, 0.95),
    )
    assert (found.champion, found.confidence, found.traded) == ("v3", 0.95, False)
    assert (found.margin, found.times_smaller, found.times_faster) == (MARGIN, 1.5, 1.5)


LOWER = noninferiority.lower_bound(WINS, LOSSES, 200, 0.95)


def test_the_margin_from_both_sides() -> None:
    """The bound must be above minus the margin: on it is not enough."""
    assert failures(full(), champion={"margin": -LOWER + 1e-6}) == []
    assert failures(full(), champion={"margin": -LOWER}) == ["top1_vs_champion"]
    assert failures(full(), champion={"margin": -LOWER - 1e-6}) == ["top1_vs_champion"]


def test_more_confidence_needs_a_wider_margin() -> None:
    assert failures(full(), champion={"margin": -LOWER + 1e-6, "confidence": 0.99}) == ["top1_vs_champion"]


def test_a_champion_that_is_better_in_production_keeps_its_place() -> None:
    given = evidence_of(text(table(theirs=())))
    assert "top1_vs_champion" in failures(given)


TRADE = {"margin": MARGIN, "min_times_smaller": 1.5, "min_times_faster": 1.5}
SMALL = 0.02  # a margin that is missed


def judge_trade(given: Evidence, margin: float = SMALL, **changes: Any) -> Any:
    return judge(given, champion={"margin": margin, "trade": TRADE | changes})


def test_a_trade_is_used_and_said() -> None:
    assert failures(full(), champion={"margin": SMALL}) == ["top1_vs_champion"]
    verdict = judge_trade(full())
    assert (verdict.passed, verdict.comparison.traded) == (True, True)
    assert one_check(verdict, "top1_vs_champion").limit == -MARGIN
    assert sentence(verdict).endswith(f"checks passed, with accuracy traded within a margin of {MARGIN}")


def test_a_margin_that_the_bound_is_on_is_missed_and_traded() -> None:
    assert judge_trade(full(), margin=-LOWER).comparison.traded is True


def test_a_trade_is_not_used_where_the_margin_holds() -> None:
    verdict = judge_trade(full(), margin=-LOWER + 1e-6)
    assert (verdict.passed, verdict.comparison.traded) == (True, False)
    assert one_check(verdict, "top1_vs_champion").limit == -(-LOWER + 1e-6)
    assert "traded" not in sentence(verdict)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("report", "champion", "size_bytes"), 1499),
        (("report", "champion", "latency_p50_ms"), 2.999),
        *((("report", "champion", key), useless) for key in ("size_bytes", "latency_p50_ms") for useless in USELESS),
        (("report", "champion", "size_bytes"), 0),
    ],
    ids=str,
)
def test_a_trade_needs_all_of_its_conditions(keys: tuple[str, ...], value: Any) -> None:
    verdict = judge_trade(with_value(value, *keys))
    assert (verdict.passed, verdict.comparison.traded) == (False, False)
    check = one_check(verdict, "top1_vs_champion")
    assert (check.passed, check.limit) == (False, -SMALL)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_what_is_too_many_times_smaller_to_be_a_number_is_no_gain() -> None:
    given = with_value(1e308, "report", "champion", "size_bytes", given=with_value(0.1, *LAST, "size_bytes"))
    verdict = judge_trade(given)
    assert (verdict.comparison.traded, verdict.comparison.times_smaller) == (False, None)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_a_trade_has_a_margin_too() -> None:
    verdict = judge(full(), champion={"margin": SMALL, "trade": TRADE | {"margin": -LOWER}})
    assert one_check(verdict, "top1_vs_champion").passed is False
    assert "traded" not in sentence(verdict)


def test_a_champion_without_answers_is_not_one_that_is_always_wrong() -> None:
    names = ["top1_vs_champion"]
    assert failures(evidence_of(text(table(theirs=None)))) == names
    assert failures(with_table(lambda cells: cells[7].__setitem__(2, ""))) == names


def first_promotion(**changes: Any) -> Evidence:
    given = with_value(None, "report", "champion", given=evidence_of(text(table(theirs=None))))
    champion: dict[str, Any] = {"version": None, "model_sha256": None, "withdrawn": [], "bootstrap": True}
    return given._replace(champion=champion | changes)


@pytest.mark.parametrize("value", [1, 0.5, True, None])
def test_two_that_are_no_sha256_are_not_the_same_model(value: Any) -> None:
    given = with_value(value, "champion", "model_sha256", given=with_value(value, "report", "champion", "sha256"))
    assert failures(given) == ["champion_sha256"]


def test_the_first_promotion_needs_the_word_for_it() -> None:
    verdict = judge(first_promotion())
    assert (verdict.passed, verdict.comparison) == (True, None)
    assert [check.name for check in verdict.checks] == [
        *SAME, *THRESHOLDS, "champion", "top1_by_label", "top1_by_device", *MET
    ]  # fmt: skip
    assert failures(first_promotion(bootstrap=False)) == ["champion"]
    assert failures(first_promotion(bootstrap=False), bootstrap=True) == []
    assert one_check(verdict, "champion").value == "bootstrap"


def test_that_word_changes_nothing_where_there_is_a_champion() -> None:
    worse = evidence_of(text(table(theirs=())))
    names = failures(worse)
    assert "top1_vs_champion" in names
    assert failures(with_value(True, "champion", "bootstrap", given=worse), bootstrap=True) == names
    unsure = with_value(True, "champion", "bootstrap", given=without("champion", "version"))
    assert failures(unsure, bootstrap=True) == ["champion", "top1_vs_champion"]
    assert failures(with_value({}, "champion"), bootstrap=True) == FACED


def test_a_champion_that_was_weighed_is_not_forgotten() -> None:
    """The record says there is none, and the benchmark weighed one: one of the two is of another run."""
    given = full()._replace(champion=first_promotion().champion)
    assert failures(given) == ["champion", "champion_sha256", "top1_vs_champion"]


# Slices


def test_every_value_of_a_column_is_listed_with_its_numbers() -> None:
    slices = judge(full()).slices
    assert [(entry.value, entry.images, entry.judged) for entry in slices["label"]] == [
        (name, 50, True) for name in CLASSES
    ]
    owl = slices["label"][2]
    assert owl.difference is not None
    assert owl.top1 == 0.84
    assert (owl.lower, owl.upper) == noninferiority.proportion(42, 50, 0.95)
    assert owl.difference.difference == pytest.approx(-0.1)
    assert (owl.difference.wins, owl.difference.losses) == (0, 5)
    assert [(entry.value, entry.images) for entry in slices["device"]] == [
        ("camera", 99), ("phone", 97), ("scanner", 4)
    ]  # fmt: skip


def test_a_slice_that_the_champion_has_right_and_ours_all_wrong_has_lost_everything() -> None:
    given = evidence_of(text(table(ours=range(100, 150), theirs=())))
    check = one_check(judge(given), "regression_by_label")
    assert (check.value, check.where, check.passed) == (1.0, "owl", False)


def test_a_slice_in_which_the_champion_left_an_image_out_has_no_difference() -> None:
    """Its missing answer would count as a wrong one, to our advantage."""
    given = with_table(lambda cells: cells[2].__setitem__(2, ""))
    first, second = judge(given).slices["label"][:2]
    assert (first.difference, second.difference is None) == (None, False)


def test_the_worst_slice_is_named() -> None:
    verdict = judge(full())
    assert one_check(verdict, "top1_by_label").where == "owl"
    assert one_check(verdict, "regression_by_label").where == "owl"
    assert one_check(verdict, "regression_by_label").value == 0.1


def test_a_slice_with_few_images_is_listed_and_not_judged() -> None:
    wrong = {*OURS, 60, 110, 161} - {1, 51, 151}  # all of the scanner's, and as many others right
    given = evidence_of(text(table(ours=wrong)))
    limits = {"min_count": 5, "min_top1": 0.5}
    verdict = judge(given, slices={"device": limits})
    scanner = verdict.slices["device"][2]
    assert (scanner.value, scanner.top1, scanner.judged) == ("scanner", 0.0, False)
    assert one_check(verdict, "top1_by_device").passed
    verdict = judge(given, slices={"device": limits | {"min_count": 4}})
    expected = Check(name="top1_by_device", value=0.0, operator=">=", limit=0.5, where="scanner", passed=False)
    assert one_check(verdict, "top1_by_device") == expected


@pytest.mark.parametrize("column", ["label", "device"])
def test_nothing_to_judge_fails(column: str) -> None:
    limit = {"min_count": 101, "min_top1": 0.0, "max_regression": 1.0}
    assert failures(full(), slices={column: limit}) == [f"top1_by_{column}", f"regression_by_{column}"]


def test_a_class_without_any_image_fails() -> None:
    limits = config.Gate.model_validate(LIMITS | {"slices": {"label": {"min_count": 1, "min_top1": 0.0}}})
    assert gate(full(), limits, CLASSES).passed
    verdict = gate(full(), limits, (*CLASSES, "emu"))
    check = one_check(verdict, "top1_by_label")
    assert (check.value, check.where, check.passed) == (None, "emu", False)
    assert sentence(verdict) == "refused: top1_by_label (emu) is None but must be >= 0.0"
    emu = verdict.slices["label"][-1]
    assert (emu.images, emu.judged, emu.top1) == (0, False, None)


def test_a_column_that_the_predictions_lack_fails() -> None:
    names = failures(full(), slices={"site": {"min_count": 1, "min_top1": 0.0, "max_regression": 1.0}})
    assert names == ["top1_by_site", "regression_by_site"]
    assert failures(full(), slices={"site": {"min_count": 1, "min_top1": 0.0}}) == ["top1_by_site"]


def test_a_missing_value_is_no_slice() -> None:
    """Up to schema 3 it was one, and could be the only one that was judged."""
    some = with_table(lambda cells: [row.__setitem__(3, "") for row in cells[1:] if row[3] == "phone"])
    assert "" not in [entry.value for entry in judge(some).slices["device"]]
    assert failures(some) == []
    all_of_them = with_table(lambda cells: [row.__setitem__(3, "") for row in cells[1:]])
    assert judge(all_of_them).slices["device"] == []
    assert "top1_by_device" in failures(all_of_them)
    before = gate(all_of_them, config.Gate.model_validate(LIMITS), CLASSES, missing_is_a_slice=True)
    assert [entry.value for entry in before.slices["device"]] == [""]


def parts_of_test(cells: list[list[str]]) -> None:
    """The last 20 images of each class are new."""
    cells[0].append("test_part")
    for index, row in enumerate(cells[1:]):
        row.append("new" if index % 50 >= 30 else "frozen")


def test_what_is_new_in_test_is_told_apart_and_judged_only_where_that_is_asked_for() -> None:
    assert judge(full()).test_parts == []
    given = with_table(parts_of_test)
    frozen, new = judge(given).test_parts
    assert (frozen.value, frozen.images, new.value, new.images) == ("frozen", 120, "new", 80)
    wrong = sum(index % 50 >= 30 for index in OURS)
    assert (new.top1, frozen.top1) == (1 - wrong / 80, 1 - (len(OURS) - wrong) / 120)
    assert new.difference is not None
    assert new.difference.wins == sum(index % 50 >= 30 for index in set(THEIRS) - set(OURS))
    assert failures(given) == []
    limit = {"min_count": 50, "min_top1": 0.95}
    assert failures(given, slices={"test_part": limit}) == ["top1_by_test_part"]
    assert one_check(judge(given, slices={"test_part": limit}), "top1_by_test_part").where == "frozen"


def test_balanced_accuracy_is_counted_from_the_predictions_and_judged_if_it_has_a_limit() -> None:
    """Half of the images are cats, which are all right; of the others a quarter is wrong."""
    cells = [["actual", "predicted", "champion"], *([["cat"] * 3] * 150)]
    for name in CLASSES[1:]:
        cells += [[name, name, name]] * 36 + [[name, "cat", name]] * 12
    given = evidence_of(text(cells))
    assert "balanced_accuracy" not in {one.name for one in judge(given).checks}
    found = one_check(judge(given, min_balanced_accuracy=0.8125), "balanced_accuracy")
    assert (found.value, found.passed) == (0.8125, True)
    assert "balanced_accuracy" in failures(given, min_balanced_accuracy=0.8126)


@pytest.mark.parametrize("cells", [[["actual", "predicted", "champion"]], [["cat"], ["cat"]], table()[:101]])
def test_without_an_image_of_each_class_there_is_no_balanced_accuracy(cells: list[list[str]]) -> None:
    found = one_check(judge(evidence_of(text(cells)), min_balanced_accuracy=0), "balanced_accuracy")
    assert (found.value, found.passed) == (None, False)


def test_a_label_that_is_no_class_counts_all_the_same() -> None:
    def relabel(cells: list[list[str]]) -> None:
        for row in cells[1:51]:
            row[0] = "emu"

    given = with_table(relabel)
    assert "emu" in [one.value for one in judge(given).slices["label"]]
    verdict = gate(given, config.Gate.model_validate(LIMITS | {"min_balanced_accuracy": 0.9}), CLASSES[1:])
    right = sum(index not in OURS for index in range(50, 200))
    assert one_check(verdict, "balanced_accuracy").value == pytest.approx(right / 200)


def with_classes(ours: object, theirs: object) -> Evidence:
    return with_value(theirs, "report", "champion_classes", given=with_value(ours, "report", "classes"))


@pytest.mark.parametrize(
    ("ours", "theirs", "change", "says"),
    [
        (["a", "b"], ["b", "a"], None, "all 23 checks passed"),
        (["a", "b"], None, None, "all 23 checks passed"),
        (None, ["a", "b"], None, "all 23 checks passed"),
        (["a"], ["a", "b", "c"], ((), ("b", "c")), "passed; without b, c, which it can"),
        (["a", "b", "c"], ["a", "b"], (("c",), ()), "passed; with c, which the champion cannot answer"),
        (
            ["a", "c"],
            ["a", "b"],
            (("c",), ("b",)),
            "passed; with c, which the champion cannot answer; without b, which it can",
        ),
    ],
)
def test_other_classes_than_the_champion_has_are_told(ours: object, theirs: object, change: Any, says: str) -> None:
    verdict = judge(with_classes(ours, theirs))
    assert (verdict.class_change and (verdict.class_change.added, verdict.class_change.removed)) == change
    assert sentence(verdict).endswith(says)


@pytest.mark.parametrize(
    ("declared", "named", "classes"),
    [
        (["a", "b"], ["c"], ("a", "b")),
        ("auto", ["c", "d"], ("c", "d")),
        ("auto", None, ()),
        ("auto", ["c", 1], ()),
        ("auto", "cd", ()),
    ],
)
def test_classes_that_are_left_to_the_data_are_those_of_the_benchmark(
    declared: object, named: object, classes: tuple[str, ...]
) -> None:
    assert classes_of(declared, {"classes": named}) == classes


# What would pass


def remedy(verdict: Verdict, name: str) -> str:
    return next(text for one, _, text in explain(verdict) if one.name == name)


def test_every_check_has_its_own_meaning_and_every_column_the_same() -> None:
    meanings = {one.name: meaning for one, meaning, _ in explain(judge(full()))}
    assert meanings["top1_drop"] == "top-1 lost against the fine-tuned fp32 model"
    assert [meanings[name] for name in BY_COLUMN[:2]] == [meanings[name] for name in BY_COLUMN[2:]]
    assert len(set(meanings.values())) == len(CHECKS) - 2


def test_what_there_is_to_spare() -> None:
    verdict = judge(with_value(990, *LAST, "size_bytes"))
    assert remedy(verdict, "size_bytes") == "10 to spare"
    assert remedy(verdict, "model_sha256") == ""


@pytest.mark.parametrize(
    ("given", "name", "says"),
    [
        (with_value(1001, *LAST, "size_bytes"), "size_bytes", "at most 1000: 1 over"),
        (with_value(0.89, *LAST, "top1"), "top1", "at least 0.9: 0.01 short"),
        (with_value(None, *LAST, "top1"), "top1", "the value is missing or not a finite number: run the pipeline"),
        (with_value(DATA, *LAST, "sha256"), "model_sha256", "run the pipeline again, so that what is judged is what"),
        (first_promotion(bootstrap=False), "champion", "put bootstrap: true under gate in params.yaml, or give"),
        (with_value({}, "champion"), "champion", "the value is missing"),
        (with_value({}, "champion"), "rolled_back", "the value is missing"),
        (with_value([MODEL], "champion", "withdrawn"), "rolled_back", "`weighin rollback` to that version by name"),
        (with_value(1.0, "infra", "huge", "difference"), "golden_difference", "find out what this process does"),
        (with_value(False, "infra", "huge", "repeatable"), "golden_not_repeatable", "at most 0: 1 over"),
    ],
)
def test_a_failed_check_says_what_would_pass(given: Evidence, name: str, says: str) -> None:
    assert remedy(judge(given), name).startswith(says)


def test_a_check_that_somebody_wrote_is_explained_too() -> None:
    odd = Check(name="top1", value="high", operator=">=", limit=0.9, passed=False)
    ((_, _, said),) = explain(judge(full()).model_copy(update={"checks": (odd,)}))
    assert said == "run the pipeline again, so that what is judged is what was measured"


@pytest.mark.parametrize(
    ("theirs", "margin"),
    [
        *((THEIRS, margin) for margin in (0.001, 0.02, 0.035, 0.05)),
        (THEIRS, 1e-6 - noninferiority.lower_bound(WINS, LOSSES - 2, 200, 0.95)),  # two just suffice
        (OURS[1:], 0.005),
        (OURS[3:], 0.001),
    ],
)
def test_so_many_more_images_right_pass_and_one_less_does_not(theirs: tuple[int, ...], margin: float) -> None:
    """With one less it is refused, whichever they are: those that the champion has right, or both have wrong."""
    verdict = judge(evidence_of(text(table(theirs=theirs))), champion={"margin": margin})
    words = remedy(verdict, "top1_vs_champion").split()
    assert words[1:7] == ["more", "of", "200", "images", "right,", "those"]
    lost, both = sorted(set(OURS) - set(theirs)), sorted(set(OURS) & set(theirs))

    def passes(count: int, order: list[int]) -> bool:
        given = evidence_of(text(table(ours=set(OURS) - set(order[:count]), theirs=theirs)))
        return bool(one_check(judge(given, champion={"margin": margin}), "top1_vs_champion").passed)

    count = int(words[0])
    assert 0 < count <= len(OURS)
    assert (count > len(lost)) is (theirs != THEIRS)
    assert passes(count, lost + both)
    assert not passes(count - 1, lost + both)
    assert not passes(count - 1, both + lost)


def test_all_images_right_may_be_just_enough() -> None:
    def said(margin: float) -> str:
        verdict = judge(evidence_of(text(table(ours=(0, 1, 2), theirs=()))), champion={"margin": margin})
        return remedy(verdict, "top1_vs_champion")

    assert said(0.02).startswith("3 more of 200 images right, those first that the champion has right; or more test")
    assert said(0.01) == "a wider margin than 0.01, or more test images than 200"


def test_where_no_image_more_would_help() -> None:
    """Ours is right everywhere and so is the champion but for one: 200 images cannot make sure of a millionth."""
    verdict = judge(evidence_of(text(table(ours=(), theirs=()))), champion={"margin": 1e-6})
    assert remedy(verdict, "top1_vs_champion") == "a wider margin than 1e-06, or more test images than 200"


# The stage


@pytest.fixture(scope="session")
def shipped(networks: Callable[[str], Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "model.onnx"
    onnx.save(reduce(networks("mlp").quantized)[0], path)
    return path


def prepare(repository: Repository, shipped: Path, **limits: Any) -> dict[str, Any]:
    """A report that fits the files in the repository, and the files."""
    repository.params(gate=LIMITS | {"slices": {"label": LIMITS["slices"]["label"]}} | limits)
    model, reports = repository.model("reduce"), repository.report("benchmark").parent
    model.write_bytes(shipped.read_bytes())
    data = repository.split("test", [png(seed, 28) for seed in range(8)])
    (reports / "predictions.csv").write_bytes(text(table()))
    np.savez_compressed(reports / "golden.npz", **golden_of(model, data, 1))  # type: ignore[arg-type]
    content: dict[str, Any] = evidence_of(text(table())).report
    content["stages"]["reduce"]["sha256"] = files.sha256(model)
    content["data_sha256"] = files.sha256(data)
    content["golden_sha256"] = files.sha256(reports / "golden.npz")
    packed = model.with_name("model.onnx.zst")
    packed.write_bytes(files.pack(shipped.read_bytes()))
    content["packed_sha256"] = files.sha256(packed)
    repository.report("benchmark").write_text(json.dumps(content))
    (repository.root / "data/champion").mkdir()
    (repository.root / "data/champion/champion.json").write_text(json.dumps(full().champion))
    return content


def test_the_stage_passes_the_model_that_was_weighed(repository: Repository, shipped: Path) -> None:
    content = prepare(repository, shipped)
    done = repository.run("gate")
    assert (done.returncode, done.stderr) == (0, "")
    verdict: Any = Verdict.model_validate_json(repository.report("gate").read_text())
    assert verdict.passed is True, sentence(verdict)
    assert done.stdout == f"gate: {sentence(verdict)}\n"
    assert verdict.model_sha256 == content["stages"]["reduce"]["sha256"]
    assert verdict.data_sha256 == content["data_sha256"]
    assert verdict.params_sha256 == files.sha256(repository.root / "params.yaml")
    assert verdict.code_sha256 == files.digest(judging_code(ROOT))
    assert verdict.champion == full().champion
    assert verdict.infra.keys() > {"batch-1", "batch-3", "batch-7", "zeros", "huge"}
    assert all(case == {"difference": 0, "same_top1": True, "repeatable": True} for case in verdict.infra.values())


def poison(repository: Repository) -> None:
    """One weight of the shipped model is another."""
    model = onnx.load(repository.model("reduce"))
    bias = next(one for one in graph.initializers(model).values() if numpy_helper.to_array(one).dtype == np.int32)
    values = numpy_helper.to_array(bias).copy()
    values[0] += 10_000
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(model, repository.model("reduce"))


def damage(repository: Repository) -> None:
    (repository.root / "data/reports/golden.npz").write_bytes(b"no archive")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (poison, {"model_sha256", "golden_difference"}),
        (lambda repository: repository.model("reduce").write_bytes(b"no model"), {"model_sha256", *MET}),
        (lambda repository: repository.split("test", [png(1)]), {"data_sha256"}),
        (lambda repository: repository.params(gate=LIMITS | {"max_size_bytes": 999, "slices": {}}), {"size_bytes"}),
        (damage, {"golden_sha256", *MET}),
    ],
    ids=["another weight", "no model", "swapped data", "limit", "damaged golden outputs"],
)
def test_a_refusal_is_a_verdict_and_no_error(
    repository: Repository, shipped: Path, change: Any, names: set[str]
) -> None:
    prepare(repository, shipped)
    change(repository)
    done = repository.run("gate")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gate: refused: " in done.stdout
    verdict: Any = Verdict.model_validate_json(repository.report("gate").read_text())
    assert verdict.passed is False
    found = {check.name for check in verdict.checks if not check.passed}
    assert found - {"golden_not_same_top1"} == names - {"golden_not_same_top1"}
    assert names <= found


def test_a_champion_of_another_version_is_refused(repository: Repository, shipped: Path) -> None:
    """The one that the benchmark weighed has left production meanwhile."""
    prepare(repository, shipped)
    record = repository.root / "data/champion/champion.json"
    record.write_text(json.dumps(full().champion | {"version": "v4", "model_sha256": MODEL}))
    repository.run("gate")
    verdict: Any = Verdict.model_validate_json(repository.report("gate").read_text())
    assert [check.name for check in verdict.checks if not check.passed] == ["champion_sha256"]


@pytest.mark.parametrize("name", ["reports/benchmark.json", "champion/champion.json"])
@pytest.mark.parametrize(("content", "said"), [(None, "is missing"), ("{", "is not JSON")])
def test_evidence_that_cannot_be_read_is_an_error(
    repository: Repository, shipped: Path, name: str, content: str | None, said: str
) -> None:
    prepare(repository, shipped)
    path = repository.root / "data" / name
    path.unlink() if content is None else path.write_text(content)
    assert f"data/{name} {said}" in repository.sentence("gate")
    assert not repository.report("gate").exists()


@pytest.mark.parametrize(
    "name",
    ["reports/predictions.csv", "reports/golden.npz", "models/reduce/model.onnx", "models/reduce/model.onnx.zst"],
)
def test_a_file_that_is_missing_is_an_error(repository: Repository, shipped: Path, name: str) -> None:
    prepare(repository, shipped)
    (repository.root / "data" / name).unlink()
    done = repository.run("gate")
    assert done.returncode == 1
    assert done.stderr == f"error: data/{name}: No such file or directory\n"
    assert not repository.report("gate").exists()


def test_the_evidence_is_what_lies_here(repository: Repository, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = prepare(repository, shipped)
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = evidence(config.load().benchmark)
    assert (found.report, found.predictions, found.champion) == (content, text(table()), full().champion)
    assert (found.golden_sha256, found.packed_sha256) == (content["golden_sha256"], content["packed_sha256"])


@pytest.fixture
def recorded(repository: Repository, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """The verdict on what lies here, written where the gate does, with limits changed, and parts of the verdict too."""
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def write(parts: dict[str, Any] | None = None, infra: Any = None, **limits: Any) -> Verdict:
        if not repository.model("reduce").exists():
            prepare(repository, shipped, **limits)
        params = config.load()
        found = evidence(params.benchmark)
        verdict = gate(found._replace(infra=infra or found.infra), params.gate, config.class_names(params))
        repository.report("gate").write_text(json.dumps(verdict.to_json() | (parts or {})))
        return verdict

    return write


def test_a_verdict_is_confirmed_by_the_evidence_that_lies_here(recorded: Callable[..., Verdict]) -> None:
    verdict = recorded()
    assert verdict.passed
    assert confirm(config.load()) == verdict
    met: Any = verdict.infra
    last_bit = {name: case | {"difference": 1e-7} for name, case in met.items()}
    verdict = recorded(infra=last_bit)
    assert confirm(config.load()) == verdict


@pytest.mark.parametrize("limits", [{}, {"max_size_bytes": 999}], ids=["passed", "refused"])
def test_a_verdict_that_the_evidence_does_not_come_to_is_an_error(
    recorded: Callable[..., Verdict], limits: dict[str, Any]
) -> None:
    verdict = recorded(**limits)
    recorded({"passed": not verdict.passed})
    with pytest.raises(StageError, match="is not what its evidence comes to: `dvc repro --force --single-item gate`"):
        confirm(config.load())


def test_what_passed_has_to_meet_its_golden_outputs_here_and_now(
    recorded: Callable[..., Verdict], repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = recorded().infra
    bad = {"huge": {"difference": 0.5, "same_top1": True, "repeatable": False}}
    monkeypatch.setattr(probe, "meet", lambda *_: bad)
    recorded(infra=good)
    with pytest.raises(StageError) as raised:
        confirm(config.load())
    assert str(raised.value).endswith(
        "is not what its evidence comes to: golden_difference (huge) is 0.5 but must be <= 0.001; "
        "golden_not_repeatable (huge) is 1.0 but must be <= 0"
    )
    refused = recorded()
    assert not refused.passed
    assert confirm(config.load()) == refused  # what is refused anyway may fail here, too


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{}", '{"schema_version": 2}', '{"schema_version": 3}', '{"schema_version": 3, "passed": 1}'],
)
def test_what_is_no_verdict_of_this_version_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gate.json"
    path.write_text(content)
    with pytest.raises(StageError, match="is no verdict of this version of Weighin: `weighin run` makes one"):
        read(path)
    whole = judge(full()).to_json()
    path.write_text(json.dumps(whole))
    assert read(path) == judge(full())
    path.write_text(json.dumps(whole | {"schema_version": 2}))
    with pytest.raises(StageError, match="is no verdict of this version"):
        read(path)
