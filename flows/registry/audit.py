"""The audit: from any decision back to its data, code, parameters and verdict, every byte read again.

Nothing is taken on trust: git's objects are hashed, the chain and its signatures are followed from the newest decision
to the first, verdicts are judged again from their evidence, and every artifact is hashed with SHA-256 wherever it lies.
What does not hold is a `Finding`; only what cannot be audited at all is a `RegistryError`.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows.registry import git, keys, refs
from flows.registry.audit_artifacts import Store, check_working_copy
from flows.registry.audit_record import Reader, check_record, read_record
from flows.registry.audit_refs import (
    check_histories,
    check_remote,
    check_replacements,
    check_tags,
    logged_commits,
)
from flows.registry.chain import Link, Standing, replay
from flows.registry.findings import Report
from flows.registry.materials import Material
from flows.registry.refs import Refs
from tasks.core import paths
from tasks.core.errors import RegistryError, WeighinError
from tasks.core.progress import track

if TYPE_CHECKING:
    import pyarrow as pa

PRODUCTION, ALL = "production", "all"
UPSTREAM = "refs/remotes/origin/registry"


def audit(
    root: Path, model: str, artifacts: str = PRODUCTION, remote: str | None = None, working_copy: bool = True
) -> Report:
    """Audit the whole chain, and the artifacts of what is in production, of `all` decisions, of a version such as
    v0.1.0, or of the decision in a commit.

    With the name of a git remote, the registry and the artifacts there as well; an artifact that is there may be
    missing in the cache. With `working_copy`, the files that lie here of the model's newest decision too.
    `RegistryError` if there is no registry, or no such version.
    """
    report = Report()
    trusted = _read_trusted(root, report)
    _catch_up(root)
    with git.Objects(root) as objects:
        reader = Reader(objects)
        found = _read_refs(root, reader)
        if found.tip is None:
            raise RegistryError(f"{root} has no branch registry: nothing has been decided yet, or it was not fetched")
        store = Store(root, remote is not None, report)
        links: list[Link] = []
        made: dict[str, tuple[Material, ...]] = {}  # by the commit of the decision
        walked: list[str] = []
        for commit in track(_commits(reader, found.tip, report), "decisions"):
            walked.append(commit)
            record = read_record(reader, commit, report)
            if record is None:
                continue
            link, outputs = check_record(record, reader, root, trusted, report)
            newest = link.decision.model == model and all(other.decision.model != model for other in links)
            if newest and working_copy:
                check_working_copy(root, link, outputs, reader, report)
            links.append(link)
            made[commit] = outputs
    if not report.findings:
        _require_decided(model, links)
    report.decisions = len(links)
    _check_unsigned(links, trusted, report)
    is_whole = len(links) == len(walked) and bool(links) and links[-1].decision.previous is None
    standings = _replay(links[::-1], is_whole, report)
    wanted = _choose_commits(links, standings.get(model, Standing()), model, artifacts, report)
    erased = _check_splits(links, made, store, artifacts == ALL, report)
    for link in links:
        if link.commit in wanted:
            store.check(link, made[link.commit], erased.get(link.commit, {}))
    check_tags(root, found, walked, standings, is_whole, report)
    check_histories(root, walked, report)
    check_replacements(root, reader, report)
    if remote:
        check_remote(root, remote, found, walked, tuple(standings), report)
    return report


def _check_splits(
    links: list[Link], made: dict[str, tuple[Material, ...]], store: Store, everything: bool, report: Report
) -> dict[str, dict[str, int]]:
    """How many images that are erased by now the files of each decision held, by commit and path.

    With `everything`, also whether images stayed in their splits from each run of a model to the next.
    """
    from flows.registry import splits  # brings pandas

    def known(link: Link, *, of_the_run: bool = False) -> "pa.Table | None":
        try:
            return splits.read_intact(store.find, made[link.commit], of_the_run=of_the_run)
        except WeighinError as error:
            report.noting(link.name, "artifact", link.commit)(str(paths.LEDGER), "a ledger of splits", str(error))
            return None

    held: dict[str, dict[str, int]] = {}
    for model in {link.decision.model for link in links}:
        own = [link for link in links if link.decision.model == model]
        runs = [link for link in own if link.decision.outcome in splits.RUNS]
        erased = splits.erased_in(known(runs[0])) if runs else set()
        if erased:
            held |= {link.commit: splits.find_erased(known(link, of_the_run=True), erased) for link in own}
        before = None
        for link in reversed(runs) if everything else ():
            after = known(link)
            if before is not None and after is not None:
                splits.check_growth(before, after, report.noting(link.name, "artifact", link.commit))
            before = after if after is not None else before
    return held


def _require_decided(model: str, links: list[Link]) -> None:
    known = {link.decision.model for link in links}
    if model not in known:
        raise RegistryError(f"the registry has no decision on {model}; it has decisions on: {', '.join(sorted(known))}")


def _read_trusted(root: Path, report: Report) -> tuple[keys.TrustedKey, ...]:
    try:
        return keys.trusted_keys(root)
    except RegistryError as error:
        report.noting("trusted keys", "registry")(str(keys.TRUSTED), "public keys, one to a line", str(error))
        return ()


def _catch_up(root: Path) -> None:
    """Bring a clone that is merely behind to where its origin was last seen; a branch that was moved back stays."""
    if git.git(root, "for-each-ref", "--format=%(objectname)", UPSTREAM) not in logged_commits(root):
        with contextlib.suppress(RegistryError):  # the audit finds what stands against it
            refs.forward(root, UPSTREAM)


def _read_refs(root: Path, reader: Reader) -> Refs:
    """The refs as they are here; the objects of the tags count as read for the decisions that they are on."""
    names = refs.list_refs(root)
    tags = refs.read_tags(root, names)
    reader.readers |= {names[f"refs/tags/{tag}"]: commit for tag, commit in tags.items()}
    return Refs(names.get(refs.BRANCH, names.get(UPSTREAM)), refs.BRANCH in names, None, tags)


def _choose_commits(links: list[Link], standing: Standing, model: str, artifacts: str, report: Report) -> set[str]:
    """The commits of the decisions whose artifacts are wanted; the decisions say which, and tags have no say in it."""
    if artifacts == ALL:
        return {link.commit for link in links}
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", artifacts):
        return {artifacts}
    if artifacts == PRODUCTION:
        return {standing.production.commit} if standing.production else set()
    if artifacts in standing.promotions:
        return {standing.promotions[artifacts].commit}
    if not report.damage:  # else it may be what is damaged
        known = ", ".join(f"{model}@{version}" for version in standing.promotions)
        raise RegistryError(f"there is no version {model}@{artifacts}; there are: {known or 'none'}")
    return set()


def _commits(reader: Reader, tip: str, report: Report) -> Iterator[str]:
    """Every commit of the branch from the tip to the first, as git has their parents."""
    commit: str | None = tip
    seen: set[str] = set()
    while commit and commit not in seen:
        seen.add(commit)
        reader.commit = commit
        try:
            header = reader.read(commit, "commit").partition(b"\n\n")[0].decode(errors="replace")
        except RegistryError as error:
            note = report.noting(f"commit {commit[:12]}", "chain", commit)
            note("the commit", "a decision, as the next one says", str(error))
            return
        yield commit
        commit = next((line[7:] for line in header.split("\n") if line.startswith("parent ")), None)


def _check_unsigned(links: list[Link], trusted: tuple[keys.TrustedKey, ...], report: Report) -> None:
    """Unsigned decisions hold where a signed one comes after them, or where no key is trusted yet."""
    for link in links:
        if link.decision.signer is not None or not trusted:
            return
        note = report.noting(link.name, "chain", link.commit)
        note("the commit's signature", f"by a key in {keys.TRUSTED}, or by one on a decision after it", "none")


def _replay(links: list[Link], is_whole: bool, report: Report) -> dict[str, Standing]:
    """Follow production from the first decision on; each decision must say what was true at its time."""
    standings: dict[str, Standing] = {}
    for step in replay(links, is_whole):
        for one in step.contradictions:
            report.noting(step.link.name, "chain", step.link.commit)(*one)
        standings[step.link.decision.model] = step.after
    return standings
