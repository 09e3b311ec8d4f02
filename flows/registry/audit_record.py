"""The audit of one decision by itself: its commit, its signatures, its files, and the verdict from its evidence."""

import contextlib
import hashlib
import json
import math
import tempfile
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from flows.registry import git, judges, keys, materials, parameters, provenance, signing
from flows.registry.chain import Link
from flows.registry.decision import (
    COPIED_FILES,
    DECISION,
    MODEL,
    ORIGIN_FILES,
    REQUIRED_FILES,
    SIGNATURE,
    Champion,
    Decision,
    Verdict,
    name_decision,
    parse_decision,
    parse_document,
)
from flows.registry.findings import Note, Report
from flows.registry.materials import Material
from tasks import gate
from tasks.core import files, paths
from tasks.core.errors import RegistryError, WeighinError

READ = {*COPIED_FILES, *ORIGIN_FILES, "trusted_keys", "README.md", DECISION, SIGNATURE}
REPEATS = ("approved", "rolled-back")  # decisions on the evidence of an earlier one
TOLERANCE = 2e-6  # of recomputed bounds, which another processor may round otherwise


class Reader:
    """Git objects by their own names; a file that many decisions share is hashed with SHA-256 once."""

    def __init__(self, objects: git.Objects) -> None:
        self.objects = objects
        self.sha256: dict[str, str] = {}
        self.readers: dict[str, str] = {}  # the first commit that each object was read for
        self.commit = ""

    def read(self, name: str, kind: str) -> bytes:
        """The content of the object; `RegistryError` if it is not there, or does not hash to its name."""
        self.readers.setdefault(name, self.commit)
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
            self.readers.setdefault(blob, self.commit)
            try:
                if blob not in self.sha256:
                    self.read(blob, "blob")
            except RegistryError as error:
                note(path, f"git object {blob}", str(error))
        return {path: self.sha256[blob] for path, blob in blobs.items() if blob in self.sha256}


class Record(NamedTuple):
    """A decision as its commit has it."""

    commit: str
    raw: bytes  # the commit object
    header: list[list[str]]  # its lines, each with key and value
    blobs: dict[str, str]  # git's names of its files, by their paths
    sha256: dict[str, str]  # SHA-256 of those that are sound
    contents: dict[str, bytes]  # of those that are looked into
    decision: Decision

    @property
    def name(self) -> str:
        return name_decision(self.commit, self.decision)

    def content(self, name: str) -> bytes:
        """The content of a file; empty if it is missing or damaged, which is noted elsewhere."""
        return self.contents.get(name, b"")


def read_record(reader: Reader, commit: str, report: Report) -> Record | None:
    """Read the decision that a commit holds; None if there is none, which is noted."""
    reader.commit = commit
    note = report.noting(f"commit {commit[:12]}", "chain", commit)
    raw = reader.read(commit, "commit")
    lines = raw.partition(b"\n\n")[0].decode(errors="replace").split("\n")
    header = [pair for line in lines if len(pair := line.split(" ", 1)) == 2]
    try:
        blobs = reader.tree(dict(reversed(header)).get("tree", ""))
    except RegistryError as error:
        note("its files", "as the commit names them", str(error))
        return None
    sha256 = reader.hashes(blobs, report.noting(f"commit {commit[:12]}", "record", commit))
    contents = {name: reader.read(blobs[name], "blob") for name in READ if name in sha256}
    try:
        decision = parse_decision(contents.get(DECISION, b""))
    except RegistryError as error:
        note(DECISION, "a decision", str(error))
        return None
    return Record(commit, raw, header, blobs, sha256, contents, decision)


def check_record(
    record: Record, reader: Reader, root: Path, trusted: tuple[keys.TrustedKey, ...], report: Report
) -> tuple[Link, tuple[Material, ...]]:
    """Check one decision by itself; returns its place in the chain, and the artifacts that it names."""
    name, commit = record.name, record.commit
    in_chain, in_record = (report.noting(name, scope, commit) for scope in ("chain", "record"))
    _check_files(record, in_record)
    _check_signatures(record, trusted, report)
    _check_place(record, reader, report)
    _check_dates(record, in_chain)
    outputs = _check_evidence(record, report)
    _check_code(record, reader, in_record)
    _check_keys(record, trusted, in_chain)
    champion: Champion | None = None
    with contextlib.suppress(WeighinError):  # the evidence has noted it
        champion = parse_document(Champion, record.content("champion.json"), "champion.json")
    shared = files.digest({one: record.sha256.get(one, "") for one in (*COPIED_FILES, *ORIGIN_FILES)})
    return Link(commit, record.decision, None, champion, shared), outputs


