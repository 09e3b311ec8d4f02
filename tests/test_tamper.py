"""The tamper matrix: whatever is changed in a registry or in what it names, the audit finds it and says where.

Every case begins with the same shared registry: a promotion, a refusal, a promotion, a rollback and a refusal.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forgery import (
    MANNERS,
    Contents,
    Edit,
    carry,
    flip,
    hide,
    history,
    loose,
    output,
    own,
    put,
    remake,
    stale,
    stranger,
    tag,
    unsigned,
)
from ledger import DOCS, FILES, MODEL, Ledger, opened

from flows.registry import keys
from flows.registry.audit import ALL, audit
from flows.registry.decision import COPIED_FILES, DECISION, ORIGIN_FILES, SIGNATURE
from flows.registry.findings import Report
from flows.registry.refs import BRANCH
from tasks.core import files, paths

FIRST, REFUSED, SECOND, BACK, LAST = range(5)  # the decisions
SHIPPED = paths.onnx("reduce").as_posix()
CASES: list["Case"] = []


class Case(NamedTuple):
    """What is done to the registry, and what a finding must say of it."""

    name: str
    tamper: Callable[[Ledger], None]
    file: str  # a part of the finding's file
    decision: str  # and of its decision
    said: str  # and of what was expected and found
    remote: bool


def case(
    name: str, tamper: Callable[[Ledger], Any], file: str, decision: str = "", said: str = "", remote: bool = False
) -> None:
    CASES.append(Case(name, tamper, file, decision, said, remote))


def look(ledger: Ledger, remote: bool = False) -> Report:
    return audit(ledger.root, MODEL, ALL, "origin" if remote else None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, own_git: None) -> Iterator[Path]:
    """The shared registry twice: `live`, where its remotes are by their paths, and `kept`, to begin again from."""
    base = tmp_path_factory.mktemp("tamper")
    ledger = Ledger.begin(base / "live/project")
    ledger.share(base / "live/bare", base / "live/store")
    ledger.decide(1)
    ledger.commit("Trust the key")
    ledger.git("push", "--quiet", "origin", "main")
    ledger.decide(2, wrong=150)
    ledger.decide(3)
    opened(ledger.root).roll_back(None, "wrong at night")
    ledger.decide(4, wrong=150)
    shutil.copytree(base / "live", base / "kept", symlinks=True, ignore=shutil.ignore_patterns("hooks", "tmp"))
    yield base


@pytest.fixture
def ledger(kept: Path) -> Ledger:
    shutil.rmtree(kept / "live")
    shutil.copytree(kept / "kept", kept / "live", copy_function=link_or_copy)
    return Ledger(kept / "live/project")


def link_or_copy(source: str, target: str) -> None:
    """Objects of git and DVC are never written again, so they need no copy."""
    if "/objects/" in source or "/files/md5/" in source:
        os.link(source, target)
    else:
        shutil.copy(source, target)


def test_an_untouched_registry_has_no_finding(ledger: Ledger) -> None:
    report = look(ledger, remote=True)
    assert report.findings == []
    assert (report.decisions, len(report.audited)) == (5, 5)


def commit(ledger: Ledger, number: int) -> str:
    return history(ledger)[number]


def cached(ledger: Ledger, name: str, path: str) -> Path:
    return ledger.cached(output(ledger, name, path)["annotations"]["md5"])


def there(ledger: Ledger, name: str, path: str) -> Path:
    found = output(ledger, name, path)["annotations"]["md5"]
    return ledger.root.parent / "store/files/md5" / found[:2] / found[2:]  # type: ignore[no-any-return]


# Files that lie in the working copy, and artifacts in DVC's cache and remote: each in every manner.

VERSION = f"{MODEL}@v0.2.0"
HERE = (
    "data/raw/cat/0.png",
    *(path.as_posix() for path in (paths.TRAIN, paths.TEST, paths.MANIFEST, paths.SOURCES, paths.GOLDEN)),
    *(SHIPPED, DOCS.as_posix(), paths.report("gate").as_posix()),
)
for manner, how in MANNERS.items():
    for path in HERE:
        case(f"here-{path}-{manner}", lambda it, path=path, how=how: how(it.root / path), path, "refusal")  # type: ignore[misc]
    for path in (one.as_posix() for one in (*FILES, DOCS, paths.DATA_DOCS)):
        if manner != "flipped" and path not in (SHIPPED, paths.TEST.as_posix(), paths.DATA_DOCS.as_posix()):
            continue
        case(
            f"cache-{path}-{manner}",
            lambda it, path=path, how=how: how(cached(it, VERSION, path)),  # type: ignore[misc]
            path,
            VERSION,
            "missing in DVC's cache" if manner == "deleted" else "in DVC's cache",
        )
        case(
            f"remote-{path}-{manner}",
            lambda it, path=path, how=how: how(there(it, VERSION, path)),  # type: ignore[misc]
            path,
            VERSION,
            "missing in DVC's remote" if manner == "deleted" else "in DVC's remote",
            remote=True,
        )


def gone_everywhere(ledger: Ledger) -> None:
    cached(ledger, VERSION, SHIPPED).unlink()
    there(ledger, VERSION, SHIPPED).unlink()


case("gone-everywhere", gone_everywhere, SHIPPED, VERSION, "missing in DVC's cache and remote", remote=True)


def lock_broken(ledger: Ledger) -> None:
    put(ledger.root / "dvc.lock", b"{")
    flip(ledger.root / SHIPPED)


def lock_gone(ledger: Ledger) -> None:
    (ledger.root / "dvc.lock").unlink()
    flip(ledger.root / SHIPPED)


def lock_names_another(ledger: Ledger) -> None:
    lock = (ledger.root / "dvc.lock").read_text()
    name = re.search(rf"path: {SHIPPED}\n\s+hash: md5\n\s+md5: (\w+)", lock)
    assert name
    put(ledger.root / "dvc.lock", lock.replace(name[1], "f" * 32).encode())


case("lock-broken", lock_broken, "dvc.lock", "refusal")
case("lock-broken-and-model", lock_broken, SHIPPED, "refusal")
case("lock-gone-and-model", lock_gone, SHIPPED, "refusal")
case("lock-names-another", lock_names_another, "dvc.lock", "refusal", SHIPPED)

# Git's objects: every file of a decision, its tree, its commit, and the tags.

BUNDLE = (*COPIED_FILES, *ORIGIN_FILES, "README.md", "trusted_keys", "tasks/stage.py", DECISION, SIGNATURE)
CORE = ("verdict.json", DECISION, SIGNATURE)
for manner, how in MANNERS.items():
    for path in BUNDLE if manner == "flipped" else CORE:
        case(f"object-{path}-{manner}", lambda it, path=path, how=how: how(loose(it, f"{VERSION}:{path}")), path)  # type: ignore[misc]
    for name, what in (("registry~2^{tree}", "tree"), ("registry~2", "commit")):
        case(f"object-{what}-{manner}", lambda it, name=name, how=how: how(loose(it, name)), "commit", "commit ")  # type: ignore[misc]
    for name in (VERSION, f"{MODEL}#production#3"):
        case(f"object-tag-{name}-{manner}", lambda it, name=name, how=how: how(loose(it, name)), f"refs/tags/{name}")  # type: ignore[misc]
CASES[:] = [
    one._replace(file="its files", decision="commit ") if one.name.startswith("object-tree") else one for one in CASES
]


def in_place(ledger: Ledger, name: str, change: Callable[[bytes], bytes]) -> None:
    """Sound content in the file of an object that has another name."""
    path = loose(ledger, name)
    head, _, data = zlib.decompress(path.read_bytes()).partition(b"\0")
    kind, data = head.split(b" ")[0], change(data)
    put(path, zlib.compress(kind + b" %d\0" % len(data) + data))


def refused_to_promoted(data: bytes) -> bytes:
    return data.replace(b'"outcome": "refused"', b'"outcome": "promoted"')


case("in-place-decision", lambda it: in_place(it, f"registry:{DECISION}", refused_to_promoted), DECISION)
case("in-place-verdict", lambda it: in_place(it, "registry:verdict.json", lambda data: data + b" "), "verdict.json")
case("in-place-commit", lambda it: in_place(it, "registry~2", lambda data: data + b"."), "commit", "commit ")
case(
    "in-place-tag",
    lambda it: in_place(it, VERSION, lambda data: data.replace(VERSION.encode(), VERSION.encode()[:-1] + b"9")),
    f"refs/tags/{VERSION}",
)


def pack_flipped(ledger: Ledger) -> None:
    ledger.git("gc", "--quiet")
    (pack,) = (ledger.root / ".git/objects/pack").glob("*.pack")
    where = ledger.git("rev-parse", f"{VERSION}:{SIGNATURE}")
    listed = ledger.git("verify-pack", "-v", str(pack)).splitlines()
    offset = next(int(line.split()[4]) for line in listed if line.startswith(where))
    data = bytearray(pack.read_bytes())
    data[offset + 20] ^= 1
    put(pack, bytes(data))


case("pack-flipped", pack_flipped, SIGNATURE)

# Decisions made anew with other content: without a signature, with the old one, by an unknown key.

FORGED: dict[str, Edit] = {}


def text(name: str, old: str, new: str) -> Edit:
    def edit(_: Ledger, contents: Contents) -> None:
        changed = contents[name].replace(old.encode(), new.encode())
        assert changed != contents[name]
        contents[name] = changed

    return edit


for name in BUNDLE:
    FORGED[name] = lambda _, contents, name=name: contents.update({name: contents[name] + b"\n"})  # type: ignore[misc]
for name, forged in FORGED.items():
    if name == SIGNATURE:
        continue
    edit = partial(remake, edits={SECOND: forged}, signer=None, seal=stale)
    case(f"forged-{name}", edit, SIGNATURE, VERSION, f"differ: {name}")
for name in ("verdict.json", "predictions.csv", "provenance.json"):
    dropped: Edit = lambda _, contents, name=name: contents.pop(name)  # type: ignore[misc]  # noqa: E731
    case(f"dropped-{name}", partial(remake, edits={SECOND: dropped}, signer=None), name, VERSION, "missing")
added: Edit = lambda _, contents: contents.update({"notes.txt": b"more"})  # noqa: E731
case("added-file", partial(remake, edits={SECOND: added}, signer=None), SIGNATURE, VERSION, "extra: notes.txt")
same: Edit = lambda _, __: None  # noqa: E731
for name, seal in (("unsigned", unsigned), ("stale", stale)):
    changed = partial(remake, edits={SECOND: FORGED["README.md"]}, signer=None, seal=seal)
    said = "not signed" if name == "unsigned" else "does not fit"
    case(f"commit-{name}", changed, "the commit's signature", VERSION, said)


def by_stranger(ledger: Ledger) -> None:
    remake(ledger, {LAST: same}, stranger(ledger.root.parent / "stranger"))


def trust_stranger(ledger: Ledger, number: int, edit: Edit, hidden: bool) -> None:
    """A forger whose key has come under review as if it always had been there."""
    signer = stranger(ledger.root.parent / "stranger")
    path = ledger.root / keys.TRUSTED
    since = keys.trusted_keys(ledger.root)[0].after
    assert since
    path.write_text(path.read_text() + keys.trusted_line(signer.public_key, since) + "\n")
    remake(ledger, {number: edit}, signer)
    if hidden:
        ledger.git("update-ref", "refs/remotes/origin/registry", BRANCH)
        ledger.git("reflog", "expire", "--expire=now", "--all")


case("unknown-key", by_stranger, "the commit's signature", "refusal", "unknown key")
talked = text("verdict.json", '"passed": false', '"passed": true')
case("trusted-forger", lambda it: trust_stranger(it, SECOND, same, False), BRANCH, said="a history without it")
case(
    "trusted-forger-hidden",
    lambda it: trust_stranger(it, SECOND, same, True),
    BRANCH,
    "remote origin",
    remote=True,
)
case("trusted-forger-talked", lambda it: trust_stranger(it, LAST, talked, True), "verdict.json", "refusal")


def foreign_signature(ledger: Ledger) -> None:
    signature = ledger.git("show", f"registry~4:{SIGNATURE}") + "\n"
    remake(ledger, {SECOND: lambda _, contents: contents.update({SIGNATURE: signature.encode()})}, None)


case("signature-of-another", foreign_signature, SIGNATURE, VERSION, "not those that key")
case(
    "signature-no-json",
    partial(remake, edits={SECOND: lambda _, contents: contents.update({SIGNATURE: b"{}"})}, signer=None),
    SIGNATURE,
    VERSION,
)


# The insider: everything is signed with the right key, and every trace of what was there is gone.


def insider(number: int, edit: Edit, headers: Any = None) -> Callable[[Ledger], None]:
    def tamper(ledger: Ledger) -> None:
        remake(ledger, {number: edit}, own(ledger), headers=headers)
        hide(ledger)

    return tamper


def test_an_insider_who_changes_nothing_is_not_noticed(ledger: Ledger) -> None:
    """So it is the change that the cases below are found by, and not how it was made."""
    before = history(ledger)
    insider(FIRST, lambda _, contents: contents.update({"notes.txt": b"more"}))(ledger)
    assert not set(before) & set(history(ledger))
    assert look(ledger, remote=True).findings == []


def inside(name: str, number: int, edit: Edit, file: str, said: str = "", headers: Any = None) -> None:
    case(f"insider-{name}", insider(number, edit, headers), file, said=said)


def say(**changes: Any) -> Edit:
    """The record with some values changed."""

    def edit(_: Ledger, contents: Contents) -> None:
        contents[DECISION] = files.to_json(json.loads(contents[DECISION]) | changes)

    return edit


def carry_edit(name: str, change: Callable[[Any], Any]) -> Edit:
    """A JSON file of the bundle changed in place, and everything that names it."""

    def edit(ledger: Ledger, contents: Contents) -> None:
        content = json.loads(contents[name])
        change(content)
        carry(ledger, contents, name, (json.dumps(content, indent=2) + "\n").encode())

    return edit


def pass_all(content: dict[str, Any]) -> None:
    content["passed"] = True
    for one in content["checks"]:
        one["passed"] = True


def lift_values(content: dict[str, Any]) -> None:
    pass_all(content)
    for one in content["checks"]:
        if one["operator"] in (">", ">="):
            one["value"] = one["limit"] + 0.001


def lower_limits(content: dict[str, Any]) -> None:
    pass_all(content)
    for one in content["checks"]:
        if one["operator"] in (">", ">=") and one["value"] <= one["limit"]:
            one["limit"] = one["value"] - 0.001


def drop_failed(content: dict[str, Any]) -> None:
    content["checks"] = [one for one in content["checks"] if one["passed"]]
    content["passed"] = True


def talk_round(change: Callable[[dict[str, Any]], None], name: str = "gate") -> Callable[[Ledger], None]:
    """A challenger that fails, promoted in the usual way, once its verdict has been changed where it lay."""

    def tamper(ledger: Ledger) -> None:
        ledger.lay(5, wrong=150)
        path = ledger.root / paths.report(name)
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))
        ledger.lock()
        decision, _ = opened(ledger.root).record()
        assert decision.outcome == ("promoted" if name == "gate" else "refused")

    return tamper


for rounder in (pass_all, lift_values, lower_limits, drop_failed):
    case(f"talked-round-{rounder.__name__}", talk_round(rounder), "verdict.json", f"{MODEL}@v0.3.0")
case(
    "metrics-after-the-verdict",
    talk_round(lambda content: content["stages"]["reduce"].update({"top1": 0.99}), "benchmark"),
    "verdict.json",
    "refusal",
    "checks[5]",
)


def talk_down(content: dict[str, Any]) -> None:
    content["checks"][2]["passed"] = content["passed"] = False


def more_right(ledger: Ledger, contents: Contents) -> None:
    table = re.sub(r"(?m)^(\w+),\w+,", r"\1,\1,", contents["predictions.csv"].decode())
    carry(ledger, contents, "predictions.csv", table.replace("actual,actual", "actual,predicted").encode())


inside("verdict-talked-down", LAST, carry_edit("verdict.json", talk_down), "verdict.json", "checks[2]")
inside(
    "verdict-value",
    SECOND,
    carry_edit("verdict.json", lambda content: content["checks"][7].update({"value": -0.5})),
    "verdict.json",
    "checks[7].value",
)
inside(
    "verdict-slices",
    SECOND,
    carry_edit("verdict.json", lambda content: content["slices"]["label"][0].update({"top1": 0.1})),
    "verdict.json",
    "slices",
)
inside(
    "verdict-champion",
    SECOND,
    carry_edit("verdict.json", lambda content: content["champion"].update({"version": "v0.0.1"})),
    "verdict.json",
    "champion",
)
inside("predictions", LAST, more_right, "verdict.json", "checks")
inside(
    "metrics",
    SECOND,
    carry_edit("metrics.json", lambda content: content["stages"]["reduce"].update({"latency_p50_ms": 9.0})),
    "verdict.json",
    "from its evidence",
)


def other_limits(ledger: Ledger, contents: Contents) -> None:
    params = contents["params.yaml"].replace(b"min_top1: 0.6", b"min_top1: 0.2")
    assert params != contents["params.yaml"]
    old = files.sha256_of(contents["params.yaml"])
    contents["params.yaml"] = params
    carry(ledger, contents, "verdict.json", contents["verdict.json"].replace(old.encode(), digest(params)))
    for name in (DECISION, "provenance.json"):
        contents[name] = contents[name].replace(old.encode(), digest(params))


def digest(data: bytes) -> bytes:
    return files.sha256_of(data).encode()


inside("params", LAST, other_limits, "verdict.json", "limit")
inside("params-only", LAST, text("params.yaml", "min_top1: 0.6", "min_top1: 0.2"), "params.yaml")
inside("metrics-only", SECOND, lambda _, it: it.update({"metrics.json": it["metrics.json"] + b" "}), "metrics.json")
inside("verdict-only", SECOND, lambda _, it: it.update({"verdict.json": it["verdict.json"] + b" "}), "verdict.json")
inside("lock", SECOND, lambda _, it: it.update({"dvc.lock": b"stages: {}\n"}), "dvc.lock", SHIPPED)
inside("lock-broken", SECOND, lambda _, it: it.update({"dvc.lock": b"{"}), "dvc.lock")
inside("provenance-broken", SECOND, lambda _, it: it.update({"provenance.json": b"{}"}), "provenance.json")
inside("provenance-bomb", SECOND, lambda _, it: it.update({"provenance.json": b"[" * 99999}), "provenance.json")
inside("metrics-bomb", SECOND, lambda lg, it: carry(lg, it, "metrics.json", b"[" * 99999), "metrics.json")
inside("metrics-odd", SECOND, lambda lg, it: carry(lg, it, "metrics.json", b"[]"), "verdict.json")


def lost(path: str) -> Edit:
    """A provenance without an output."""

    def edit(_: Ledger, contents: Contents) -> None:
        content = json.loads(contents["provenance.json"])
        details = content["predicate"]["runDetails"]
        details["byproducts"] = [one for one in details["byproducts"] if one["name"] != path]
        contents["provenance.json"] = files.to_json(content)

    return edit


def other_output(path: str, **changes: Any) -> Edit:
    def edit(_: Ledger, contents: Contents) -> None:
        content = json.loads(contents["provenance.json"])
        for one in content["predicate"]["runDetails"]["byproducts"]:
            if one["name"] == path:
                one["digest"]["sha256"] = "0" * 64
        contents["provenance.json"] = files.to_json(content)

    return edit


inside("provenance-lost-train", SECOND, lost(paths.TRAIN.as_posix()), "provenance.json", paths.TRAIN.as_posix())
inside("provenance-lost-model", SECOND, lost(SHIPPED), "provenance.json", SHIPPED)
inside("provenance-other-train", SECOND, other_output(paths.TRAIN.as_posix()), paths.TRAIN.as_posix(), "0" * 64)
inside("provenance-other-test", SECOND, other_output(paths.TEST.as_posix()), "provenance.json", paths.TEST.as_posix())
inside("provenance-other-gate", SECOND, other_output(paths.report("gate").as_posix()), "verdict.json")

inside("promoted", LAST, say(outcome="promoted", version="v0.3.0", replaces="v0.1.0", failed=[]), DECISION, "promoted")
inside("failed", LAST, say(failed=["top1"]), DECISION, "failed")
inside("version", SECOND, say(version="v0.9.0"), DECISION, "v0.9.0")
inside("replaces", SECOND, say(replaces=None), DECISION, "in place of None")
inside("bootstrap", SECOND, say(bootstrap=True), DECISION, "bootstrap True")
inside("traded", SECOND, say(traded=True), DECISION, "traded")
inside("signer", SECOND, say(signer="SHA256:" + "A" * 43), DECISION, "SHA256:AAA")
inside("created", SECOND, say(created="2026-01-01T00:00:00Z"), DECISION, "2026-01-01")
inside("data", SECOND, say(data_sha256="0" * 64), "provenance.json", "0" * 64)
inside("code-digest", SECOND, say(code_sha256="0" * 64), "tasks/", "0" * 64)
inside("code-file", SECOND, text("tasks/stage.py", "code", "edoc"), "tasks/stage.py", "as in commit")
inside("code-file-more", SECOND, lambda _, it: it.update({"tasks/more.py": b""}), "tasks/more.py")
inside("code-commit", SECOND, say(code={"commit": "0" * 40, "dirty": False}), f"commit {'0' * 40}", "not in this")
inside("previous", SECOND, say(previous=None, previous_sha256=None), DECISION, "previous None")
inside("previous-sha256", SECOND, say(previous_sha256="0" * 64), DECISION, f"previous_sha256 {'0' * 64}")
inside("previous-half", SECOND, say(previous_sha256=None), DECISION, "previous_sha256")
inside("model-name", SECOND, say(model="other"), DECISION)
inside("record-broken", SECOND, lambda _, it: it.update({DECISION: b"{}"}), DECISION)
inside("champion", SECOND, carry_edit("champion.json", lambda it: it.update({"version": None})), "champion.json")
inside(
    "champion-none",
    FIRST,
    carry_edit("champion.json", lambda it: it.update({"version": "v0.0.1", "model_sha256": "0" * 64})),
    "champion.json",
    "nothing was in production",
)
inside(
    "withdrawn", LAST, carry_edit("champion.json", lambda it: it.update({"withdrawn": []})), "champion.json", "withdr"
)
inside("rollback-nowhere", BACK, say(version="v0.7.0"), DECISION, "v0.7.0")
inside("rollback-replaces", BACK, say(replaces="v0.1.0"), DECISION, "in place of v0.1.0")
inside("rollback-to-another", BACK, lambda _, it: it.update({"dvc.yaml": b"{}"}), "its files", "others")
inside("trusted-keys", SECOND, lambda _, it: it.update({"trusted_keys": b"?"}), "trusted_keys")


def again(payload: bytes, old: str, new: str) -> bytes:
    return re.sub(old.encode(), new.encode(), payload, count=1)


inside("commit-date", SECOND, same, "the commit", "committer", partial(again, old=r"(committer .*) \d+ ", new=r"\1 1 "))


def two_parents(ledger: Ledger) -> None:
    main = ledger.git("rev-parse", "main")
    insider(SECOND, same, partial(again, old=r"\nauthor", new=f"\nparent {main}\nauthor"))(ledger)


case("insider-two-parents", two_parents, DECISION, VERSION, "previous")


# History: dropped, reordered, cut off, begun anew.


def without(number: int, hidden: bool) -> Callable[[Ledger], None]:
    """The branch without one decision, signed anew by the insider."""

    def tamper(ledger: Ledger) -> None:
        from forgery import follow, relink, write

        from flows.registry import git

        before, made, parent = history(ledger), dict[str, str](), None
        for place, one in enumerate(before):
            if place == number:
                continue
            if place < number:
                made[one] = parent = one
                continue
            contents = git.files(ledger.root, one)
            relink(ledger, contents, parent, own(ledger))
            contents.pop(SIGNATURE)
            made[one] = parent = write(ledger, one, contents, parent, own(ledger))
        follow(ledger, made)
        if hidden:
            hide(ledger)

    return tamper


case("dropped-refusal", without(REFUSED, False), BRANCH, said="a history without it")
case("dropped-first", without(FIRST, True), DECISION, VERSION)
case("dropped-rollback", without(BACK, True), "champion.json", "refusal")


def back(ledger: Ledger) -> None:
    ledger.git("update-ref", BRANCH, "registry~1")


def back_remote_forgotten(ledger: Ledger) -> None:
    ledger.git("update-ref", "refs/remotes/origin/registry", "registry~1")
    back(ledger)


def back_traces_gone(ledger: Ledger, to: int = LAST - 1) -> None:
    ledger.git("update-ref", BRANCH, commit(ledger, to))
    ledger.git("update-ref", "refs/remotes/origin/registry", BRANCH)
    ledger.git("reflog", "expire", "--expire=now", "--all")


case("moved-back", back, BRANCH, said="refs/remotes/origin/registry")
case("moved-back-remote-forgotten", back_remote_forgotten, BRANCH, said="as it was")
case("moved-back-traces-gone", back_traces_gone, BRANCH, "remote origin", remote=True)
case("moved-back-tag-left", partial(back_traces_gone, to=SECOND), f"refs/tags/{MODEL}#production#3")
case("moved-before-all", partial(back_traces_gone, to=FIRST), f"refs/tags/{VERSION}")


def graft(ledger: Ledger) -> None:
    tip = commit(ledger, LAST)
    back(ledger)
    (ledger.root / ".git/info").mkdir(exist_ok=True)
    (ledger.root / ".git/info/grafts").write_text(f"{commit(ledger, -1)} {tip}\n")


def shallow(ledger: Ledger) -> None:
    tip = commit(ledger, LAST)
    (ledger.root / ".git/shallow").write_text(f"{tip}\n")
    in_place(ledger, f"{VERSION}:verdict.json", lambda data: data + b" ")


def replace(ledger: Ledger, name: str, change: Callable[[bytes], bytes]) -> None:
    """As `git replace --edit` would leave it."""
    one = ledger.git("rev-parse", name)
    kind = ledger.git("cat-file", "-t", one)
    from flows.registry import git

    with git.Objects(ledger.root) as objects:
        data = change(objects.read(one))
    other = git.git(ledger.root, "hash-object", "-t", kind, "-w", "--stdin", stdin=data)
    ledger.git("replace", one, other)


case("grafts", graft, BRANCH, said="a history without it")
case("shallow", shallow, "verdict.json")
case("replace-decision", lambda it: replace(it, f"registry:{DECISION}", refused_to_promoted), "refs/replace/")
case("replace-commit", lambda it: replace(it, "registry~2", lambda data: data + b"."), "refs/replace/")
case(
    "replace-tag",
    lambda it: replace(it, VERSION, lambda data: data.replace(b"promoted", b"Promoted")),
    "refs/replace/",
)


def reorder(ledger: Ledger) -> None:
    from forgery import follow, relink, write

    from flows.registry import git

    order, made, parent = history(ledger), dict[str, str](), None
    order[REFUSED], order[SECOND] = order[SECOND], order[REFUSED]
    for one in order:
        contents = git.files(ledger.root, one)
        relink(ledger, contents, parent, own(ledger))
        contents.pop(SIGNATURE)
        made[one] = parent = write(ledger, one, contents, parent, own(ledger))
    follow(ledger, made)
    hide(ledger)


case("reordered", reorder, DECISION, "refusal", "created after")


def root_rewritten(ledger: Ledger) -> None:
    remake(ledger, {FIRST: FORGED["README.md"]}, None)


case("root-rewritten", root_rewritten, SIGNATURE, f"{MODEL}@v0.1.0", "README.md")


def parent_gone(ledger: Ledger) -> None:
    loose(ledger, "registry~4").unlink()


case("root-gone", parent_gone, "the commit", "commit ", "missing or damaged")


# Tags and pointers.

POINTER = f"{MODEL}#production#3"


def delete(name: str) -> Callable[[Ledger], Any]:
    return lambda it: it.git("tag", "--delete", name)


def point(name: str, to: str, inside: str | None = None) -> Callable[[Ledger], None]:
    return lambda it: tag(it, name, it.git("rev-parse", f"{to}^{{commit}}"), inside)


for name in (f"{MODEL}@v0.1.0", VERSION, f"{MODEL}#production#1", f"{MODEL}#production#2", POINTER):
    case(f"tag-deleted-{name}", delete(name), f"refs/tags/{name}", said="commit None")
    case(f"tag-moved-{name}", point(name, "registry"), f"refs/tags/{name}")
    case(
        f"tag-lightweight-{name}",
        lambda it, name=name: it.git("update-ref", f"refs/tags/{name}", f"{name}^{{commit}}"),  # type: ignore[misc]
        f"refs/tags/{name}",
        said="annotated",
    )
    case(f"tag-named-otherwise-{name}", point(name, name, inside="other@v1.0.0"), f"refs/tags/{name}")
for name, to in (
    (f"{MODEL}@v0.3.0", "registry"),
    (f"{MODEL}@v0.3.0", "main"),
    (f"{MODEL}@v0.2.1", VERSION),
    (f"{MODEL}#production#4", VERSION),
    (f"{MODEL}#production#4", "main"),
    (f"{MODEL}#production!#4", "main"),
    (f"{MODEL}@v0.2.0!", "main"),
    ("other@v1.0.0", "registry"),
    ("other#production#1", "registry"),
):
    case(f"tag-extra-{name}-{to}", point(name, to), f"refs/tags/{name}")


def swap_pointers(ledger: Ledger) -> None:
    one, other = (ledger.git("rev-parse", f"{MODEL}#production#{n}^{{}}") for n in (2, 3))
    tag(ledger, f"{MODEL}#production#2", other)
    tag(ledger, f"{MODEL}#production#3", one)


case("pointers-swapped", swap_pointers, f"refs/tags/{POINTER}")

# Trusted keys.


def trust(change: Callable[[bytes], bytes]) -> Callable[[Ledger], None]:
    def tamper(ledger: Ledger) -> None:
        path = ledger.root / keys.TRUSTED
        changed = change(path.read_bytes())
        assert changed != path.read_bytes()
        put(path, changed)

    return tamper


def later(data: bytes) -> bytes:
    return re.sub(rb'valid-after="(\d{4})', lambda it: b'valid-after="%d' % (int(it[1]) + 1), data)


def earlier(data: bytes) -> bytes:
    return re.sub(rb'valid-after="(\d{4})', lambda it: b'valid-after="%d' % (int(it[1]) - 1), data)


def end_key(data: bytes) -> bytes:
    stamp = re.search(rb'valid-after="(\d+)Z"', data)
    assert stamp
    return data.replace(b'namespaces="git"', b'namespaces="git",valid-before="%dZ"' % (int(stamp[1]) + 1))


def flip_key(data: bytes) -> bytes:
    place = data.rindex(b" SHA256:") - 20
    return data[:place] + (b"A" if data[place : place + 1] != b"A" else b"B") + data[place + 1 :]


for name, changed_keys in {
    "key-flipped": flip_key,
    "from-later": later,
    "from-earlier": earlier,
    "ended-before": end_key,
    "lines-gone": lambda data: keys.HEADER,
    "truncated": lambda data: data[: data.rindex(b" SHA256:") - 20],
    "swapped": lambda data: data[::-1],
}.items():
    said = "signature" if name == "ended-before" else ""
    file = "signature" if name == "ended-before" else str(keys.TRUSTED)
    case(f"trusted-{name}", trust(changed_keys), file)
case("trusted-deleted", lambda it: (it.root / keys.TRUSTED).unlink(), str(keys.TRUSTED))


# The git remote.


def at_remote(*args: str) -> Callable[[Ledger], Any]:
    return lambda it: it.git("--git-dir", str(it.root.parent / "bare"), *args)


def remote_ahead(ledger: Ledger) -> None:
    main = ledger.git("rev-parse", "main")
    at_remote("update-ref", BRANCH, main)(ledger)


def remote_tag_named_otherwise(ledger: Ledger) -> None:
    before = ledger.git("rev-parse", VERSION)
    tag(ledger, VERSION, ledger.git("rev-parse", f"{VERSION}^{{}}"), "other@v1.0.0")
    ledger.git("push", "--quiet", "--force", "origin", f"refs/tags/{VERSION}")
    ledger.git("update-ref", f"refs/tags/{VERSION}", before)


for name, tampered in {
    "branch-back": at_remote("update-ref", BRANCH, f"{BRANCH}~1"),
    "branch-ahead": remote_ahead,
    "branch-gone": at_remote("update-ref", "-d", BRANCH),
}.items():
    case(f"remote-{name}", tampered, BRANCH, "remote origin", remote=True)
for name, (tagged, tampered) in {
    "tag-gone": (VERSION, at_remote("update-ref", "-d", f"refs/tags/{VERSION}")),
    "tag-moved": (VERSION, at_remote("update-ref", f"refs/tags/{VERSION}", f"refs/tags/{MODEL}@v0.1.0")),
    "tag-lightweight": (VERSION, at_remote("update-ref", f"refs/tags/{VERSION}", f"{BRANCH}~2")),
    "tag-named-otherwise": (VERSION, remote_tag_named_otherwise),
    "pointer-gone": (POINTER, at_remote("update-ref", "-d", f"refs/tags/{POINTER}")),
    "pointer-moved": (POINTER, at_remote("update-ref", f"refs/tags/{POINTER}", f"refs/tags/{VERSION}")),
    "pointer-extra": (f"{MODEL}#production#4", at_remote("update-ref", f"refs/tags/{MODEL}#production#4", BRANCH)),
    "pointer-elsewhere": (f"{MODEL}#production#4", at_remote("tag", f"{MODEL}#production#4", "main")),
}.items():
    case(f"remote-{name}", tampered, f"refs/tags/{tagged}", "remote origin", remote=True)
case(
    "damaged-here-audited-with-remote",
    lambda it: in_place(it, f"{VERSION}:{DECISION}", lambda data: data + b" "),
    DECISION,
    remote=True,
)


@pytest.mark.parametrize("case", CASES, ids=lambda one: one.name)
def test_what_is_tampered_with_is_found_and_named(case: Case, ledger: Ledger) -> None:
    case.tamper(ledger)
    findings = look(ledger, case.remote).findings
    assert any(
        case.file in one.file and case.decision in one.decision and case.said in f"{one.expected} {one.found}"
        for one in findings
    ), findings
    assert all(one.expected != one.found for one in findings), findings


def test_the_matrix_is_as_large_as_promised() -> None:
    names = [one.name for one in CASES]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("name", ["cache", "verdict", "pointer"])
def test_the_command_ends_with_status_1(name: str, ledger: Ledger) -> None:
    tamper = {
        "cache": lambda it: flip(cached(it, f"{MODEL}@v0.1.0", SHIPPED)),
        "verdict": lambda it: flip(loose(it, f"{VERSION}:verdict.json")),
        "pointer": delete(POINTER),
    }[name]
    tamper(ledger)
    said = ledger.weighin("audit", status=1)
    assert {"cache": SHIPPED, "verdict": "verdict.json", "pointer": f"refs/tags/{POINTER}"}[name] in said
