"""The audit: from any decision back to its data, code, parameters and verdict, every byte read again.

Nothing is taken on trust: git's objects are hashed, the chain and its signatures are followed from the newest decision
to the first, verdicts are judged again from their evidence, and every artifact is hashed with SHA-256 wherever it lies.
What does not hold is a `Finding`; only what cannot be audited at all is a `RegistryError`.
"""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tasks import gate
from tasks.core import config, documents, files, git, keys, materials, paths, registry, signing
from tasks.core.errors import RegistryError, WeighinError
from tasks.core.materials import Material
from tasks.core.progress import track
from tasks.core.registry import CARRIED, DECISION, ORIGIN, SIGNATURE, Champion, Decision, Refs, Verdict

CERTAIN = (*ORIGIN, "trusted_keys", "README.md", DECISION, SIGNATURE)
TOLERANCE = 2e-6  # of recomputed bounds, which another processor may round otherwise

Note = Callable[[str, str, str], None]  # file, expected, found


class Finding(NamedTuple):
    """What does not hold: in which decision, about which file, and what was expected and found."""

    decision: str
    file: str
    expected: str
    found: str


@dataclass
class Report:
    """What was looked at, and the findings; everything holds if there are none."""

    decisions: int = 0
    audited: list[str] = field(default_factory=list)  # decisions whose artifacts were read
    artifacts: int = 0
    bytes_hashed: int = 0
    findings: list[Finding] = field(default_factory=list)

    def noting(self, decision: str) -> Note:
        """Notes what is wrong with that decision."""
        return lambda file, expected, found: self.findings.append(Finding(decision, file, expected, found))


class Entry(NamedTuple):
    """A decision, the commit that holds it, and what it was compared with."""

    commit: str
    decision: Decision
    champion: Champion | None
    evidence: str  # one hash for the files that a rollback or an approval has to share with what it is about

    @property
    def name(self) -> str:
        return named(self.commit, self.decision)


def named(commit: str, decision: Decision) -> str:
    """What people call a decision."""
    if decision.outcome in ("promoted", "approved"):
        return f"{decision.model}@{decision.version}"
    what = {"refused": "refusal", "held": "hold", "rolled-back": f"rollback to {decision.version}"}[decision.outcome]
    return f"{decision.model} {what} ({commit[:12]})"


@dataclass
class Books:
    """A model's state as the chain tells it, from its first decision on."""

    promotions: dict[str, Entry] = field(default_factory=dict)  # by version
    assignments: list[str] = field(default_factory=list)  # commits of the promotions, as production went to them
    production: str | None = None
    held: Entry | None = None  # the decision before, if it waits for an approval
    withdrawn: list[str] = field(default_factory=list)  # SHA-256 of models that a rollback took out of production


class Reader:
    """Git objects by their own names; a file that many decisions share is hashed with SHA-256 once."""

    def __init__(self, objects: git.Objects) -> None:
        self.objects = objects
        self.sha256: dict[str, str] = {}
        self.names: set[str] = set()

    def read(self, name: str, kind: str) -> bytes:
        """The content of the object; `RegistryError` if it is not there, or does not hash to its name."""
        self.names.add(name)
        found = self.objects.find(name)
        if found is None:
            raise RegistryError("missing or damaged in git's object store")
        if (found.kind, found.name) != (kind, name):
            raise RegistryError(f"git object {name} does not hash to its name")
        if kind == "blob":
            self.sha256[name] = files.sha256_of(found.data)
        return found.data

    def tree(self, name: str) -> dict[str, str]:
        """The names of the blobs in a tree and the trees in it, by their paths."""
        data = self.read(name, "tree")
        blobs: dict[str, str] = {}
        size = len(name) // 2
        while data:
            head, _, rest = data.partition(b"\0")
            mode, path = head.decode(errors="replace").split(" ", 1)
            entry, data = rest[:size].hex(), rest[size:]
            if mode == "40000":
                blobs |= {f"{path}/{inner}": blob for inner, blob in self.tree(entry).items()}
            else:
                blobs[path] = entry
        return blobs

    def hashes(self, blobs: dict[str, str], note: Note) -> dict[str, str]:
        """SHA-256 of each sound blob by its path."""
        for path, blob in blobs.items():
            try:
                if blob not in self.sha256:
                    self.read(blob, "blob")
            except RegistryError as error:
                note(path, f"git object {blob}", str(error))
        return {path: self.sha256[blob] for path, blob in blobs.items() if blob in self.sha256}


