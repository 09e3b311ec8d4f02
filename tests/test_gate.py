"""gate: every limit from both sides, and everything that is no usable number is refused."""

import copy
import json
from typing import Any

import pytest
from conftest import CLASSES, Repository, png

from tasks.core import config, files
from tasks.gate import gate, sentence

MODEL, DATA = "a" * 64, "b" * 64
LIMITS: dict[str, Any] = {
    "min_top1": 0.9,
    "max_top1_drop": 0.01,
    "max_size_bytes": 1000,
    "max_latency_ratio": 0.5,
    "max_latency_ms": 2.0,
    "min_class_recall": 0.8,
}
CHECKS = ["model_sha256", "data_sha256", "top1", "top1_drop", "size_bytes", "latency_ratio", "class_recall"]


def report() -> dict[str, Any]:
    """Each value lies exactly on its limit."""
    recall = dict.fromkeys(CLASSES, 0.95) | {"owl": 0.8}
    first = {"top1": 0.91, "latency_p50_ms": 4.0}
    last = {"sha256": MODEL, "top1": 0.9, "size_bytes": 1000, "latency_p50_ms": 2.0, "class_recall": recall}
    return {"data_sha256": DATA, "stages": {"finetune": first, "reduce": last}}


def judged(content: Any, **changes: Any) -> dict[str, Any]:
    return gate(content, config.Gate(**(LIMITS | changes)), CLASSES, MODEL, DATA)


def failed(content: Any, **changes: Any) -> list[str]:
    verdict = judged(content, **changes)
    names = [check["name"] for check in verdict["checks"] if not check["passed"]]
    assert verdict["passed"] == (not names)
    json.dumps(verdict, allow_nan=False)
    return names


def with_value(value: Any, *keys: str) -> dict[str, Any]:
    changed: Any = copy.deepcopy(report())
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return dict(changed)


LAST = ("stages", "reduce")


def test_on_every_limit_it_passes() -> None:
    verdict = judged(report())
    assert verdict["passed"] is True
    assert [check["name"] for check in verdict["checks"]] == [*CHECKS, "latency_ms"]
    assert (verdict["model_sha256"], verdict["data_sha256"]) == (MODEL, DATA)
    assert sentence(verdict) == "makes weight: all 8 checks passed"


@pytest.mark.parametrize(
    ("keys", "value", "names"),
    [
        ((*LAST, "top1"), 0.8999, ["top1", "top1_drop"]),
        (("stages", "finetune", "top1"), 0.9101, ["top1_drop"]),
        ((*LAST, "size_bytes"), 1001, ["size_bytes"]),
        ((*LAST, "latency_p50_ms"), 2.001, ["latency_ratio", "latency_ms"]),
        (("stages", "finetune", "latency_p50_ms"), 3.999, ["latency_ratio"]),
        ((*LAST, "class_recall", "owl"), 0.7999, ["class_recall"]),
        ((*LAST, "class_recall", "fox"), 0.7999, ["class_recall"]),
        ((*LAST, "sha256"), "c" * 64, ["model_sha256"]),
        (("data_sha256",), MODEL, ["data_sha256"]),
    ],
)
def test_just_beyond_a_limit_it_fails(keys: tuple[str, ...], value: Any, names: list[str]) -> None:
    assert failed(with_value(value, *keys)) == names


USELESS: list[Any] = [None, float("nan"), float("inf"), float("-inf"), True, False, "0.95", [], {}, 10**400, -(10**400)]


@pytest.mark.parametrize("value", USELESS, ids=lambda value: str(value)[:5])
@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ((*LAST, "sha256"), ["model_sha256"]),
        ((*LAST, "top1"), ["top1", "top1_drop"]),
        ((*LAST, "size_bytes"), ["size_bytes"]),
        ((*LAST, "latency_p50_ms"), ["latency_ratio", "latency_ms"]),
        ((*LAST, "class_recall"), ["class_recall"]),
        ((*LAST, "class_recall", "owl"), ["class_recall"]),
        (LAST, ["model_sha256", "top1", "top1_drop", "size_bytes", "latency_ratio", "class_recall", "latency_ms"]),
        (("stages", "finetune", "top1"), ["top1_drop"]),
        (("stages", "finetune", "latency_p50_ms"), ["latency_ratio"]),
        (("stages", "finetune"), ["top1_drop", "latency_ratio"]),
        (("data_sha256",), ["data_sha256"]),
    ],
)
def test_what_is_no_finite_number_is_refused(keys: tuple[str, ...], names: list[str], value: Any) -> None:
    assert failed(with_value(value, *keys)) == names


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ((*LAST, "top1"), ["top1", "top1_drop"]),
        ((*LAST, "size_bytes"), ["size_bytes"]),
        ((*LAST, "class_recall", "owl"), ["class_recall"]),
        ((*LAST, "sha256"), ["model_sha256"]),
        (("stages", "finetune", "latency_p50_ms"), ["latency_ratio"]),
        (("data_sha256",), ["data_sha256"]),
    ],
)
def test_what_is_missing_is_refused(keys: tuple[str, ...], names: list[str]) -> None:
    content: Any = report()
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    assert failed(content) == names


