"""The registry: every decision (promotion, refusal, hold, approval, rollback) is a signed commit on branch `registry`.

The branch has a history of its own; each commit has the previous decision as parent and holds the record, the evidence
behind it, the code and the DVC files that bring the decided model back. A version is tagged `<model>@v<version>`, what
is in production `<model>#production#<n>`, which is GTO's format. Branch and tags move by compare-and-swap, all of them
or none, here and at the remote if there is one. What goes wrong is a `RegistryError`, but for an unusable
`params.yaml`, which is a `ParamsError`.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, ValidationError, model_validator

from tasks.core import config, documents, files, git, keys, materials, paths, signing
from tasks.core.errors import RegistryError
from tasks.core.git import Objects, Overtaken

BRANCH = "refs/heads/registry"
STAGE = "production"
TAG = re.compile(rf"refs/tags/[^/]+(@v\d+\.\d+\.\d+|#{STAGE}#\d+)")
HELD = "refs/weighin/code"  # keeps the revisions of the code that decisions name, whatever becomes of their branch
MODEL = paths.onnx("reduce")
SIGNATURE = "bundle.sig"
# What a decision says of how the model was made; a rollback repeats it.
ORIGIN = ("environment.json", "bom.cdx.json", "provenance.json")
DECISION = "decision.json"
# What a commit of the registry carries of the working copy, under which name.
CARRIED = {
    "verdict.json": paths.report("gate"),
    "metrics.json": paths.report("benchmark"),
    "predictions.csv": paths.PREDICTIONS,
    "champion.json": paths.CHAMPION_RECORD,
    "params.yaml": paths.PARAMS,
    "dvc.yaml": Path("dvc.yaml"),
    "dvc.lock": Path("dvc.lock"),
    ".dvc/config": Path(".dvc/config"),
    "data/device.json": paths.DEVICE,
}

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^v\d+\.\d+\.\d+$")]
Outcome = Literal["promoted", "refused", "held", "approved", "rolled-back"]
Document = TypeVar("Document", bound=BaseModel)


class Superseded(RegistryError):
    """The verdict compared with a champion that is no longer the one in production: it has to be judged again."""


class Code(BaseModel):
    """The revision of the code that ran; dirty if a file that the decision does not carry differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: str | None
    dirty: bool


class Decision(BaseModel):
    """One decision, as `decision.json` has it; deploy/decision.schema.json is its schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str = Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", description="the model's name in the registry")
    outcome: Outcome
    version: Version | None = Field(description="the version that is in production from here on; null if nothing moved")
    replaces: Version | None = Field(description="the version that this one takes production from")
    previous: str | None = Field(description="commit of the decision before this one, of whatever model")
    previous_sha256: Sha256 | None = Field(description="SHA-256 of that one's bundle.sig, which names all its files")
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="UTC")
    by: str = Field(min_length=1, description="who decided, as git knows them")
    reason: str | None = Field(description="why, for an approval or a rollback")
    signer: str = Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$", description="fingerprint of the signing key")
    code: Code
    model_sha256: Sha256
    data_sha256: Sha256 = Field(description="of the test split")
    params_sha256: Sha256
    code_sha256: Sha256 = Field(description="of what sha256sum prints for tasks/**/*.py, sorted by path")
    verdict_sha256: Sha256
    bootstrap: bool = Field(description="there was no champion to compare with, and that was allowed")
    traded: bool = Field(description="accuracy was given for size or speed, within the margin stated for it")
    failed: tuple[str, ...] = Field(description="the names of the gate's checks that failed")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.outcome not in ("refused", "held")) != (self.version is not None):
            raise ValueError("what goes into production has a version, and nothing else has one")
        if self.failed and self.outcome != "refused":
            raise ValueError("only what is refused has failed a check")
        if (self.outcome in ("approved", "rolled-back")) != (self.reason is not None):
            raise ValueError("what people decide has a reason, and nothing else has one")
        return self


class Check(BaseModel):
    """One line of the gate's verdict. Only a true `passed` passes: "yes" and 1 are not verdicts."""

    name: str
    value: JsonValue
    operator: str
    limit: JsonValue
    where: str | None = None
    passed: StrictBool


