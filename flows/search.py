"""The search: one budget after another is tried, and what is left is the Pareto front of bytes, milliseconds and top-1.

Optuna's multi-objective TPE asks (Ozaki et al. 2022, JAIR 73), in this process only; a trial may run anywhere. All of
it looks at train and val: reduce alone opens the test split, to prove that it changed no logit.
"""

import io
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from prefect import flow
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner
from ruamel.yaml import YAML

from flows import artifacts, front
from flows.front import FOLDER
from flows.production.checkout import adopt, exclusive
from flows.retrain import finetune, hide_user_error_tracebacks, prepare
from flows.trial import STAGES, Result, end, sweep, trial
from tasks.budget import allocation, costs
from tasks.core import config, files, paths
from tasks.core.errors import ParamsError, StageError
from tasks.core.files import Json

LOCK = Path(".dvc/tmp/weighin.search.lock")
CODE = Path("tasks")
DIGITS = 4  # of a limit in milliseconds
Bounds = dict[str, tuple[float, float]]


@flow(name="search", task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def search(params: str = str(paths.PARAMS), trials: int = 20, workers: int = 1) -> Json:
    """Try so many budgets more, so many at a time; returns what front.json has.

    Stages up to finetune are brought up to date here, the others run in folders of their own. A study belongs to what
    its trials depend on, and goes on where it ended, however it ended. `StageError` if no trial ever ended well.
    """
    hide_user_error_tracebacks()
    say = get_run_logger().info
    with exclusive(say, LOCK):
        with exclusive(say):
            adopt(Path(params))
            costs.read(paths.DEVICE, config.load().benchmark.threads)  # an hour before a trial would say so
            prepare(config.load(), budget=True)
            finetune()
            content = snapshot()
        sweep(Path.cwd())
        chosen = config.read(content[str(paths.PARAMS)], paths.PARAMS)
        study = resume(content, chosen)
        within: Bounds = study.user_attrs["within"]
        say(f"study {study.study_name}: {describe(within)}; prune.blocks and prune.channels are not looked at")
        explore(study, content, within, trials, workers)
        found = front.measure_front(results(study), FOLDER / study.study_name, chosen.benchmark)
        front.write(found)
        artifacts.show_front(found)
        return found


def over(address: str, params: str, trials: int) -> Json:
    """The same search on the workers of a Dask cluster, one trial each at a time.

    `ParamsError` if no scheduler answers there, if it has no workers, or if there is no Prefect server that all of
    them could reach; `StageError` if workers are lost on the way.
    """
    from distributed import Client, KilledWorker
    from prefect.settings import PREFECT_API_URL
    from prefect_dask.task_runners import DaskTaskRunner

    if not PREFECT_API_URL.value():
        raise ParamsError("--dask needs a Prefect server that every worker can reach: set PREFECT_API_URL to one")
    try:
        with Client(address, timeout="10s", set_as_default=False) as client:  # type: ignore[no-untyped-call]
            workers = len(client.nthreads())
    except (OSError, ValueError) as error:
        raise ParamsError(f"no Dask scheduler answers at {address}: {' '.join(str(error).split())}") from None
    if not workers:
        raise ParamsError(f"the Dask scheduler at {address} has no workers: start some with `dask worker {address}`")
    try:
        runner: Any = DaskTaskRunner(address=address)
        return search.with_options(task_runner=runner)(params, trials, workers)
    except KilledWorker as error:
        raise StageError(f"Dask's workers end during a trial: {error}") from None


def snapshot() -> dict[str, bytes]:
    """What a trial needs besides data, by path: code, pipeline, the device's table, and parameters without shares."""
    chosen = [Path("dvc.yaml"), Path("dvc.lock"), paths.DEVICE, *sorted(CODE.rglob("*.py"))]
    params = {str(paths.PARAMS): set_budget(paths.PARAMS.read_bytes())}
    return {str(path): path.read_bytes() for path in chosen} | params


def set_budget(params: bytes, **limits: float) -> bytes:
    """The content of params.yaml with these limits as its budget, and without shares, which cannot go with one."""
    content = YAML(typ="safe").load(params)
    shares = [name for name in ("blocks", "channels") if content["prune"].get(name)]
    content["prune"] = {name: value for name, value in content["prune"].items() if name not in shares}
    content["compress"] = limits or None
    stream = io.BytesIO()
    YAML(typ="safe").dump(content, stream)
    return stream.getvalue()


def bounds(params: config.Params, table: costs.Table) -> Bounds:
    """Between which limits a budget makes a difference: from the least that can be left to the whole network.

    A limit that makes none is left out. `StageError` if the table lacks the backbone, or nothing can go.
    """
    from flows import profile  # brings torch, which Dask's workers and a study that goes on do without
    from tasks.prune import MARGIN

    network = profile.network(params)
    least, whole = (
        allocation.allocate(network, limits, table).cost for limits in (allocation.MINIMAL, allocation.UNLIMITED)
    )
    found = {
        name: (low / margin, high / margin)
        for name, low, high, margin in zip(costs.Cost._fields, least, whole, MARGIN, strict=True)
        if low < high
    }
    if not found:
        raise StageError(f"nothing of {params.finetune.backbone} can go: no budget makes a difference")
    return found


def resume(content: dict[str, bytes], params: config.Params) -> optuna.Study:
    """The study of what these trials depend on, with the `bounds` in its attribute `within`.

    Trials that were cut off have failed, and are tried again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    FOLDER.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{FOLDER / 'studies.db'}",
        study_name=identity(content),
        directions=["minimize", "minimize", "maximize"],
        load_if_exists=True,
    )
    if "within" not in study.user_attrs:
        study.set_user_attr("within", bounds(params, costs.read(paths.DEVICE, params.benchmark.threads)))
    within = study.user_attrs["within"]
    for cut in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut.number, state=TrialState.FAIL)
        if cut.params.keys() == within.keys():
            study.enqueue_trial(cut.params)
    return study


def identity(content: dict[str, bytes]) -> str:
    """The study's name: a hash of every file and every parameter that the stages of a trial depend on."""
    stages = YAML(typ="safe").load(content["dvc.yaml"])["stages"]
    params = YAML(typ="safe").load(content[str(paths.PARAMS)])
    tried = [stages[name] for name in STAGES]
    made = {out for stage in tried for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])}
    read = {dep for stage in tried for dep in stage["deps"]} - made
    sections = {name: params[name] for stage in tried for name in stage.get("params", [])}
    listing = {dep: files.sha256_of(content[dep]) if dep in content else files.sha256(Path(dep)) for dep in read}
    return files.digest(listing | {str(paths.PARAMS): files.sha256_of(files.to_json(sections))})[:12]


