"""The chain of decisions: read from the newest to the first, and replayed from the first to the newest.

A decision holds if a key signed it that was trusted then, and if it is linked to the one before. Decisions of the first
days, which nobody signed, hold where a signed one comes after them, or where no key is trusted yet.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from flows.registry import keys, signing
from flows.registry.decision import DECISION, SIGNATURE, Champion, Decision, name_decision, parse_decision
from flows.registry.git import Objects
from flows.registry.refs import STAGE
from tasks.core import files
from tasks.core.errors import RegistryError


class Link(NamedTuple):
    """A decision and the commit that holds it; `fault` says why it does not hold, and is None if it does.

    An audit knows more of it: the champion that it faced, and one hash for the files that a rollback or an approval has
    to share with what it is about.
    """

    commit: str
    decision: Decision
    fault: str | None = None
    champion: Champion | None = None
    evidence: str | None = None

    @property
    def name(self) -> str:
        return name_decision(self.commit, self.decision)


class Damage(NamedTuple):
    """A commit of the branch that holds no decision which could be read, and why."""

    commit: str
    fault: str


class Standing(NamedTuple):
    """Where a model stands: what its decisions come to, from the first to the newest. Tags have no say in it."""

    latest: Link | None = None
    moved: Link | None = None  # the newest promotion, approval or rollback
    promotions: dict[str, Link] = {}  # by version, approvals among them  # noqa: RUF012 (nothing ever changes it)
    assignments: tuple[str, ...] = ()  # the version that each of those moves put into production
    withdrawn: tuple[str, ...] = ()  # SHA-256 of models that a rollback took out of production, and that are not back

    @property
    def production(self) -> Link | None:
        """The promotion of the version that is in production."""
        return self.promotions.get(self.assignments[-1]) if self.assignments else None

    @property
    def held(self) -> Link | None:
        """The latest decision, if it waits for an approval."""
        return self.latest if self.latest and self.latest.decision.outcome == "held" else None

    @property
    def next_version(self) -> str:
        """The version that comes after all that were promoted."""
        versions = (tuple(map(int, version[1:].split("."))) for version in self.promotions)
        major, minor, _ = max(versions, default=(0, 0, 0))
        return f"v{major}.{minor + 1}.0"

    def tags(self, model: str) -> dict[str, str]:
        """Every tag that the decisions ask for, with its commit."""
        versions = {f"{model}@{version}": link.commit for version, link in self.promotions.items()}
        numbered = enumerate(self.assignments, start=1)
        known = ((n, self.promotions[version].commit) for n, version in numbered if version in self.promotions)
        return versions | {f"{model}#{STAGE}#{n}": commit for n, commit in known}


class Contradiction(NamedTuple):
    """What a decision says against those before it: about which file, what was expected, and what it says."""

    file: str
    expected: str
    found: str


class Step(NamedTuple):
    """A decision, where its model stood before and after it, and what in it contradicts that."""

    link: Link
    before: Standing
    after: Standing
    contradictions: tuple[Contradiction, ...]


def walk(root: Path, tip: str | None) -> Iterator[Link | Damage]:
    """Every decision from the tip back to the first, whether it holds or not, as far as git has the commits."""
    trusted = keys.trusted_keys(root)
    signed_after, bundle = False, None  # of the decision after this one: whether it holds, and what it has of this one
    with Objects(root) as objects:
        while tip:
            try:
                payload, signature = signing.split_commit(objects.read(tip))
            except RegistryError as error:
                yield Damage(tip, str(error))
                return
            parents = re.findall(rb"^parent ([0-9a-f]+)$", payload.partition(b"\n\n")[0], re.M)
            before = parents[0].decode() if parents else None
            try:
                decision = parse_decision(objects.read(f"{tip}:{DECISION}"), f"{tip}:{DECISION}")
            except RegistryError as error:
                yield Damage(tip, str(error))
                tip, bundle = before, None
                continue
            try:
                _require_bundle(objects, tip, bundle)
                _require_linked(decision, [one.decode() for one in parents])
                if not (decision.signer is None and (signed_after or not trusted)):
                    at = datetime.fromisoformat(decision.created)
                    _require_signer(decision, signing.verify_commit(payload, signature, trusted, at))
                    signed_after = True
                fault = None
            except RegistryError as error:
                fault = str(error)
            yield Link(tip, decision, fault)
            tip, bundle = before, decision.previous_sha256


def _require_bundle(objects: Objects, commit: str, bundle: str | None) -> None:
    if bundle is not None and files.sha256_of(objects.read(f"{commit}:{SIGNATURE}")) != bundle:
        raise RegistryError(f"its {SIGNATURE} is not the one that the next decision has seen")


def _require_linked(decision: Decision, parents: list[str]) -> None:
    if parents != [decision.previous] * bool(decision.previous):
        raise RegistryError(f"{DECISION} names another decision before it than the commit has")


def _require_signer(decision: Decision, signer: str) -> None:
    if signer != decision.signer:
        raise RegistryError(f"{DECISION} names another signer than the commit has")


def read_chain(root: Path, tip: str | None) -> Iterator[Link]:
    """Every decision from the tip back to the first.

    `RegistryError` at the first that does not hold: who can write to the branch, but has no key, must not say what the
    champion is.
    """
    for one in walk(root, tip):
        if one.fault is not None:
            raise RegistryError(f"decision {one.commit[:12]} does not hold: {one.fault}; see `weighin audit`")
        if isinstance(one, Link):
            yield one


def replay(links: Iterable[Link], is_whole: bool = True) -> Iterator[Step]:
    """Follow every model through the decisions, which come from the first to the newest.

    Where the chain is not whole, since some could not be read, nothing is known that others could contradict.
    """
    standings: dict[str, Standing] = {}
    last: Link | None = None
    for link in links:
        before = standings.get(link.decision.model, Standing())
        after = _advance(before, link)
        contradictions = (*_out_of_order(last, link), *_contradictions(before, link)) if is_whole else ()
        yield Step(link, before, after, contradictions)
        standings[link.decision.model], last = after, link


def _advance(before: Standing, link: Link) -> Standing:
    """Where the model stands after the decision."""
    decision, promotions = link.decision, before.promotions
    if decision.version is None:
        return before._replace(latest=link)
    if decision.outcome != "rolled-back":
        promotions = promotions | {decision.version: link}
    withdrawn = dict.fromkeys(before.withdrawn)
    if decision.outcome == "rolled-back" and decision.replaces in promotions:
        withdrawn[promotions[decision.replaces].decision.model_sha256] = None
    withdrawn.pop(decision.model_sha256, None)
    return Standing(link, link, promotions, (*before.assignments, decision.version), tuple(withdrawn))


def _out_of_order(last: Link | None, link: Link) -> Iterator[Contradiction]:
    """Time and schemas only go forward; only what was repeated has the evidence of an older schema."""
    if last is None:
        return
    earlier, decision = last.decision, link.decision
    if decision.created <= earlier.created and earlier.created:
        expected = f"created after {earlier.created}, when the decision before was"
        yield Contradiction(DECISION, expected, f"created {decision.created}")
    if decision.schema_version < earlier.schema_version:
        expected = f"schema_version {earlier.schema_version} or higher, as the decision before has"
        yield Contradiction(DECISION, expected, f"schema_version {decision.schema_version}")


def _contradictions(before: Standing, link: Link) -> Iterator[Contradiction]:
    """What the decision says against where its model stood."""
    if link.decision.outcome == "rolled-back":
        yield from _of_rollback(before, link)
        return
    yield from _of_champion(before, link)
    decision, production = link.decision, before.assignments[-1] if before.assignments else None
    if decision.version is None:
        return
    held = before.held
    if decision.outcome == "approved" and (held is None or held.evidence != link.evidence):
        yield Contradiction(
            "its files", f"those of {held.name if held else 'a decision that holds the model'}", "others"
        )
    if (decision.version, decision.replaces) != (before.next_version, production):
        expected = f"version {before.next_version} in place of {production}"
        yield Contradiction(DECISION, expected, f"version {decision.version} in place of {decision.replaces}")


def _of_champion(before: Standing, link: Link) -> Iterator[Contradiction]:
    """The champion that was faced is what was in production; without a record of it, nothing can be said."""
    champion, production = link.champion, before.production
    if champion is None:
        return
    if production is None:
        if champion.version is not None:
            yield Contradiction("champion.json", "no champion: nothing was in production", str(champion.version))
        return
    version = production.decision.version
    if (champion.version, champion.model_sha256) != (before.assignments[-1], production.decision.model_sha256):
        # A refusal of what is in production already faces the champion that it faced before.
        again = link.decision.outcome == "refused" and champion == production.champion
        if not again:
            yield Contradiction("champion.json", f"{version}, which was in production", str(champion.version))
    elif sorted(champion.withdrawn) != sorted(before.withdrawn):
        expected, found = (f"withdrawn {list(one)}" for one in (before.withdrawn, champion.withdrawn))
        yield Contradiction("champion.json", expected, found)


def _of_rollback(before: Standing, link: Link) -> Iterator[Contradiction]:
    decision, target = link.decision, before.promotions.get(str(link.decision.version))
    production = before.assignments[-1] if before.assignments else None
    if target is None or decision.replaces != production or decision.version == production:
        expected = f"an earlier version in place of {production}"
        yield Contradiction(DECISION, expected, f"{decision.version} in place of {decision.replaces}")
    elif target.evidence != link.evidence or target.decision.model_sha256 != decision.model_sha256:
        yield Contradiction("its files", f"those of {target.name}", "others")
