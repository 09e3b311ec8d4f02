"""What the commands show to people: tables and sentences on the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tasks.core import config
from tasks.core.files import Json
from tasks.core.report import Measurements, stage_rows

if TYPE_CHECKING:
    from flows.registry.findings import Report
    from flows.registry.reproduce import Result
    from tasks.gate import SliceResult, Verdict


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
    console = Console()
    console.print(table)
    console.print(f"gate: {content['verdict']}", highlight=False, soft_wrap=True)
    console.print(_outcome(content), highlight=False, soft_wrap=True)


def _outcome(decision: Json) -> str:
    colour = {"refused": "red", "held": "yellow"}.get(decision["outcome"], "green")
    what = f"{decision['model']} {decision['version'] or ''}".strip()
    known = "" if decision["recorded"] else " (nothing changed since that decision)"
    return f"decision: [{colour}]{decision['outcome']}[/{colour}] {what}{known}"


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
    console = Console()
    console.print(table)
    console.print("To have one of them, put its line into params.yaml; its stages are in DVC's cache already:")
    for row in content["front"]:
        console.print(f"  {line(row)}  # trial {row['trial']}", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"front: {len(content['front'])} of {len(content['trials'])} trials, in {FOLDER}/front.png", highlight=False
    )


def status(content: Json) -> None:

    console = Console()
    production, latest = content["production"], content["latest"]
    if production is None:
        console.print(f"production: no version of {content['model']} yet", highlight=False)
    else:
        console.print(
            f"production: {production['model']} {production['version']}, promoted {production['created']}, "
            f"model SHA-256 {production['model_sha256']}",
            highlight=False,
            soft_wrap=True,
        )
    if latest is None:
        console.print("latest decision: none; start with `weighin run`", highlight=False)
    else:
        failed = f", failed: {', '.join(latest['failed'])}" if latest["failed"] else ""
        console.print(f"latest decision: {latest['outcome']} {latest['created']}{failed}", highlight=False)


def params(params: config.Params) -> None:

    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True, style="bold")
    table.add_column("value, bounds, meaning", overflow="fold")
    for name, value, bounds, meaning in config.explain(params):
        table.add_row(name, f"[cyan]{value}[/cyan]" + (f"  ({bounds})" if bounds else ""))
        if meaning:
            table.add_row("", f"[dim]{meaning}[/dim]")
    Console().print(table)


def verdict(content: "Verdict") -> None:
    """Every check of a verdict, with what it means and what would pass it or is to spare; then the slices."""
    from tasks import gate

    console = Console()
    for one, meaning, remedy in gate.explain(content):
        mark = "[green]ok[/green]" if one.passed else "[red]no[/red]"
        where = f" ({one.where})" if one.where is not None else ""
        value, limit = _short(one.value), _short(one.limit)
        spare = f" [dim]({remedy})[/dim]" if one.passed and remedy else ""
        console.print(f"{mark} [bold]{one.name}[/bold]{where}: {value}, must be {one.operator} {limit}{spare}")
        console.print(f"   [dim]{meaning}[/dim]", highlight=False)
        if not one.passed:
            console.print(f"   would pass: {remedy}", highlight=False, soft_wrap=True)
    for column, slices in content.slices.items():
        console.print(_slices(column, slices))
    console.print(f"gate: {gate.sentence(content)}", highlight=False, soft_wrap=True)


def _slices(column: str, slices: list["SliceResult"]) -> Table:
    table = Table(column, "images", "top-1", "interval", "against the champion", "judged")
    for one in slices:
        difference = one.difference
        table.add_row(
            one.value or "(none)",
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

    console = Console()
    for one in report.findings:
        colour = "red" if one.severity == "damage" else "yellow"
        console.print(f"[{colour}]{one.decision}[/{colour}]: {one.file}", highlight=False, soft_wrap=True)
        console.print(f"  expected {one.expected}", highlight=False, soft_wrap=True, markup=False)
        console.print(f"  found    {one.found}", highlight=False, soft_wrap=True, markup=False)
    console.print(summarize(report), highlight=False, soft_wrap=True)


def reproduction(result: "Result") -> None:
    """Each artifact, the first difference, and whether the version is what it was."""
    console = Console()
    table = Table("stage", "artifact", "SHA-256", "")
    for one in result.artifacts:
        table.add_row(
            one.stage, one.path, one.recorded[:16], "[green]same[/green]" if one.same else "[red]differs[/red]"
        )
    console.print(table)
    if result.first:
        console.print(f"the first difference arises in {result.first.stage}: {result.first.path}", highlight=False)
    if result.differs:
        console.print(f"another kind of machine: {', '.join(result.differs)} differ from the record", highlight=False)
    console.print(
        f"top-1 {result.top1_reproduced:.2%}, recorded {result.top1_recorded:.2%}: "
        f"{'reproduced' if result.holds else 'not reproduced'}",
        highlight=False,
    )


def origins(steps: list[Json]) -> None:
    """A version, what it was made of, and the versions that it was warmed from."""
    console = Console()
    for step in steps:
        console.print(f"[bold]{step['version']}[/bold]  {step['created']}, commit {step['commit']}", highlight=False)
        dirty = " with changes" if step["code"]["dirty"] else ""
        rows = {
            "model": step["model_sha256"],
            "test split": step["data_sha256"],
            "code": f"{step['code']['commit']}{dirty}",
            "weights": ", ".join(f"{key} {value}" for key, value in step["weights"].items()),
            **{f"source {path}": sha256 for path, sha256 in list(step["sources"].items())[:20]},
        }
        for name, value in rows.items():
            console.print(f"  {name}: {value}", highlight=False, soft_wrap=True, markup=False)
        if len(step["sources"]) > 20:
            console.print(f"  and {len(step['sources']) - 20} more source files (--json has them all)", highlight=False)


def uses(rows: list[dict[str, str]]) -> None:
    """The decisions whose models saw a file."""
    console = Console()
    table = Table("decision", "outcome", "as", "split")
    for row in rows:
        table.add_row(row["decision"], row["outcome"], row["path"], row["split"])
    console.print(table if rows else "no model in the registry saw this file")