def explore(study: optuna.Study, content: dict[str, bytes], within: Bounds, trials: int, workers: int) -> None:
    """Run the trials, so many at a time; whatever ends this early ends those that are at work."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("trials run in the flow only")
    name, runner = str(context.flow_run.id), context.task_runner
    pending: dict[PrefectFuture[Result], optuna.Trial] = {}
    try:
        while trials or pending:
            while trials and len(pending) < workers:
                asked, limits = ask(study, within)
                mine = content | {str(paths.PARAMS): set_budget(content[str(paths.PARAMS)], **limits)}
                pending[trial.submit(asked.number, str(Path.cwd()), name, mine)] = asked
                trials -= 1
            done = next(as_completed(list(pending)))
            tell(study, pending.pop(done), done)
    except BaseException:  # Ctrl-C and cancellation too; it goes on rising
        end(name)
        if client := getattr(runner, "client", None):
            client.run(end, name)
        raise


def ask(study: optuna.Study, within: Bounds) -> tuple[optuna.Trial, dict[str, float]]:
    """The next trial and its limits, log-uniform as long as little is known."""
    # Seeded by its place, so that a study that was interrupted asks what an undisturbed one asks.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    asked = study.ask()
    limits = {
        f"max_{name}": round_up(asked.suggest_float(name, *ends, log=True), name) for name, ends in within.items()
    }
    asked.set_user_attr("compress", limits)
    return asked, limits


def round_up(limit: float, name: str) -> float:
    """The limit as params.yaml would have it: whole bytes, or milliseconds of a few digits."""
    if name == "size_bytes":
        return math.ceil(limit)
    unit = 10.0 ** (math.floor(math.log10(limit)) + 1 - DIGITS)
    return float(f"{math.ceil(limit / unit) * unit:.{DIGITS}g}")


def tell(study: optuna.Study, asked: optuna.Trial, done: PrefectFuture[Result]) -> None:
    """Keep what came out of the trial: its model as a file, its values in the study."""
    try:
        result = done.result()
    except StageError as error:
        asked.set_user_attr("error", str(error))
        study.tell(asked, state=TrialState.FAIL)
        get_run_logger().warning("trial %d failed: %s", asked.number, error)
        return
    files.write_bytes(FOLDER / study.study_name / f"{asked.number}.onnx", result.model)
    study.tell(asked, [result.size_bytes, result.latency_ms, result.val_top1])
    text = f"{result.size_bytes:,} bytes, {result.latency_ms:.4f} ms, val top-1 {result.val_top1:.2%}"
    get_run_logger().info("trial %d: %s", asked.number, text)


def results(study: optuna.Study) -> Json:
    """The trials that ended well, and which of them are the front, smallest first; of equal ones the first."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not complete:
        errors = [one.user_attrs.get("error") for one in study.get_trials(states=(TrialState.FAIL,))]
        told = next((error for error in reversed(errors) if error), "none was made; give --trials")
        raise StageError(f"no trial of study {study.study_name} has ended well: {told}")
    best = {tuple(one.values): one for one in reversed(study.best_trials)}
    return {
        "study": study.study_name,
        "finetune_val_top1": files.read_json(paths.report("finetune"))["val_top1"],
        "trials": [row(one) for one in complete],
        "front": [row(best[values]) for values in sorted(best)],
    }


def row(one: FrozenTrial) -> Json:
    """A trial that ended well."""
    size_bytes, latency_ms, val_top1 = one.values
    return {
        "trial": one.number,
        "size_bytes": round(size_bytes),
        "latency_ms": latency_ms,
        "val_top1": val_top1,
        "compress": one.user_attrs["compress"],
    }


def describe(within: Bounds) -> str:
    """What is searched, in words."""
    units = {"size_bytes": ("bytes", ",.0f"), "latency_ms": ("ms", ".4f")}
    return " and ".join(
        f"{low:{form}} to {high:{form}} {unit}" for name, (low, high) in within.items() for unit, form in [units[name]]
    )
