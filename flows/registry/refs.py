"""The registry's refs in git: where its branch and tags are, here and at the remote, and how they are brought here."""

import re
from pathlib import Path
from typing import NamedTuple

from flows.registry import git
from tasks.core.errors import RegistryError

BRANCH = "refs/heads/registry"
STAGE = "production"
TAG = re.compile(rf"refs/tags/[^/]+(@v\d+\.\d+\.\d+|#{STAGE}#\d+)")
CODE_REFS = "refs/weighin/code"  # keep the revisions of the code that decisions name, whatever becomes of their branch


class Refs(NamedTuple):
    """The registry's refs as one look at the repository found them."""

    tip: str | None
    local: bool  # whether the branch is here, and not only where it was last seen at the remote
    theirs: str | None  # the branch at the remote
    tags: dict[str, str]  # the commit of each tag in the repository, by its name


def look(root: Path, remote: str | None = None) -> Refs:
    """The registry's refs; with a remote as they are there, and what was missing here has been fetched.

    `RegistryError` if the remote cannot be reached, or if this registry and that one have parted ways.
    """
    upstream = f"refs/remotes/{remote or 'origin'}/registry"  # all that a fresh clone has of it
    theirs = _fetch(root, remote) if remote else None
    if theirs and commit_of(root, BRANCH) is None:
        git.move(root, [f"create {BRANCH} {theirs}"], f"fetch {remote}", {})
    forward(root, upstream)
    names = list_refs(root)
    return Refs(names.get(BRANCH, names.get(upstream)), BRANCH in names, theirs, read_tags(root, names))


def list_refs(root: Path) -> dict[str, str]:
    """Return the name of the object that each ref in the repository is on."""
    listed = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)").splitlines()
    return {ref: name for name, ref in (line.split(" ", 1) for line in listed)}


def read_tags(root: Path, names: dict[str, str]) -> dict[str, str]:
    """Return the commit of each tag by its name; a tag that is damaged, or that is no object of its own, has itself.

    The tags are read one by one, since git would stop at the first whose commit is missing.
    """
    tags = {ref.removeprefix("refs/tags/"): name for ref, name in names.items() if ref.startswith("refs/tags/")}
    with git.Objects(root) as objects:
        for tag, name in tags.items():
            found = objects.find(name)
            if found and found.kind == "tag" and found.name == name:
                tags[tag] = found.data[len("object ") :].partition(b"\n")[0].decode()
    return tags


def _fetch(root: Path, remote: str) -> str | None:
    """Bring the remote's branches and the registry's tags; says where the registry's branch is there."""
    listed = git.git(root, "ls-remote", "--refs", remote).splitlines()
    there = {ref for _, ref in (line.split("\t") for line in listed)}
    ours = set(git.git(root, "for-each-ref", "--format=%(refname)", "refs/tags").split())
    tags = sorted(ref for ref in there - ours if TAG.fullmatch(ref))
    kept = [f"+{CODE_REFS}/*:{CODE_REFS}/*"] if any(ref.startswith(f"{CODE_REFS}/") for ref in there) else []
    specs = [f"+refs/heads/*:refs/remotes/{remote}/*", *kept, *(f"{ref}:{ref}" for ref in tags)]
    git.git(root, "fetch", "--quiet", "--no-tags", remote, *specs)
    return commit_of(root, f"refs/remotes/{remote}/registry") if BRANCH in there else None


def forward(root: Path, upstream: str) -> None:
    """Move the branch `registry` forward to where it was last seen at the remote.

    `RegistryError` if the two have parted ways.
    """
    ours, theirs = commit_of(root, BRANCH), commit_of(root, upstream)
    if theirs is None or ours is None or ours == theirs or _is_ancestor(root, theirs, ours):
        return
    if not _is_ancestor(root, ours, theirs):
        raise RegistryError(
            f"the branch registry here ({ours[:12]}) and {upstream} ({theirs[:12]}) have parted ways: "
            "`weighin audit` tells which one holds"
        )
    git.move(root, [f"update {BRANCH} {theirs} {ours}"], f"forward to {upstream}", {})


def _is_ancestor(root: Path, one: str, other: str) -> bool:
    return git.git(root, "rev-list", "--max-count=1", one, f"^{other}") == ""


def commit_of(root: Path, ref: str) -> str | None:
    """Return the commit that a ref is on, or None if there is no such ref."""
    return git.git(root, "for-each-ref", "--format=%(objectname)", ref) or None
