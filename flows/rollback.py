"""Rollback: an earlier version goes back into production, verified as an audit does and run again before it goes."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.audit import audit
from tasks.core import config, documents, files, git, keys, paths, probe, registry
from tasks.core.errors import RegistryError
from tasks.core.git import Overtaken
from tasks.core.registry import CARRIED, DECISION, ORIGIN, Decision, Refs, Standing, Verdict
from tasks.gate import infra_checks, reason


def rollback(root: Path, model: str, version: str | None, why: str, say: Callable[[str], None] = print) -> Decision:
    """Put `version`, or else the one before, into production again; says the decision that records it.

    It is what the next challenger has to face, and the model that it replaces is refused until it is put back by name.
    `RegistryError` if there is no such version, if the audit of it has a finding, if its file does not meet its golden
    outputs in a fresh process here, or if another version comes into production meanwhile. Then no ref has moved.
    """
    remote = config.load(root / paths.PARAMS).registry.remote
    refs = registry.look(root, remote)
    stands = registry.mended(root, refs, model, remote)
    production = stands.production and stands.production.decision
    if production is None:
        raise RegistryError(f"{model} has no version in production, so there is nothing to roll back")
    target = version or production.replaces
    if target is None:
        raise RegistryError(f"{model} {production.version} has no version before it: name the one to go back to")
    if target == production.version:
        raise RegistryError(f"{model} {target} is in production already")
    while True:
        try:
            return _rollback(root, model, target, why, refs, stands, remote, say)
        except Overtaken:
            say("another decision reached the registry first: looking at it again")
        refs = registry.look(root, remote)
        stands = registry.mended(root, refs, model, remote)
        if stands.production is None or stands.production.decision != production:
            raise RegistryError(
                f"another version of {model} came into production meanwhile: look at it with `weighin status`, "
                "and roll back again if it shall go too"
            )


def _rollback(
    root: Path,
    model: str,
    target: str,
    why: str,
    refs: Refs,
    stands: Standing,
    remote: str | None,
    say: Callable[[str], None],
) -> Decision:
    if target not in stands.promotions:
        raise RegistryError(f"{model} has no version {target}; there are: {', '.join(stands.promotions)}")
    name = f"{model}@{target}"
    with verified(root, model, stands.promotions[target].commit, name, remote) as (contents, shipped, infra):
        change = {"outcome": "rolled-back", "reason": why, "replaces": stands.assignments[-1]}
        return repeat(root, contents, change, shipped, infra, refs, stands, remote, say)


@contextmanager
def verified(
    root: Path, model: str, commit: str, name: str, remote: str | None
) -> Iterator[tuple[dict[str, bytes], Path, dict[str, Any]]]:
    """The files of a decision, its model as a file, and how that meets its golden outputs in a fresh process here.

    `RegistryError` if the audit of it has a finding, or if the model does not run here as it was recorded.
    """
    report = audit(root, model, commit=commit, remote=remote, working_copy=False)
    if report.findings:
        first = report.findings[0]
        raise RegistryError(
            f"{name} stays out of production: {first.file} of {first.decision}, expected {first.expected}, found "
            f"{first.found} ({len(report.findings) - 1} more findings: `weighin audit --all`)"
        )
    contents = git.files(root, commit)
    params = config.read(contents["params.yaml"], Path(f"{commit[:12]}:params.yaml"))
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        shipped, golden = Path(scratch) / registry.MODEL.name, Path(scratch) / paths.GOLDEN.name
        registry.bring(root, commit, registry.MODEL, shipped, name)
        registry.bring(root, commit, paths.GOLDEN, golden, name)
        infra = probe.meet(golden, shipped, params.benchmark.threads, params.benchmark.memory_limit_bytes)
        failed = [reason(one) for one in infra_checks(infra, params.gate) if not one["passed"]]
        if failed:
            raise RegistryError(f"{name} does not run here as it was recorded: {'; '.join(failed)}")
        yield contents, shipped, infra


def repeat(
    root: Path,
    contents: dict[str, bytes],
    change: dict[str, Any],
    shipped: Path,
    infra: dict[str, Any],
    refs: Refs,
    stands: Standing,
    remote: str | None,
    say: Callable[[str], None],
) -> Decision:
    """Record a decision on the evidence of an earlier one, with what has changed; says it.

    `git.Overtaken` if another one came first; then no ref has moved.
    """
    then = registry.parsed(Decision, contents[DECISION], DECISION)
    place, signer = registry.linked(root, refs, say)
    decision = Decision.model_validate(then.model_dump() | change | place)
    params = config.read(contents["params.yaml"], Path("params.yaml"))
    verdict = registry.parsed(Verdict, contents["verdict.json"], "verdict.json")
    benchmark = registry.parsed(documents.Benchmark, contents["metrics.json"], "metrics.json")
    code = documents.materials_of(json.loads(contents["provenance.json"])).code
    bundle = {name: contents[name] for name in (*CARRIED, *ORIGIN, *code)} | {
        DECISION: files.to_json(decision.model_dump(mode="json")),
        "trusted_keys": (root / keys.TRUSTED).read_bytes(),
        "README.md": documents.card(decision, verdict.checks, benchmark, params).encode(),
        "infra.json": files.to_json({"environment": documents.environment(), "golden": infra}),
    }
    registry.publish(root, decision, bundle, shipped, refs, stands, remote, signer)
    return decision
