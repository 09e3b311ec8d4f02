"""What a run shows in the Prefect UI: the data verdict, the table of stages, the gate."""

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.registry.markdown import escape, row, table
from tasks.core import files, paths
from tasks.core.files import Json
from tasks.core.report import read_report, stage_rows


def show_data_verdict() -> None:
    """The expectations on the data and what was observed."""
    verdict = files.read_json(paths.report("validate"))
    rows = [
        {key: str(expectation[key]) for key in ("name", "severity", "passed", "observed")}
        for expectation in verdict["expectations"]
    ]
    description = f"{verdict['rows']} images: data {'passed' if verdict['passed'] else 'did not pass'}"
    create_table_artifact(rows, key="data-verdict", description=description)


def show_stages() -> None:
    """The table of stages."""
    report = read_report(paths.report("benchmark"))
    rows = stage_rows(report.stages, report.champion)
    formatted = [
        row | {name: round(value, 4) for name, value in row.items() if isinstance(value, float)} for row in rows
    ]
    create_table_artifact(formatted, key="stages", description="every stage and the champion in ONNX Runtime on test")


def show_gate(sentence: str) -> None:
    """The gate's checks."""
    verdict = files.read_json(paths.report("gate"))
    lines = [*table("check", "where", "value", "operator", "limit", "passed")]
    for one in verdict["checks"]:
        where = "" if one["where"] is None else one["where"]
        lines.append(
            row(one["name"], where, one["value"], one["operator"], one["limit"], "yes" if one["passed"] else "no")
        )
    told = escape(sentence)
    create_markdown_artifact("\n".join([f"**{told}**", "", *lines]), key="gate", description=told)


def show_front(found: Json) -> None:
    """The Pareto front of a search."""
    rows = [row | {"compress": str(row["compress"])} for row in found["front"]]
    description = f"the Pareto front of {len(found['trials'])} trials, study {found['study']}"
    create_table_artifact(rows, key="front", description=description)
