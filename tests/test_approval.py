"""Approval: what passes is held until somebody puts their name to it, and is audited and run before it goes."""

import json
from pathlib import Path

import forgery
import pytest
from ledger import MODEL, Ledger, opened, production

from flows.registry import materials
from flows.registry.audit import ALL, audit
from tasks.core import paths
from tasks.core.errors import RegistryError


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A first model that passed and is held."""
    made = Ledger.begin(tmp_path / "project", bootstrap=True, approval=True)
    assert made.decide(1).outcome == "held"
    return made


def holds(ledger: Ledger) -> bool:
    return audit(ledger.root, MODEL, ALL).findings == []


def test_what_is_held_is_not_in_production_until_it_is_approved(ledger: Ledger) -> None:
    assert production(ledger.root) is None
    assert ledger.git("tag") == ""
    assert opened(ledger.root).record()[1] is False
    decision = opened(ledger.root).approve("field test")
    assert (decision.outcome, decision.version, decision.replaces) == ("approved", "v0.1.0", None)
    assert (decision.reason, decision.by) == ("field test", "Ada <ada@example.org>")
    assert production(ledger.root) == decision
    assert ledger.git("tag").split() == ["classifier#production#1", "classifier@v0.1.0"]
    assert opened(ledger.root).record() == (decision, False)
    assert holds(ledger)


def test_an_approved_version_is_the_next_champion_and_can_be_gone_back_to(ledger: Ledger) -> None:
    first = opened(ledger.root).approve("good")
    assert ledger.decide(2).outcome == "held"
    assert json.loads((ledger.root / paths.CHAMPION_RECORD).read_text())["version"] == first.version
    assert ledger.decide(3, wrong=90).outcome == "refused"
    with pytest.raises(RegistryError, match="the latest decision on classifier holds nothing"):
        opened(ledger.root).approve("too late")
    assert ledger.decide(4).outcome == "held"
    assert opened(ledger.root).approve("good").replaces == first.version
    assert opened(ledger.root).roll_back(None, "bad").version == first.version
    assert holds(ledger)


def test_what_does_not_hold_is_not_approved(ledger: Ledger) -> None:
    before = ledger.git("for-each-ref")
    lock = (ledger.root / "dvc.lock").read_text()
    name = paths.weights("finetune")

    md5 = next(out["md5"] for _, out in materials.read_lock(lock.encode()) if out["path"] == name.as_posix())
    ledger.cached(md5).write_bytes(b"another")
    with pytest.raises(RegistryError, match=f"stays out of production: {name} of"):
        opened(ledger.root).approve("good")
    assert ledger.git("for-each-ref") == before


def test_approvals_may_begin_later(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project", bootstrap=True)
    ledger.decide(1)
    ledger.params(bootstrap=True, approval=True)
    ledger.commit("Approvals from now on")
    assert ledger.decide(2).outcome == "held"
    assert holds(ledger)


def test_the_audit_finds_a_promotion_that_went_without_its_approval(ledger: Ledger) -> None:
    def talk_round(_: Ledger, contents: dict[str, bytes]) -> None:
        decision = json.loads(contents["decision.json"]) | {"outcome": "promoted", "version": "v0.1.0"}
        contents["decision.json"] = json.dumps(decision).encode()

    forgery.remake(ledger, {0: talk_round}, forgery.own(ledger))
    found = audit(ledger.root, MODEL, ALL).findings
    assert any(one.file == "decision.json" and "gate.approval" in one.expected for one in found)


def test_the_command_line_tells_and_ends_with_4_or_0(ledger: Ledger) -> None:
    assert "latest decision: held" in ledger.weighin("status")
    assert ledger.weighin("approve", "--reason", "good") == "decision: approved classifier v0.1.0\n"
    assert json.loads(ledger.weighin("status", "--json"))["production"]["outcome"] == "approved"
    assert "# classifier v0.1.0" in ledger.git("show", "registry:README.md")
    assert "Reason: good" in ledger.git("show", "registry:README.md")
