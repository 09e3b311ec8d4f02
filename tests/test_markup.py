"""Names of classes, paths and values are shown as they are, on the terminal, in Prefect's pages and in model cards."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Repository
from markdown_it import MarkdownIt

from flows import terminal
from flows.registry import markdown
from flows.registry.findings import Finding, Report
from flows.registry.reproduce import Comparison, Result
from tasks.core import config
from tasks.core.report import Measurements
from tasks.gate import SliceResult, Verdict, check, sentence

NAMES = ["[red]", "[/other]", "[bold]x[/bold]", "[link=http://a.b]c[/link]", ":smile:", r"a\[b", "naïve 🐈"]


def verdict(name: str) -> Verdict:
    one = SliceResult(value=name, images=50, judged=True, top1=0.5, lower=0.4, upper=0.6)
    return Verdict(
        schema_version=2, passed=False, checks=(check("top1", 0.5, ">=", 0.6, name),), slices={name: [one]},
        champion=None, comparison=None, class_change=None,
        test_parts=[],
        infra=None, model_sha256="", data_sha256="", params_sha256="", code_sha256="",
    )  # fmt: skip


FINETUNED = dict.fromkeys(Measurements.model_fields, 1) | {
    "sha256": "", "class_recall": {}, "confusion": [], "operators": {},
}  # fmt: skip


def decision(name: str) -> dict[str, Any]:
    told = sentence(verdict(name))
    return {"stages": {"finetune": FINETUNED}, "champion": None, "verdict": told, "outcome": "refused",
            "model": name, "version": None, "recorded": True}  # fmt: skip


def reproduction(name: str) -> Result:
    one = Comparison("finetune", name, "0", "1")
    return Result(False, [name], 0.5, 0.5, 0.0, [one])


STEP = {"version": "v0.1.0", "created": "", "commit": "", "code": {"dirty": False, "commit": ""}, "model_sha256": "",
        "data_sha256": ""}  # fmt: skip
SHOWN: dict[str, Callable[[str], None]] = {
    "run": lambda name: terminal.run(decision(name)),
    "status": lambda name: terminal.status({"model": name, "production": None, "latest": None}),
    "gate": lambda name: terminal.verdict(verdict(name)),
    "audit": lambda name: terminal.audit(Report(findings=[Finding(name, name, name, name, "record")])),
    "reproduce": lambda name: terminal.reproduction(reproduction(name)),
    "lineage of a version": lambda name: terminal.origins([STEP | {"weights": {"path": name}, "sources": {name: "0"}}]),
    "lineage of a file": lambda name: terminal.uses(
        [{"decision": "a", "outcome": "b", "path": name, "split": "c", "pixels_sha256": ""}]
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", SHOWN)
def test_the_terminal_shows_a_name_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    SHOWN[command](name)
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_weighin_params_shows_a_class_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repository: Repository, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    repository.params()
    loaded = config.load(repository.root / "params.yaml").model_copy(update={"classes": (name, "other")})
    terminal.params(loaded)
    assert f"{name}, other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "shown"), [("\x1b[31mred", r"\x1b[31mred"), ("a\nb", r"a\nb"), ("a\rb", r"a\rb"), ("\udce9", r"\udce9")]
)
def test_a_control_character_is_shown_and_does_nothing(
    capsys: pytest.CaptureFixture[str], name: str, shown: str
) -> None:
    terminal.verdict(verdict(name))
    output = capsys.readouterr().out
    assert shown in output
    assert name not in output


MARKED = [
    "a|b", "<b>", "</b>", "*x*", "**x**", "_x_", "__x__", "`x`", "``", "~~x~~", "[a](http://b.c)", "![a](b.png)", "[a]",
    "<http://a.b>", "<!-- x -->", "&amp;", "&#42;", "\\", "a\\|b", r"\*x\*", "max_top1_drop", "x < y & z > w", "# x",
    "a_b_", "_", "*", "-", "naïve 🐈",
]  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def texts(source: str) -> list[str]:
    """The text of each block, of which none may be anything else."""
    found = []
    for token in PARSER.parse(source):
        assert token.type not in ("html_block", "code_block", "fence"), source
        if token.type == "inline":
            assert {child.type for child in token.children or ()} <= {"text", "text_special"}, source
            found.append("".join(child.content for child in token.children or ()))
    return found


@pytest.mark.parametrize("name", MARKED)
def test_markdown_shows_a_name_as_it_is_in_a_line_and_in_a_table(name: str) -> None:
    assert texts(f"Looked at: {markdown.escape(name)}.") == [f"Looked at: {name}."]
    lines = [*markdown.table("a", "b"), markdown.row(name, "c")]
    assert texts("\n".join(lines)) == ["a", "b", name, "c"]


def test_markdown_keeps_a_name_of_two_lines_in_one() -> None:
    assert texts("x " + markdown.escape("a\n\n# b")) == ["x a # b"]
