"""The registry: every decision, promotion or refusal, as one commit on the git branch `registry`.

The branch has a history of its own; each commit has the previous decision as parent and holds the record,
the verdict, the metrics, the model card, and the DVC files that bring the decided model back. A promotion
is tagged `<model>@v<version>` and `<model>#production#<n>`, which is GTO's format. Commits are made of bare
objects, so the user's branch, index and work tree are never touched. What goes wrong is a `RegistryError`,
but for an unusable `params.yaml`, which is a `ParamsError`.
"""

import hashlib
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, ValidationError, model_validator

from tasks.core import config, files, paths
from tasks.core.errors import RegistryError

BRANCH = "refs/heads/registry"
UPSTREAM = "refs/remotes/origin/registry"  # all that a fresh clone has of it
STAGE = "production"
DVC_CONFIG = Path(".dvc/config")
CARRIED = {
    "verdict.json": paths.report("gate"),
    "metrics.json": paths.report("benchmark"),
    "params.yaml": paths.PARAMS,
    "dvc.yaml": Path("dvc.yaml"),
    "dvc.lock": Path("dvc.lock"),
    ".dvc/config": DVC_CONFIG,
}

# Settings of the user that could stop a decision or change its bytes; older gits pass over the ones they do not know.
SETTINGS = (
    "core.fsync=objects,reference",
    f"core.hooksPath={os.devnull}",
    "i18n.commitEncoding=UTF-8",
)
# Set while git runs a hook or an alias; with them, git would work on that repository, whatever the root.
INHERITED = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^v\d+\.\d+\.\d+$")]
Document = TypeVar("Document", bound=BaseModel)


class Code(BaseModel):
    """The revision of the code that ran; dirty if a file that the decision does not carry differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: str | None
    dirty: bool


class Decision(BaseModel):
    """One decision, as `decision.json` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str = Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    outcome: Literal["promoted", "refused"]
    version: Version | None
    previous: str | None = Field(description="commit of the decision before this one, of whatever model")
    replaces: Version | None = Field(description="the version that this one takes production from")
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    code: Code
    model_sha256: Sha256
    data_sha256: Sha256
    verdict_sha256: Sha256
    failed: tuple[str, ...] = Field(description="the names of the gate's checks that failed")

    @model_validator(mode="after")
    def _version_if_promoted(self) -> Self:
        if (self.outcome == "promoted") != (self.version is not None) or (self.version and self.failed):
            raise ValueError("a promotion has a version and no failed check, a refusal has no version")
        return self


class Check(BaseModel):
    """One line of the gate's verdict. Only a true `passed` passes: "yes" and 1 are not verdicts."""

    name: str
    value: JsonValue
    operator: str
    limit: JsonValue
    passed: StrictBool


class Verdict(BaseModel):
    """What a decision needs of `gate.json`."""

    passed: StrictBool
    checks: tuple[Check, ...] = Field(min_length=1)
    model_sha256: Sha256
    data_sha256: Sha256


class Metrics(BaseModel):
    """What the model card tells of one stage."""

    top1: float
    size_bytes: int
    latency_p50_ms: float


class Benchmark(BaseModel):
    """What the model card needs of `benchmark.json`."""

    stages: dict[str, Metrics]


class Refs(NamedTuple):
    """The registry's refs as one look at the repository found them."""

    tip: str | None
    local: bool
    tags: dict[str, str]

    def numbered(self, pattern: str) -> dict[tuple[int, ...], str]:
        """The commits of the tags that match the whole pattern, by the numbers that its groups caught."""
        matches = ((re.fullmatch(pattern, tag), commit) for tag, commit in self.tags.items())
        return {tuple(map(int, match.groups())): commit for match, commit in matches if match}

    def versions(self, model: str) -> dict[tuple[int, ...], str]:
        return self.numbered(rf"{re.escape(model)}@v(\d+)\.(\d+)\.(\d+)")

    def assignments(self, model: str) -> dict[tuple[int, ...], str]:
        return self.numbered(rf"{re.escape(model)}#{STAGE}#(\d+)")