@pytest.mark.parametrize("content", [{}, [], None, "passed", 1.0, True, {"stages": []}, {"stages": {"reduce": 1}}])
def test_a_report_that_is_none_is_refused(content: Any) -> None:
    assert failed(content) == [*CHECKS, "latency_ms"]


@pytest.mark.parametrize("base", [0, 0.0, -4.0])
def test_a_ratio_needs_a_base_above_zero(base: float) -> None:
    assert failed(with_value(base, "stages", "finetune", "latency_p50_ms")) == ["latency_ratio"]


@pytest.mark.parametrize("amount", [-1, 0])
def test_what_weighs_nothing_was_not_weighed(amount: int) -> None:
    assert failed(with_value(amount, *LAST, "size_bytes")) == ["size_bytes"]
    assert failed(with_value(amount, *LAST, "latency_p50_ms")) == ["latency_ratio", "latency_ms"]


@pytest.mark.parametrize("share", [-0.1, 1.1, 91])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    assert failed(with_value(share, *LAST, "top1")) == ["top1", "top1_drop"]
    assert failed(with_value(share, "stages", "finetune", "top1")) == ["top1_drop"]
    assert failed(with_value(share, *LAST, "class_recall", "owl")) == ["class_recall"]


def test_a_drop_on_the_limit_passes_in_spite_of_rounding() -> None:
    assert 0.91 - 0.9 > 0.01
    assert failed(report()) == []
    assert failed(with_value(0.899999, *LAST, "top1"), min_top1=0.5) == ["top1_drop"]


def test_a_better_model_has_a_drop_below_zero() -> None:
    verdict = judged(with_value(0.95, *LAST, "top1"), max_top1_drop=0.0)
    assert verdict["passed"]
    assert next(check["value"] for check in verdict["checks"] if check["name"] == "top1_drop") == pytest.approx(-0.04)


def test_a_limit_of_null_is_left_out() -> None:
    content = with_value(1e9, "stages", "finetune", "latency_p50_ms")
    content["stages"]["reduce"]["latency_p50_ms"] = 1e6
    assert failed(content) == ["latency_ms"]
    verdict = judged(content, max_latency_ms=None)
    assert verdict["passed"]
    assert [check["name"] for check in verdict["checks"]] == CHECKS


def test_the_sentence_names_what_was_and_what_must_be() -> None:
    assert sentence(judged(with_value(1001, *LAST, "size_bytes"))) == (
        "refused: size_bytes is 1001 but must be <= 1000"
    )


def prepared(repository: Repository) -> dict[str, Any]:
    """A report that fits the files in the repository."""
    repository.params(gate=LIMITS)
    repository.model("reduce").write_bytes(b"a model")
    data = repository.split("test", [png(0)])
    content = report()
    content["stages"]["reduce"]["sha256"] = files.sha256(repository.model("reduce"))
    content["data_sha256"] = files.sha256(data)
    repository.report("benchmark").write_text(json.dumps(content))
    return content


def test_the_stage_passes_the_model_that_was_weighed(repository: Repository) -> None:
    content = prepared(repository)
    done = repository.run("gate")
    assert (done.returncode, done.stderr) == (0, "")
    verdict = json.loads(repository.report("gate").read_text())
    assert verdict["passed"] is True
    assert verdict["model_sha256"] == content["stages"]["reduce"]["sha256"]
    assert verdict["data_sha256"] == content["data_sha256"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda repository: repository.model("reduce").write_bytes(b"another model"), "model_sha256"),
        (lambda repository: repository.split("test", [png(1)]), "data_sha256"),
        (lambda repository: repository.params(gate=LIMITS | {"max_size_bytes": 999}), "size_bytes"),
    ],
    ids=["swapped model", "swapped data", "limit"],
)
def test_a_refusal_is_a_verdict_and_no_error(repository: Repository, change: Any, name: str) -> None:
    prepared(repository)
    change(repository)
    done = repository.run("gate")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"gate: refused: {name} is " in done.stdout
    verdict = json.loads(repository.report("gate").read_text())
    assert verdict["passed"] is False
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == [name]


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "data/reports/benchmark.json is missing"), ("{", "data/reports/benchmark.json is not JSON")],
)
def test_a_report_that_cannot_be_read_is_an_error(repository: Repository, text: str | None, said: str) -> None:
    prepared(repository)
    repository.report("benchmark").unlink() if text is None else repository.report("benchmark").write_text(text)
    assert said in repository.sentence("gate")
    assert not repository.report("gate").exists()
