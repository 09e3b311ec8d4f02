"""Old registries, made by the code of their day: today's code audits them, goes on with them and goes back in them."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from archive import RECORDS, fingerprint, newest_fingerprint, open_record
from ledger import GATE, OUTS, Ledger, call, look, opened
from ruamel.yaml import YAML

from flows.registry import judges, keys, lineage
from flows.registry.audit import ALL, audit
from flows.registry.findings import Report
from flows.registry.reproduce import reproduce
from tasks import gate
from tasks.core import paths
from tasks.core.errors import RegistryError

NAME = "mlp-digits"
FIRST_DAYS = ("40a8c8b", "7b43fbf", "cf50a27")
pytestmark = pytest.mark.usefixtures("own_git")


@pytest.fixture(params=RECORDS)
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return open_record(request.param, tmp_path / request.param)


def run_audit(root: Path) -> Report:
    return audit(root, NAME, ALL, working_copy=False)


def trust_new_key(root: Path) -> None:
    """A key of one's own, whose line is reviewed and committed: the private one of then is not in the record.

    Where none is trusted yet, the first one enters itself.
    """
    if not keys.trusted_keys(root):
        return
    try:
        keys.current(root, datetime.now(UTC), lambda _: None, first=False)
    except RegistryError as error:
        line = str(error).rsplit("reviewed: ", 1)[1]
        path = root / keys.TRUSTED
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + line + "\n")
        call(root, "git", "add", str(keys.TRUSTED))
        call(root, "git", "commit", "--quiet", "--message", "Trust the key")


def lay_challenger(root: Path, seed: int) -> None:
    """A model of today, judged by the gate of today against the champion that the record has in production."""
    ledger = Ledger(root)
    outs = [path.as_posix() for path in OUTS]
    ledger.write("dvc.yaml", json.dumps({"stages": {"build": {"cmd": "true", "outs": outs}, "gate": GATE}}).encode())
    shutil.rmtree(root / "tasks")
    ledger.write("tasks/stage.py", b"print('code')\n")
    for index in range(3):
        ledger.write(f"data/raw/cat/{index}.png", b"no image, which nobody looks at")
    ledger.params(name=NAME, bootstrap=False)
    if not (root / paths.DEVICE).exists():
        ledger.write(paths.DEVICE, b'{"latency_ms": []}\n')
    ledger.prepare()
    opened(root, NAME).lay_splits(None, is_current=False)
    shutil.copy(root / paths.KNOWN_SPLITS, root / paths.LEDGER)  # as ingest would, of images that are known already
    ledger.commit("An upgrade")
    ledger.lay(seed, name=NAME)


def test_what_was_recorded_then_holds_today(record: Path) -> None:
    report = run_audit(record)
    assert report.damage == []
    assert report.unjudged == 0
    lacking = {one.file for one in report.unchecked}
    first_days = record.name in FIRST_DAYS
    assert lacking == ({"the commit's signature", "provenance.json"} if first_days else set())
    assert report.decisions == (3 if first_days else 4 if record.name == "4cf5bde" else 6)


def test_it_goes_back_to_another_version(record: Path) -> None:
    trust_new_key(record)
    production = look(record, NAME).standing.production
    assert production
    target = "v0.1.0" if production.decision.version != "v0.1.0" else "v0.2.0"
    decision = opened(record, NAME).roll_back(target, "wrong at night")
    assert (decision.outcome, decision.version) == ("rolled-back", target)
    assert decision.replaces == production.decision.version
    report = run_audit(record)
    assert report.damage == []
    now = look(record, NAME).standing
    assert now.production and now.production.decision.version == target
    assert production.decision.model_sha256 in now.withdrawn


def test_a_challenger_of_today_faces_its_champion_and_is_promoted(record: Path) -> None:
    before = look(record, NAME).standing
    assert before.production
    lay_challenger(record, 7)
    trust_new_key(record)
    decision, new = opened(record, NAME).record()
    assert (new, decision.outcome, decision.version) == (True, "promoted", before.next_version)
    assert decision.replaces == before.production.decision.version
    champion = json.loads((record / paths.CHAMPION_RECORD).read_text())
    assert champion["model_sha256"] == before.production.decision.model_sha256
    assert run_audit(record).damage == []
    back = opened(record, NAME).roll_back(None, "worse than before")
    assert back.version == before.production.decision.version
    assert run_audit(record).damage == []


def test_it_shows_the_lineage_of_each_version(record: Path) -> None:
    for version, link in look(record, NAME).standing.promotions.items():
        (step,) = lineage.backward(record, NAME, version)
        assert step["model_sha256"] == link.decision.model_sha256
        assert step["params"]["finetune"]["backbone"] == "mlp"
        assert paths.onnx("reduce").as_posix() in step["artifacts"]
        assert bool(step["sources"]) == (record.name not in FIRST_DAYS)
    source = next((record / "data/raw/digits").iterdir()).relative_to(record)
    rows = lineage.forward(record, source)
    assert bool(rows) == (record.name not in FIRST_DAYS)


def test_a_first_day_that_was_tampered_with_is_found(tmp_path: Path) -> None:
    """Nobody signed it, but its files name each other."""
    root = open_record("cf50a27", tmp_path / "record")
    cached = next(path for path in sorted((root / ".dvc/cache/files/md5").rglob("*")) if path.is_file())
    cached.chmod(0o644)
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    assert [one.scope for one in run_audit(root).damage] == ["artifact"] * len(run_audit(root).damage) != []


def test_unsigned_decisions_have_no_say_once_a_key_is_trusted(tmp_path: Path) -> None:
    """Else whoever can write to the branch could put a weaker champion up, by forgetting to sign."""
    root = open_record("cf50a27", tmp_path / "record")
    keys.current(root, datetime.now(UTC), lambda _: None, first=True)
    with pytest.raises(RegistryError, match=r"does not hold: the commit is not signed"):
        look(root, NAME)
    assert [one.file for one in run_audit(root).damage] == ["the commit's signature"] * 3


def test_a_first_day_says_that_it_cannot_be_made_again(tmp_path: Path) -> None:
    root = open_record("cf50a27", tmp_path / "record")
    with pytest.raises(RegistryError, match="of the first days, when neither code nor sources were recorded"):
        reproduce(root, NAME, "v0.1.0")


def test_a_version_of_before_the_upgrade_is_made_again(tmp_path: Path) -> None:
    """By its own code, on the packages of today."""
    root = open_record("3c445ea", tmp_path / "record")
    result = reproduce(root, NAME, "v0.1.0", lambda _: None)
    assert result.holds
    assert result.top1_reproduced == pytest.approx(result.top1_recorded, abs=result.tolerance)


def test_a_key_of_params_yaml_that_nobody_knows_any_more_breaks_nothing(tmp_path: Path) -> None:
    """What was recorded is read by what the registry needs of it."""
    from flows.registry.parameters import read_recorded

    root = open_record("3c445ea", tmp_path / "record")
    yaml = YAML(typ="safe")
    content = yaml.load((root / "params.yaml").read_text())
    content["finetune"]["gone"] = content.pop("compress")
    content["quantize"] = {"renamed": 3}
    recorded = read_recorded(json.dumps(content).encode(), "params.yaml")
    assert recorded.classes == tuple(content["classes"])


def test_verdicts_of_today_may_be_recorded_and_those_of_before_stay_so() -> None:
    assert set(judges.VERDICTS[2]) >= {3, gate.SCHEMA_VERSION}
    assert set(judges.VERDICTS[1]) == {2, 3}


def test_every_schema_has_a_record() -> None:
    """Whoever changes what is recorded makes a record of it: see tests/records/README.md."""
    assert newest_fingerprint() == (RECORDS[-1], fingerprint())