def record(root: Path, model: str) -> tuple[Decision, bool]:
    """Record the gate's verdict on `model` in the repository at `root`; say the decision and whether it is new.

    The model is promoted if the verdict and every check in it passed, and refused otherwise. A verdict that is
    the model's latest decision already is not recorded twice. `RegistryError` if a file is missing or damaged,
    if the verdict judged another model or other data than those that lie there now, if dvc.lock does not name them,
    or if another decision came first; then no ref has moved.
    """
    contents = {name: _read(root / path) for name, path in CARRIED.items()}
    verdict = _parsed(Verdict, contents["verdict.json"], paths.report("gate"))
    _require_judged(root, verdict)
    _require_locked(root, contents["dvc.lock"])
    refs = _refs(root)
    last = _latest(root, refs, model)
    _require_tag(refs, last)
    judged = (_sha256(contents["verdict.json"]), verdict.model_sha256, verdict.data_sha256)
    if last and judged == (last.verdict_sha256, last.model_sha256, last.data_sha256):
        return last, False
    decision = _decide(root, model, verdict, judged[0], refs, last)
    benchmark = _parsed(Benchmark, contents["metrics.json"], paths.report("benchmark"))
    contents["decision.json"] = (decision.model_dump_json(indent=2) + "\n").encode()
    contents["README.md"] = card(decision, verdict, benchmark, config.load(root / paths.PARAMS)).encode()
    _publish(root, decision, contents, refs)
    return decision, True


def latest(root: Path, model: str) -> Decision | None:
    """The latest decision on `model`, or None if there is none; `RegistryError` if the branch cannot be read."""
    return _latest(root, _refs(root), model)


def production(root: Path, model: str) -> Decision | None:
    """The decision that put `model` into production as it is now, or None; `RegistryError` if it cannot be read."""
    return _production(root, _refs(root), model)


def fetch(root: Path, model: str, path: Path, target: Path) -> str:
    """Copy `path` as the production version of `model` had it to `target`; say which version that is.

    The file comes through DVC, out of its cache or its remote. `RegistryError` if nothing is in production, if
    the file cannot be brought, or if what was brought is not what was recorded; then `target` is as it was.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    refs = _refs(root)
    decision = _production(root, refs, model)
    if decision is None or decision.version is None:
        raise RegistryError(f"{model} has no version in production: promote one first")
    commit = refs.assignments(model)[max(refs.assignments(model))]
    try:
        dvc = DVCFileSystem(url=str(root), rev=commit)
        with files.replacing(target) as (temporary,):
            dvc.get_file(path.as_posix(), str(temporary))
            _require_recorded(temporary, dvc.info(path.as_posix()).get("md5"), f"{path} of {model}@{decision.version}")
    except (DvcException, OSError) as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"{path} of {model}@{decision.version} cannot be brought: {reason}") from None
    return decision.version


def is_committed(root: Path, path: Path) -> bool:
    """Whether the file at `path` is in the repository's HEAD as it is now."""
    return _git(root, "--no-optional-locks", "status", "--porcelain", "--ignored", "--", path.as_posix()) == ""


def card(decision: Decision, verdict: Verdict, benchmark: Benchmark, params: config.Params) -> str:
    """The model card, Markdown."""
    side, code, ingest = params.finetune.image_size, decision.code, params.ingest
    return "\n".join(
        [
            f"# {decision.model} {decision.version or '(refused)'}",
            "",
            f"{decision.outcome.capitalize()} on {decision.created}"
            + (f", in place of {decision.replaces}." if decision.replaces else "."),
            "",
            "## Intended input",
            "",
            f"Images scaled to {side}x{side} pixels, each of one class: {', '.join(params.classes)}.",
            "",
            "## Stages",
            "",
            *_table("stage", "top-1", "size", "latency (p50)"),
            *(
                _row(name, f"{stage.top1:.2%}", f"{stage.size_bytes:,} B", f"{stage.latency_p50_ms:.3f} ms")
                for name, stage in benchmark.stages.items()
            ),
            "",
            "## Checks",
            "",
            *_table("check", "value", "operator", "limit", "passed"),
            *(
                _row(check.name, check.value, check.operator, check.limit, "yes" if check.passed else "no")
                for check in verdict.checks
            ),
            "",
            "## Provenance",
            "",
            f"- model SHA-256: `{decision.model_sha256}`",
            f"- test data SHA-256: `{decision.data_sha256}`",
            f"- code: commit `{code.commit}`" + (" with changes that are not committed" if code.dirty else ""),
            f"- images: `{ingest.path}` ({ingest.kind})",
            f"- starting weights: `{params.finetune.backbone}` ({params.finetune.weights.source})",
            "- licence: the terms of these images and starting weights hold for the model made from them",
            "",
        ]
    )


