"""The registry against real git, GTO and DVC: what a decision leaves behind, and what it leaves alone."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ledger import FILES as LAID
from ledger import Ledger, latest, model, opened, production

from flows.registry import keys
from flows.registry.decision import COPIED_FILES, Decision
from flows.registry.git import MOVER
from flows.registry.record import Superseded
from flows.registry.refs import CODE_REFS
from tasks.core import files, paths
from tasks.core.errors import ParamsError, RegistryError
from tasks.gate import SCHEMA_VERSION

pytestmark = pytest.mark.usefixtures("own_git")

BIN = Path(sys.executable).parent
PASSED = {"name": "top1", "value": 1.0, "operator": ">=", "limit": 0.5, "where": None, "passed": True}
FILES = {
    *(
        "README.md",
        "decision.json",
        "dvc.lock",
        "dvc.yaml",
        "metrics.json",
        "params.yaml",
        "verdict.json",
        "bundle.sig",
    ),
    *("bom.cdx.json", "champion.json", "environment.json", "predictions.csv", "provenance.json", "trusted_keys"),
    *(".dvc/config", "data/device.json", "tasks/stage.py"),
}


def run(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def git(root: Path, *args: str) -> str:
    return run(root, "git", *args)


def dvc(root: Path, *args: str) -> str:
    return run(root, str(BIN / "dvc"), *args)


def gto(root: Path, *args: str) -> str:
    return run(root, str(BIN / "gto"), *args)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed git and DVC repository with a judged model; tests work on copies of it."""
    ledger = Ledger.begin(tmp_path_factory.mktemp("project"), bootstrap=True)
    ledger.lay(1)
    ledger.commit("Lay")
    return ledger.root


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "root", symlinks=True))


def write(root: Path, path: Path, data: bytes) -> None:
    Ledger(root).write(path, data)


def judge(root: Path, number: int, good: bool = True, name: str = "classifier", **changes: Any) -> None:
    """Lay a model in `root` and the gate's verdict on it; `changes` to the verdict's keys, None takes one out."""
    ledger = Ledger(root)
    ledger.lay(number, wrong=10 if good else 90, name=name)
    if changes:
        verdict = json.loads((root / paths.report("gate")).read_text())
        verdict = {key: value for key, value in (verdict | changes).items() if changes.get(key, ...) is not None}
        write(root, paths.report("gate"), json.dumps(verdict).encode())
        ledger.lock()


def decide(root: Path, number: int, good: bool = True, name: str = "classifier") -> Decision:
    judge(root, number, good, name)
    decision, new = opened(root, name).record()
    assert new
    return decision


def record(root: Path, name: str = "classifier") -> tuple[Decision, bool]:
    return opened(root, name).record()


def refs(root: Path) -> str:
    return git(root, "for-each-ref")


def show(root: Path, name: str, rev: str = "registry") -> str:
    return git(root, "show", f"{rev}:{name}")


def clone(root: Path, target: Path, *options: str) -> Path:
    """A clone with the data, DVC's cache and the key of the other."""
    git(root, "clone", "--quiet", *options, f"file://{root}", str(target))
    for name in ("data", ".weighin", ".dvc/cache"):
        if (root / name).exists():
            shutil.copytree(root / name, target / name, dirs_exist_ok=True)
    shutil.copy(root / "dvc.lock", target / "dvc.lock")
    if (root / "deploy").exists():
        shutil.copytree(root / "deploy", target / "deploy", dirs_exist_ok=True)
    return target


def chain(root: Path) -> list[Decision]:
    """Every decision on the branch, the first one first; each must name its only parent as the previous one."""
    decisions = []
    for line in git(root, "rev-list", "--reverse", "--parents", "registry").splitlines():
        commit, *parents = line.split()
        decision = Decision.model_validate_json(show(root, "decision.json", commit))
        assert parents == ([decision.previous] if decision.previous else [])
        decisions.append(decision)
    return decisions


def test_promotions_and_refusals_are_one_chain_and_promotions_are_tagged(root: Path) -> None:
    first = decide(root, 1)
    refusal = decide(root, 2, good=False)
    second = decide(root, 3)

    assert [first.version, refusal.version, second.version] == ["v0.1.0", None, "v0.2.0"]
    assert [first.replaces, refusal.replaces, second.replaces] == [None, None, "v0.1.0"]
    assert [first.outcome, refusal.outcome, second.outcome] == ["promoted", "refused", "promoted"]
    assert [first.failed, refusal.failed] == [(), ("top1", "top1_vs_champion")]
    assert chain(root) == [first, refusal, second]
    assert git(root, "tag").split() == [
        "classifier#production#1",
        "classifier#production#2",
        "classifier@v0.1.0",
        "classifier@v0.2.0",
    ]
    for tag, commit in {"@v0.1.0": "registry~2", "#production#1": "registry~2", "#production#2": "registry"}.items():
        assert git(root, "cat-file", "-t", f"classifier{tag}") == "tag"
        assert git(root, "rev-parse", f"classifier{tag}^{{commit}}") == git(root, "rev-parse", commit)
    assert latest(root) == production(root) == second