def audit(
    root: Path,
    model: str,
    version: str | None = None,
    everything: bool = False,
    remote: str | None = None,
    working_copy: bool = True,
    commit: str | None = None,
) -> Report:
    """Audit the whole chain, and the artifacts of `version` or of the decision in `commit`, of every decision, or else
    of what is in production.

    With the name of a git remote, the registry and the artifacts there as well; an artifact that is there may be
    missing in the cache. With `working_copy`, the files that lie here of the model's newest decision too.
    `RegistryError` if there is no registry, or no such version.
    """
    report = Report()
    trusted = _trusted(root, report)
    _catch_up(root)
    entries: list[Entry] = []
    walked: list[str] = []
    with git.Objects(root) as objects:
        reader = Reader(objects)
        refs = _refs(root, reader)
        if refs.tip is None:
            raise RegistryError(f"{root} has no branch registry: nothing has been decided yet, or it was not fetched")
        wanted = commit or _wanted(refs, model, version, everything)
        store = Store(root, remote is not None, report)
        for one in track(_commits(reader, refs.tip, report), "decisions"):
            walked.append(one)
            entry, outputs = _read(reader, root, one, trusted, report)
            if entry is None:
                continue
            newest = entry.decision.model == model and all(other.decision.model != model for other in entries)
            if newest and working_copy:
                _working_copy(root, entry, outputs, reader, report)
            entries.append(entry)
            if wanted is None or one == wanted:
                report.audited.append(entry.name)
                store.check(outputs, report.noting(entry.name))
    if not any(one.decision.model == model for one in entries) and not report.findings:
        known = ", ".join(sorted({one.decision.model for one in entries}))
        raise RegistryError(f"the registry has no decision on {model}; it has decisions on: {known}")
    report.decisions = len(entries)
    books = _replay(list(reversed(entries)), report)
    _tags(root, refs, walked, books, report)
    _histories(root, walked, report)
    _replacements(root, reader, report)
    if remote:
        _elsewhere(root, remote, refs, walked, tuple(books), report)
    return report


def _trusted(root: Path, report: Report) -> tuple[keys.TrustedKey, ...]:
    try:
        return keys.trusted_keys(root)
    except RegistryError as error:
        report.noting("trusted keys")(str(keys.TRUSTED), "public keys, one to a line", str(error))
        return ()


def _catch_up(root: Path) -> None:
    """Bring a clone that is merely behind to where its origin was last seen; a branch that was moved back stays."""
    upstream = "refs/remotes/origin/registry"
    if git.git(root, "for-each-ref", "--format=%(objectname)", upstream) not in _logged(root):
        with contextlib.suppress(RegistryError):  # the audit finds what stands against it
            registry.forward(root, upstream)


def _refs(root: Path, reader: Reader) -> Refs:
    """The refs as `registry.look` finds them, but for tags that are damaged: those stand for themselves."""
    listed = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)").splitlines()
    names = {ref: name for name, ref in (line.split(" ") for line in listed)}
    tags: dict[str, str] = {}
    for ref, name in names.items():
        if ref.startswith("refs/tags/"):
            tags[ref.removeprefix("refs/tags/")] = name
            with contextlib.suppress(RegistryError):
                tags[ref.removeprefix("refs/tags/")] = reader.read(name, "tag")[7:].partition(b"\n")[0].decode()
    tip = names.get(registry.BRANCH, names.get("refs/remotes/origin/registry"))
    return Refs(tip, registry.BRANCH in names, None, tags)


def _wanted(refs: Refs, model: str, version: str | None, everything: bool) -> str | None:
    """The commit of the decision whose artifacts are wanted; None for all of them."""
    if everything:
        return None
    tag = f"{model}@{version}"
    if version:
        if tag not in refs.tags:
            known = sorted(one for one in refs.tags if one.startswith(f"{model}@"))
            raise RegistryError(f"there is no version {tag}; there are: {', '.join(known) or 'none'}")
        return refs.tags[tag]
    prefix = f"{model}#{registry.STAGE}#"
    numbers = [one.removeprefix(prefix) for one in refs.tags if one.startswith(prefix)]
    newest = max((int(one) for one in numbers if one.isdecimal()), default=None)
    return refs.tags[f"{prefix}{newest}"] if newest is not None else ""


