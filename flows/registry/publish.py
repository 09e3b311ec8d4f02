"""Publication: a decision becomes a signed commit, and branch and tags move to it, all of them or none.

They move by compare-and-swap, here and at the remote if there is one.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from flows import dvc_bridge
from flows.registry import git, keys, materials, provenance, signing
from flows.registry.decision import MODEL, SIGNATURE, Decision
from flows.registry.git import Objects
from flows.registry.refs import BRANCH, CODE_REFS, STAGE, commit_of, look
from flows.registry.view import View
from tasks.core import files
from tasks.core.errors import RegistryError


class Bundle(NamedTuple):
    """What is signed: the files of a decision by their paths in its commit, and the model, which DVC holds."""

    files: dict[str, bytes]
    model: Path


def chain_fields(view: View, say: Callable[[str], None]) -> tuple[dict[str, Any], signing.Signer]:
    """What every decision says of its place in the chain, its time, and who made it; and its signer.

    `RegistryError` if the signer's key is not trusted, or is so only by a change that has not been committed: the
    first key of all, which enters itself, does not need that.
    """
    root, tip = view.root, view.refs.tip
    now, bundle = datetime.now(UTC), None
    if tip:
        with Objects(root) as objects:
            found = objects.find(f"{tip}:{SIGNATURE}")
        bundle = files.sha256_of(found.data) if found else None  # those of the first days have none
        # GTO orders tags by their second, so decisions never share one, nor go back with the clock.
        now = max(now, datetime.fromisoformat(view.links[-1].decision.created) + timedelta(seconds=1))
    first = all(link.decision.signer is None for link in view.links)
    if first and view.links:
        say(f"the {len(view.links)} decisions before this one are not signed: this one takes them over as they are")
    signer = signing.signer(root, now, say, first)
    _require_reviewed(root, signer, now)
    who = git.git(root, "var", "GIT_AUTHOR_IDENT", env=git.identity(root))
    fields = {
        "schema_version": 2,
        "previous": tip,
        "previous_sha256": bundle,
        "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "by": who.rsplit(" ", 2)[0],
        "signer": signer.fingerprint,
    }
    return fields, signer


def _require_reviewed(root: Path, signer: signing.Signer, now: datetime) -> None:
    """The last commit trusts the key now, by its own times: those of the working copy nobody may have reviewed."""
    with Objects(root) as objects:
        committed = objects.find(f"HEAD:./{keys.TRUSTED}")
    lines = [key for key in keys.parse(committed.data) if key.fingerprint == signer.fingerprint] if committed else []
    if not (committed and keys.parse(committed.data)) or keys.is_trusted(lines, signer.public_key, now):
        return
    here = f"key {signer.fingerprint} is in {keys.TRUSTED} here, but not in the last commit"
    if lines:
        here = f"key {signer.fingerprint} holds by {keys.TRUSTED} here, but by the last commit it does not hold now"
    raise RegistryError(f"{here}: have the change reviewed and commit it")


def publish(view: View, decision: Decision, bundle: Bundle, signer: signing.Signer) -> None:
    """Sign the bundle, commit it, and move branch and tags.

    `Overtaken` if another decision came first; `RegistryError` if a tag is in the way. Then no ref has moved.
    """
    root, refs = view.root, view.refs
    message, who = describe(decision), dated_identity(root, decision)
    commit = _signed_commit(root, _signed_tree(root, bundle, signer), refs.tip, message, who, signer)
    # The branch first: if git is killed between two refs, the tags follow from it (`repair_tags`), not it from them.
    moves = {BRANCH: commit} | _tag_moves(view, decision, commit)
    if decision.code.commit and commit_of(root, f"{CODE_REFS}/{decision.code.commit}") is None:
        moves[f"{CODE_REFS}/{decision.code.commit}"] = decision.code.commit
    if view.remote:
        push_refs(view, moves)
        look(root, view.remote)
    else:
        expected = {BRANCH: refs.tip} if refs.local else {}
        steps = (
            f"update {ref} {new} {expected[ref]}" if ref in expected else f"create {ref} {new}"
            for ref, new in moves.items()
        )
        git.move(root, list(steps), message, who)


def _signed_tree(root: Path, bundle: Bundle, signer: signing.Signer) -> str:
    """Write the files of the bundle and its signature, which names the model too, as a git tree; return its name."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        folder = Path(scratch)
        for name, data in bundle.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        shutil.copy(bundle.model, folder / MODEL.name)
        signer.sign_folder(folder, folder / SIGNATURE)
        (folder / MODEL.name).unlink()
        return git.tree(root, folder)


