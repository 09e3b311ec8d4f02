"""What the commands show to people: tables and sentences on the terminal.

Names of classes, paths and values are shown as they are: nothing in them is markup, an emoji or a control sequence.
"""

import unicodedata
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tasks.core import config
from tasks.core.files import Json
from tasks.core.report import Measurements, stage_rows

if TYPE_CHECKING:
    from flows.registry.findings import Report
    from flows.registry.reproduce import Result
    from tasks.gate import SliceResult, Verdict


Part = str | tuple[str, str]  # a plain text, or a text and its style


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)


def _line(*parts: Part) -> Text:
    """The parts in one line; a control character in them is shown as its code."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((_plain(part), style) for part, style in pairs))


def _plain(text: str) -> str:
    controls = {one for one in text if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")}
    return "".join(one.encode("unicode_escape").decode() if one in controls else one for one in text)


def _say(*parts: Part) -> None:
    _console().print(_line(*parts), soft_wrap=True)


def run(content: Json) -> None:
    """The stages, the gate's sentence and the decision."""
    table = Table("stage", title=None)
    for column in ("top-1", "bytes", "p50 ms", "smaller", "faster"):
        table.add_column(column, justify="right")
    stages = {name: Measurements.model_validate(stage) for name, stage in content["stages"].items()}
    champion = content["champion"] and Measurements.model_validate(content["champion"])
    for row in stage_rows(stages, champion):
        table.add_row(
            row["stage"],
            f"{row['top1']:.2%}",
            f"{row['size_bytes']:,}",
            f"{row['latency_p50_ms']:.3f}",
            f"{row['times_smaller']:.1f}x",
            f"{row['times_faster']:.1f}x",
        )
    _console().print(table)
    _say(f"gate: {content['verdict']}")
    colour = {"refused": "red", "held": "yellow"}.get(content["outcome"], "green")
    what = f"{content['model']} {content['version'] or ''}".strip()
    known = "" if content["recorded"] else " (nothing changed since that decision)"
    _say("decision: ", (content["outcome"], colour), f" {what}{known}")


def front(content: Json) -> None:
    """The Pareto front, and what to write into params.yaml for each of its models."""
    from flows.front import FOLDER, line

    table = Table("trial")
    for column in ("bytes", "planned ms", "val top-1", "p50 ms here"):
        table.add_column(column, justify="right")
    for row in content["front"]:
        p50 = row["p50_ms"]
        table.add_row(
            str(row["trial"]),
            f"{row['size_bytes']:,}",
            f"{row['latency_ms']:.4f}",
            f"{row['val_top1']:.2%}",
            "" if p50 is None else f"{p50:.4f}",
        )
    _console().print(table)
    _say("To have one of them, put its line into params.yaml; its stages are in DVC's cache already:")
    for row in content["front"]:
        _say(f"  {line(row)}  # trial {row['trial']}")
    _say(f"front: {len(content['front'])} of {len(content['trials'])} trials, in {FOLDER}/front.png")


def status(content: Json) -> None:
    """The version in production, and the latest decision."""
    production, latest = content["production"], content["latest"]
    if production is None:
        _say(f"production: no version of {content['model']} yet")
    else:
        _say(
            f"production: {production['model']} {production['version']}, promoted {production['created']}, "
            f"model SHA-256 {production['model_sha256']}"
        )
    if latest is None:
        _say("latest decision: none; start with `weighin run`")
    else:
        failed = f", failed: {', '.join(latest['failed'])}" if latest["failed"] else ""
        _say(f"latest decision: {latest['outcome']} {latest['created']}{failed}")


def params(params: config.Params) -> None:
    """Every parameter with its value, its bounds and its meaning."""
    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True, style="bold")
    table.add_column("value, bounds, meaning", overflow="fold")
    for name, value, bounds, meaning in config.explain(params):
        table.add_row(_line(name), _line((value, "cyan"), f"  ({bounds})" if bounds else ""))
        if meaning:
            table.add_row("", _line((meaning, "dim")))
    _console().print(table)