class Champion(BaseModel):
    """What a challenger is compared with: `champion.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Version | None
    model_sha256: Sha256 | None
    withdrawn: tuple[Sha256, ...] = Field(description="models that a rollback took out of production")
    bootstrap: StrictBool = Field(description="--bootstrap was given: the first promotion goes without a champion")


class Compared(BaseModel):
    """What a decision needs of the comparison."""

    traded: StrictBool


class Verdict(BaseModel):
    """What a decision needs of `gate.json`."""

    passed: StrictBool
    checks: tuple[Check, ...] = Field(min_length=1)
    model_sha256: Sha256
    data_sha256: Sha256
    params_sha256: Sha256
    code_sha256: Sha256
    champion: Champion
    comparison: Compared | None


class Link(NamedTuple):
    """A decision and the commit that holds it."""

    commit: str
    decision: Decision


class Refs(NamedTuple):
    """The registry's refs as one look at the repository found them."""

    tip: str | None
    local: bool
    theirs: str | None  # the branch at the remote
    tags: dict[str, str]


class Standing(NamedTuple):
    """Where a model stands: what its decisions come to, from the first to the newest. Tags have no say in it."""

    latest: Link | None
    moved: Link | None  # the newest promotion, approval or rollback
    promotions: dict[str, Link]  # by version, approvals among them
    assignments: tuple[str, ...]  # the version that each of those moves put into production
    withdrawn: tuple[str, ...]  # SHA-256 of models that a rollback took out of production, and that are not back

    @property
    def production(self) -> Link | None:
        """The promotion of the version that is in production."""
        return self.promotions[self.assignments[-1]] if self.assignments else None

    def tags(self, model: str) -> dict[str, str]:
        """Every tag that the decisions ask for, with its commit."""
        versions = {f"{model}@{version}": link.commit for version, link in self.promotions.items()}
        numbered = enumerate(self.assignments, start=1)
        return versions | {f"{model}#{STAGE}#{n}": self.promotions[version].commit for n, version in numbered}


def record(root: Path, model: str, say: Callable[[str], None] = print) -> tuple[Decision, bool]:
    """Record the gate's verdict on `model` in the repository at `root`; say the decision and whether it is new.

    The model is promoted (or held, where promotions need an approval) if the verdict and every check in it passed, and
    refused otherwise. Nothing new is recorded for a verdict that is the model's latest decision already, nor for one
    that passes what is in production already.
    `Superseded` if another version has come into production since the verdict; `RegistryError` if a file is missing
    or damaged, if the verdict judged other files than those that lie there now, or if dvc.lock does not name them.
    Then no ref has moved.
    """
    remote = config.load(root / paths.PARAMS).registry.remote
    contents = {name: _read(root / path) for name, path in CARRIED.items()}
    verdict = parsed(Verdict, contents["verdict.json"], paths.report("gate"))
    parsed(documents.Benchmark, contents["metrics.json"], paths.report("benchmark"))
    _require_judged(root, verdict, contents["params.yaml"])
    _require_locked(root, contents["dvc.lock"])
    while True:
        try:
            refs = look(root, remote)
            stands = mended(root, refs, model, remote)
            known = _known(root, stands, model, verdict, files.sha256_of(contents["verdict.json"]))
            if known:
                return known, False
            return _record(root, model, contents, verdict, refs, stands, remote, say), True
        except Overtaken:
            say("another decision reached the registry first: looking at it again")