def _tag_moves(view: View, decision: Decision, commit: str) -> dict[str, str]:
    """The tags that the decision asks for, as new objects by their refs; `RegistryError` if one is there already."""
    if decision.version is None:
        return {}
    promotion = view.standing.promotions.get(decision.version)
    target = promotion.commit if promotion else commit
    names = [f"{decision.model}#{STAGE}#{view.next_assignment(decision.model)}"]
    names += [] if promotion else [f"{decision.model}@{decision.version}"]
    for name in names:
        if name in view.refs.tags:
            raise RegistryError(f"there is a tag {name} already, and no decision has it: `weighin audit`")
    message, who = describe(decision), dated_identity(view.root, decision)
    return {f"refs/tags/{name}": git.tag(view.root, name, target, message, who) for name in names}


def describe(decision: Decision) -> str:
    """The message of the decision's commit and tags."""
    return f"{decision.model}: {decision.outcome} {decision.version or ', '.join(decision.failed)}".strip()


def dated_identity(root: Path, decision: Decision) -> dict[str, str]:
    """The environment in which git signs as this user, at the time of the decision."""
    dates = {"GIT_AUTHOR_DATE": decision.created, "GIT_COMMITTER_DATE": decision.created}
    return git.identity(root) | dates


def _signed_commit(
    root: Path, tree: str, parent: str | None, message: str, who: dict[str, str], signer: signing.Signer
) -> str:
    author, committer = (git.git(root, "var", f"GIT_{role}_IDENT", env=who) for role in ("AUTHOR", "COMMITTER"))
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), f"author {author}", f"committer {committer}"]
    payload = "\n".join([*lines, "", message, ""]).encode()
    signed = signing.join_commit(payload, signer.sign_commit(payload))
    return git.git(root, "hash-object", "-t", "commit", "-w", "--stdin", stdin=signed)


def push_refs(view: View, moves: dict[str, str]) -> None:
    """Move the refs at the remote, all or none, if they are there what they were when we looked.

    Tags of earlier decisions that the remote lacks go along, as when the registry was kept here only until now.
    """
    root, remote, refs = view.root, str(view.remote), view.refs
    listed = git.git(root, "ls-remote", "--refs", remote, "refs/tags/*", f"{CODE_REFS}/*").split()[1::2]
    decided = {link.commit for link in view.links}
    names = (f"refs/tags/{tag}" for tag, commit in refs.tags.items() if commit in decided)
    kept = git.git(root, "for-each-ref", "--format=%(refname)", CODE_REFS).split()
    older = {ref: ref for ref in (*names, *kept) if ref not in listed}
    leases = [f"--force-with-lease={ref}:{refs.theirs or '' if ref == BRANCH else ''}" for ref in (*moves, *older)]
    specs = [f"{new}:{ref}" for ref, new in (moves | older).items()]
    git.git(root, "push", "--quiet", "--atomic", *leases, remote, *specs)


def push_outputs(view: View, outputs: Iterable[materials.Material]) -> None:
    """Bring every output to DVC's remote, so that the pointer never points to what others cannot have.

    Those of earlier decisions that the git remote lacks go along.
    """
    root, refs = view.root, view.refs
    wanted = {one.md5: one.path for one in outputs}
    earlier = git.git(root, "rev-list", refs.tip, *([f"^{refs.theirs}"] if refs.theirs else [])) if refs.tip else ""
    with Objects(root) as objects:
        for commit in earlier.split():
            wanted |= {one.md5: one.path for one in provenance.read_materials(objects, commit).outputs}
    missing = dvc_bridge.push(root, wanted)
    if missing:
        lost = min(wanted[md5] for md5 in missing)
        raise RegistryError(f"{lost} did not reach DVC's remote ({len(missing)} in all): it may lack in the cache")
