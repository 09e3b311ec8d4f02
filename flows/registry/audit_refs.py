"""The audit of the registry's refs: tags, where the branch has been, replacements, and the remote."""

from pathlib import Path

from flows.registry import git, refs
from flows.registry.audit_record import Reader
from flows.registry.chain import Standing
from flows.registry.findings import Report
from flows.registry.refs import Refs
from tasks.core.errors import RegistryError


def check_tags(
    root: Path, found: Refs, walked: list[str], standings: dict[str, Standing], is_whole: bool, report: Report
) -> None:
    """Tags and pointer are those that the chain asks for, no more and no fewer.

    Whatever GTO could read as a word on these models, or is on a decision, is one of them. Where the chain is not
    whole, nobody can count how often production moved, so the numbered tags are left out.
    """
    expected: dict[str, str] = {}
    for model, standing in standings.items():
        tags = standing.tags(model)
        expected |= tags if is_whole else {tag: commit for tag, commit in tags.items() if tag.startswith(f"{model}@")}
    known = {
        tag: commit
        for tag, commit in found.tags.items()
        if tag in expected or commit in walked or any(tag.startswith((f"{model}@", f"{model}#")) for model in standings)
        if is_whole or tag in expected
    }
    for tag in sorted(expected.keys() | known.keys()):
        note = report.noting(f"tag {tag}", "tag", expected.get(tag))
        if expected.get(tag) != known.get(tag):
            note(f"refs/tags/{tag}", f"commit {expected.get(tag)}, as the chain says", f"commit {known.get(tag)}")
    with git.Objects(root) as objects:
        for tag in sorted(expected.keys() & known.keys()):
            note = report.noting(f"tag {tag}", "tag", expected[tag])
            name = git.git(root, "for-each-ref", "--format=%(objectname)", f"refs/tags/{tag}")
            try:
                content = Reader(objects).read(name, "tag").decode(errors="replace").split("\n")
            except RegistryError as error:
                note(f"refs/tags/{tag}", "an annotated tag", str(error))
                continue
            if content[:3] != [f"object {known[tag]}", "type commit", f"tag {tag}"]:
                note(f"refs/tags/{tag}", f"a tag of that name on {known[tag]}", " ".join(content[:3]))


def check_histories(root: Path, walked: list[str], report: Report) -> None:
    """Where the branch has been, here and at the remotes as they were last seen, is part of where it is now."""
    ever = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/remotes/*/registry").splitlines()
    for line in [*ever, *(f"{commit} {refs.BRANCH} as it was" for commit in dict.fromkeys(logged_commits(root)))]:
        commit, where = line.split(" ", 1)
        if commit not in walked:
            report.noting("the branch registry", "registry")(
                refs.BRANCH, f"a history that has commit {commit[:12]} ({where})", "a history without it"
            )


def logged_commits(root: Path) -> list[str]:
    """The commits that the branch has been at here, as far as git's log of it goes."""
    log = root / git.git(root, "rev-parse", "--git-path", f"logs/{refs.BRANCH}")  # git reads it with commits only
    moves = [line.split(" ")[:2] for line in log.read_text().splitlines()] if log.exists() else []
    # git writes the log first: a move that was cut off there was never made, and nothing goes on from it.
    left = {old for old, _ in moves}
    return [new for _, new in moves if new in left]


def check_replacements(root: Path, reader: Reader, report: Report) -> None:
    """No `git replace` shows other content in the place of what was read here."""
    for name in git.git(root, "for-each-ref", "--format=%(refname)", "refs/replace/").splitlines():
        replaced = name.rpartition("/")[2]
        if replaced in reader.readers:
            report.noting("git", "chain", reader.readers[replaced])(
                name, "no replacement of what the registry names", "one"
            )


def check_remote(
    root: Path, remote: str, found: Refs, walked: list[str], models: tuple[str, ...], report: Report
) -> None:
    """Branch and tags at the remote are those that are here, to the tag object."""
    lines = git.git(root, "ls-remote", remote, refs.BRANCH, "refs/tags/*").splitlines()
    there = {name: commit for commit, name in (line.split("\t") for line in lines)}
    note = report.noting(f"remote {remote}", "registry")
    if there.get(refs.BRANCH) != found.tip:
        note(refs.BRANCH, f"commit {found.tip}, as here", f"commit {there.get(refs.BRANCH)}")
    lines = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/tags").splitlines()
    here = {name: commit for commit, name in (line.split(" ") for line in lines)}
    starts = tuple(f"refs/tags/{model}{sign}" for model in models for sign in "@#")
    for name in sorted(here.keys() | there.keys()):
        commits = found.tags.get(name.removeprefix("refs/tags/")), there.get(f"{name}^{{}}", there.get(name))
        ours = name.startswith(starts) or any(commit in walked for commit in commits)
        if ours and name != refs.BRANCH and not name.endswith("^{}") and here.get(name) != there.get(name):
            of_tag = report.noting(f"remote {remote}", "tag", commits[0])
            of_tag(name, f"{here.get(name)}, as here", str(there.get(name)))