def test_the_commit_carries_the_record_and_what_brings_the_model_back(root: Path) -> None:
    decision = decide(root, 1)
    assert set(git(root, "ls-tree", "-r", "--name-only", "registry").split()) == {*FILES, ".dvc/config"}
    for name, path in COPIED_FILES.items():
        blob = subprocess.run(["git", "show", f"registry:{name}"], cwd=root, check=True, capture_output=True).stdout
        assert blob == (root / path).read_bytes()
    assert decision.verdict_sha256 == hashlib.sha256((root / paths.report("gate")).read_bytes()).hexdigest()
    assert decision.code.commit == git(root, "rev-parse", "HEAD")
    assert decision.previous is None
    assert git(root, "log", "-1", "--format=%an <%ae>, %cn <%ce>, %s", "registry") == (
        "Ada <ada@example.org>, Ada <ada@example.org>, classifier: promoted v0.1.0"
    )
    seconds = git(root, "log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", "--format=%ad %cd", "registry")
    assert seconds == f"{decision.created} {decision.created}"
    git(root, "fsck", "--strict")


def test_the_model_card_tells_what_was_decided_and_why(root: Path) -> None:
    decision = decide(root, 1, good=False)
    card = show(root, "README.md")
    for text in (
        "# classifier (refused)",
        "64x64 pixels",
        "| reduce | 55.00% | 1,000 B | 0.100 ms |",
        "| top1 |  | 0.55 | >= | 0.6 | no |",
        f"`{decision.model_sha256}`",
        f"`{decision.data_sha256}`",
        f"`{decision.code.commit}`",
        "licence",
    ):
        assert text in card


def test_a_pipe_does_not_break_the_cards_table(root: Path) -> None:
    check = {"name": "recall|bag", "value": None, "operator": ">=", "limit": 0.6, "passed": False}
    judge(root, 1, checks=[check])
    opened(root).record()
    assert r"| recall\|bag |  | missing | >= | 0.6 | no |" in show(root, "README.md")


def test_the_users_branch_index_and_work_tree_stay_untouched(root: Path) -> None:
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "# staged\n")
    git(root, "add", ".gitignore")
    (root / "notes.txt").write_text("not tracked")
    os.utime(root / "dvc.yaml", (1, 1))  # the index is stale now: git would like to refresh it
    index = (root / ".git/index").read_bytes()
    decide(root, 1)
    assert (root / ".git/index").read_bytes() == index
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert git(root, "rev-list", "--count", "HEAD") == "2"
    assert git(root, "status", "--porcelain").split("\n") == ["M  .gitignore", "?? deploy/", "?? notes.txt"]


@pytest.mark.parametrize(
    "path", [paths.onnx("reduce"), paths.TEST, paths.report("benchmark"), paths.report("gate"), paths.DEVICE]
)
def test_a_lock_that_names_another_file_decides_nothing(root: Path, path: Path) -> None:
    judge(root, 1)
    text = (root / "dvc.lock").read_text()
    found = hashlib.md5((root / path).read_bytes(), usedforsecurity=False).hexdigest()
    assert found in text
    (root / "dvc.lock").write_text(text.replace(found, "0" * 32))
    before = refs(root)
    with pytest.raises(RegistryError, match=f"dvc.lock does not name {path} as it is now"):
        opened(root).record()
    assert refs(root) == before


def test_code_is_dirty_only_by_what_the_decision_does_not_carry(root: Path) -> None:
    (root / "dvc.lock").write_text((root / "dvc.lock").read_text() + "# a retrain rewrites it\n")
    assert not decide(root, 1).code.dirty
    git(root, "config", "status.showUntrackedFiles", "no")
    (root / "stage.py").write_text("an edit")
    assert decide(root, 2).code.dirty


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        ("data/raw/images/cat/1.jpg", False),
        ("data/raw/images/cat/odd.py", False),
        ("data/recipes/mine.yaml", False),
        ("my-recipe.yaml", False),
        ("notes.txt", False),
        ("scripts/count.py", False),
        ("tasks/notes.md", False),
        ("tasks/extra.py", True),
        ("tasks/nets/extra.py", True),
        ("flows/extra.py", True),
        ("numpy.py", True),
        ("numpy.cpython-311-x86_64-linux-gnu.so", True),
        ("numpy/__init__.py", True),
    ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_a_new_file_makes_the_code_dirty_only_if_a_stage_could_run_it(
    root: Path, path: str, dirty: bool, staged: bool
) -> None:
    write(root, Path(path), b"new")
    if staged:
        git(root, "add", "--force", path)
    assert decide(root, 1).code.dirty is dirty