def mended(root: Path, refs: Refs, model: str, remote: str | None) -> Standing:
    """Where the model stands. If the newest move lacks its tags, because it was cut off, they are made now.

    `RegistryError` if a tag is elsewhere than where the decisions have it, or one of an earlier move is missing.
    """
    stands = standing(root, refs, model)
    expected = stands.tags(model)
    wrong = sorted(tag for tag, commit in expected.items() if refs.tags.get(tag, commit) != commit)
    if wrong:
        raise RegistryError(f"the tag {wrong[0]} is not where the registry's decisions have it: `weighin audit`")
    missing = [tag for tag in expected if tag not in refs.tags]
    moved = stands.moved and stands.moved.decision
    newest = {f"{model}@{moved.version}", f"{model}#{STAGE}#{len(stands.assignments)}"} if moved else set()
    if set(missing) - newest:
        raise RegistryError(
            f"the tag {missing[0]} of a recorded decision is missing: fetch the tags, or `weighin audit`"
        )
    if missing and moved:
        # The tag objects are those that were or would have been made with the decision.
        message, who = _message(moved), _who(root, moved)
        moves = {f"refs/tags/{tag}": git.tag(root, tag, expected[tag], message, who) for tag in missing}
        if remote:
            _push(root, remote, moves, refs)
            look(root, remote)
        else:
            git.move(root, [f"create {ref} {new}" for ref, new in moves.items()], "finish a decision", {})
    return stands


def _known(root: Path, stands: Standing, model: str, verdict: Verdict, verdict_sha256: str) -> Decision | None:
    """The decision that this verdict needs no new one for; `Superseded` if it is about another champion."""
    last, production = stands.latest and stands.latest.decision, stands.production and stands.production.decision
    if last and (last.verdict_sha256, last.model_sha256) == (verdict_sha256, verdict.model_sha256):
        return last
    if _passed(verdict) and production and production.model_sha256 == verdict.model_sha256:
        return production
    champion = _champion(root, stands, verdict.model_sha256, verdict.champion.bootstrap)
    if champion != verdict.champion:
        raise Superseded(
            f"the verdict compared with {verdict.champion.version or 'no champion'}, but {model} "
            f"{champion.version or 'nothing'} is in production now: judge again"
        )
    return None


def _record(
    root: Path,
    model: str,
    contents: dict[str, bytes],
    verdict: Verdict,
    refs: Refs,
    stands: Standing,
    remote: str | None,
    say: Callable[[str], None],
) -> Decision:
    params, production = config.load(root / paths.PARAMS), stands.production
    outcome: Outcome = "refused" if not _passed(verdict) else "held" if params.gate.approval else "promoted"
    promoted = outcome == "promoted"
    code = _code(root)
    if remote:
        _require_pushed(root, remote, code)
    place, signer = linked(root, refs, say)
    decision = Decision(
        model=model,
        outcome=outcome,
        version=next_version(stands.promotions) if promoted else None,
        replaces=production.decision.version if promoted and production else None,
        reason=None,
        code=code,
        model_sha256=verdict.model_sha256,
        data_sha256=verdict.data_sha256,
        params_sha256=verdict.params_sha256,
        code_sha256=verdict.code_sha256,
        verdict_sha256=files.sha256_of(contents["verdict.json"]),
        bootstrap=verdict.champion.version is None,
        traded=verdict.comparison is not None and verdict.comparison.traded,
        failed=tuple(check.name for check in verdict.checks if not check.passed),
        **place,
    )
    made_of = materials.read(root, contents["dvc.lock"])
    bundle = _bundle(root, decision, params, contents, verdict, made_of)
    if remote:
        _push_data(root, made_of.outputs, refs)
    publish(root, decision, bundle, root / MODEL, refs, stands, remote, signer)
    return decision


