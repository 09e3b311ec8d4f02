"""What a rollback and an approval stand on: an earlier decision that is audited, and its model, run again here."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flows import dvc_bridge
from flows.registry import git, keys, materials, provenance
from flows.registry.audit import audit
from flows.registry.card import model_card
from flows.registry.chain import Link, Standing
from flows.registry.decision import (
    COPIED_FILES,
    DECISION,
    MODEL,
    ORIGIN_FILES,
    Benchmark,
    Decision,
    Verdict,
    parse_document,
)
from flows.registry.environment import describe_environment
from flows.registry.findings import Finding, blocking
from flows.registry.parameters import Recorded, read_recorded
from flows.registry.publish import Bundle
from flows.registry.view import View
from tasks.core import files, paths
from tasks.core.errors import RegistryError
from tasks.gate import infra_checks, reason
from tasks.runtime import probe


class Target(NamedTuple):
    """An earlier decision that holds: its files, its model as a file, and how that ran in a fresh process here."""

    contents: dict[str, bytes]
    params: Recorded
    model: Path
    infra: dict[str, object]

    @property
    def upgrade(self) -> dict[str, Any]:
        """What a decision of today says of it, even if one of its own time did not."""
        return {"params_sha256": files.sha256_of(self.contents["params.yaml"])}


def choose_version(model: str, standing: Standing, version: str | None, begun: list[Decision]) -> str:
    """The version to go back to: the one that was named, or the one before; `begun` is what was in production first.

    `RegistryError` if there is none, or if another version has come into production since.
    """
    production = standing.production and standing.production.decision
    if production is None or not begun:
        raise RegistryError(f"{model} has no version in production, so there is nothing to roll back")
    if production != begun[0]:
        raise RegistryError(
            f"another version of {model} came into production meanwhile: look at it with `weighin status`, and roll "
            "back again if it shall go too"
        )
    target = version or production.replaces
    if target is None:
        raise RegistryError(f"{model} {production.version} has no version before it: name the one to go back to")
    if target == production.version:
        raise RegistryError(f"{model} {target} is in production already")
    if target not in standing.promotions:
        raise RegistryError(f"{model} has no version {target}; there are: {', '.join(standing.promotions)}")
    return target


@contextmanager
def verify(view: View, model: str, link: Link, name: str, say: Callable[[str], None]) -> Iterator[Target]:
    """Audit an earlier decision and run its model in a fresh process here; yield what it is.

    What is damaged elsewhere is told. `RegistryError` if the chain from it on or the decision itself is damaged, or if
    the model does not run here as it was recorded.
    """
    root = view.root
    report = audit(root, model, link.commit, view.remote, working_copy=False)
    since = view.commits[: view.commits.index(link.commit) + 1]
    found = blocking(report.findings, link.commit, since)
    if found:
        raise RegistryError(f"{name} stays out of production: {_first(found)}")
    elsewhere = [one for one in report.damage if one not in found]
    if elsewhere:
        say(f"DAMAGE elsewhere in the registry, which {name} does not stand on: {_first(elsewhere)}")
    contents = git.files(root, link.commit)
    params = read_recorded(contents["params.yaml"], f"{link.commit[:12]}:params.yaml")
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        shipped = Path(scratch) / MODEL.name
        dvc_bridge.copy_output(root, link.commit, MODEL, shipped, name)
        if files.sha256(shipped) != link.decision.model_sha256:
            raise RegistryError(f"{MODEL} of {name} is not what was recorded: `weighin audit`")
        yield Target(contents, params, shipped, _run(view, link, name, params, shipped, say))


def _first(findings: list[Finding]) -> str:
    one, more = findings[0], len(findings) - 1
    return (
        f"{one.file} of {one.decision}, expected {one.expected}, found {one.found} "
        f"({more} more findings: `weighin audit --all`)"
    )


def _run(
    view: View, link: Link, name: str, params: Recorded, shipped: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """How the model meets its golden outputs in a fresh process, by case; `RegistryError` if it does not."""
    threads, memory = params.benchmark.threads, params.benchmark.memory_limit_bytes
    recorded = {one.path for one in provenance.outputs_of(git.files(view.root, link.commit))}
    if paths.GOLDEN.as_posix() not in recorded:
        say(f"{name} was recorded without golden outputs: it is loaded and run, and no answer is compared")
        return {"load": probe.probe(shipped, threads, memory)}
    golden = shipped.with_name(paths.GOLDEN.name)
    dvc_bridge.copy_output(view.root, link.commit, paths.GOLDEN, golden, name)
    infra = probe.meet(golden, shipped, threads, memory)
    failed = [reason(one) for one in infra_checks(infra, params.gate.max_golden_difference) if not one.passed]
    if failed:
        raise RegistryError(f"{name} does not run here as it was recorded: {'; '.join(failed)}")
    return infra


def repeat_bundle(root: Path, decision: Decision, target: Target) -> Bundle:
    """The files of a decision on the evidence of an earlier one: that one's, as they are, and what is written anew."""
    contents = target.contents
    verdict = parse_document(Verdict, contents["verdict.json"], "verdict.json")
    benchmark = parse_document(Benchmark, contents["metrics.json"], "metrics.json")
    kept = {
        name: data
        for name, data in contents.items()
        if name in (*COPIED_FILES, *ORIGIN_FILES) or name.startswith(f"{materials.CODE}/")
    }
    written = {
        DECISION: files.to_json(decision.model_dump(mode="json")),
        "trusted_keys": (root / keys.TRUSTED).read_bytes(),
        "README.md": model_card(decision, verdict.checks, benchmark, target.params).encode(),
        "infra.json": files.to_json({"environment": describe_environment(), "golden": target.infra}),
    }
    return Bundle(kept | written, target.model)