def _table(*names: str) -> tuple[str, str]:
    return _row(*names), _row(*["---"] * len(names))


def _row(*cells: Any) -> str:
    texts = (f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RegistryError(f"{path} is missing, so there is nothing to decide on: run the pipeline first") from None


def _parsed(kind: type[Document], data: bytes | str, name: Path | str) -> Document:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"{name} is malformed: {where and where + ': '}{first['msg']}") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _require_judged(root: Path, verdict: Verdict) -> None:
    for path, sha256, other in (
        (paths.onnx("reduce"), verdict.model_sha256, "another model"),
        (paths.TEST, verdict.data_sha256, "other data"),
    ):
        if not (root / path).is_file():
            raise RegistryError(f"{root / path} is missing: `dvc checkout` brings it back")
        if files.sha256(root / path) != sha256:
            raise RegistryError(f"the verdict judged {other} than {path} is now: run the pipeline again")


def _require_locked(root: Path, lock: bytes) -> None:
    # The lock is how the decided files are brought back, so it must name these very files.
    from ruamel.yaml import YAML

    stages = (YAML(typ="safe").load(lock.decode()) or {}).get("stages", {})
    recorded = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    for path in (paths.onnx("reduce"), paths.TEST, paths.report("benchmark"), paths.report("gate")):
        if recorded.get(path.as_posix()) != _md5(root / path):
            raise RegistryError(f"dvc.lock does not name {path} as it is now: run the pipeline again, or `dvc commit`")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _require_tag(refs: Refs, last: Decision | None) -> None:
    # A clone without tags, or one whose tag was taken away, would give the same version out again.
    if last and last.version and f"{last.model}@{last.version}" not in refs.tags:
        raise RegistryError(f"the tag {last.model}@{last.version} of a recorded promotion is missing: fetch the tags")


def _require_recorded(path: Path, md5: str | None, name: str) -> None:
    # DVC takes a cache object for intact if its size and time are, so the check is made here.
    found = _md5(path)
    if md5 is not None and found != md5:
        raise RegistryError(f"{name} is damaged in DVC's cache (md5 {found}, recorded {md5})")


def _decide(
    root: Path, model: str, verdict: Verdict, verdict_sha256: str, refs: Refs, last: Decision | None
) -> Decision:
    failed = tuple(check.name for check in verdict.checks if not check.passed)
    promoted = verdict.passed and not failed
    before = _production(root, refs, model)
    return Decision(
        model=model,
        outcome="promoted" if promoted else "refused",
        version=_next_version(refs, model) if promoted else None,
        previous=refs.tip,
        replaces=before.version if promoted and before else None,
        created=_created(last),
        code=_code(root),
        model_sha256=verdict.model_sha256,
        data_sha256=verdict.data_sha256,
        verdict_sha256=verdict_sha256,
        failed=failed,
    )


def _created(last: Decision | None) -> str:
    # GTO orders tags by their second, so a model's decisions never share one, nor go back with the clock.
    now = datetime.now(UTC)
    if last:
        now = max(now, datetime.fromisoformat(last.created) + timedelta(seconds=1))
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def _next_version(refs: Refs, model: str) -> str:
    major, minor, _ = max(refs.versions(model), default=(0, 0, 0))
    return f"v{major}.{minor + 1}.0"


def _code(root: Path) -> Code:
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD^{commit}")
    except RegistryError:
        raise RegistryError(f"{root} has no commit yet: commit the project, so that decisions can name it") from None
    carried = (f":(exclude){path.as_posix()}" for path in CARRIED.values())
    # Without the optional lock, git status does not refresh the user's index.
    changes = _git(
        root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=normal", "--", ".", *carried
    )
    return Code(commit=commit, dirty=changes != "")


def _refs(root: Path) -> Refs:
    fields = "%(refname) %(objectname) %(*objectname)"  # the last is the commit of an annotated tag
    lines = _git(root, "for-each-ref", f"--format={fields}", BRANCH, UPSTREAM, "refs/tags").splitlines()
    commits = {name: last for name, *_, last in map(str.split, lines)}
    tags = {
        name.removeprefix("refs/tags/"): commit for name, commit in commits.items() if name.startswith("refs/tags/")
    }
    return Refs(commits.get(BRANCH, commits.get(UPSTREAM)), BRANCH in commits, tags)


