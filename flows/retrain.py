"""The pipeline, top to bottom: data in, a decision out."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.logging import get_run_logger

from flows import artifacts, dvc_bridge
from flows.production.checkout import adopt, exclusive
from flows.registry import materials
from flows.registry.record import Superseded, open_registry
from flows.rehearsal import rehearse
from flows.stage import stage
from tasks.core import config, files, paths, shares
from tasks.core.errors import StageError, WeighinError
from tasks.core.report import read_report
from tasks.gate import confirm, sentence
from tasks.images import listing

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
    hide_user_error_tracebacks()
    with exclusive(get_run_logger().info):
        asked = adopt(Path(params))
        content = config.load()
        if content.compress:
            from tasks.budget import costs  # brings ONNX Runtime

            costs.read(
                paths.DEVICE, content.benchmark.threads
            )  # what `prune` plans with: known before fine-tuning begins
        prepare(content, budget=content.compress is not None)
        if content.finetune.weights.source == "production":
            start()
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
            except Superseded as lost:
                get_run_logger().info("superseded: %s", lost)


def prepare(params: config.Params, budget: bool) -> None:
    """Bring the data up to date and accept them; the plan is tried beside it, or once the classes are known."""
    say = get_run_logger().info
    listing.walk(Path(params.ingest.path))  # DVC would wait for a FIFO for good, for one
    with rehearse(params, say, budget) if params.classes else contextlib.nullcontext():
        splits()
        ingest()
        materials.require_hashed(Path.cwd(), Path("dvc.lock").read_bytes())
        validate()
        accept_data()
    if not params.classes:
        with rehearse(params, say, budget):
            pass


@task(name="accept data", task_run_name="accept data")
def accept_data() -> None:
    """Show the data verdict; `StageError` if a critical expectation failed."""
    artifacts.show_data_verdict()
    verdict = files.read_json(paths.report("validate"))
    failed = [one["sentence"] for one in verdict["expectations"] if one["severity"] == "critical" and not one["passed"]]
    if failed or verdict["passed"] is not True:
        more = f" ({len(failed) - 1} more in {paths.report('validate')})" if len(failed) > 1 else ""
        raise StageError(f"validate: {(failed or ['the data did not pass'])[0]}{more}")


@task(name="splits", task_run_name="splits")
def splits() -> None:
    """Lay the splits of earlier runs' images in data/splits, so that `ingest` keeps them."""
    say, weights = get_run_logger().info, config.load().finetune.weights
    is_current = paths.KNOWN_SPLITS.exists() and dvc_bridge.is_current("ingest", say)
    if open_registry(Path.cwd()).lay_splits(weights.model, is_current=is_current):
        say("splits: those of earlier runs are kept")


@task(name="start", task_run_name="start")
def start() -> None:
    """Write the weights of the production model to data/start, where `finetune` begins.

    Only if `finetune` has to run: what it once began with stays as it is while nothing else changes.
    """
    params, say = config.load(), get_run_logger().info
    weights = params.finetune.weights
    if not dvc_bridge.is_current("finetune", say):
        version = open_registry(Path.cwd(), weights.model).lay_start(paths.weights(weights.stage))
        say("start: %s of %s", version, weights.model or params.model)


@task(name="champion", task_run_name="champion")
def champion(bootstrap: bool) -> None:
    """Lay what the reduced model has to face in data/champion: the version in production, if there is one."""
    challenger = files.sha256(paths.onnx("reduce"))
    found = open_registry(Path.cwd()).lay_champion(challenger, bootstrap)
    get_run_logger().info("champion: %s", found.version or "none yet")


@task(name="decide", task_run_name="decide")
def decide(asked: bytes) -> dict[str, Any]:
    """Show the stages and the gate, and record the promotion or the refusal.

    `StageError` if params.yaml is no longer what this run began with: the record would name values that made nothing.
    Or if the verdict is not what the gate itself comes to.
    `Superseded` if another version came into production meanwhile.
    """
    if paths.PARAMS.read_bytes() != asked:
        raise StageError(f"{paths.PARAMS} changed while the run was at work: run again")
    params = config.load()
    report = read_report(paths.report("benchmark"))
    if params.compress:
        val_top1 = [files.read_json(paths.report(name))["val_top1"] for name in ("finetune", "quantize")]
        made = {
            "max_top1_drop": shares.subtract(*val_top1),
            "max_size_bytes": report.stages["reduce"].size_bytes,
            "max_latency_ms": round(report.stages["reduce"].latency_p50_ms, 6),
        }
        for line in find_exceeded(params.compress, made):
            get_run_logger().warning(line)
    verdict = sentence(confirm(params))
    artifacts.show_stages()
    artifacts.show_gate(verdict)
    decision, recorded = open_registry(Path.cwd(), say=get_run_logger().info).record()
    outcome = f"{decision.outcome} {decision.model} {decision.version or ''}".strip()
    get_run_logger().info("%s (%s), %s", outcome, "new" if recorded else "already recorded", verdict)
    weighed = report.model_dump(mode="json", include={"stages", "champion"})
    return decision.model_dump(mode="json") | {"recorded": recorded, "verdict": verdict} | weighed


def find_exceeded(budget: config.Compress, made: dict[str, float]) -> list[str]:
    """What the model exceeds of its budget, a sentence each: `prune` plans with a table, and in float32."""
    return [
        f"{made[name]:,} is over compress.{name} {limit:,}: the gate has limits of its own"
        for name, limit in budget
        if limit is not None and made[name] > limit
    ]


def hide_user_error_tracebacks() -> None:
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