def _bundle(
    root: Path,
    decision: Decision,
    params: config.Params,
    contents: dict[str, bytes],
    verdict: Verdict,
    made_of: materials.Materials,
) -> dict[str, bytes]:
    """Every file of the decision: what it carries of the working copy, the code, and what is written for it."""
    benchmark = parsed(documents.Benchmark, contents["metrics.json"], "metrics.json")
    environment = documents.environment()
    return contents | {
        DECISION: files.to_json(decision.model_dump(mode="json")),
        "environment.json": files.to_json(environment),
        "trusted_keys": (root / keys.TRUSTED).read_bytes(),
        "bom.cdx.json": files.to_json(documents.bom(decision, params, benchmark, environment)),
        "provenance.json": files.to_json(documents.provenance(decision, params, made_of, environment)),
        "README.md": documents.card(decision, verdict.checks, benchmark, params).encode(),
        **{path: (root / path).read_bytes() for path in made_of.code},
    }


def latest(root: Path, model: str) -> Decision | None:
    """The latest decision on `model`, or None if there is none; `RegistryError` if the branch cannot be read."""
    found = standing(root, look(root), model).latest
    return found.decision if found else None


def production(root: Path, model: str) -> Decision | None:
    """The promotion of the version of `model` that is in production, or None; `RegistryError` if it cannot be read."""
    found = standing(root, look(root), model).production
    return found.decision if found else None


def standing(root: Path, refs: Refs, model: str) -> Standing:
    """What the decisions on `model` come to; `RegistryError` if one cannot be read."""
    latest: Link | None = None
    moved: Link | None = None
    promotions: dict[str, Link] = {}
    assignments: list[str] = []
    withdrawn: dict[str, None] = {}
    for link in reversed(list(chain(root, refs.tip))):
        decision = link.decision
        if decision.model != model:
            continue
        latest = link
        if decision.version is None:
            continue
        moved = link
        if decision.outcome != "rolled-back":
            promotions[decision.version] = link
        if decision.version not in promotions:
            raise RegistryError(f"the rollback {link.commit} goes to {decision.version}, which was never promoted")
        if decision.outcome == "rolled-back" and decision.replaces in promotions:
            withdrawn[promotions[decision.replaces].decision.model_sha256] = None
        withdrawn.pop(decision.model_sha256, None)
        assignments.append(decision.version)
    return Standing(latest, moved, promotions, tuple(assignments), tuple(withdrawn))


def chain(root: Path, tip: str | None) -> Iterator[Link]:
    """Every decision from the tip back to the first.

    `RegistryError` if one cannot be read, is not signed by a key that was trusted then, or is not linked to the one
    before: who can write to the branch, but has no key, must not say what the champion is.
    """
    trusted = keys.trusted_keys(root)
    bundle: str | None = None  # as the decision after this one has it
    with Objects(root) as objects:
        while tip:
            name = f"{tip}:{DECISION}"
            decision = parsed(Decision, objects.read(name), name)
            try:
                _require_signed(objects, tip, decision, trusted, bundle)
            except RegistryError as error:
                raise RegistryError(f"decision {tip[:12]} does not hold: {error}; see `weighin audit`") from None
            yield Link(tip, decision)
            tip, bundle = decision.previous, decision.previous_sha256


def _require_signed(
    objects: Objects, commit: str, decision: Decision, trusted: tuple[keys.TrustedKey, ...], bundle: str | None
) -> None:
    payload, signature = signing.split_commit(objects.read(commit))
    signer = signing.verify_commit(payload, signature, trusted, datetime.fromisoformat(decision.created))
    parents = re.findall(rb"^parent ([0-9a-f]+)$", payload.partition(b"\n\n")[0], re.M)
    if signer != decision.signer or [one.decode() for one in parents] != [decision.previous] * bool(decision.previous):
        raise RegistryError(f"{DECISION} names another signer or another decision before it than the commit has")
    if bundle is not None and files.sha256_of(objects.read(f"{commit}:{SIGNATURE}")) != bundle:
        raise RegistryError(f"its {SIGNATURE} is not the one that the next decision has seen")