def _latest(root: Path, refs: Refs, model: str) -> Decision | None:
    commit = refs.tip
    while commit:
        decision = _decision(root, commit)
        if decision.model == model:
            return decision
        commit = decision.previous
    return None


def _production(root: Path, refs: Refs, model: str) -> Decision | None:
    assignments = refs.assignments(model)
    return _decision(root, assignments[max(assignments)]) if assignments else None


def _decision(root: Path, commit: str) -> Decision:
    name = f"{commit}:decision.json"
    return _parsed(Decision, _git(root, "cat-file", "blob", name), name)


def _publish(root: Path, decision: Decision, contents: dict[str, bytes], refs: Refs) -> None:
    who = _identity(root) | {"GIT_AUTHOR_DATE": decision.created, "GIT_COMMITTER_DATE": decision.created}
    parent = ("-p", refs.tip) if refs.tip else ()
    message = f"{decision.model}: {decision.outcome} {decision.version or ', '.join(decision.failed)}".strip()
    tree = _tree(root, contents)
    commit = _git(root, "commit-tree", tree, *parent, stdin=message.encode(), env=who)
    moves = [f"update {BRANCH} {commit} {refs.tip}" if refs.local else f"create {BRANCH} {commit}"]
    if decision.version:
        (assigned,) = max(refs.assignments(decision.model), default=(0,))
        for tag in (f"{decision.model}@{decision.version}", f"{decision.model}#{STAGE}#{assigned + 1}"):
            moves.append(f"create refs/tags/{tag} {_tag(root, tag, commit, message, who)}")
    _move(root, moves, message, who)


def _identity(root: Path) -> dict[str, str]:
    """Names for the author and committer where git has none, as on a fresh runner."""
    names: dict[str, str] = {}
    for role in ("AUTHOR", "COMMITTER"):
        try:
            _git(root, "var", f"GIT_{role}_IDENT")
        except RegistryError:
            names |= {f"GIT_{role}_NAME": "Weighin", f"GIT_{role}_EMAIL": "weighin@localhost"}
    return names


def _tree(root: Path, contents: dict[str, bytes]) -> str:
    folders: dict[str, list[str]] = {"": [], ".dvc": []}
    for name, data in contents.items():
        folder, _, leaf = name.rpartition("/")
        blob = _git(root, "hash-object", "-w", "--stdin", stdin=data)
        folders[folder].append(f"100644 blob {blob}\t{leaf}\n")
    inner = _git(root, "mktree", stdin="".join(folders[".dvc"]).encode())
    return _git(root, "mktree", stdin="".join([*folders[""], f"040000 tree {inner}\t.dvc\n"]).encode())


def _tag(root: Path, tag: str, commit: str, message: str, who: dict[str, str]) -> str:
    tagger = _git(root, "var", "GIT_COMMITTER_IDENT", env=who)
    content = f"object {commit}\ntype commit\ntag {tag}\ntagger {tagger}\n\n{message}\n"
    return _git(root, "mktag", stdin=content.encode(), env=who)


def _move(root: Path, moves: list[str], message: str, who: dict[str, str]) -> None:
    """Move the refs, all of them or none: each move names the value it expects, so a lost race is refused."""
    transaction = "\n".join(["start", *moves, "prepare", "commit", ""])
    try:
        _git(root, "update-ref", "-m", message, "--stdin", stdin=transaction.encode(), env=who)
    except RegistryError as error:
        if not any(sign in str(error) for sign in ("but expected", "already exists", "File exists")):
            raise
        raise RegistryError(
            f"another decision reached the registry first, so this one was not recorded: decide again ({error})"
        ) from None


def _git(root: Path, *args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> str:
    """What git says, without the last newline; `RegistryError` with git's own words if it fails."""
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    kept = {name: value for name, value in os.environ.items() if name not in INHERITED}
    done = subprocess.run(
        ["git", "-C", str(root), *settings, *args],
        input=stdin,
        capture_output=True,
        check=False,
        env=kept | {"LC_ALL": "C"} | (env or {}),
    )
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()).replace("fatal: ", "")[:300]
        verb = next(arg for arg in args if not arg.startswith("-"))
        raise RegistryError(f"git {verb} did not work in {root}: {said or f'status {done.returncode}'}")
    return done.stdout.decode(errors="replace").strip()
