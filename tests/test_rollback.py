"""Rollbacks: what goes back into production, what is recorded of it, and what stays out."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forgery import flip, loose, output
from ledger import BIN, MODEL, Ledger, call, opened, production

from flows.registry.audit import ALL, audit
from flows.registry.decision import Decision
from flows.registry.refs import BRANCH
from tasks.core import files, paths
from tasks.core.errors import RegistryError

SHIPPED = paths.onnx("reduce").as_posix()

pytestmark = pytest.mark.usefixtures("own_git")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, own_git: None) -> Ledger:
    """Two promotions, kept here only; tests work on copies of them."""
    made = Ledger.begin(tmp_path_factory.mktemp("two") / "project")
    made.decide(1)
    made.decide(2)
    return made


@pytest.fixture(scope="module")
def three(two: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """One more."""
    made = copy(two, tmp_path_factory.mktemp("three"))
    made.decide(3)
    return made


def copy(ledger: Ledger, folder: Path) -> Ledger:
    return Ledger(shutil.copytree(ledger.root, folder / "project", symlinks=True))


@pytest.fixture
def ledger(two: Ledger, tmp_path: Path) -> Ledger:
    return copy(two, tmp_path)


@pytest.fixture
def longer(three: Ledger, tmp_path: Path) -> Ledger:
    return copy(three, tmp_path)


@pytest.fixture
def shared(tmp_path: Path) -> Ledger:
    """Two promotions at remotes."""
    made = Ledger.begin(tmp_path / "project")
    made.share(tmp_path / "bare", tmp_path / "store")
    made.decide(1)
    made.commit("Trust the key")
    made.git("push", "--quiet", "origin", "main")
    made.decide(2)
    return made


def back(ledger: Ledger, version: str | None = None, said: list[str] | None = None) -> Decision:
    return opened(ledger.root, say=(said if said is not None else []).append).roll_back(version, "wrong at night")


def holds(ledger: Ledger, remote: bool = False) -> bool:
    return not audit(ledger.root, MODEL, ALL, "origin" if remote else None).findings


def refs(ledger: Ledger) -> str:
    return ledger.git("for-each-ref")


def test_the_version_before_goes_back_and_who_and_why_are_recorded(ledger: Ledger) -> None:
    first, second = (ledger.git("rev-parse", f"{MODEL}@{version}^{{}}") for version in ("v0.1.0", "v0.2.0"))
    decision = back(ledger)
    assert (decision.outcome, decision.version, decision.replaces) == ("rolled-back", "v0.1.0", "v0.2.0")
    assert (decision.reason, decision.by) == ("wrong at night", "Ada <ada@example.org>")
    assert decision.previous == second
    assert json.loads(ledger.git("show", "registry:decision.json")) == decision.model_dump(mode="json")
    assert ledger.git("rev-parse", f"{MODEL}#production#3^{{}}") == first
    now = production(ledger.root)
    assert now and now.version == "v0.1.0"
    infra = json.loads(ledger.git("show", "registry:infra.json"))
    assert all(one["same_top1"] and one["repeatable"] for one in infra["golden"].values())
    assert "packages" in infra["environment"]
    assert holds(ledger)


def test_the_card_says_what_was_rolled_back_and_why(ledger: Ledger) -> None:
    back(ledger)
    card = ledger.git("show", "registry:README.md")
    assert "Rolled-back on" in card
    assert "in place of v0.2.0" in card
    assert "Reason: wrong at night" in card


def test_gto_sees_the_version_that_is_back(ledger: Ledger) -> None:
    back(ledger)
    assert call(ledger.root, str(BIN / "gto"), "show", f"{MODEL}#production", "--version") == "v0.1.0"


def test_a_version_can_be_named(longer: Ledger) -> None:
    assert back(longer, "v0.1.0").replaces == "v0.3.0"
    assert back(longer, "v0.3.0").replaces == "v0.1.0"
    assert holds(longer)


def test_the_next_challenger_has_to_face_the_version_that_is_back(ledger: Ledger) -> None:
    back(ledger)
    ledger.lay(3)
    champion = json.loads((ledger.root / paths.CHAMPION_RECORD).read_bytes())
    assert champion["version"] == "v0.1.0"
    first = output(ledger, f"{MODEL}@v0.1.0", SHIPPED)["digest"]["sha256"]
    assert files.sha256(ledger.root / paths.CHAMPION_MODEL) == first
    decision, _ = opened(ledger.root).record()
    assert (decision.version, decision.replaces) == ("v0.3.0", "v0.1.0")
    assert holds(ledger)


def test_the_model_that_went_is_refused_until_it_is_put_back_by_name(ledger: Ledger) -> None:
    back(ledger)
    assert ledger.decide(2).failed == ("rolled_back",)
    assert back(ledger, "v0.2.0").version == "v0.2.0"
    ledger.decide(3)
    assert ledger.decide(2, wrong=11).outcome == "promoted"
    assert holds(ledger)


@pytest.mark.parametrize("what", ["cache", "verdict", "tag"])
def test_what_is_damaged_stays_out_and_nothing_moves(what: str, ledger: Ledger) -> None:
    if what == "cache":
        flip(ledger.cached(output(ledger, f"{MODEL}@v0.1.0", SHIPPED)["annotations"]["md5"]))
    elif what == "verdict":
        flip(loose(ledger, f"{MODEL}@v0.1.0:verdict.json"))
    else:
        ledger.git("update-ref", f"refs/tags/{MODEL}@v0.1.0", "registry")
    before = refs(ledger)
    with pytest.raises(RegistryError):
        back(ledger)
    assert refs(ledger) == before


def test_the_sentence_names_what_is_damaged(ledger: Ledger) -> None:
    flip(ledger.cached(output(ledger, f"{MODEL}@v0.1.0", SHIPPED)["annotations"]["md5"]))
    with pytest.raises(RegistryError, match=rf"v0\.1\.0 stays out of production: {SHIPPED} of .*expected SHA-256"):
        back(ledger)


def test_changes_in_the_working_copy_do_not_hinder_it(ledger: Ledger) -> None:
    (ledger.root / "data/raw/cat/0.png").write_bytes(b"new")
    (ledger.root / SHIPPED).write_bytes(b"new")
    assert back(ledger).version == "v0.1.0"


def test_a_model_that_does_not_meet_its_golden_outputs_stays_out(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.decide(1, golden=7)
    ledger.decide(2)
    assert holds(ledger)
    before = refs(ledger)
    with pytest.raises(RegistryError, match=r"v0\.1\.0 does not run here as it was recorded: golden_difference"):
        back(ledger)
    assert refs(ledger) == before


def test_there_must_be_something_to_go_back_to(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    with pytest.raises(RegistryError, match="has no version in production"):
        back(ledger)
    ledger.decide(1)
    with pytest.raises(RegistryError, match="no version before it"):
        back(ledger)
    with pytest.raises(RegistryError, match="in production already"):
        back(ledger, "v0.1.0")
    with pytest.raises(RegistryError, match=r"v0\.9\.0.*v0\.1\.0"):
        back(ledger, "v0.9.0")


def test_the_command_says_what_it_did(ledger: Ledger) -> None:
    said = ledger.weighin("rollback", "--reason", "wrong at night")
    assert said == f"decision: rolled back {MODEL} from v0.2.0 to v0.1.0\n"
    record = json.loads(ledger.weighin("rollback", "v0.2.0", "--reason", "was right", "--json"))
    assert (record["version"], record["reason"]) == ("v0.2.0", "was right")
    ledger.weighin("rollback", "v0.2.0", "--reason", "again", status=1)


def test_with_a_remote_it_goes_there_too(shared: Ledger) -> None:
    back(shared)
    bare = shared.root.parent / "bare"
    assert call(bare, "git", "rev-parse", BRANCH) == shared.git("rev-parse", "registry")
    assert call(bare, "git", "rev-parse", f"{MODEL}#production#3^{{}}") == shared.git(
        "rev-parse", f"{MODEL}@v0.1.0^{{}}"
    )
    assert holds(shared, remote=True)


def test_somebody_else_can_do_it_who_has_no_artifacts(shared: Ledger, tmp_path: Path) -> None:
    other = shared.clone(tmp_path / "clone")
    decision = back(other)
    assert (decision.by, decision.version) == ("Grace <grace@example.org>", "v0.1.0")
    assert back(shared, "v0.2.0").previous == other.git("rev-parse", "registry")
    assert holds(shared, remote=True)


def meanwhile(shared: Ledger, other: Ledger) -> None:
    """Take what `other` has decided from the remote again, until the next push is about to be accepted."""
    bare = shared.root.parent / "bare"
    before = shared.git("rev-parse", "registry")
    known = shared.git("for-each-ref", "--format=%(refname)", "refs/tags").split()
    lines = call(bare, "git", "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    new = [line.split(" ") for line in lines if line.split(" ")[0] not in (*known, "refs/heads/main")]
    script = ["#!/bin/sh", "test -e late && exit 0", "touch late", "unset GIT_QUARANTINE_PATH"]
    for ref, name in new:
        script.append(f"git update-ref '{ref}' {name}")
        call(bare, "git", "update-ref", f"refs/waiting/{name}", name)
        call(bare, "git", "update-ref", *([ref, before] if ref == BRANCH else ["-d", ref]))
    hook = bare / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("\n".join(script) + "\n")
    hook.chmod(stat.S_IRWXU)


def test_a_promotion_by_somebody_else_meanwhile_stops_it(shared: Ledger, tmp_path: Path) -> None:
    other = shared.clone(tmp_path / "clone")
    other.decide(3)
    meanwhile(shared, other)
    said: list[str] = []
    with pytest.raises(RegistryError, match="another version of classifier came into production meanwhile"):
        back(shared, said=said)
    assert any("reached the registry first" in one for one in said)
    assert shared.git("rev-parse", "registry") == other.git("rev-parse", "registry")
    assert holds(shared, remote=True)


def test_a_refusal_meanwhile_does_not(shared: Ledger, tmp_path: Path) -> None:
    other = shared.clone(tmp_path / "clone")
    other.decide(3, wrong=150)
    meanwhile(shared, other)
    said: list[str] = []
    decision = back(shared, said=said)
    assert any("reached the registry first" in one for one in said)
    assert decision.previous == other.git("rev-parse", "registry")
    assert holds(shared, remote=True)


def lose(ledger: Ledger, name: str) -> None:
    """A git object is gone."""
    path = loose(ledger, name)
    path.chmod(stat.S_IWUSR | stat.S_IRUSR)
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda ledger: lose(ledger, f"{MODEL}@v0.1.0^{{}}:verdict.json"),
        lambda ledger: lose(ledger, f"{MODEL}@v0.1.0^{{}}:decision.json"),
        lambda ledger: lose(ledger, f"{MODEL}@v0.1.0^{{}}:bundle.sig"),
        lambda ledger: ledger.git("tag", "-d", f"{MODEL}@v0.1.0"),
        lambda ledger: flip(ledger.cached(output(ledger, f"{MODEL}@v0.1.0^{{}}", SHIPPED)["annotations"]["md5"])),
    ],
    ids=["verdict", "decision", "signature", "tag", "artifact"],
)
def test_damage_of_decisions_before_the_target_does_not_keep_it_out(longer: Ledger, damage: Callable[..., Any]) -> None:
    """An emergency needs what holds: the chain from the newest decision back to the target, and the target."""
    damage(longer)
    said: list[str] = []
    decision = back(longer, "v0.2.0", said)
    assert (decision.version, decision.replaces) == ("v0.2.0", "v0.3.0")
    assert longer.git("rev-parse", f"{MODEL}#production#4^{{}}") == longer.git("rev-parse", f"{MODEL}@v0.2.0^{{}}")
    assert audit(longer.root, MODEL, ALL).damage
    told = any(line.startswith("DAMAGE elsewhere in the registry") for line in said)
    assert told == bool(audit(longer.root, MODEL).damage)  # the artifacts of others are not read


@pytest.mark.parametrize("version", ["v0.2.0", "v0.3.0"], ids=["target", "between"])
def test_damage_of_the_target_or_of_the_chain_above_it_keeps_it_out(longer: Ledger, version: str) -> None:
    lose(longer, f"{MODEL}@{version}^{{}}:decision.json")
    tip = longer.git("rev-parse", "registry")
    with pytest.raises(RegistryError, match=r"does not hold|no version|nothing to roll back"):
        back(longer, "v0.2.0")
    assert longer.git("rev-parse", "registry") == tip


def test_damage_elsewhere_keeps_a_new_version_out(ledger: Ledger) -> None:
    """A promotion is no emergency: it stands on the whole chain."""
    lose(ledger, f"{MODEL}@v0.1.0^{{}}:decision.json")
    with pytest.raises(RegistryError, match="does not hold"):
        ledger.decide(3)