def lay_champion(root: Path, model: str, challenger_sha256: str, bootstrap: bool) -> Champion:
    """Lay the champion that this challenger has to face in data/champion: its record and, if there is one, its model.

    That is the version in production or, where the challenger is in production itself, the one that it faced before.
    `RegistryError` if the champion's file cannot be brought or is not what was recorded.
    """
    remote = config.load(root / paths.PARAMS).registry.remote
    stands = standing(root, look(root, remote), model)
    champion = _champion(root, stands, challenger_sha256, bootstrap)
    target = root / paths.CHAMPION_MODEL
    there = files.sha256(target) if target.exists() else None
    text = champion.model_dump_json(indent=2) + "\n"
    if there == champion.model_sha256 and _same(root / paths.CHAMPION_RECORD, text):
        return champion
    with files.replacing(root / paths.CHAMPION) as (folder,):
        folder.mkdir()
        if champion.version and champion.model_sha256 == there:
            shutil.copy(target, folder / target.name)
        elif champion.version:
            commit = stands.promotions[champion.version].commit
            bring(root, commit, MODEL, folder / target.name, f"{model}@{champion.version}")
            if files.sha256(folder / target.name) != champion.model_sha256:
                raise RegistryError(f"{MODEL} of {model}@{champion.version} is not what was recorded: `weighin audit`")
        (folder / paths.CHAMPION_RECORD.name).write_text(text)
    return champion


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def _champion(root: Path, stands: Standing, challenger_sha256: str, bootstrap: bool) -> Champion:
    production = stands.production
    if production is None:
        return Champion(version=None, model_sha256=None, withdrawn=(), bootstrap=bootstrap)
    if production.decision.model_sha256 == challenger_sha256:
        name = f"{production.commit}:champion.json"
        with Objects(root) as objects:
            return parsed(Champion, objects.read(name), name)
    return Champion(
        version=production.decision.version,
        model_sha256=production.decision.model_sha256,
        withdrawn=stands.withdrawn,
        bootstrap=False,
    )


def fetch(root: Path, model: str, path: Path, target: Path) -> str:
    """Copy `path` as the production version of `model` had it to `target`; say which version that is.

    The file comes through DVC, out of its cache or its remote. `RegistryError` if nothing is in production, if
    the file cannot be brought, or if what was brought is not what was recorded; then `target` is as it was.
    """
    found = standing(root, look(root), model).production
    if found is None or found.decision.version is None:
        raise RegistryError(f"{model} has no version in production: promote one first")
    bring(root, found.commit, path, target, f"{model}@{found.decision.version}")
    return found.decision.version


def bring(root: Path, commit: str, path: Path, target: Path, name: str) -> None:
    """Copy `path` of a registry commit to `target` through DVC; `name` is what messages call the commit."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        dvc = DVCFileSystem(url=str(root), rev=commit)
        with files.replacing(target) as (temporary,):
            dvc.get_file(path.as_posix(), str(temporary))
            _require_recorded(temporary, dvc.info(path.as_posix()).get("md5"), f"{path} of {name}")
    except (DvcException, OSError) as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"{path} of {name} cannot be brought: {reason}") from None


def is_committed(root: Path, path: Path) -> bool:
    """Whether the file at `path` is in the repository's HEAD as it is now."""
    return git.git(root, "--no-optional-locks", "status", "--porcelain", "--ignored", "--", path.as_posix()) == ""


def _passed(verdict: Verdict) -> bool:
    return verdict.passed and all(check.passed for check in verdict.checks)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RegistryError(f"{path} is missing, so there is nothing to decide on: run the pipeline first") from None