def _commits(reader: Reader, tip: str, report: Report) -> Iterator[str]:
    """Every commit of the branch from the tip to the first, as git has their parents."""
    commit: str | None = tip
    seen: set[str] = set()
    while commit and commit not in seen:
        seen.add(commit)
        try:
            header = reader.read(commit, "commit").partition(b"\n\n")[0].decode(errors="replace")
        except RegistryError as error:
            report.noting(f"commit {commit[:12]}")("the commit", "a decision, as the next one says", str(error))
            return
        yield commit
        commit = next((line[7:] for line in header.split("\n") if line.startswith("parent ")), None)


def _read(
    reader: Reader, root: Path, commit: str, trusted: tuple[keys.TrustedKey, ...], report: Report
) -> tuple[Entry | None, tuple[Material, ...]]:
    """Check one decision for itself; what it is, and the artifacts that it names."""
    note = report.noting(f"commit {commit[:12]}")
    raw = reader.read(commit, "commit")
    header = [line.split(" ", 1) for line in raw.partition(b"\n\n")[0].decode(errors="replace").split("\n")]
    fields = dict(line for line in reversed(header) if len(line) == 2)
    try:
        blobs = reader.tree(fields.get("tree", ""))
    except RegistryError as error:
        note("its files", "as the commit names them", str(error))
        return None, ()
    sha256 = reader.hashes(blobs, note)
    contents = {name: reader.read(blobs[name], "blob") for name in (*CARRIED, *CERTAIN) if name in sha256}
    try:
        decision = registry.parsed(Decision, contents.get(DECISION, b""), DECISION)
    except RegistryError as error:
        note(DECISION, "a decision", str(error))
        return None, ()
    note = report.noting(named(commit, decision))
    for name in (*CARRIED, *CERTAIN):
        if name not in blobs:
            note(name, "a file of every decision", "missing")
    _signatures(raw, contents, sha256, decision, trusted, note)
    _link(reader, header, decision, note)
    _dates(fields, decision, note)
    _evidence(contents, sha256, decision, note)
    _code(reader, root, blobs, decision, note)
    _kept(contents.get("trusted_keys", b""), trusted, note)
    champion: Champion | None = None
    outputs: tuple[Material, ...] = ()
    with contextlib.suppress(WeighinError, ValueError, RecursionError):  # _evidence has noted it
        outputs = documents.materials_of(json.loads(contents.get("provenance.json", b"{}"))).outputs
        champion = registry.parsed(Champion, contents.get("champion.json", b""), "champion.json")
    shared = files.digest({name: sha256.get(name, "") for name in (*CARRIED, *ORIGIN)})
    return Entry(commit, decision, champion, shared), outputs


def _signatures(
    raw: bytes,
    contents: dict[str, bytes],
    sha256: dict[str, str],
    decision: Decision,
    trusted: tuple[keys.TrustedKey, ...],
    note: Note,
) -> None:
    """The commit is signed by a key that was trusted then, and the bundle by the same."""
    try:
        signer = signing.verify_commit(*signing.split_commit(raw), trusted, datetime.fromisoformat(decision.created))
    except RegistryError as error:
        note("the commit's signature", f"by a key in {keys.TRUSTED}", str(error))
        signer = decision.signer
    if signer != decision.signer:
        note(DECISION, f"signer {signer}", f"signer {decision.signer}")
    key = next((key.public_key for key in trusted if key.fingerprint == signer), None)
    if key is None:
        return
    digests = {path: value for path, value in sha256.items() if path != SIGNATURE}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        (Path(scratch) / SIGNATURE).write_bytes(contents.get(SIGNATURE, b""))
        try:
            signing.verify_manifest(
                Path(scratch) / SIGNATURE, digests | {registry.MODEL.name: decision.model_sha256}, key
            )
        except RegistryError as error:
            note(SIGNATURE, f"the signature of every file by key {signer}", str(error).replace(f"{scratch}/", ""))


