"""The pipeline, top to bottom: data in, a decision out."""

import logging
import os
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.logging import get_run_logger

from flows import artifacts
from flows.stage import exclusive, stage
from tasks.core import config, files, paths, registry
from tasks.core.errors import ParamsError, StageError, WeighinError
from tasks.gate import confirmed, sentence

ADOPTED = Path(".dvc/tmp/weighin.params.yaml")

ingest = stage("ingest")
validate = stage("validate")
finetune = stage("finetune")
prune = stage("prune")
quantize = stage("quantize")
reduce = stage("reduce")
benchmark = stage("benchmark")
gate = stage("gate")


@flow(name="retrain")
def retrain(params: str = str(paths.PARAMS), bootstrap: bool = False) -> dict[str, Any]:
    """Bring every stage up to date with the parameter file and decide; returns the decision as JSON would have it.

    `bootstrap` lets the first promotion go without a champion. If another version comes into production while this
    run is at work, its champion is no longer the one to beat, and the new one is faced.
    """
    keep_short_what_users_can_mend()
    with exclusive(get_run_logger().info):
        asked = adopt(Path(params))
        content = config.load()
        if content.compress:
            from tasks.core import costs  # brings ONNX Runtime

            costs.read(
                paths.DEVICE, content.benchmark.threads
            )  # what `prune` plans with: known before fine-tuning begins
        ingest()
        validate()
        accept_data()
        finetune()
        prune()
        quantize()
        reduce()
        while True:
            champion(bootstrap)
            benchmark()
            gate()
            try:
                return decide(asked)
            except registry.Superseded as lost:
                get_run_logger().info("superseded: %s", lost)


def adopt(recipe: Path) -> bytes:
    """Make the recipe the repository's params.yaml, which is what the stages and DVC read; returns its content.

    `ParamsError` if the recipe is not usable, or if params.yaml holds changes that exist nowhere else.
    """
    config.load(recipe)
    wanted, present = recipe.read_bytes(), paths.PARAMS.read_bytes() if paths.PARAMS.exists() else b""
    if wanted == present:
        return wanted
    # Lost is nothing that is a recipe, or was one when it was adopted.
    elsewhere = [path.read_bytes() for path in (ADOPTED, *paths.RECIPES.glob("*.yaml")) if path.exists()]
    if present and present not in elsewhere and not registry.is_committed(Path.cwd(), paths.PARAMS):
        raise ParamsError(
            f"{paths.PARAMS} has changes that are not committed: commit them or keep them as a recipe before "
            f"{recipe} takes their place"
        )
    files.write_bytes(ADOPTED, wanted)
    files.write_bytes(paths.PARAMS, wanted)
    return wanted


@task(name="accept data", task_run_name="accept data")
def accept_data() -> None:
    """Show the data verdict; `StageError` if a critical expectation failed."""
    artifacts.show_data_verdict()
    verdict = files.read_json(paths.report("validate"))
    failed = [one["sentence"] for one in verdict["expectations"] if one["severity"] == "critical" and not one["passed"]]
    if failed or verdict["passed"] is not True:
        more = f" ({len(failed) - 1} more in {paths.report('validate')})" if len(failed) > 1 else ""
        raise StageError(f"validate: {(failed or ['the data did not pass'])[0]}{more}")


@task(name="champion", task_run_name="champion")
def champion(bootstrap: bool) -> None:
    """Lay what the reduced model has to face in data/champion: the version in production, if there is one."""
    challenger = files.sha256(paths.onnx("reduce"))
    found = registry.lay_champion(Path.cwd(), config.load().model, challenger, bootstrap)
    get_run_logger().info("champion: %s", found.version or "none yet")


@task(name="decide", task_run_name="decide")
def decide(asked: bytes) -> dict[str, Any]:
    """Show the stages and the gate, and record the promotion or the refusal.

    `StageError` if params.yaml is no longer what this run began with: the record would name values that made nothing.
    Or if the verdict is not what the gate itself comes to.
    `registry.Superseded` if another version came into production meanwhile.
    """
    if paths.PARAMS.read_bytes() != asked:
        raise StageError(f"{paths.PARAMS} changed while the run was at work: run again")
    params = config.load()
    for line in exceeded(params.compress) if params.compress else ():
        get_run_logger().warning(line)
    verdict = sentence(confirmed(params))
    artifacts.show_stages()
    artifacts.show_gate(verdict)
    decision, recorded = registry.record(Path.cwd(), params.model, get_run_logger().info)
    outcome = f"{decision.outcome} {decision.model} {decision.version or ''}".strip()
    get_run_logger().info("%s (%s), %s", outcome, "new" if recorded else "already recorded", verdict)
    report = files.read_json(paths.report("benchmark"))
    weighed = {name: report[name] for name in ("stages", "champion")}
    return decision.model_dump(mode="json") | {"recorded": recorded, "verdict": verdict} | weighed


def exceeded(budget: config.Compress) -> list[str]:
    """What the model exceeds of its budget after all, a sentence each: `prune` plans with a table, and in float32."""
    val = [files.read_json(paths.report(name))["val_top1"] for name in ("finetune", "quantize")]
    made = files.read_json(paths.report("benchmark"))["stages"]["reduce"]
    found = {
        "max_top1_drop": round(val[0] - val[1], 9),  # 0.91 - 0.90 is not over 0.01
        "max_size_bytes": made["size_bytes"],
        "max_latency_ms": round(made["latency_p50_ms"], 6),
    }
    return [
        f"{found[name]:,} is over compress.{name} {limit:,}: the gate has limits of its own"
        for name, limit in budget
        if limit is not None and found[name] > limit
    ]


def keep_short_what_users_can_mend() -> None:
    """No traceback in the log for errors that are one sentence to the user."""

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], WeighinError):
            record.exc_info, record.exc_text = None, None
        return True

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    retrain()