def parsed(kind: type[Document], data: bytes | str, name: Path | str) -> Document:
    """A document of that kind; `RegistryError` with its name and the first thing wrong in it."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RegistryError(f"{name} is malformed: {where and where + ': '}{first['msg']}") from None


def _require_judged(root: Path, verdict: Verdict, params: bytes) -> None:
    for path, sha256, other in (
        (MODEL, verdict.model_sha256, "another model"),
        (paths.TEST, verdict.data_sha256, "other data"),
    ):
        if not (root / path).is_file():
            raise RegistryError(f"{root / path} is missing: `dvc checkout` brings it back")
        if files.sha256(root / path) != sha256:
            raise RegistryError(f"the verdict judged {other} than {path} is now: run the pipeline again")
    if files.sha256_of(params) != verdict.params_sha256:
        raise RegistryError(f"the verdict judged other parameters than {paths.PARAMS} has now: run the pipeline again")
    if files.digest(materials.code(root)) != verdict.code_sha256:
        raise RegistryError(f"the verdict judged other code than {materials.CODE} has now: run the pipeline again")


def _require_locked(root: Path, lock: bytes) -> None:
    # The lock is how the decided files are brought back, so it must name these very files.
    parts = (*materials.locked(lock, "deps"), *materials.locked(lock))
    recorded = {part["path"]: part["md5"] for _, part in parts}
    for path in (MODEL, paths.TEST, paths.report("benchmark"), paths.report("gate"), paths.DEVICE):
        if recorded.get(path.as_posix()) != materials.hashes(root / path)[0]:
            raise RegistryError(f"dvc.lock does not name {path} as it is now: run the pipeline again, or `dvc commit`")


def _require_recorded(path: Path, md5: str | None, name: str) -> None:
    # DVC takes a cache object for intact if its size and time are, so the check is made here.
    found = materials.hashes(path)[0]
    if md5 is not None and found != md5:
        raise RegistryError(f"{name} is damaged in DVC's cache (md5 {found}, recorded {md5})")


def _require_pushed(root: Path, remote: str, code: Code) -> None:
    # Others could neither read nor run a revision that only this machine has.
    where = f"refs/remotes/{remote}"
    if not git.git(root, "for-each-ref", "--count=1", f"--contains={code.commit}", "--format=%(refname)", where):
        raise RegistryError(f"commit {code.commit} is not at {remote}: push it, so that others can audit the decision")


def linked(root: Path, refs: Refs, say: Callable[[str], None]) -> tuple[dict[str, Any], signing.Signer]:
    """What every decision says of its place in the chain, its time, and who made it; and its signer.

    `RegistryError` if the signer's key is not trusted, or is so only by a change that has not been committed: the
    first key of all, which enters itself, does not need that.
    """
    now, before = datetime.now(UTC), None
    if refs.tip:
        with Objects(root) as objects:
            last = parsed(Decision, objects.read(f"{refs.tip}:{DECISION}"), f"{refs.tip}:{DECISION}")
            before = files.sha256_of(objects.read(f"{refs.tip}:{SIGNATURE}"))
        # GTO orders tags by their second, so decisions never share one, nor go back with the clock.
        now = max(now, datetime.fromisoformat(last.created) + timedelta(seconds=1))
    signer = signing.signer(root, now, say, first=refs.tip is None)
    _require_reviewed(root, signer)
    who = git.git(root, "var", "GIT_AUTHOR_IDENT", env=git.identity(root))
    place = {
        "previous": refs.tip,
        "previous_sha256": before,
        "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "by": who.rsplit(" ", 2)[0],
        "signer": signer.fingerprint,
    }
    return place, signer


def _require_reviewed(root: Path, signer: signing.Signer) -> None:
    with Objects(root) as objects:
        committed = objects.find(f"HEAD:./{keys.TRUSTED}")
    reviewed = keys.parse(committed.data) if committed else ()
    if reviewed and all(key.fingerprint != signer.fingerprint for key in reviewed):
        raise RegistryError(
            f"key {signer.fingerprint} is in {keys.TRUSTED} here, but not in the last commit: have the change reviewed "
            "and commit it"
        )


def next_version(versions: Iterable[str]) -> str:
    """The version after these."""
    major, minor, _ = max((tuple(map(int, one[1:].split("."))) for one in versions), default=(0, 0, 0))
    return f"v{major}.{minor + 1}.0"


def _code(root: Path) -> Code:
    try:
        commit = git.git(root, "rev-parse", "--verify", "HEAD^{commit}")
    except RegistryError:
        raise RegistryError(f"{root} has no commit yet: commit the project, so that decisions can name it") from None
    carried = (f":(exclude){path.as_posix()}" for path in (*CARRIED.values(), keys.TRUSTED))
    # Without the optional lock, git status does not refresh the user's index.
    status = ("--no-optional-locks", "status", "--porcelain")
    changes = git.git(root, *status, "--untracked-files=normal", "--", ".", *carried)
    # What git ignores among the code is carried all the same, so no commit has it.
    ignored = git.git(root, *status, "--untracked-files=all", "--ignored", "--", materials.CODE.as_posix())
    return Code(commit=commit, dirty=changes != "" or any(line.endswith(".py") for line in ignored.splitlines()))


def look(root: Path, remote: str | None = None) -> Refs:
    """The registry's refs; with a remote as they are there, and what was missing here has been fetched.

    `RegistryError` if the remote cannot be reached, or if this registry and that one have parted ways.
    """
    upstream = f"refs/remotes/{remote or 'origin'}/registry"  # all that a fresh clone has of it
    theirs = _fetch(root, remote) if remote else None
    if theirs and _commit(root, BRANCH) is None:
        git.move(root, [f"create {BRANCH} {theirs}"], f"fetch {remote}", {})
    forward(root, upstream)
    fields = "%(refname) %(objectname) %(*objectname)"  # the last is the commit of an annotated tag
    lines = git.git(root, "for-each-ref", f"--format={fields}", BRANCH, upstream, "refs/tags").splitlines()
    commits = {name: last for name, *_, last in map(str.split, lines)}
    tags = {
        name.removeprefix("refs/tags/"): commit for name, commit in commits.items() if name.startswith("refs/tags/")
    }
    return Refs(commits.get(BRANCH, commits.get(upstream)), BRANCH in commits, theirs, tags)


def _fetch(root: Path, remote: str) -> str | None:
    """Bring the remote's branches and the registry's tags; says where the registry's branch is there."""
    listed = git.git(root, "ls-remote", "--refs", remote).splitlines()
    there = {ref for _, ref in (line.split("\t") for line in listed)}
    ours = set(git.git(root, "for-each-ref", "--format=%(refname)", "refs/tags").split())
    tags = sorted(ref for ref in there - ours if TAG.fullmatch(ref))
    kept = [f"+{HELD}/*:{HELD}/*"] if any(ref.startswith(f"{HELD}/") for ref in there) else []
    specs = [f"+refs/heads/*:refs/remotes/{remote}/*", *kept, *(f"{ref}:{ref}" for ref in tags)]
    git.git(root, "fetch", "--quiet", "--no-tags", remote, *specs)
    return _commit(root, f"refs/remotes/{remote}/registry") if BRANCH in there else None