def _link(reader: Reader, header: list[list[str]], decision: Decision, note: Note) -> None:
    """The decision before this one is the commit's only parent, and its bundle is the one that was there then."""
    parents = [line[1] for line in header if line[0] == "parent"]
    if parents != [decision.previous] * (decision.previous is not None):
        note(DECISION, f"previous {', '.join(parents) or None}", f"previous {decision.previous}")
    if (decision.previous is None) != (decision.previous_sha256 is None):
        note(DECISION, "previous and previous_sha256, both or none", f"previous_sha256 {decision.previous_sha256}")
    for parent in parents:
        found = reader.objects.find(f"{parent}:{SIGNATURE}")
        before = files.sha256_of(found.data) if found else None
        if before != decision.previous_sha256:
            note(DECISION, f"previous_sha256 {before}", f"previous_sha256 {decision.previous_sha256}")


def _dates(fields: dict[str, str], decision: Decision, note: Note) -> None:
    at = datetime.fromisoformat(decision.created).timestamp()
    for role in ("author", "committer"):
        if fields.get(role, "").split(" ")[-2:-1] != [f"{at:.0f}"]:
            note("the commit", f"{role} date {decision.created}", str(fields.get(role)))


def _evidence(contents: dict[str, bytes], sha256: dict[str, str], decision: Decision, note: Note) -> None:
    """The record names its own files, the verdict follows from them, and the outcome from the verdict."""
    for name, recorded in (("verdict.json", decision.verdict_sha256), ("params.yaml", decision.params_sha256)):
        if name in sha256 and sha256[name] != recorded:
            note(name, f"SHA-256 {recorded}, as {DECISION} says", sha256[name])
    code = files.digest({path: value for path, value in sha256.items() if path.startswith(f"{materials.CODE}/")})
    if code != decision.code_sha256:
        note(f"{materials.CODE}/", f"SHA-256 {decision.code_sha256}, as {DECISION} says", code)
    try:
        made_of = documents.materials_of(json.loads(contents.get("provenance.json", b"")))
        outputs = {material.path: material for material in made_of.outputs}
        locked = {out["path"]: out["md5"] for _, out in materials.locked(contents.get("dvc.lock", b""))}
        read = {dep["path"]: dep["md5"] for _, dep in materials.locked(contents.get("dvc.lock", b""), "deps")}
        verdict = registry.parsed(Verdict, contents.get("verdict.json", b""), "verdict.json")
    except (ValueError, RecursionError, RegistryError) as error:
        note("provenance.json, dvc.lock or verdict.json", "what belongs there", str(error))
        return
    for path, md5 in locked.items():
        if path not in outputs or outputs[path].md5 != md5:
            note("provenance.json", f"{path} with md5 {md5}, as dvc.lock says", str(outputs.get(path)))
    for path in outputs:
        if path not in locked and not any(path.startswith(f"{one}/") for one in locked):
            note("dvc.lock", f"{path}, as provenance.json says", "no such output")
    for name, path in CARRIED.items():
        if path.as_posix() in outputs and outputs[path.as_posix()].sha256 != sha256.get(name):
            note(name, f"SHA-256 {outputs[path.as_posix()].sha256}, as provenance.json says", str(sha256.get(name)))
    device = str(paths.DEVICE)
    found = hashlib.md5(contents.get(device, b""), usedforsecurity=False).hexdigest()
    if device in contents and read.get(device) != found:
        note(device, f"md5 {read.get(device)}, as dvc.lock says", found)
    for path, recorded in ((registry.MODEL, decision.model_sha256), (paths.TEST, decision.data_sha256)):
        if path.as_posix() not in outputs or outputs[path.as_posix()].sha256 != recorded:
            note("provenance.json", f"{path} with SHA-256 {recorded}", str(outputs.get(path.as_posix())))
    _follows(contents, outputs, decision, verdict, note)