def _check_files(record: Record, note: Note) -> None:
    """The files of every decision are there; a repeated one has those of what it repeats, which the chain compares."""
    required = set(REQUIRED_FILES[record.decision.schema_version])
    if record.decision.outcome in REPEATS:
        required -= {*COPIED_FILES, *ORIGIN_FILES}
    for name in sorted(required - record.blobs.keys()):
        note(name, "a file of every decision", "missing")


def _check_signatures(record: Record, trusted: tuple[keys.TrustedKey, ...], report: Report) -> None:
    """The commit is signed by a key that was trusted then, and the bundle by the same."""
    decision, note = record.decision, report.noting(record.name, "chain", record.commit)
    if decision.signer is None:
        report.note_unchecked(
            record.name, record.commit, "the commit's signature", "a signature", "none: it is of before signing began"
        )
        return
    signer = decision.signer
    try:
        at = datetime.fromisoformat(decision.created)
        signer = signing.verify_commit(*signing.split_commit(record.raw), trusted, at)
    except RegistryError as error:
        note("the commit's signature", f"by a key in {keys.TRUSTED}", str(error))
    if signer != decision.signer:
        note(DECISION, f"signer {signer}", f"signer {decision.signer}")
    key = next((key.public_key for key in trusted if key.fingerprint == signer), None)
    if key is None:
        return
    digests = {path: value for path, value in record.sha256.items() if path != SIGNATURE}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        (Path(scratch) / SIGNATURE).write_bytes(record.content(SIGNATURE))
        try:
            signing.verify_manifest(Path(scratch) / SIGNATURE, digests | {MODEL.name: decision.model_sha256}, key)
        except RegistryError as error:
            in_record = report.noting(record.name, "record", record.commit)
            in_record(SIGNATURE, f"the signature of every file by key {signer}", str(error).replace(f"{scratch}/", ""))


def _check_place(record: Record, reader: Reader, report: Report) -> None:
    """The decision before this one is the commit's only parent, and its bundle is the one that was there then."""
    decision, note = record.decision, report.noting(record.name, "chain", record.commit)
    parents = [value for key, value in record.header if key == "parent"]
    if parents != [decision.previous] * (decision.previous is not None):
        note(DECISION, f"previous {', '.join(parents) or None}", f"previous {decision.previous}")
    if not parents and decision.previous_sha256:
        note(DECISION, "previous_sha256 None", f"previous_sha256 {decision.previous_sha256}")
    for parent in parents:
        found = reader.objects.find(f"{parent}:{SIGNATURE}")
        if found is None and decision.previous_sha256:  # it is the one before that is damaged
            of_parent = report.noting(f"commit {parent[:12]}", "record", parent)
            of_parent(SIGNATURE, f"SHA-256 {decision.previous_sha256}, as the next decision says", "missing or damaged")
            continue
        before = files.sha256_of(found.data) if found else None
        if before != decision.previous_sha256:
            note(DECISION, f"previous_sha256 {before}", f"previous_sha256 {decision.previous_sha256}")


def _check_dates(record: Record, note: Note) -> None:
    at = datetime.fromisoformat(record.decision.created).timestamp()
    fields = dict(reversed(record.header))
    for role in ("author", "committer"):
        if fields.get(role, "").split(" ")[-2:-1] != [f"{at:.0f}"]:
            note("the commit", f"{role} date {record.decision.created}", str(fields.get(role)))