def forward(root: Path, upstream: str) -> None:
    """Move the branch `registry` forward to where it was last seen at the remote.

    `RegistryError` if the two have parted ways.
    """
    ours, theirs = _commit(root, BRANCH), _commit(root, upstream)
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


def _commit(root: Path, ref: str) -> str | None:
    return git.git(root, "for-each-ref", "--format=%(objectname)", ref) or None


def publish(
    root: Path,
    decision: Decision,
    bundle: dict[str, bytes],
    model: Path,
    refs: Refs,
    stands: Standing,
    remote: str | None,
    signer: signing.Signer,
) -> None:
    """Sign the bundle with the model, commit it, and move branch and tags.

    `Overtaken` if another decision came first; `RegistryError` if a tag is in the way. Then no ref has moved.
    """
    message, who = _message(decision), _who(root, decision)
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        folder = Path(scratch)
        for name, data in bundle.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        shutil.copy(model, folder / MODEL.name)
        signer.sign_folder(folder, folder / SIGNATURE)
        (folder / MODEL.name).unlink()
        tree = git.tree(root, folder)
    commit = _signed_commit(root, tree, refs.tip, message, who, signer)
    # The branch first: if git is killed between two refs, the tags follow from it (`mended`), not it from them.
    moves = {BRANCH: commit}
    if decision.version:
        promotion = stands.promotions.get(decision.version)
        target = promotion.commit if promotion else commit
        tags = [f"{decision.model}#{STAGE}#{len(stands.assignments) + 1}"]
        tags += [] if promotion else [f"{decision.model}@{decision.version}"]
        for tag in tags:
            if tag in refs.tags:
                raise RegistryError(f"there is a tag {tag} already, and no decision has it: `weighin audit`")
            moves[f"refs/tags/{tag}"] = git.tag(root, tag, target, message, who)
    if decision.code.commit and _commit(root, f"{HELD}/{decision.code.commit}") is None:
        moves[f"{HELD}/{decision.code.commit}"] = decision.code.commit
    if remote:
        _push(root, remote, moves, refs)
        look(root, remote)
    else:
        expected = {BRANCH: refs.tip} if refs.local else {}
        steps = (
            f"update {ref} {new} {expected[ref]}" if ref in expected else f"create {ref} {new}"
            for ref, new in moves.items()
        )
        git.move(root, list(steps), message, who)


