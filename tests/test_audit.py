"""The audit of registries that hold, for whoever asks; what it says; and what it costs."""

import json
import re
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import png
from forgery import flip
from ledger import BIN, FILES, MODEL, Ledger, call, opened

from flows.registry import keys
from flows.registry.audit import ALL, PRODUCTION, audit
from flows.registry.findings import Finding, summarize
from tasks.core import paths
from tasks.core.errors import RegistryError

SHIPPED = paths.onnx("reduce").as_posix()

pytestmark = pytest.mark.usefixtures("own_git")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Two promotions and a refusal, at remotes; tests only read it."""
    base = tmp_path_factory.mktemp("shared")
    ledger = Ledger.begin(base / "project")
    ledger.share(base / "bare", base / "store")
    ledger.decide(1)
    ledger.decide(2)
    ledger.decide(3, wrong=150)
    ledger.commit("Trust the key")
    ledger.git("push", "--quiet", "origin", "main")
    return ledger


@pytest.fixture
def stranger(shared: Ledger, tmp_path: Path) -> Ledger:
    """A clone by someone who has neither the key nor the artifacts."""
    call(tmp_path, "git", "clone", "--quiet", shared.git("remote", "get-url", "origin"), "clone")
    return Ledger(tmp_path / "clone")


def test_what_is_as_it_was_has_no_finding(shared: Ledger) -> None:
    report = audit(shared.root, MODEL, PRODUCTION, "origin")
    assert (report.findings, report.decisions, report.audited) == ([], 3, [f"{MODEL}@v0.2.0"])
    assert summarize(report).startswith("everything holds: 3 decisions")


def test_a_stranger_can_audit_a_fresh_clone(stranger: Ledger) -> None:
    report = json.loads(stranger.weighin("audit", "--all", "--remote", "--json"))
    assert report["findings"] == []
    assert (report["decisions"], len(report["audited"])) == (3, 3)
    assert report["bytes_hashed"] > 0


def test_a_stranger_without_the_artifacts_is_told_which_are_missing(stranger: Ledger) -> None:
    report = json.loads(stranger.weighin("audit", "--json", status=1))
    assert {path.as_posix() for path in FILES} < {one["file"] for one in report["findings"]}
    assert all("dvc fetch" in one["found"] for one in report["findings"])
    assert set(report["findings"][0]) == set(Finding._fields)
    call(stranger.root, str(BIN / "dvc"), "pull", "--quiet")
    stranger.weighin("audit", "v0.2.0", status=1)  # dvc.lock is that of the refusal
    call(stranger.root, str(BIN / "dvc"), "fetch", "--quiet", "--all-commits")
    assert f"{MODEL}@v0.2.0" not in stranger.weighin("audit", "--remote")


def test_findings_are_printed_with_what_was_expected_and_found(stranger: Ledger) -> None:
    (stranger.root / "data/raw/cat/0.png").write_bytes(b"dog")
    said = stranger.weighin("audit", "--remote", status=1)
    assert "data/raw/cat/0.png" in said
    assert "expected SHA-256" in said
    assert "\n1 finding in 3 decisions" in said


def test_only_the_artifacts_of_the_version_are_read(shared: Ledger) -> None:
    for version in ("v0.1.0", "v0.2.0"):
        assert audit(shared.root, MODEL, version, None).audited == [f"{MODEL}@{version}"]


def test_unknown_versions_and_models_are_told(shared: Ledger) -> None:
    with pytest.raises(RegistryError, match=r"v0\.9\.0.*there are.*v0\.1\.0.*v0\.2\.0"):
        audit(shared.root, MODEL, "v0.9.0", None)
    with pytest.raises(RegistryError, match=r"no decision on other; it has decisions on: classifier"):
        audit(shared.root, "other", "v0.1.0", None)


def test_without_a_registry_there_is_nothing_to_audit(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    with pytest.raises(RegistryError, match="nothing has been decided"):
        audit(ledger.root, MODEL, PRODUCTION, None)


def test_models_share_a_branch(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.decide(1)
    opened(ledger.root, "other").record()
    ledger.decide(2)
    for model, version in ((MODEL, "v0.2.0"), ("other", "v0.1.0")):
        report = audit(ledger.root, model, PRODUCTION, None)
        assert (report.findings, report.audited) == ([], [f"{model}@{version}"])
    flip(ledger.root / SHIPPED)
    assert [one.file for one in audit(ledger.root, MODEL, PRODUCTION, None).findings] == [SHIPPED]


def test_what_the_old_key_signed_holds_after_a_rotation_and_no_more(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.decide(1)
    old = (ledger.root / keys.LOCAL).read_bytes()
    keys.rotate(ledger.root, datetime.now(UTC))
    trusted = (ledger.root / keys.TRUSTED).read_bytes()
    ledger.decide(2)
    assert audit(ledger.root, MODEL, ALL, None).findings == []
    (ledger.root / keys.LOCAL).write_bytes(old)
    # The thief extends the old key, signs, and puts the file back as it was.

    (ledger.root / keys.TRUSTED).write_bytes(re.sub(rb',valid-before="\w+"', b"", trusted))
    ledger.decide(3)
    extended = audit(ledger.root, MODEL, ALL, None).findings
    assert {one.file for one in extended} == {str(keys.TRUSTED)}
    assert {one.decision for one in extended} == {f"{MODEL}@v0.2.0"}
    (ledger.root / keys.TRUSTED).write_bytes(trusted)
    found = audit(ledger.root, MODEL, ALL, None).findings
    assert ("the commit's signature", f"{MODEL}@v0.3.0") in {(one.file, one.decision) for one in found}
    assert any("was not valid at" in one.found for one in found)


def test_a_key_that_ends_earlier_takes_what_it_signed_later_along(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.decide(1)
    decision = ledger.decide(2)
    ledger.decide(3)
    end = re.sub("[-:T]", "", decision.created)
    path = ledger.root / keys.TRUSTED
    path.write_text(path.read_text().replace('namespaces="git"', f'namespaces="git",valid-before="{end}"'))
    findings = audit(ledger.root, MODEL, ALL, None).findings
    assert {(one.file, one.decision) for one in findings} == {("the commit's signature", f"{MODEL}@v0.3.0")}


def test_an_artifact_that_decisions_share_is_hashed_once(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.decide(1, padding=1_000_000)
    once = audit(ledger.root, MODEL, ALL, None)
    ledger.decide(1, wrong=150, padding=1_000_000)  # the same weights, judged again
    twice = audit(ledger.root, MODEL, ALL, None)
    assert once.bytes_hashed > 1_000_000
    assert once.bytes_hashed < twice.bytes_hashed < once.bytes_hashed + 500_000


def test_memory_does_not_grow_with_the_artifacts(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project")
    ledger.share(tmp_path / "bare", tmp_path / "store")
    peaks = []
    for seed, size in ((1, 64), (2, 64), (3, 64_000_000)):
        decision = ledger.decide(seed, padding=size)
        tracemalloc.start()
        report = audit(ledger.root, MODEL, str(decision.version), "origin")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.findings == []
    assert report.bytes_hashed > 128_000_000
    assert peaks[2] < peaks[1] + 8_000_000  # a piece is one megabyte


def test_a_model_that_nobody_knows_is_an_error_and_not_sound(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project", bootstrap=True)
    ledger.decide(1)
    with pytest.raises(RegistryError, match="no decision on typo; it has decisions on: classifier"):
        audit(ledger.root, "typo")


def test_new_data_and_a_rollback_are_no_tampering(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project", bootstrap=True)
    ledger.decide(1)
    ledger.write("data/raw/cat/0.png", png(99, 8))
    ledger.prepare()
    ledger.commit("New data")
    ledger.decide(2)
    opened(ledger.root).roll_back(None, "worse")
    assert audit(ledger.root, MODEL).findings == []
