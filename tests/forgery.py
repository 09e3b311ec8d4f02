"""How the registry of a `Ledger` is forged: files, git objects, refs, and decisions made anew by whoever has a key."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ledger import Ledger, md5

from flows.registry import git, signing
from flows.registry.decision import COPIED_FILES, DECISION, SIGNATURE
from flows.registry.decision import MODEL as SHIPPED
from flows.registry.refs import BRANCH
from tasks.core import files

Contents = dict[str, bytes]
Edit = Callable[[Ledger, Contents], None]
Seal = Callable[[bytes, str], bytes]  # payload, the signature that was there


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    put(path, bytes(data))


def swap(path: Path) -> None:
    """Other bytes of the same length."""
    put(path, hashlib.shake_256(path.read_bytes()).digest(path.stat().st_size))


def truncate(path: Path) -> None:
    put(path, path.read_bytes()[:-1])


def put(path: Path, data: bytes) -> None:
    path.unlink()  # git's and DVC's objects are read-only
    path.write_bytes(data)


MANNERS: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "swapped": swap,
    "deleted": Path.unlink,
    "truncated": truncate,
}


def loose(ledger: Ledger, name: str) -> Path:
    """The file of a git object, by any name that git has for it."""
    found = ledger.git("rev-parse", name)
    return ledger.root / ".git/objects" / found[:2] / found[2:]


def history(ledger: Ledger) -> list[str]:
    """The commits of the registry, the first one first."""
    return ledger.git("rev-list", "--reverse", "registry").split()


def output(ledger: Ledger, name: str, path: str) -> dict[str, Any]:
    """What the provenance of a decision says of one of its outputs."""
    provenance = json.loads(ledger.git("show", f"{name}:provenance.json"))
    byproducts = provenance["predicate"]["runDetails"]["byproducts"]
    found: dict[str, Any] = next(one for one in byproducts if one["name"] == path)
    return found


def own(ledger: Ledger) -> signing.Signer:
    return signing.signer(ledger.root, datetime.now(UTC))


def stranger(folder: Path) -> signing.Signer:
    """A key that nobody has heard of."""
    folder.mkdir()
    return signing.signer(folder, datetime.now(UTC), say=lambda _: None)


def unsigned(payload: bytes, _: str) -> bytes:
    return payload


def stale(payload: bytes, signature: str) -> bytes:
    return signing.join_commit(payload, signature)


def remake(
    ledger: Ledger, edits: dict[int, Edit], signer: signing.Signer | None, seal: Seal = stale, headers: Any = None
) -> None:
    """Make the edited decision and all after it anew, each linked to the one before; tags follow.

    With a signer, all are signed again; else their bundles' signatures stay and `seal` makes the commit. `headers`
    changes the payload of the first edited commit.
    """
    before, made = history(ledger), dict[str, str]()
    first = min(edits)
    for number, commit in enumerate(before):
        if number < first:
            made[commit] = commit
            continue
        contents = git.files(ledger.root, commit)
        parent = made[before[number - 1]] if number else None
        relink(ledger, contents, parent, signer)
        if number in edits:
            edits[number](ledger, contents)
        if signer:
            contents.pop(SIGNATURE, None)
        change = headers if number == first else None
        made[commit] = write(ledger, commit, contents, parent, signer, seal, change)
    follow(ledger, made)


def relink(ledger: Ledger, contents: Contents, parent: str | None, signer: signing.Signer | None) -> None:
    decision = json.loads(contents[DECISION])
    if parent != decision["previous"]:
        there = git.files(ledger.root, parent)[SIGNATURE] if parent else None
        decision |= {"previous": parent, "previous_sha256": there and files.sha256_of(there)}
    if signer:
        decision["signer"] = signer.fingerprint
    contents[DECISION] = files.to_json(decision)


def write(
    ledger: Ledger,
    commit: str,
    contents: Contents,
    parent: str | None,
    signer: signing.Signer | None,
    seal: Seal = stale,
    headers: Any = None,
) -> str:
    """A commit as `commit` is, with other content."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if signer:
            model = folder / SHIPPED.name
            found = output(ledger, commit, SHIPPED.as_posix())
            model.write_bytes(ledger.cached(found["annotations"]["md5"]).read_bytes())
            signer.sign_folder(folder, folder / SIGNATURE)
            model.unlink()
        tree = git.tree(ledger.root, folder)
    with git.Objects(ledger.root) as objects:
        payload, signature = signing.split_commit(objects.read(commit))
    head, gap, message = payload.partition(b"\n\n")
    lines = [line for line in head.decode().split("\n") if not line.startswith(("tree ", "parent "))]
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else []), *lines]
    payload = "\n".join(lines).encode() + gap + message
    payload = headers(payload) if headers else payload
    data = signing.join_commit(payload, signer.sign_commit(payload)) if signer else seal(payload, signature or "")
    return git.git(ledger.root, "hash-object", "-t", "commit", "-w", "--stdin", stdin=data)


def follow(ledger: Ledger, made: dict[str, str]) -> None:
    """Let the branch and the tags point to the new commits, or go with the commits that are gone."""
    for line in ledger.git("for-each-ref", "--format=%(refname) %(*objectname)", "refs/tags").splitlines():
        ref, commit = line.split(" ")
        if commit not in made:
            ledger.git("update-ref", "-d", ref)
        elif made[commit] != commit:
            tag(ledger, ref.removeprefix("refs/tags/"), made[commit])
    ledger.git("update-ref", BRANCH, list(made.values())[-1])


def tag(ledger: Ledger, name: str, commit: str, inside: str | None = None) -> None:
    made = git.tag(ledger.root, inside or name, commit, "forged", {})
    ledger.git("update-ref", f"refs/tags/{name}", made)


def hide(ledger: Ledger) -> None:
    """Leave no trace of what was there before: neither in the logs, nor at the remote."""
    ledger.git("update-ref", "refs/remotes/origin/registry", BRANCH)
    ledger.git("reflog", "expire", "--expire=now", "--all")
    ledger.git("push", "--quiet", "--force", "--prune", "origin", f"{BRANCH}:{BRANCH}", "refs/tags/*:refs/tags/*")


def carry(ledger: Ledger, contents: Contents, name: str, data: bytes) -> None:
    """Change a file of the bundle and all that names it: dvc.lock, provenance, record, and DVC's cache."""
    queue = [(name, data)]
    while queue:
        name, data = queue.pop()
        old, contents[name] = contents[name], data
        target = ledger.cached(md5(data))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        changes = ((files.sha256_of(old), files.sha256_of(data)), (md5(old), md5(data)))
        for other, text in list(contents.items()):
            new = text
            for was, now in changes:
                new = new.replace(was.encode(), now.encode())
            if new == text:
                continue
            if other in COPIED_FILES and other not in ("dvc.lock", "dvc.yaml"):
                queue.append((other, new))
            else:
                contents[other] = new
