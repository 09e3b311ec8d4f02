"""The command line: `weighin run | status | schedule | params`."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.core import config, paths
from tasks.core.errors import ParamsError, WeighinError

app = typer.Typer(
    help="Retrain an image classifier, make it small and fast, weigh it, and promote it only if it makes weight.",
    epilog="Start with `weighin run`. Then change params.yaml (`weighin params` explains it) and run again.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

PROMOTED, FAILED, USAGE, REFUSED = 0, 1, 2, 3
QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file: params.yaml, or a recipe.", metavar="FILE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]


@app.command()
def run(params: ParamsFile = paths.PARAMS, as_json: AsJson = False) -> None:
    """Bring every stage up to date and decide: promote or refuse.

    Stages whose code, parameters and inputs have not changed are skipped. A recipe given with --params becomes
    the repository's params.yaml.

    Exit status: **0** promoted, **3** refused by the gate, **1** failed, **2** wrong usage or parameters.

    Examples: `weighin run`, or `weighin run --params data/recipes/mlp-digits.yaml`
    """
    with _sentences():
        chosen = _in_repository(params)
        config.load(chosen)
        from flows.retrain import retrain
        from flows.schedule import require_server

        require_server()
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # a closed terminal cancels
        decision = retrain(str(chosen))
        _print(decision, as_json, _show_run)
    raise typer.Exit(PROMOTED if decision["outcome"] == "promoted" else REFUSED)


@app.command()
def status(
    model: Annotated[str | None, typer.Option(help="Model name; the one in params.yaml if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the model in production and the latest decision.

    Both come from the branch `registry`; `gto show` and `gto history` read the same tags.
    """
    with _sentences():
        from tasks.core import registry

        _in_repository(paths.PARAMS)
        name = model or config.load().model
        found = {"production": registry.production(Path.cwd(), name), "latest": registry.latest(Path.cwd(), name)}
        content = {key: value and value.model_dump(mode="json") for key, value in found.items()}
        _print({"model": name} | content, as_json, _show_status)


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help='When to run, as cron says it: "0 3 * * 1" is Mondays at three.')],
    params: ParamsFile = paths.PARAMS,
) -> None:
    """Serve the pipeline on a schedule until you stop it.

    Uses the Prefect server at PREFECT_API_URL, or starts one here. For a fleet of workers use the deployment in
    deploy/prefect.yaml instead.

    Example: `weighin schedule --cron "0 3 * * 1"`
    """
    with _sentences():
        chosen = _in_repository(params)
        config.load(chosen)
        from flows.schedule import serve

        serve(cron, chosen)


@app.command("params")
def show_params(params: ParamsFile = paths.PARAMS, as_json: AsJson = False) -> None:
    """Show every parameter with its value, its bounds and what it means.

    Checks the file too: a typo, a missing key or a value out of bounds is named, and the exit status is 2.
    """
    with _sentences():
        loaded = config.load(_in_repository(params))
        _print(loaded.model_dump(mode="json", by_alias=True), as_json, lambda _: _show_params(loaded))


@contextmanager
def _sentences() -> Iterator[None]:
    """One sentence and an exit status instead of a traceback, for what the user can put right."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        yield
    except ParamsError as error:
        sentence, code = str(error), USAGE
    except WeighinError as error:
        sentence, code = str(error), FAILED
    except OSError as error:
        sentence, code = f"{error.filename or 'input or output'}: {error.strerror or error}", FAILED
    except KeyboardInterrupt:
        sentence, code = "interrupted: the next `weighin run` goes on from here", FAILED
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


def _in_repository(params: Path) -> Path:
    """Go to the repository's root, from wherever in it; returns the parameter file's path as seen from there."""
    chosen = params.absolute() if params.exists() else params
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), None)
    if root is None:
        raise ParamsError(f"{here} is not in a Weighin repository: no dvc.yaml here or above")
    os.chdir(root)
    return chosen.relative_to(root) if chosen.is_absolute() and chosen.is_relative_to(root) else chosen


def _print(content: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        show(content)


def _show_run(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from flows.artifacts import stage_rows

    table = Table("stage", title=None)
    for column in ("top-1", "bytes", "p50 ms", "smaller", "faster"):
        table.add_column(column, justify="right")
    for row in stage_rows(content):
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


def _outcome(decision: dict[str, Any]) -> str:
    colour = "green" if decision["outcome"] == "promoted" else "red"
    what = f"{decision['model']} {decision['version'] or ''}".strip()
    known = "" if decision["recorded"] else " (nothing changed since that decision)"
    return f"decision: [{colour}]{decision['outcome']}[/{colour}] {what}{known}"


def _show_status(content: dict[str, Any]) -> None:
    from rich.console import Console

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


def _show_params(params: config.Params) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True, style="bold")
    table.add_column("value, bounds, meaning", overflow="fold")
    for name, value, bounds, meaning in config.explained(params):
        table.add_row(name, f"[cyan]{value}[/cyan]" + (f"  ({bounds})" if bounds else ""))
        if meaning:
            table.add_row("", f"[dim]{meaning}[/dim]")
    Console().print(table)