@pytest.mark.parametrize(
    ("path", "dirty"), [("data/raw/fashion-mnist/a.gz", False), ("docs/a.md", True), ("tasks/a.py", True)]
)
def test_a_changed_or_removed_file_makes_the_code_dirty_unless_it_is_an_image(
    root: Path, path: str, dirty: bool
) -> None:
    write(root, Path(path), b"committed")
    git(root, "add", "--force", path)
    git(root, "commit", "--quiet", "-m", "File")
    write(root, Path(path), (root / path).read_bytes() + b"\n# changed")
    assert decide(root, 1).code.dirty is dirty
    (root / path).unlink()
    assert decide(root, 2).code.dirty is dirty


def test_an_unchanged_verdict_is_not_recorded_twice(root: Path) -> None:
    decision = decide(root, 1)
    before = refs(root)
    assert opened(root).record() == (decision, False)
    assert refs(root) == before
    decide(root, 2, good=False)
    judge(root, 1)
    assert opened(root).record() == (decision, False)  # what is in production needs no promotion
    assert decide(root, 3).version == "v0.2.0"


def test_models_share_the_branch_and_count_on_their_own(root: Path) -> None:
    first = decide(root, 1)
    other = decide(root, 1, name="class")
    assert (first.version, other.version, other.replaces) == ("v0.1.0", "v0.1.0", None)
    assert latest(root) == first
    assert latest(root, "class") == production(root, "class") == other
    assert opened(root).record() == (first, False)
    assert latest(root, "nobody") is production(root, "nobody") is None
    assert chain(root) == [first, other]


def test_versions_and_assignments_are_ordered_as_numbers(root: Path) -> None:
    decisions = [decide(root, number) for number in range(11)]
    assert decisions[-1].version == "v0.11.0"
    assert decisions[-1].replaces == "v0.10.0"
    assert production(root) == decisions[-1]


@pytest.mark.parametrize(("path", "other"), [(paths.onnx("reduce"), "another model"), (paths.TEST, "other data")])
def test_a_verdict_of_something_else_is_no_decision(root: Path, path: Path, other: str) -> None:
    decide(root, 1)
    judge(root, 2)
    before = refs(root)
    (root / path).write_bytes(b"tampered with")
    with pytest.raises(RegistryError, match=f"the verdict judged {other} than {path}"):
        opened(root).record()
    (root / path).unlink()
    with pytest.raises(RegistryError, match="missing"):
        opened(root).record()
    assert refs(root) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"checks": None},
        {"checks": []},
        {"passed": "yes"},
        {"passed": 1},
        {"passed": None},
        {"checks": [{"name": "top1", "value": 1, "operator": ">=", "limit": 0, "passed": "true"}]},
        {"checks": [{"name": "top1", "value": 1, "operator": ">=", "limit": 0}]},
        {"model_sha256": None},
        {"data_sha256": "0" * 63},
    ],
)
def test_a_malformed_verdict_is_an_error(root: Path, changes: dict[str, Any]) -> None:
    judge(root, 1, **changes)
    with pytest.raises(RegistryError, match=r"gate\.json is malformed"):
        opened(root).record()
    assert "registry" not in refs(root)


