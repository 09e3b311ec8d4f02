"""One look at the registry: its refs, its decisions, where a model stands, and what in it does not hold."""

from pathlib import Path
from typing import NamedTuple

from flows.registry.chain import Damage, Link, Standing, replay, walk
from flows.registry.refs import STAGE, Refs, look
from tasks.core.errors import RegistryError


class View(NamedTuple):
    """The registry as one look found it; `remote` is the git remote that holds it, if one does.

    `faults` has a sentence for each commit whose decision does not hold or contradicts those before it, the newest
    first; `commits` are all of the branch, from the newest to the first.
    """

    root: Path
    remote: str | None
    refs: Refs
    commits: tuple[str, ...]
    links: tuple[Link, ...]  # from the first to the newest
    standing: Standing
    faults: tuple[tuple[str, str], ...]

    def require_sound(self, since: str | None = None) -> None:
        """`RegistryError` with the newest fault, in all decisions or in those from a commit on."""
        looked_at = self.commits if since is None else self.commits[: self.commits.index(since) + 1]
        for commit, sentence in self.faults:
            if commit in looked_at:
                raise RegistryError(sentence)

    def next_assignment(self, model: str) -> int:
        """The number of the next tag that says what is in production.

        Where decisions could not be read, it is the one after all that there are.
        """
        if len(self.links) == len(self.commits):
            return len(self.standing.assignments) + 1
        prefix = f"{model}#{STAGE}#"
        numbers = [tag.removeprefix(prefix) for tag in self.refs.tags if tag.startswith(prefix)]
        return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1


def read_view(root: Path, model: str, remote: str | None) -> View:
    """Fetch what is new, and read every decision, whether it holds or not."""
    refs = look(root, remote)
    walked = tuple(walk(root, refs.tip))
    links = tuple(one for one in reversed(walked) if isinstance(one, Link))
    standing = Standing()
    contradictions: dict[str, str] = {}
    for step in replay(links, is_whole=len(links) == len(walked)):
        if step.link.decision.model == model:
            standing = step.after
        for one in step.contradictions[:1]:
            contradictions[step.link.commit] = (
                f"decision {step.link.commit[:12]} contradicts those before it: {one.file}, expected {one.expected}, "
                f"found {one.found}; see `weighin audit`"
            )
    faults = tuple(fault for one in walked for fault in _faults(one, contradictions))
    return View(root, remote, refs, tuple(one.commit for one in walked), links, standing, faults)


def _faults(one: Link | Damage, contradictions: dict[str, str]) -> list[tuple[str, str]]:
    if one.fault is not None:
        return [(one.commit, f"decision {one.commit[:12]} does not hold: {one.fault}; see `weighin audit`")]
    return [(one.commit, contradictions[one.commit])] if one.commit in contradictions else []
