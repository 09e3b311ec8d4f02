"""The command line: `weighin` and its commands. Each imports what it needs when it is called."""

import atexit
import dataclasses
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.core import config, paths
from tasks.core.errors import MENDABLE, ParamsError, WeighinError, describe
from tasks.core.quiet import set_quiet

app = typer.Typer(
    epilog="Start with `weighin run`. Then change params.yaml (`weighin params` explains it) and run again.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

keys_app = typer.Typer(help="The key that signs decisions.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

PROMOTED, FAILED, USAGE, REFUSED, HELD = 0, 1, 2, 3, 4

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file: params.yaml, or a recipe.", metavar="FILE")]
Model = Annotated[str | None, typer.Option(help="Model name; the one in params.yaml if left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"weighin {version('weighin')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Retrain an image classifier, make it small and fast, weigh it, and promote it only if it makes weight."""
    atexit.register(gc.freeze)  # at its end, Python would look through all objects of the libraries


@app.command()
def run(
    params: ParamsFile = paths.PARAMS,
    bootstrap: Annotated[
        bool, typer.Option("--bootstrap", help="Let the first promotion go without a champion to compare with.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring every stage up to date and decide: promote or refuse.

    Stages whose code, parameters and inputs have not changed are skipped. A recipe given with --params becomes
    the repository's params.yaml. The model in production runs on the same test images, and may be
    better by less than `gate.champion.margin` only.

    Exit status: **0** promoted, **3** refused by the gate, **4** held until it is approved, **1** failed, **2** wrong
    usage or parameters.

    Examples: `weighin run`, or `weighin run --params data/recipes/mlp-digits.yaml`
    """
    with _sentences():
        chosen = _in_repository(params)
        config.load(chosen)
        from flows import terminal
        from flows.server import connect

        with connect():
            from flows.retrain import retrain

            decision = retrain(str(chosen), bootstrap)

        _print(decision, as_json, terminal.run)
    raise typer.Exit({"refused": REFUSED, "held": HELD}.get(decision["outcome"], PROMOTED))


@app.command()
def search(
    trials: Annotated[int, typer.Option(min=0, help="How many budgets to try, beside those tried before.")] = 20,
    params: ParamsFile = paths.PARAMS,
    dask: Annotated[
        str | None, typer.Option(help="Scheduler of a Dask cluster; each worker runs a trial.", metavar="ADDRESS")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search the budgets worth having: the Pareto front of bytes, milliseconds and top-1 on val.

    Each trial is a budget for `compress`, from the least that can be left of the backbone to all of it. It reuses the
    fine-tuned weights and what is in DVC's cache, in a folder of its own. The next call goes on with the same study as
    long as data, weights, code and parameters of the trials are the same. Dask's workers run in this folder where they
    see it, or in clones to which `dvc fetch` brought the data; PREFECT_API_URL has to reach one server.

    Exit status: **0** there is a front, **1** failed, **2** wrong usage or parameters.

    Examples: `weighin search --trials 30`, or `weighin search --dask tcp://10.0.0.5:8786`
    """
    with _sentences():
        chosen = _in_repository(params)
        config.load(chosen)
        from flows import server, terminal

        if dask is not None:
            server.require_server()  # each worker has to reach it, so that one of our own is none
            from flows.search import over

            found = over(dask, str(chosen), trials)
        else:
            with server.connect():
                from flows.search import search

                found = search(str(chosen), trials)

        _print(found, as_json, terminal.front)


@app.command()
def status(
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Show the model in production and the latest decision.

    Both come from the branch `registry`; `gto show` and `gto history` read the same tags.
    """
    with _sentences():
        from flows.registry.parameters import read_place
        from flows.registry.view import read_view

        _in_repository(paths.PARAMS)
        name = model or read_place(Path.cwd()).model
        view = read_view(Path.cwd(), name, None)
        view.require_sound()
        found = {"production": view.standing.production, "latest": view.standing.latest}
        content = {key: link and link.decision.model_dump(mode="json") for key, link in found.items()}
        from flows import terminal

        _print({"model": name} | content, as_json, terminal.status)


@app.command("gate")
def show_gate(
    explain: Annotated[
        bool, typer.Option("--explain", help="Each check with its meaning and what would pass it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the verdict on the model that lies here.

    Exit status: **0** it makes weight, **3** it is refused, **1** there is no verdict.
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        from tasks import gate
        from tasks.core import files

        verdict = gate.read(paths.report("gate"))
        if files.sha256(paths.onnx("reduce")) != verdict.model_sha256:
            raise WeighinError(f"{paths.report('gate')} is about another model than {paths.onnx('reduce')} is now")
        if explain and not as_json:
            from flows import terminal

            terminal.verdict(verdict)
        else:
            _print(verdict.to_json(), as_json, lambda _: print(f"gate: {gate.sentence(verdict)}"))
    raise typer.Exit(PROMOTED if verdict.passed else REFUSED)


@app.command()
def approve(
    reason: Annotated[str, typer.Option(help="Why; it is recorded with your name.")],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Put the model that the latest decision holds into production, once it is audited and has run here.

    With `approval: true` under `gate` in params.yaml, what passes is held until then.

    Example: `weighin approve --reason "field test of week 12"`
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        _require_reason(reason)
        from flows.registry.record import open_registry

        decision = open_registry(Path.cwd(), model, _say(as_json)).approve(reason)
        text = f"decision: approved {decision.model} {decision.version}"
        _print(decision.model_dump(mode="json"), as_json, lambda _: print(text))


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")],
    version: Annotated[str | None, typer.Argument(help="Version to go back to; the one before if left out.")] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Put an earlier version into production again, once it is audited and has run here.

    The version that goes is refused from then on, until it is put back by name. The next challenger has to face the
    version that is back.

    Example: `weighin rollback --reason "wrong on night images"`, or `weighin rollback v0.2.0 --reason "..."`
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        _require_reason(reason)
        from flows.registry.record import open_registry

        decision = open_registry(Path.cwd(), model, _say(as_json)).roll_back(version, reason)
        text = f"decision: rolled back {decision.model} from {decision.replaces} to {decision.version}"
        _print(decision.model_dump(mode="json"), as_json, lambda _: print(text))


@app.command()
def audit(
    version: Annotated[
        str | None, typer.Argument(help="Version whose artifacts are read; production if left out.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Read the artifacts of every decision.")] = False,
    remote: Annotated[bool, typer.Option("--remote", help="Read the git remote and DVC's remote too.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="What a record lacks, so that it cannot be checked, is a finding too.")
    ] = False,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Check every decision from the first one on, and hash every artifact again.

    The chain, the signatures, each verdict from its evidence, tags and pointers; the artifacts of what is in
    production, of a version, or with --all of every decision; and the files that lie here.

    A decision is read by what it was written with, and its verdict judged again by the judge of its time. What its
    record lacks is told, in yellow, and is a finding with --strict.

    Exit status: **0** everything holds, **1** there are findings, each with what was expected and what was found.

    Examples: `weighin audit`, or `weighin audit v0.2.0 --remote`
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        from flows.registry.audit import ALL, PRODUCTION, audit
        from flows.registry.parameters import read_place

        place = read_place(Path.cwd())
        elsewhere = (place.registry.remote or "origin") if remote else None
        artifacts = ALL if everything else version or PRODUCTION
        report = audit(Path.cwd(), model or place.model, artifacts, elsewhere)
        from flows import terminal

        content = dataclasses.asdict(report) | {"findings": [one._asdict() for one in report.findings]}
        _print(content, as_json, lambda _: terminal.audit(report))
    raise typer.Exit(FAILED if report.damage or (strict and report.unchecked) else PROMOTED)


@app.command()
def reproduce(
    version: Annotated[str, typer.Argument(help="Version to make again.")],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Make a version again from its code, parameters and data, in a clean worktree, and compare.

    Exit status: **0** reproduced, **1** not; then the first artifact that differs is named.

    Example: `weighin reproduce v0.1.0`
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        from flows import terminal
        from flows.registry.parameters import read_place
        from flows.registry.reproduce import reproduce

        result = reproduce(Path.cwd(), model or read_place(Path.cwd()).model, version, _say(as_json))
        content = result._asdict() | {"artifacts": [one._asdict() | {"same": one.same} for one in result.artifacts]}
        _print(content, as_json, lambda _: terminal.reproduction(result))
    raise typer.Exit(PROMOTED if result.holds else FAILED)


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(metavar="VERSION|FILE", help="A version such as v0.1.0, or a data file.")],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Show what a version was made of, or every model that saw a data file.

    Examples: `weighin lineage v0.1.0`, or `weighin lineage data/raw/my-images/cat/1.jpg`
    """
    with _sentences():
        start = Path.cwd()
        _in_repository(paths.PARAMS)
        from flows import terminal
        from flows.registry import lineage as lines
        from flows.registry.parameters import read_place

        if re.fullmatch(r"v\d+\.\d+\.\d+", what):
            steps = lines.backward(Path.cwd(), model or read_place(Path.cwd()).model, what)
            _print(steps, as_json, terminal.origins)
        else:
            file = Path(os.path.relpath(start / what, Path.cwd())) if (start / what).exists() else Path(what)
            _print(lines.forward(Path.cwd(), file), as_json, terminal.uses)


@app.command()
def reduce(
    file: Annotated[Path, typer.Argument(help="A quantized ONNX file (QDQ), whose dead channels are zero.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; FILE.reduced.onnx if left out.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave constants as they are.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is dead in an ONNX file of your own, and pack its constants, as the stage reduce does.

    The result gives the same bits as the file on 200 random inputs, or nothing is written.

    Example: `weighin reduce model.onnx --output small.onnx`
    """
    with _sentences():
        from tasks.reduce import reduce_file

        target = output or file.parent / f"{file.stem}.reduced.onnx"
        found = reduce_file(file, target, pack=not plain)
        text = f"reduce: {found['size_bytes_before']:,} to {found['size_bytes_after']:,} bytes, in {target}"
        _print(found, as_json, lambda _: print(text))


@app.command()
def profile(params: ParamsFile = paths.PARAMS, as_json: AsJson = False) -> None:
    """Measure this machine for `compress`: each int8 layer of the backbone at each width, and whole networks.

    Writes data/device.json, which belongs in git: the plan for a budget is made from it. Run it on the device, or on
    its like, with nothing else at work, whenever the device, the backbone, the image size, the classes or
    benchmark.threads change; it is about one backbone at a time. Takes two or three minutes at 64 pixels.
    """
    with _sentences():
        chosen = _in_repository(params)
        content = config.load(chosen)
        from flows.profile import profile

        found = profile(content, paths.DEVICE)
        counts = f"{found['layers']} measurements of layers and {found['networks']} of networks"
        text = f"profile: {counts} on {found['processor']}, in {paths.DEVICE}"
        _print(found, as_json, lambda _: print(text))


@keys_app.command()
def rotate() -> None:
    """Sign with a new key from now on; what the old one signed stays valid.

    The change of deploy/trusted_keys is for review, as every change there.
    """
    with _sentences():
        _in_repository(paths.PARAMS)
        from flows.registry import keys, refs
        from flows.registry.chain import read_chain

        newest = next(read_chain(Path.cwd(), refs.look(Path.cwd()).tip), None)
        decided = datetime.fromisoformat(newest.decision.created) if newest else datetime.min.replace(tzinfo=UTC)
        old, new = keys.rotate(Path.cwd(), max(datetime.now(UTC), decided))  # a decision may be a second ahead
        print(f"keys: {new} signs from now on, {old} did until now; commit {keys.TRUSTED}")


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help='When to run, as cron says it: "0 3 * * 1" is Mondays at three.')],
    timezone: Annotated[
        str | None, typer.Option(help="Time zone of the schedule, such as Europe/Berlin; this machine's if left out.")
    ] = None,
    params: ParamsFile = paths.PARAMS,
) -> None:
    """Serve the pipeline on a schedule until you stop it, which ends a run that is at work.

    Shows when the next three runs start. A time that daylight saving leaves out is kept an hour off, and one that comes
    twice is kept once.

    Uses the Prefect server at PREFECT_API_URL, or starts one here. For a fleet of workers use the deployment in
    deploy/prefect.yaml instead.

    Example: `weighin schedule --cron "0 3 * * 1"`
    """
    with _sentences():
        chosen = _in_repository(params)
        config.load(chosen)
        from flows.schedule import serve

        serve(cron, timezone, chosen)


@app.command("params")
def show_params(params: ParamsFile = paths.PARAMS, as_json: AsJson = False) -> None:
    """Show every parameter with its value, its bounds and what it means.

    Checks the file too: a typo, a missing key or a value out of bounds is named, and the exit status is 2.
    """
    with _sentences():
        loaded = config.load(_in_repository(params))
        from flows import terminal

        _print(loaded.model_dump(mode="json", by_alias=True), as_json, lambda _: terminal.params(loaded))


def _require_reason(reason: str) -> None:
    if not reason.strip():
        raise ParamsError("--reason is empty: say why, it is recorded")


@contextmanager
def _sentences() -> Iterator[None]:
    """One sentence and an exit status instead of a traceback, for what the user can put right.

    SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that what the command has started ends with it.
    """
    set_quiet()
    _unwind_when_ended()
    try:
        yield
    except KeyboardInterrupt:
        sentence, code = "interrupted: the same command goes on from here", 128 + signal.SIGINT
    except Ended as end:
        sentence, code = f"ended by {end.signal.name}: the same command goes on from here", 128 + end.signal
    except MENDABLE as error:
        sentence, code = describe(error), USAGE if isinstance(error, ParamsError) else FAILED
    else:
        return
    with suppress(OSError):  # a terminal that is closed
        print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


class Ended(SystemExit):
    """The process was told to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number


def _unwind_when_ended() -> None:
    """Make SIGTERM and SIGHUP an exception, but where the command was started to ignore them, as by nohup."""
    hung_up: list[int] = []

    def end(number: int, _: object) -> None:
        raise Ended(signal.SIGHUP if hung_up else signal.Signals(number))

    def hang_up(number: int, _: object) -> None:
        hung_up.append(number)
        os.kill(os.getpid(), signal.SIGTERM)  # Prefect has a handler of its own for it while a flow runs

    for number, handler in ((signal.SIGTERM, end), (signal.SIGHUP, hang_up)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _in_repository(params: Path) -> Path:
    """Go to the repository's root, from wherever in it; returns the parameter file's path as seen from there."""
    chosen = params.absolute() if params.exists() else params
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), None)
    if root is None:
        raise ParamsError(f"{here} is not in a Weighin repository: no dvc.yaml here or above")
    os.chdir(root)
    return chosen.relative_to(root) if chosen.is_absolute() and chosen.is_relative_to(root) else chosen


def _say(as_json: bool) -> Callable[[str], None]:
    """What a command tells meanwhile goes to standard output, unless that is for JSON."""
    return (lambda text: print(text, file=sys.stderr)) if as_json else print


def _print(content: object, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        show(content)