def _follows(
    contents: dict[str, bytes], outputs: dict[str, Material], decision: Decision, verdict: Verdict, note: Note
) -> None:
    """Judge again from the evidence; the verdict and the outcome must be what comes of it."""
    failed = tuple(check.name for check in verdict.checks if not check.passed)
    passed = verdict.passed and not failed
    if passed != (decision.outcome != "refused") or failed != decision.failed:
        note(
            DECISION,
            f"{'passed' if passed else 'refused'}, failed {list(failed)}",
            f"{decision.outcome}, failed {list(decision.failed)}",
        )
    told = (decision.model_sha256, decision.data_sha256, decision.params_sha256, decision.code_sha256)
    if told != (verdict.model_sha256, verdict.data_sha256, verdict.params_sha256, verdict.code_sha256):
        note(DECISION, "the model, data, parameters and code that the verdict judged", "others")
    if decision.bootstrap != (verdict.champion.version is None):
        note(DECISION, f"bootstrap {verdict.champion.version is None}", f"bootstrap {decision.bootstrap}")
    if decision.traded != (verdict.comparison is not None and verdict.comparison.traded):
        note(DECISION, "traded, as the verdict says", f"traded {decision.traded}")
    recorded = json.loads(contents["verdict.json"])
    if recorded.get("schema_version") != gate.SCHEMA_VERSION:
        note(
            "verdict.json",
            f"schema_version {gate.SCHEMA_VERSION}",
            f"{recorded.get('schema_version')}, not judged again",
        )
        return
    golden, packed = (outputs.get(path.as_posix()) for path in (paths.GOLDEN, paths.PACKED))
    try:
        params = config.read(contents.get("params.yaml", b""), Path("params.yaml"))
        evidence = gate.Evidence(
            report=json.loads(contents.get("metrics.json", b"")),
            predictions=contents.get("predictions.csv", b""),
            champion=json.loads(contents.get("champion.json", b"")),
            golden_sha256=golden.sha256 if golden else None,
            packed_sha256=packed.sha256 if packed else None,
            infra=recorded.get("infra"),
            judged=gate.Judged(*told),
        )
    except (ValueError, RecursionError, WeighinError) as error:
        note("metrics.json, champion.json or params.yaml", "what belongs there", str(error))
        return
    if decision.outcome in (("promoted",) if params.gate.approval else ("held", "approved")):
        note(DECISION, f"what gate.approval {params.gate.approval} makes of a model that passes", decision.outcome)
    again = json.loads(json.dumps(gate.gate(evidence, params.gate, params.classes)))
    if difference := _difference(again, recorded, "verdict"):
        note("verdict.json", f"{difference[0]}, from its evidence", difference[1])