def _check_evidence(record: Record, report: Report) -> tuple[Material, ...]:
    """The record names its own files, the verdict follows from them, and the outcome from the verdict.

    Returns the artifacts that it names.
    """
    note = report.noting(record.name, "record", record.commit)
    decision, sha256 = record.decision, record.sha256
    for name, recorded in (("verdict.json", decision.verdict_sha256), ("params.yaml", decision.params_sha256)):
        if recorded and name in sha256 and sha256[name] != recorded:
            note(name, f"SHA-256 {recorded}, as {DECISION} says", sha256[name])
    try:
        outputs = provenance.outputs_of(record.contents)
        verdict = parse_document(Verdict, record.content("verdict.json"), "verdict.json")
        _check_outputs(record, outputs, note)
        _check_judged_code(record, note)
    except (ValueError, RecursionError, RegistryError) as error:
        note("provenance.json, dvc.lock or verdict.json", "what belongs there", str(error))
        return ()
    if "provenance.json" not in record.contents:
        report.note_unchecked(
            record.name,
            record.commit,
            "provenance.json",
            "SHA-256 of every artifact",
            "none: only the MD5 of dvc.lock was recorded",
        )
    _check_outcome(record, verdict, note)
    _judge_again(record, outputs, verdict, report)
    return outputs


def _check_judged_code(record: Record, note: Note) -> None:
    recorded = record.decision.code_sha256
    if recorded is None:
        return
    code = files.digest(materials.judging(record.content("dvc.lock"), record.sha256))
    if code != recorded:
        note(f"{materials.CODE}/", f"SHA-256 {recorded}, as {DECISION} says", code)


def _check_outputs(record: Record, outputs: tuple[Material, ...], note: Note) -> None:
    """dvc.lock, the provenance, the decision and the carried files name the same artifacts by the same hashes."""
    named = {material.path: material for material in outputs}
    lock = record.content("dvc.lock")
    locked = {out["path"]: out["md5"] for _, out in materials.read_lock(lock)}
    for path, md5 in locked.items():
        if path not in named or named[path].md5 != md5:
            note("provenance.json", f"{path} with md5 {md5}, as dvc.lock says", str(named.get(path)))
    for path in named:
        if path not in locked and not any(path.startswith(f"{one}/") for one in locked):
            note("dvc.lock", f"{path}, as provenance.json says", "no such output")
    for name, path in COPIED_FILES.items():
        material = named.get(path.as_posix())
        if material and name in record.contents and not material.names(record.content(name)):
            note(name, f"{material.hash}, as provenance.json says", str(record.sha256.get(name)))
    device = str(paths.DEVICE)
    if device in record.contents:
        read = {dep["path"]: dep["md5"] for _, dep in materials.read_lock(lock, "deps")}
        found = hashlib.md5(record.content(device), usedforsecurity=False).hexdigest()
        # Carried from schema 1 on, though for some commits dvc.lock did not name it yet.
        is_named = device in read or record.decision.schema_version > 1
        if is_named and read.get(device) != found:
            note(device, f"md5 {read.get(device)}, as dvc.lock says", found)
    for path, recorded in ((MODEL, record.decision.model_sha256), (paths.TEST, record.decision.data_sha256)):
        material = named.get(path.as_posix())
        if material is None or material.sha256 not in (None, recorded):
            note("provenance.json", f"{path} with SHA-256 {recorded}", str(material))


def _check_outcome(record: Record, verdict: Verdict, note: Note) -> None:
    """The decision is what the verdict comes to, and is about what it judged."""
    decision = record.decision
    if verdict.is_pass != (decision.outcome != "refused") or verdict.failed != decision.failed:
        note(
            DECISION,
            f"{'passed' if verdict.is_pass else 'refused'}, failed {list(verdict.failed)}",
            f"{decision.outcome}, failed {list(decision.failed)}",
        )
    names = ("model_sha256", "data_sha256", "params_sha256", "code_sha256")
    if any(getattr(verdict, name) not in (None, getattr(decision, name)) for name in names):
        note(DECISION, "the model, data, parameters and code that the verdict judged", "others")
    if decision.bootstrap != verdict.bootstrap:
        note(DECISION, f"bootstrap {verdict.bootstrap}", f"bootstrap {decision.bootstrap}")
    if decision.traded != verdict.traded:
        note(DECISION, "traded, as the verdict says", f"traded {decision.traded}")
    allowed = judges.VERDICTS[decision.schema_version]
    if verdict.schema_version not in allowed and decision.outcome not in REPEATS:
        expected = " or ".join(map(str, allowed))
        note(
            "verdict.json", f"schema_version {expected}, as every decision of its time has", str(verdict.schema_version)
        )


