"""What an audit finds: each finding with its severity and its scope, and which of them stand in the way of a move."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple

Note = Callable[[str, str, str], None]  # file, expected, found
# What a finding is about: the registry as a whole, a decision's place in the chain, what it has recorded, an artifact
# that it names, a tag on it, or what lies in the working copy.
Scope = Literal["registry", "chain", "record", "artifact", "tag", "working copy"]
# Damage: something is not what was recorded. Unchecked: it may be, but the record does not have what would show it.
Severity = Literal["damage", "unchecked"]


class Finding(NamedTuple):
    """What does not hold: in which decision, about which file, and what was expected and found."""

    decision: str  # as people call it
    file: str
    expected: str
    found: str
    scope: Scope
    severity: Severity = "damage"
    commit: str | None = None  # that holds the decision


@dataclass
class Report:
    """What was looked at, and what was found; everything that could be checked holds if nothing is damaged."""

    decisions: int = 0
    audited: list[str] = field(default_factory=list)  # decisions whose artifacts were read
    artifacts: int = 0
    bytes_hashed: int = 0
    findings: list[Finding] = field(default_factory=list)
    unjudged: int = 0  # decisions whose verdicts could not be judged again
    erased: list[str] = field(default_factory=list)  # artifacts that are gone with images that were to be erased

    def noting(self, decision: str, scope: Scope, commit: str | None = None) -> Note:
        """Return the function that notes damage of that decision."""
        return lambda file, expected, found: self.findings.append(
            Finding(decision, file, expected, found, scope, "damage", commit)
        )

    def note_unchecked(self, decision: str, commit: str, file: str, expected: str, found: str) -> None:
        """Note what the record of the decision does not have, so that something cannot be checked."""
        self.findings.append(Finding(decision, file, expected, found, "record", "unchecked", commit))

    @property
    def damage(self) -> list[Finding]:
        return [one for one in self.findings if one.severity == "damage"]

    @property
    def unchecked(self) -> list[Finding]:
        return [one for one in self.findings if one.severity == "unchecked"]


def blocking(findings: Iterable[Finding], target: str, since: Iterable[str]) -> list[Finding]:
    """Return the damage that stands in the way of putting the decision in commit `target` into production.

    That is damage of the registry as a whole, of the chain in the commits `since`, from the newest back to the target,
    and of the target itself. What is damaged elsewhere does not.
    """
    between = {target, *since}
    return [
        one
        for one in findings
        if one.severity == "damage"
        and (one.scope == "registry" or (one.scope == "chain" and one.commit in between) or one.commit == target)
    ]


def summarize(report: Report) -> str:
    """The result in one line."""
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    looked = (
        f"{count(report.decisions, 'decision')}, {count(report.artifacts, 'artifact')} of {len(report.audited)} of "
        f"them ({report.bytes_hashed:,} bytes hashed)"
    )
    if report.unjudged:
        looked += f"; checked, not judged again: {report.unjudged} of {report.decisions}"
    if report.erased:
        looked += f"; erased on request: {count(len(report.erased), 'artifact')}"
    if report.damage:
        return f"{count(len(report.damage), 'finding')} in {looked}, {when}"
    return f"everything holds: {looked}, {when}"


def count(number: int, noun: str) -> str:
    """Return "1 decision", or "2 decisions"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