def _message(decision: Decision) -> str:
    return f"{decision.model}: {decision.outcome} {decision.version or ', '.join(decision.failed)}".strip()


def _who(root: Path, decision: Decision) -> dict[str, str]:
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


def _push(root: Path, remote: str, moves: dict[str, str], refs: Refs) -> None:
    """Move the refs at the remote, all or none, if they are there what they were when we looked.

    Tags of earlier decisions that the remote lacks go along, as when the registry was kept here only until now.
    """
    listed = git.git(root, "ls-remote", "--refs", remote, "refs/tags/*", f"{HELD}/*").split()[1::2]
    decided = {link.commit for link in chain(root, refs.tip)}
    names = (f"refs/tags/{tag}" for tag, commit in refs.tags.items() if commit in decided)
    held = git.git(root, "for-each-ref", "--format=%(refname)", HELD).split()
    older = {ref: ref for ref in (*names, *held) if ref not in listed}
    leases = [f"--force-with-lease={ref}:{refs.theirs or '' if ref == BRANCH else ''}" for ref in (*moves, *older)]
    specs = [f"{new}:{ref}" for ref, new in (moves | older).items()]
    git.git(root, "push", "--quiet", "--atomic", *leases, remote, *specs)


def _push_data(root: Path, outputs: Iterable[materials.Material], refs: Refs) -> None:
    """Bring every output to DVC's remote, so that the pointer never points to what others cannot have.

    Those of earlier decisions that the git remote lacks go along.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    wanted = {one.md5: one.path for one in outputs}
    earlier = git.git(root, "rev-list", refs.tip, *([f"^{refs.theirs}"] if refs.theirs else [])) if refs.tip else ""
    with Objects(root) as objects:
        for commit in earlier.split():
            made_of = documents.materials_of(json.loads(objects.read(f"{commit}:provenance.json")))
            wanted |= {one.md5: one.path for one in made_of.outputs}
    try:
        with Repo(str(root)) as repo:
            result = repo.cloud.push([HashInfo("md5", name) for name in wanted])
    except DvcException as error:
        raise RegistryError(f"the outputs did not reach DVC's remote: {' '.join(str(error).split())}") from None
    if result.failed:
        lost = min(wanted[one.value] for one in result.failed)
        raise RegistryError(
            f"{lost} did not reach DVC's remote ({len(result.failed)} in all): it may lack in the cache"
        )