@pytest.mark.parametrize("name", ["gate", "benchmark"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"passed": true', b"\xff", b'{"stages": {"reduce": {}}}'])
def test_a_damaged_report_is_an_error(root: Path, name: str, content: bytes) -> None:
    write(root, paths.report(name), content)
    Ledger(root).lock()
    with pytest.raises(RegistryError, match=rf"{name}\.json is malformed"):
        opened(root).record()
    assert "registry" not in refs(root)


@pytest.mark.parametrize("passed", [(True, False), (False, True)])
def test_a_verdict_at_odds_with_its_checks_is_a_refusal(root: Path, passed: tuple[bool, bool]) -> None:
    check = {"name": "top1", "value": 0.9, "operator": ">=", "limit": 0.8, "passed": passed[1]}
    judge(root, 1, passed=passed[0], checks=[check])
    decision, _ = opened(root).record()
    assert (decision.outcome, decision.version) == ("refused", None)
    assert git(root, "tag") == ""


@pytest.mark.parametrize(
    "path", ["params.yaml", "dvc.lock", ".dvc/config", "data/device.json", "data/reports/gate.json"]
)
def test_a_missing_file_is_named(root: Path, path: str) -> None:
    (root / path).unlink()
    with pytest.raises((RegistryError, ParamsError), match=f"{path} (is missing|does not exist)"):
        opened(root).record()


def test_a_decision_is_coherent() -> None:
    hashes = ("model", "data", "params", "code", "verdict")
    fields: dict[str, Any] = {f"{name}_sha256": "0" * 64 for name in hashes} | {
        "model": "classifier",
        "previous": None,
        "previous_sha256": None,
        "replaces": None,
        "created": "2026-01-31T00:00:00Z",
        "by": "Ada <ada@example.org>",
        "reason": None,
        "signer": "SHA256:" + "A" * 43,
        "code": {"commit": None, "dirty": True},
        "bootstrap": False,
        "traded": False,
    }
    Decision(**fields, outcome="promoted", version="v0.1.0", failed=())
    for outcome, version, failed, said in (
        ("promoted", None, (), "what goes into production has a version"),
        ("refused", "v0.1.0", ("size",), "what goes into production has a version"),
        ("held", "v0.1.0", (), "what goes into production has a version"),
        ("promoted", "v0.1.0", ("size",), "only what is refused has failed a check"),
        ("rolled-back", "v0.1.0", (), "what people decide has a reason"),
        ("approved", "v0.1.0", (), "what people decide has a reason"),
    ):
        with pytest.raises(ValueError, match=said):
            Decision(**fields, outcome=outcome, version=version, failed=failed)


def test_a_lock_that_a_killed_git_of_ours_left_is_removed(root: Path) -> None:
    decide(root, 1)
    judge(root, 2)
    git(root, "commit", "--quiet", "--allow-empty", "-m", "Another revision")
    kept = f"{CODE_REFS}/{git(root, 'rev-parse', 'HEAD')}"
    (root / ".git" / MOVER).write_text('{"moving": true}')  # as it is while a git moves refs, and when that was killed
    for ref in ("refs/heads/registry", "refs/tags/classifier@v0.2.0", "refs/tags/classifier#production#2", kept):
        (root / ".git" / f"{ref}.lock").touch()
    assert opened(root).record()[0].version == "v0.2.0"
    assert not list((root / ".git/refs").rglob("*.lock"))


@pytest.mark.parametrize("died", [False, True])
def test_a_lock_that_may_be_held_still_is_named_and_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    """However old it is: a git that is only paused would go on, and its compare-and-swap with it."""
    monkeypatch.setattr("flows.registry.git.WAIT_S", 0.2)
    decide(root, 1)
    judge(root, 2)
    lock = root / ".git/refs/heads/registry.lock"
    lock.touch()
    os.utime(lock, (1, 1))  # made long before the git of ours that died, if one did
    if died:
        (root / ".git" / MOVER).write_text('{"moving": true}')
    tip = git(root, "rev-parse", "registry")
    with pytest.raises(
        RegistryError, match=r"another git holds .*refs/heads/registry\.lock, or was killed and left it"
    ):
        opened(root).record()
    assert lock.exists()
    assert git(root, "rev-parse", "registry") == tip


def test_nobody_moves_refs_while_a_paused_git_of_ours_may(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.registry.git.TURN_S", 0.2)
    decide(root, 1)
    judge(root, 2)
    with (root / ".git" / MOVER).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a git that was started by another process has it
        with pytest.raises(RegistryError, match="another decision has been moving refs for"):
            opened(root).record()
    assert opened(root).record()[0].version == "v0.2.0"


@pytest.mark.parametrize("schema", [None, 1, 2, 3, SCHEMA_VERSION + 1])
def test_a_verdict_of_another_schema_decides_nothing(root: Path, schema: int | None) -> None:
    """An older judge looked at less: what it would let pass today must face the judge of today."""
    judge(root, 1, good=False, schema_version=schema, passed=True, checks=[PASSED])
    before = refs(root)
    with pytest.raises(RegistryError, match=rf"gate\.json is a verdict of schema \d, not {SCHEMA_VERSION}: run"):
        opened(root).record()
    assert refs(root) == before


@pytest.mark.parametrize("tags", [["classifier@v0.2.0"], ["classifier@v0.2.0", "classifier#production#2"]])
def test_a_decision_that_was_cut_off_before_its_tags_gets_them(root: Path, tags: list[str]) -> None:
    decide(root, 1)
    last = decide(root, 2)
    before = refs(root)
    for tag in tags:
        git(root, "tag", "--delete", tag)
    assert production(root) == last
    assert opened(root).record() == (last, False)
    assert refs(root) == before


@pytest.mark.parametrize("tag", ["classifier@v0.1.0", "classifier#production#1"])
def test_an_earlier_tag_that_is_missing_or_moved_stops_decisions(root: Path, tag: str) -> None:
    decide(root, 1)
    decide(root, 2)
    git(root, "tag", "--delete", tag)
    judge(root, 3)
    with pytest.raises(RegistryError, match=f"the tag {tag} of a recorded decision is missing"):
        opened(root).record()
    git(root, "tag", tag, "registry")
    with pytest.raises(RegistryError, match=f"the tag {tag} is not where the registry's decisions have it"):
        opened(root).record()


def test_what_another_promotion_superseded_is_judged_again(root: Path) -> None:
    judge(root, 1)
    laid = {path: (root / path).read_bytes() for path in (*LAID, Path("dvc.lock"), paths.CHAMPION_RECORD)}
    decide(root, 2)
    for path, data in laid.items():
        write(root, path, data)
    before = refs(root)
    with pytest.raises(Superseded, match=r"compared with no champion, but classifier v0\.1\.0 is in production"):
        opened(root).record()
    assert refs(root) == before


def meanwhile(tmp_path: Path, patch: pytest.MonkeyPatch, command: str) -> None:
    """Put a `git` on PATH that runs `command` once a recorder has read the registry and makes its commit."""
    shim, real = tmp_path / "bin/git", shutil.which("git")
    shim.parent.mkdir()
    shim.write_text(
        f'#!/bin/sh\ncase "$*" in *"hash-object -t commit"*) {real} -C "$2" {command};; esac\nexec {real} "$@"\n'
    )
    shim.chmod(0o755)
    patch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_tag_that_came_between_is_left_as_it_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        meanwhile(tmp_path, patch, "tag classifier@v0.1.0 main")
        with pytest.raises(RegistryError, match=r"there is a tag classifier@v0\.1\.0 already, and no decision has it"):
            opened(root).record()
    assert refs(root).split()[2::3] == ["refs/heads/main", "refs/tags/classifier@v0.1.0"]
    assert git(root, "rev-parse", "classifier@v0.1.0") == git(root, "rev-parse", "main")


def test_a_refusal_that_came_between_is_built_upon(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(root, 1)
    rival = clone(root, tmp_path / "rival")
    decide(rival, 77, good=False)
    judge(root, 2)
    with monkeypatch.context() as patch:
        meanwhile(tmp_path, patch, f"fetch --quiet --no-tags {rival} registry:registry")
        decision, new = opened(root).record()
    assert new
    assert decision.previous == git(rival, "rev-parse", "registry")
    assert [decision.outcome for decision in chain(root)][-2:] == ["refused", "promoted"]


def test_a_promotion_that_came_between_has_to_be_faced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(root, 1)
    rival = clone(root, tmp_path / "rival")
    decide(rival, 77)
    judge(root, 2)
    with monkeypatch.context() as patch:
        meanwhile(tmp_path, patch, f"fetch --quiet --tags {rival} registry:registry")
        with pytest.raises(Superseded, match=r"compared with v0\.1\.0, but classifier v0\.2\.0 is in production"):
            opened(root).record()
    assert git(root, "rev-parse", "registry") == git(rival, "rev-parse", "registry")


def test_recorders_at_the_same_time_make_one_chain(root: Path, tmp_path: Path) -> None:
    """Two work trees of one repository decide at once, again and again: each time one wins, one is superseded."""
    decide(root, 99)
    git(root, "worktree", "add", "--quiet", "--detach", str(tmp_path / "other"))
    other = shutil.copytree(root, tmp_path / "other", dirs_exist_ok=True, ignore=lambda *_: {".git"})
    (other / ".dvc/config.local").write_text(f"[cache]\n    dir = {root}/.dvc/cache\n")
    recorded: list[Decision] = []
    superseded: list[Superseded] = []

    def recorder(where: Path, start: threading.Barrier) -> None:
        start.wait()
        try:
            recorded.append(opened(where).record()[0])
        except Superseded as error:
            superseded.append(error)

    for number in range(5):
        start = threading.Barrier(2)
        for index, where in enumerate((root, other)):
            judge(where, 100 + 2 * number + index)
            if where is other:
                shutil.copytree(where / ".dvc/cache", root / ".dvc/cache", dirs_exist_ok=True)
        threads = [threading.Thread(target=recorder, args=(where, start)) for where in (root, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert (len(recorded), len(superseded)) == (5, 5)
    decisions = chain(root)[1:]
    assert decisions == recorded
    assert [decision.version for decision in decisions] == [f"v0.{number}.0" for number in range(2, 7)]
    assert len(git(root, "tag").split()) == 12


def test_without_an_identity_weighin_signs_as_itself(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git(root, "config", "--remove-section", "user")
    git(root, "config", "user.useConfigOnly", "true")  # else git may make up an identity from the host's name
    decide(root, 1)
    assert git(root, "log", "-1", "--format=%an <%ae> %cn <%ce>", "registry") == " ".join(
        ["Weighin <weighin@localhost>"] * 2
    )
    assert "tagger Weighin <weighin@localhost>" in git(root, "cat-file", "tag", "classifier@v0.1.0")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Grace")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "grace@example.org")
    decide(root, 2)
    assert git(root, "log", "-1", "--format=%an, %cn", "registry") == "Grace, Weighin"


def test_the_users_settings_and_hooks_do_not_matter(root: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("reference-transaction", "pre-commit", "commit-msg"):
        (hooks / name).write_text("#!/bin/sh\nexit 1\n")
        (hooks / name).chmod(0o755)
    for key, value in {
        "core.hooksPath": str(hooks),
        "commit.gpgSign": "true",
        "tag.gpgSign": "true",
        "gpg.program": "false",
        "core.autocrlf": "true",
        "core.safecrlf": "true",
        "i18n.commitEncoding": "ISO-8859-1",
        "status.showUntrackedFiles": "no",
    }.items():
        git(root, "config", key, value)
    verdict = (root / paths.report("gate")).read_bytes().replace(b", ", b",\r\n")
    (root / paths.report("gate")).write_bytes(verdict)
    Ledger(root).lock()
    assert opened(root).record()[0].version == "v0.1.0"
    blob = subprocess.run(["git", "show", "registry:verdict.json"], cwd=root, check=True, capture_output=True).stdout
    assert blob == verdict
    assert "encoding" not in git(root, "cat-file", "commit", "registry")


def test_the_repository_is_the_roots_own_when_git_is_the_caller(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "--quiet", "elsewhere")
    with monkeypatch.context() as patch:  # as a hook of another repository would have it
        patch.setenv("GIT_DIR", str(tmp_path / "elsewhere/.git"))
        patch.setenv("GIT_INDEX_FILE", str(tmp_path / "elsewhere/.git/index"))
        opened(root).record()
    assert "refs/heads/registry" in refs(root)


def test_a_detached_head_decides_too(root: Path) -> None:
    git(root, "checkout", "--quiet", "--detach")
    assert decide(root, 1).code.commit == git(root, "rev-parse", "HEAD")


def test_a_shallow_clone_decides_too(root: Path, tmp_path: Path) -> None:
    git(root, "commit", "--quiet", "--allow-empty", "-m", "More")
    shallow = clone(root, tmp_path / "shallow", "--depth", "1")
    assert decide(shallow, 1).version == "v0.1.0"


def test_a_fresh_clone_goes_on_where_its_origin_is(root: Path, tmp_path: Path) -> None:
    first = decide(root, 1)
    other = clone(root, tmp_path / "clone")
    assert latest(other) == production(other) == first
    assert opened(other).record() == (first, False)
    second = decide(other, 2)
    assert chain(other) == [first, second]
    assert second.version == "v0.2.0"


def test_a_clone_that_lacks_part_of_the_registry_is_told(root: Path, tmp_path: Path) -> None:
    decide(root, 1)
    decide(root, 2)
    cut = clone(root, tmp_path / "cut", "--depth", "1", "--no-single-branch", "--no-tags")
    for call in (latest, production, record):
        with pytest.raises(RegistryError, match="`git fetch --unshallow` brings what a shallow clone lacks"):
            call(cut, "classifier")
    git(cut, "fetch", "--quiet", "--unshallow", "--no-tags")
    with pytest.raises(RegistryError, match=r"the tag classifier@v0\.1\.0 of a recorded decision is missing"):
        opened(cut).record()


def test_a_folder_that_cannot_keep_decisions_is_told(root: Path) -> None:
    shutil.rmtree(root / ".git")
    for call in (record, latest, production):
        with pytest.raises(RegistryError, match="not a git repository"):
            call(root, "classifier")
    git(root, "init", "--quiet")
    assert latest(root) is production(root) is None
    with pytest.raises(RegistryError, match="has no commit yet"):
        opened(root).record()


def test_gto_shows_versions_and_their_history(root: Path) -> None:
    decide(root, 1)
    decide(root, 2, good=False)
    decide(root, 3)
    shown = json.loads(gto(root, "show", "--json"))["classifier"]
    assert (shown["version"], shown["stage"]) == ("v0.2.0", {"production": "v0.2.0"})
    assert gto(root, "show", "classifier@latest", "--version") == "v0.2.0"
    assert gto(root, "show", "classifier#production", "--version") == "v0.2.0"
    events = json.loads(gto(root, "history", "classifier", "--json"))
    refs_of = {event["ref"]: (event["event"], event["version"]) for event in events}
    assert refs_of == {
        "classifier@v0.1.0": ("registration", "v0.1.0"),
        "classifier@v0.2.0": ("registration", "v0.2.0"),
        "classifier#production#1": ("assignment", "v0.1.0"),
        "classifier#production#2": ("assignment", "v0.2.0"),
    }
    commits = {event["commit"] for event in events}
    assert commits == {git(root, "rev-parse", rev) for rev in ("registry", "registry~2")}


def test_dvc_brings_every_promoted_model_back(root: Path, tmp_path: Path) -> None:
    decide(root, 1)
    decide(root, 2)
    for number in (1, 2):
        target, version = tmp_path / f"{number}.onnx", f"classifier@v0.{number}.0"
        dvc(tmp_path, "get", str(root), str(paths.onnx("reduce")), "--rev", version, "-o", str(target))
        assert target.read_bytes() == model(number)


def test_the_start_is_laid_from_the_version_in_production(root: Path) -> None:
    with pytest.raises(RegistryError, match="classifier has no version in production"):
        opened(root).lay_start(paths.weights("finetune"))
    decide(root, 1)
    wanted = (root / paths.weights("finetune")).read_bytes()
    decide(root, 2, good=False)
    assert (root / paths.weights("finetune")).read_bytes() != wanted
    assert opened(root).lay_start(paths.weights("finetune")) == "v0.1.0"
    assert (root / paths.START).read_bytes() == wanted
    assert (root / paths.START_VERSION).read_text() == "v0.1.0"


def test_a_start_that_cannot_be_brought_leaves_what_lies_there(root: Path) -> None:
    start = root / paths.START
    files.write_bytes(start, b"before")
    decide(root, 1)
    with pytest.raises(RegistryError, match=r"nothing\.bin of classifier@v0\.1\.0 cannot be brought"):
        opened(root).lay_start(Path("data/nothing.bin"))
    data = (root / paths.weights("finetune")).read_bytes()
    cached = Ledger(root).cached(hashlib.md5(data, usedforsecurity=False).hexdigest())
    cached.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(RegistryError, match="is damaged"):
        opened(root).lay_start(paths.weights("finetune"))
    cached.unlink()
    with pytest.raises(RegistryError, match="cannot be brought"):
        opened(root).lay_start(paths.weights("finetune"))
    assert start.read_bytes() == b"before"
    assert [path.name for path in start.parent.iterdir()] == [start.name]


def test_a_decision_without_a_trusted_signature_has_no_say(root: Path) -> None:
    """Who can write to the branch but has no key cannot put a weaker champion up."""
    decide(root, 1)
    decide(root, 2)
    forged = json.loads(show(root, "decision.json")) | {
        "outcome": "rolled-back", "version": "v0.1.0", "replaces": "v0.2.0", "reason": "so that mine is better",
        "previous": git(root, "rev-parse", "registry"), "previous_sha256": "0" * 64,
    }  # fmt: skip
    write(root, Path("decision.json"), json.dumps(forged).encode())
    blob = git(root, "hash-object", "-w", "decision.json")
    tree = subprocess.run(
        ["git", "mktree"],
        cwd=root,
        input=f"100644 blob {blob}\tdecision.json\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    commit = git(root, "commit-tree", tree, "-p", "registry", "-m", "forged")
    git(root, "update-ref", "refs/heads/registry", commit)
    for call in (lambda: judge(root, 3), lambda: production(root)):
        with pytest.raises(RegistryError, match=f"decision {commit[:12]} does not hold: the commit is not signed"):
            call()  # type: ignore[no-untyped-call]


def test_only_the_first_key_of_all_enters_itself(root: Path) -> None:
    decide(root, 1)
    shutil.rmtree(root / ".weighin")
    judge(root, 2)
    with pytest.raises(RegistryError, match=r"is not in deploy/trusted_keys: add this line"):
        opened(root).record()
    (root / "deploy/trusted_keys").unlink()
    with pytest.raises(RegistryError, match="unknown key"):
        opened(root).record()


def test_a_key_that_nobody_has_reviewed_signs_nothing(root: Path) -> None:
    decide(root, 1)
    git(root, "add", "deploy")
    git(root, "commit", "--quiet", "-m", "Trust")
    keys.rotate(root, datetime.now(UTC))
    judge(root, 2)
    with pytest.raises(RegistryError, match="is in deploy/trusted_keys here, but not in the last commit"):
        opened(root).record()
    git(root, "commit", "--quiet", "--all", "-m", "Rotate")
    assert opened(root).record()[0].version == "v0.2.0"


@pytest.mark.parametrize("extension", ["", ',valid-before="20990101Z"'])
def test_a_key_whose_end_nobody_has_reviewed_the_extension_of_signs_nothing(root: Path, extension: str) -> None:
    created = decide(root, 1).created
    end = re.sub(r"[-:T]", "", created)
    path = root / keys.TRUSTED
    begun = re.sub('valid-after="[^"]+"', 'valid-after="20200101Z"', path.read_text())
    ended = begun.replace('valid-after="20200101Z"', f'valid-after="20200101Z",valid-before="{end}"')
    path.write_text(ended)
    git(root, "add", "deploy")
    git(root, "commit", "--quiet", "-m", "End")
    path.write_text(begun.replace('valid-after="20200101Z"', f'valid-after="20200101Z"{extension}'))
    judge(root, 2)
    before = refs(root)
    with pytest.raises(RegistryError, match="but by the last commit it does not hold now: have the change reviewed"):
        opened(root).record()
    assert refs(root) == before
    git(root, "commit", "--quiet", "--all", "-m", "Extend")
    assert opened(root).record()[0].version == "v0.2.0"


MEDDLED: dict[str, tuple[tuple[str, ...], str]] = {
    "moved": (("--force", "classifier#production#2", "classifier@v0.1.0^{}"), "classifier#production#2"),
    "deleted": (("-d", "classifier#production#2"), "classifier#production#2"),
    "made": (("classifier#production#3", "classifier@v0.1.0^{}"), "classifier#production#3"),
    "of a later number": (("classifier#production#99", "classifier@v0.1.0^{}"), "classifier#production#99"),
}


@pytest.mark.parametrize("how", MEDDLED)
def test_what_is_in_production_the_audit_has_from_the_decisions_and_from_no_tag(root: Path, how: str) -> None:
    from flows.registry.audit import audit

    decide(root, 1)
    decide(root, 2)
    command, tag = MEDDLED[how]
    git(root, "tag", *(() if "-d" in command else ("-a", "-m", how)), *command)
    report = audit(root, "classifier", working_copy=False)
    assert report.audited == ["classifier@v0.2.0"]
    assert [one.file for one in report.damage] == [f"refs/tags/{tag}"]


def test_a_version_is_audited_by_its_decision_where_its_tag_is_gone(root: Path) -> None:
    from flows.registry.audit import audit

    decide(root, 1)
    decide(root, 2)
    git(root, "tag", "-d", "classifier@v0.1.0")
    report = audit(root, "classifier", "v0.1.0", working_copy=False)
    assert report.audited == ["classifier@v0.1.0"]
    assert [one.file for one in report.damage] == ["refs/tags/classifier@v0.1.0"]


def test_code_that_git_ignores_is_no_part_of_a_commit(root: Path) -> None:
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + ".ipynb_checkpoints/\n")
    git(root, "commit", "--quiet", "--all", "-m", "Ignore")
    write(root, Path("tasks/.ipynb_checkpoints/stage.py"), b"x = 1\n")
    assert decide(root, 1).code.dirty


def test_a_model_that_came_back_by_a_promotion_is_not_withdrawn(root: Path) -> None:
    from flows.registry.audit import ALL, audit

    for number in (1, 2, 1):
        decide(root, number)
    opened(root).roll_back("v0.1.0", "the same model")
    assert decide(root, 4).version == "v0.4.0"
    assert audit(root, "classifier", ALL).findings == []


def test_a_clone_that_is_behind_goes_forward(root: Path, tmp_path: Path) -> None:
    decide(root, 1)
    other = clone(root, tmp_path / "other")
    assert latest(other) is not None
    git(other, "branch", "registry", "origin/registry")
    last = decide(root, 2)
    git(other, "fetch", "--quiet")
    assert production(other) == last
    assert git(other, "rev-parse", "registry") == git(root, "rev-parse", "registry")


def test_tags_of_others_at_the_remote_do_not_matter(root: Path, tmp_path: Path) -> None:
    decide(root, 1)
    ledger = Ledger(root)
    ledger.share(tmp_path / "bare", tmp_path / "store")
    git(root, "tag", "nightly")
    git(root, "push", "--quiet", "origin", "nightly")
    git(root, "tag", "--force", "nightly", "HEAD~1")
    assert decide(root, 2).version == "v0.2.0"
    held = git(root, "ls-remote", "origin", "refs/weighin/code/*").split()
    assert held[0::2] == [name.rpartition("/")[2] for name in held[1::2]]
    assert git(root, "rev-parse", "HEAD") in held


@pytest.mark.parametrize("name", ["--upload-pack=touch x", "-v", "", "origin; x"])
def test_a_remote_is_a_name_and_no_option(root: Path, name: str) -> None:
    Ledger(root).params(remote=name)
    with pytest.raises(ParamsError, match=r"registry\.remote"):
        opened(root).record()