def _difference(expected: Any, found: Any, where: str) -> tuple[str, str] | None:
    """The first place at which two JSON documents differ by more than rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return f"{where} with {sorted(expected)}", f"with {sorted(found)}"
        pairs = [(expected[key], found[key], f"{where}.{key}") for key in expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [
            (one, other, f"{where}[{index}]") for index, (one, other) in enumerate(zip(expected, found, strict=True))
        ]
    else:
        return None if _same(expected, found) else (f"{where} {expected}", f"{found}")
    return next(filter(None, (_difference(*pair) for pair in pairs)), None)


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=TOLERANCE)
    return type(expected) is type(found) and bool(expected == found)


def _code(reader: Reader, root: Path, blobs: dict[str, str], decision: Decision, note: Note) -> None:
    """The code that the record carries is that of the revision it names, unless it says that there were changes."""
    commit = decision.code.commit
    if commit is None or decision.code.dirty:
        return
    found = reader.objects.find(f"{commit}^{{tree}}")
    if found is None:
        note(f"commit {commit}", "the revision of the code, as the record says", "not in this repository")
        return
    carried = {path: blob for path, blob in blobs.items() if path.startswith(f"{materials.CODE}/")}
    committed = {
        path: blob
        for path, blob in reader.tree(found.name).items()
        if path.startswith(f"{materials.CODE}/") and path.endswith(".py")
    }
    for path in sorted(carried.keys() | committed.keys()):
        if carried.get(path) != committed.get(path):
            note(path, f"as in commit {commit[:12]}: {committed.get(path)}", str(carried.get(path)))


def _kept(recorded: bytes, trusted: tuple[keys.TrustedKey, ...], note: Note) -> None:
    """Keys that were trusted at the decision are in the file still, from the same time on, and end no later."""
    try:
        before = keys.parse(recorded)
    except RegistryError as error:
        note("trusted_keys", "public keys, one to a line", str(error))
        return
    for key in before:
        same = (now for now in trusted if (now.fingerprint, now.after) == (key.fingerprint, key.after))
        if not any(key.before is None or (now.before and now.before <= key.before) for now in same):
            until = f" until {key.before}" if key.before else ""
            note(
                str(keys.TRUSTED), f"key {key.fingerprint} from {key.after}{until}, as at the decision", "no such line"
            )


def _replay(entries: list[Entry], report: Report) -> dict[str, Books]:
    """Follow production from the first decision on; each decision must say what was true at its time."""
    books: dict[str, Books] = {}
    last = ""
    for entry in entries:
        decision, note = entry.decision, report.noting(entry.name)
        if not last < decision.created:
            note(DECISION, f"created after {last}, when the decision before was", f"created {decision.created}")
        last = decision.created
        book = books.setdefault(decision.model, Books())
        if decision.outcome == "rolled-back":
            _rolled_back(entry, book, note)
        else:
            _judged(entry, book, note)
        book.held = entry if decision.outcome == "held" else None
    return books


def _judged(entry: Entry, book: Books, note: Note) -> None:
    decision, champion = entry.decision, entry.champion
    there = book.promotions.get(book.production or "")
    if (
        champion
        and there
        and (champion.version, champion.model_sha256) != (book.production, there.decision.model_sha256)
    ):
        # A refusal of what is in production already faces the champion that it faced before.
        if decision.outcome != "refused" or there.champion is None or champion != there.champion:
            note("champion.json", f"{book.production}, which was in production", str(champion.version))
    elif champion and there and sorted(champion.withdrawn) != sorted(book.withdrawn):
        note("champion.json", f"withdrawn {book.withdrawn}", f"withdrawn {list(champion.withdrawn)}")
    elif champion and not there and champion.version is not None:
        note("champion.json", "no champion: nothing was in production", str(champion.version))
    if decision.outcome in ("refused", "held"):
        return
    if decision.outcome == "approved" and (book.held is None or book.held.evidence != entry.evidence):
        note("its files", f"those of {book.held.name if book.held else 'a decision that holds the model'}", "others")
    expected = registry.next_version(book.promotions)
    if decision.version != expected or decision.replaces != book.production:
        note(
            DECISION,
            f"version {expected} in place of {book.production}",
            f"version {decision.version} in place of {decision.replaces}",
        )
    book.promotions[str(decision.version)] = entry
    book.assignments.append(entry.commit)
    book.production = decision.version


def _rolled_back(entry: Entry, book: Books, note: Note) -> None:
    decision = entry.decision
    target, there = book.promotions.get(str(decision.version)), book.promotions.get(book.production or "")
    if target is None or decision.replaces != book.production or decision.version == book.production:
        note(
            DECISION,
            f"an earlier version in place of {book.production}",
            f"{decision.version} in place of {decision.replaces}",
        )
        return
    if target.evidence != entry.evidence or target.decision.model_sha256 != decision.model_sha256:
        note("its files", f"those of {target.name}", "others")
    if there and there.decision.model_sha256 not in book.withdrawn:
        book.withdrawn.append(there.decision.model_sha256)
    if decision.model_sha256 in book.withdrawn:
        book.withdrawn.remove(decision.model_sha256)
    book.assignments.append(target.commit)
    book.production = decision.version


def _tags(root: Path, refs: Refs, walked: list[str], books: dict[str, Books], report: Report) -> None:
    """Tags and pointer are those that the chain asks for, no more and no fewer.

    Whatever GTO could read as a word on these models, or is on a decision, is one of them.
    """
    expected: dict[str, str] = {}
    for model, book in books.items():
        expected |= {f"{model}@{version}": entry.commit for version, entry in book.promotions.items()}
        expected |= {f"{model}#{registry.STAGE}#{n}": commit for n, commit in enumerate(book.assignments, start=1)}
    known = {
        tag: commit
        for tag, commit in refs.tags.items()
        if tag in expected or commit in walked or any(tag.startswith((f"{model}@", f"{model}#")) for model in books)
    }
    for tag in sorted(expected.keys() | known.keys()):
        note = report.noting(f"tag {tag}")
        if expected.get(tag) != known.get(tag):
            note(f"refs/tags/{tag}", f"commit {expected.get(tag)}, as the chain says", f"commit {known.get(tag)}")
    with git.Objects(root) as objects:
        for tag in sorted(expected.keys() & known.keys()):
            note = report.noting(f"tag {tag}")
            name = git.git(root, "for-each-ref", "--format=%(objectname)", f"refs/tags/{tag}")
            try:
                content = Reader(objects).read(name, "tag").decode(errors="replace").split("\n")
            except RegistryError as error:
                note(f"refs/tags/{tag}", "an annotated tag", str(error))
                continue
            if content[:3] != [f"object {known[tag]}", "type commit", f"tag {tag}"]:
                note(f"refs/tags/{tag}", f"a tag of that name on {known[tag]}", " ".join(content[:3]))


def _histories(root: Path, walked: list[str], report: Report) -> None:
    """Where the branch has been, here and at the remotes as they were last seen, is part of where it is now."""
    ever = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/remotes/*/registry").splitlines()
    for line in [*ever, *(f"{commit} {registry.BRANCH} as it was" for commit in dict.fromkeys(_logged(root)))]:
        commit, where = line.split(" ", 1)
        if commit not in walked:
            report.noting("the branch registry")(
                registry.BRANCH, f"a history that has commit {commit[:12]} ({where})", "a history without it"
            )


def _logged(root: Path) -> list[str]:
    """The commits that the branch has been at here, as far as git's log of it goes."""
    log = root / git.git(root, "rev-parse", "--git-path", f"logs/{registry.BRANCH}")  # git reads it with commits only
    moves = [line.split(" ")[:2] for line in log.read_text().splitlines()] if log.exists() else []
    # git writes the log first: a move that was cut off there was never made, and nothing goes on from it.
    left = {old for old, _ in moves}
    return [new for _, new in moves if new in left]