def _judge_again(record: Record, outputs: tuple[Material, ...], verdict: Verdict, report: Report) -> None:
    """The judge of the verdict's schema must come to the verdict from its evidence."""
    decision, note = record.decision, report.noting(record.name, "record", record.commit)
    try:
        params = parameters.read_recorded(record.content("params.yaml"), "params.yaml")
        evidence = _evidence(record, outputs, verdict)
    except (ValueError, RecursionError, WeighinError) as error:
        note("metrics.json, champion.json or params.yaml", "what belongs there", str(error))
        return
    if decision.outcome in (("promoted",) if params.gate.approval else ("held", "approved")):
        expected = f"what gate.approval {params.gate.approval} makes of a model that passes"
        note(DECISION, expected, decision.outcome)
    try:
        again = json.loads(json.dumps(judges.judge_again(verdict.schema_version, evidence, params.content)))
    except judges.Unjudged as error:
        report.unjudged += 1
        report.note_unchecked(record.name, record.commit, "verdict.json", "a verdict that is judged again", str(error))
        return
    recorded = json.loads(record.contents["verdict.json"])
    if difference := _difference(again, recorded, "verdict"):
        note("verdict.json", f"{difference[0]}, from its evidence", difference[1])


def _evidence(record: Record, outputs: tuple[Material, ...], verdict: Verdict) -> gate.Evidence:
    sha256 = {material.path: material.sha256 for material in outputs}
    decision = record.decision
    return gate.Evidence(
        report=json.loads(record.content("metrics.json")),
        predictions=record.content("predictions.csv"),
        champion=json.loads(record.content("champion.json") or b"null"),
        golden_sha256=sha256.get(paths.GOLDEN.as_posix()),
        packed_sha256=sha256.get(paths.PACKED.as_posix()),
        infra=json.loads(record.contents["verdict.json"]).get("infra"),
        subject=gate.Subject(
            decision.model_sha256,
            decision.data_sha256,
            (verdict.params_sha256 and decision.params_sha256) or "",
            (verdict.code_sha256 and decision.code_sha256) or "",
        ),
    )


def _difference(expected: object, found: object, where: str) -> tuple[str, str] | None:
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
        return None if _is_same(expected, found) else (f"{where} {expected}", f"{found}")
    return next(filter(None, (_difference(*pair) for pair in pairs)), None)


def _is_same(expected: object, found: object) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=TOLERANCE)
    return type(expected) is type(found) and bool(expected == found)


def _check_code(record: Record, reader: Reader, note: Note) -> None:
    """The code that the record carries is that of the revision it names, unless it says that there were changes."""
    commit = record.decision.code.commit
    carried = {path: blob for path, blob in record.blobs.items() if path.startswith(f"{materials.CODE}/")}
    if commit is None or record.decision.code.dirty or (record.decision.code_sha256 is None and not carried):
        return
    found = reader.objects.find(f"{commit}^{{tree}}")
    if found is None:
        note(f"commit {commit}", "the revision of the code, as the record says", "not in this repository")
        return
    committed = {
        path: blob
        for path, blob in reader.tree(found.name).items()
        if path.startswith(f"{materials.CODE}/") and path.endswith(".py")
    }
    for path in sorted(carried.keys() | committed.keys()):
        if carried.get(path) != committed.get(path):
            note(path, f"as in commit {commit[:12]}: {committed.get(path)}", str(carried.get(path)))


def _check_keys(record: Record, trusted: tuple[keys.TrustedKey, ...], note: Note) -> None:
    """Keys that were trusted at the decision are in the file still, from the same time on, and end no later."""
    try:
        before = keys.parse(record.content("trusted_keys"))
    except RegistryError as error:
        note("trusted_keys", "public keys, one to a line", str(error))
        return
    for key in before:
        same = (now for now in trusted if (now.fingerprint, now.after) == (key.fingerprint, key.after))
        if not any(key.before is None or (now.before and now.before <= key.before) for now in same):
            until = f" until {key.before}" if key.before else ""
            expected = f"key {key.fingerprint} from {key.after}{until}, as at the decision"
            note(str(keys.TRUSTED), expected, "no such line")