def verdict(content: "Verdict") -> None:
    """Every check of a verdict, with what it means and what would pass it or is to spare; then the slices."""
    from tasks import gate

    for one, meaning, remedy in gate.explain(content):
        mark = ("ok", "green") if one.passed else ("no", "red")
        where = f" ({one.where})" if one.where is not None else ""
        value, limit = _short(one.value), _short(one.limit)
        spare = f" ({remedy})" if one.passed and remedy else ""
        _say(mark, " ", (one.name, "bold"), f"{where}: {value}, must be {one.operator} {limit}", (spare, "dim"))
        _say("   ", (meaning, "dim"))
        if not one.passed:
            _say(f"   would pass: {remedy}")
    for column, slices in content.slices.items():
        _console().print(_slices(column, slices))
    if len(content.test_parts) > 1 and "test_part" not in content.slices:
        _console().print(_slices("test images", content.test_parts))
    _say(f"gate: {gate.sentence(content)}")


def _slices(column: str, slices: list["SliceResult"]) -> Table:
    table = Table(Column(_line(column)), "images", "top-1", "interval", "against the champion", "judged")
    for one in slices:
        difference = one.difference
        table.add_row(
            _line(one.value or "(none)"),
            str(one.images),
            "" if one.top1 is None else f"{one.top1:.1%}",
            f"{one.lower:.1%} to {one.upper:.1%}",
            f"{difference.difference:+.1%} ({difference.lower:+.1%} to {difference.upper:+.1%})" if difference else "",
            "yes" if one.judged else "too few",
        )
    return table


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 20 else f"{text[:8]}…"


def audit(report: "Report") -> None:
    """Every finding with what was expected and found, and the summary."""
    from flows.registry.findings import summarize

    for one in report.findings:
        colour = "red" if one.severity == "damage" else "yellow"
        _say((one.decision, colour), f": {one.file}")
        _say(f"  expected {one.expected}")
        _say(f"  found    {one.found}")
    for line in report.erased:
        _say(line)
    _say(summarize(report))


def reproduction(result: "Result") -> None:
    """Each artifact, the first difference, and whether the version is what it was."""
    table = Table("stage", "artifact", "SHA-256", "")
    for one in result.artifacts:
        same = ("same", "green") if one.same else ("differs", "red")
        table.add_row(one.stage, _line(one.path), one.recorded[:16], _line(same))
    _console().print(table)
    if result.first:
        _say(f"the first difference arises in {result.first.stage}: {result.first.path}")
    if result.differs:
        _say(f"another kind of machine: {', '.join(result.differs)} differ from the record")
    _say(
        f"top-1 {result.top1_reproduced:.2%}, recorded {result.top1_recorded:.2%}: "
        f"{'reproduced' if result.holds else 'not reproduced'}"
    )


def origins(steps: list[Json]) -> None:
    """A version, what it was made of, and the versions that it was warmed from."""
    for step in steps:
        _say((step["version"], "bold"), f"  {step['created']}, commit {step['commit']}")
        dirty = " with changes" if step["code"]["dirty"] else ""
        rows = {
            "model": step["model_sha256"],
            "test split": step["data_sha256"],
            "code": f"{step['code']['commit']}{dirty}",
            "weights": ", ".join(f"{key} {value}" for key, value in step["weights"].items()),
            **{f"source {path}": sha256 for path, sha256 in list(step["sources"].items())[:20]},
        }
        for name, value in rows.items():
            _say(f"  {name}: {value}")
        if len(step["sources"]) > 20:
            _say(f"  and {len(step['sources']) - 20} more source files (--json has them all)")


def uses(rows: list[dict[str, str]]) -> None:
    """The decisions whose models saw a file."""
    if not rows:
        _say("no model in the registry saw this file")
        return
    table = Table("decision", "outcome", "as", "split")
    for row in rows:
        table.add_row(row["decision"], row["outcome"], _line(row["path"]), row["split"])
    _console().print(table)
    for pixels in sorted({row["pixels_sha256"] for row in rows if row["pixels_sha256"]}):
        _say(f"pixels_sha256 {pixels}")