def _replacements(root: Path, reader: Reader, report: Report) -> None:
    """No `git replace` shows other content in the place of what was read here."""
    for name in git.git(root, "for-each-ref", "--format=%(refname)", "refs/replace/").splitlines():
        if name.rpartition("/")[2] in reader.names:
            report.noting("git")(name, "no replacement of what the registry names", "one")


def _elsewhere(root: Path, remote: str, refs: Refs, walked: list[str], models: tuple[str, ...], report: Report) -> None:
    """Branch and tags at the remote are those that are here, to the tag object."""
    lines = git.git(root, "ls-remote", remote, registry.BRANCH, "refs/tags/*").splitlines()
    there = {name: found for found, name in (line.split("\t") for line in lines)}
    note = report.noting(f"remote {remote}")
    if there.get(registry.BRANCH) != refs.tip:
        note(registry.BRANCH, f"commit {refs.tip}, as here", f"commit {there.get(registry.BRANCH)}")
    lines = git.git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/tags").splitlines()
    here = {name: found for found, name in (line.split(" ") for line in lines)}
    starts = tuple(f"refs/tags/{model}{sign}" for model in models for sign in "@#")
    for name in sorted(here.keys() | there.keys()):
        commits = refs.tags.get(name.removeprefix("refs/tags/")), there.get(f"{name}^{{}}", there.get(name))
        ours = name.startswith(starts) or any(commit in walked for commit in commits)
        if ours and name != registry.BRANCH and not name.endswith("^{}") and here.get(name) != there.get(name):
            note(name, f"{here.get(name)}, as here", str(there.get(name)))


class Store:
    """DVC's cache and, if wanted, its remote; what was hashed once in an audit is not hashed again."""

    def __init__(self, root: Path, remotely: bool, report: Report) -> None:
        self.report = report
        self.cached = materials.cache(root)
        self.remote = materials.remote(root) if remotely else None
        self.known: dict[str, tuple[str | None, str | None]] = {}

    def check(self, outputs: tuple[Material, ...], note: Note) -> None:
        """Every artifact is there, and hashes to what was recorded."""
        for material in outputs:
            here, there = self._hashed(material.md5)
            if here is None and there is None:
                where = "DVC's cache and remote" if self.remote else "DVC's cache (`dvc fetch`, or --remote)"
                note(material.path, f"SHA-256 {material.sha256}", f"missing in {where}")
            elif here is not None and here != material.sha256:
                note(material.path, f"SHA-256 {material.sha256}", f"{here} in DVC's cache, {self.cached(material.md5)}")
            if self.remote and there is None and here is not None:
                note(material.path, f"SHA-256 {material.sha256}", "missing in DVC's remote")
            elif there is not None and there != material.sha256:
                note(material.path, f"SHA-256 {material.sha256}", f"{there} in DVC's remote")

    def _hashed(self, md5: str) -> tuple[str | None, str | None]:
        if md5 not in self.known:
            self.known[md5] = self._sha256(self.cached(md5)), self._sha256_there(md5)
        return self.known[md5]

    def _sha256(self, path: Path) -> str | None:
        if not path.is_file():
            return None
        self.report.artifacts += 1
        _, sha256, size = materials.hashes(path)
        self.report.bytes_hashed += size
        return sha256

    def _sha256_there(self, md5: str) -> str | None:
        if self.remote is None:
            return None
        digest = hashlib.sha256()
        try:
            with self.remote.fs.open(self.remote.oid_to_path(md5), "rb") as file:
                while piece := file.read(materials.PIECE):
                    digest.update(piece)
                    self.report.bytes_hashed += len(piece)
        except FileNotFoundError:
            return None
        self.report.artifacts += 1
        return digest.hexdigest()


def _working_copy(root: Path, entry: Entry, outputs: tuple[Material, ...], reader: Reader, report: Report) -> None:
    """What lies here of the model's newest decision is what was decided on: sources and outputs.

    An output that dvc.lock names otherwise is of a later run, and no part of the record yet. A fresh clone has none of
    the outputs, and no sources but those that git has; where one lies, all have to.
    """
    note = report.noting(entry.name)
    found = reader.objects.find(f"{entry.commit}:provenance.json")
    with contextlib.suppress(WeighinError, ValueError, RecursionError):
        made_of = documents.materials_of(json.loads(found.data if found else b""))
        listing = next((one.md5 for one in outputs if one.path == paths.SOURCES.as_posix()), None)
        sources = materials.listed(root, made_of) if _locked(root).get(str(paths.SOURCES), listing) == listing else {}
        fresh = not any((root / path).exists() for path in sources)
        for path, sha256 in sources.items():
            now = files.sha256(root / path) if (root / path).is_file() else "missing"
            if now != sha256 and not (fresh and git.git(root, "ls-files", "--", path) == ""):
                note(path, f"SHA-256 {sha256}, of which the model was made", now)
    _outputs(root, outputs, note)


def _locked(root: Path) -> dict[str, str]:
    lock = root / "dvc.lock"
    return {out["path"]: out["md5"] for _, out in materials.locked(lock.read_bytes())} if lock.exists() else {}


def _outputs(root: Path, outputs: tuple[Material, ...], note: Note) -> None:
    here = {one.path: materials.hashes(root / one.path) for one in outputs if (root / one.path).is_file()}
    try:
        locked = _locked(root)
    except WeighinError as error:
        note("dvc.lock", "the outputs of the stages", str(error))
        locked = {}
    recorded = {one.path: one.md5 for one in outputs}
    for one in outputs:
        folder = next((path for path in locked if one.path.startswith(f"{path}/")), one.path)
        later = locked.get(folder, recorded.get(folder)) != recorded.get(folder)
        if one.path not in here:
            if here and not later and not one.md5.endswith(".dir"):
                note(one.path, f"SHA-256 {one.sha256}", "missing in the working copy (`dvc checkout`)")
            continue
        md5, sha256, _ = here[one.path]
        if later and folder == one.path and md5 != locked[folder]:
            note("dvc.lock", f"{one.path} with md5 {md5}, as it lies here", f"md5 {locked[folder]}")
        elif not later and sha256 != one.sha256:
            note(one.path, f"SHA-256 {one.sha256}", f"{sha256} in the working copy")


def summary(report: Report) -> str:
    """The result in one line."""
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    looked = (
        f"{report.decisions} decisions, {report.artifacts} artifacts of {len(report.audited)} of them "
        f"({report.bytes_hashed:,} bytes hashed)"
    )
    if report.findings:
        return f"{len(report.findings)} findings in {looked}, {when}"
    return f"everything holds: {looked}, {when}"
