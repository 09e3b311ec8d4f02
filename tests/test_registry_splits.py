"""The splits of earlier runs: what the registry lays for ingest, what it refuses to record, and what an audit finds."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger import Ledger, opened

from flows.registry.audit import ALL, audit
from flows.registry.findings import Report
from tasks.core import files, paths
from tasks.core.errors import RegistryError
from tasks.images import ledger as splits

pytestmark = pytest.mark.usefixtures("own_git")
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, own_git: None) -> Ledger:
    """One promotion, whose run had A in train and B in test."""
    made = Ledger.begin(tmp_path_factory.mktemp("begun") / "project", bootstrap=True)
    made.know(**{A: "train", B: "test"})
    rows = [{"path": "1.png", "sha256": C, "pixels_sha256": A, "split": "train"}]
    pq.write_table(pa.Table.from_pylist(rows), made.root / paths.MANIFEST)
    made.decide(1)
    return made


@pytest.fixture
def project(begun: Ledger, tmp_path: Path) -> Ledger:
    """A copy of it."""
    return Ledger(shutil.copytree(begun.root, tmp_path / "project"))


def laid_splits(project: Ledger) -> dict[str, str]:
    return by_split(splits.read(project.root / paths.KNOWN_SPLITS))


def by_split(known: pa.Table) -> dict[str, str]:
    return {row["pixels_sha256"]: row["split"] for row in known.to_pylist()}


def lay(project: Ledger, other: str | None = None, *, is_current: bool = False) -> bool:
    return opened(project.root).lay_splits(other, is_current=is_current)


def run_audit(project: Ledger) -> Report:
    return audit(project.root, "classifier", ALL)


def test_without_any_decision_nothing_is_known(tmp_path: Path) -> None:
    project = Ledger.begin(tmp_path / "project")
    assert lay(project)
    assert laid_splits(project) == {}


def test_ingest_gets_what_the_newest_run_knew(project: Ledger) -> None:
    project.know(**{A: "train", B: "test", C: "val"})
    project.decide(2, wrong=150)  # a refusal has used its images, too
    assert lay(project)
    assert laid_splits(project) == {A: "train", B: "test", C: "val"}


def test_a_rollback_forgets_no_image(project: Ledger) -> None:
    project.know(**{A: "train", B: "test", C: "val"})
    project.decide(2, wrong=5)
    opened(project.root).roll_back(None, "it fails in the field")
    lay(project)
    assert laid_splits(project) == {A: "train", B: "test", C: "val"}


def test_an_ingest_that_is_current_and_knows_all_need_not_run(project: Ledger) -> None:
    assert not lay(project, is_current=True)
    project.know(**{A: "train", B: "test", C: "val"})
    assert not lay(project, is_current=True)
    assert not (project.root / paths.KNOWN_SPLITS).exists()


def test_an_ingest_that_is_current_and_lacks_an_image_runs_again(project: Ledger) -> None:
    project.know(**{A: "train"})
    assert lay(project, is_current=True)
    project.know(**{A: "train", B: "train"})
    assert lay(project, is_current=True)
    assert laid_splits(project) == {A: "train", B: "test"}


def test_images_of_the_model_that_training_starts_with_count_too(project: Ledger) -> None:
    project.params(name="ancestor", bootstrap=True)
    project.know(**{B: "train", C: "train"})
    project.decide(5, name="ancestor")
    assert lay(project, "ancestor")
    assert laid_splits(project) == {A: "train", B: "excluded", C: "train"}
    project.params()
    lay(project)
    assert laid_splits(project) == {A: "train", B: "test"}


def test_an_older_decision_is_known_by_its_manifest(tmp_path: Path) -> None:
    project = Ledger.begin(tmp_path / "project", bootstrap=True)
    rows = [{"pixels_sha256": A, "split": "train"}, {"pixels_sha256": B, "split": None}]
    pq.write_table(pa.Table.from_pylist(rows), project.root / paths.MANIFEST)
    (project.root / paths.LEDGER).unlink()
    project.decide(1)
    lay(project)
    assert laid_splits(project) == {A: "train"}


def test_a_ledger_that_cannot_be_had_stops_the_run_by_name(project: Ledger) -> None:
    shutil.rmtree(project.root / ".dvc/cache/files")
    with pytest.raises(RegistryError, match=r"data/prepared/ledger\.parquet of classifier@v0\.1\.0 cannot be brought"):
        lay(project)
    assert not (project.root / paths.KNOWN_SPLITS).exists()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({A: "test", B: "test"}, "was in train and is in test"),
        ({A: "train", B: "train"}, "was in test and is in train"),
        ({B: "test"}, "was in train and is gone"),
    ],
)
def test_a_run_that_did_not_know_the_splits_is_not_recorded(project: Ledger, now: dict[str, str], said: str) -> None:
    project.know(**now)
    project.lay(2, wrong=5)
    before = project.git("rev-parse", "registry")
    with pytest.raises(RegistryError, match=f"classifier@v0.1.0 has put images into splits .*{said}.*: run again"):
        opened(project.root).record()
    assert project.git("rev-parse", "registry") == before


def test_an_audit_of_all_finds_an_image_that_moved(project: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_audit(project).damage == []
    project.know(**{A: "test", B: "test"})
    monkeypatch.setattr("flows.registry.splits.require_grown", lambda *_: None)
    project.decide(2, wrong=5)
    (found,) = run_audit(project).damage
    assert (found.decision, found.file) == ("classifier@v0.2.0", "data/prepared/ledger.parquet")
    assert found.found == f"1 that are not, the first: the image with pixels {A[:12]} was in train and is in test"


def forget(project: Ledger, path: Path) -> None:
    """Remove a file of the working copy from DVC's cache."""
    project.cached(files.md5(project.root / path)).unlink()


def test_an_audit_holds_without_files_that_had_to_go_with_an_erased_image(project: Ledger) -> None:
    forget(project, paths.TRAIN)
    assert [one.file for one in run_audit(project).damage] == ["data/prepared/train.parquet"]
    project.write(paths.TRAIN, b"others")
    project.know(**{A: "erased", B: "test"})
    project.decide(2, wrong=5)
    report = run_audit(project)
    assert report.damage == []
    assert report.erased == [
        "classifier@v0.1.0: data/prepared/train.parquet is gone, and held 1 image erased on request"
    ]
    assert "classifier@v0.1.0: data/prepared/train.parquet is gone" in project.weighin("audit", "--all", "--strict")


@pytest.mark.parametrize("here", ["gone", "damaged"])
def test_a_ledger_that_is_at_the_remote_only_counts_where_the_remote_is_asked(
    project: Ledger, tmp_path: Path, here: str
) -> None:
    project.share(tmp_path / "bare", tmp_path / "store")
    forget(project, paths.TRAIN)
    project.write(paths.TRAIN, b"others")
    project.know(**{A: "erased", B: "test"})
    project.decide(2, wrong=5)
    forget(project, paths.LEDGER)
    if here == "damaged":
        project.cached(files.md5(project.root / paths.LEDGER)).write_bytes(b"others")
    (shipped,) = (tmp_path / "store").rglob(files.md5(project.root / paths.LEDGER)[2:])
    assert shipped.is_file()
    without, there = (audit(project.root, "classifier", ALL, remote) for remote in (None, "origin"))
    assert "data/prepared/train.parquet" in [one.file for one in without.damage]
    assert len(there.erased) == 1
    assert "data/prepared/train.parquet" not in [one.file for one in there.damage]
    shipped.chmod(0o644)
    shipped.write_bytes(b"others")
    assert audit(project.root, "classifier", ALL, "origin").erased == []


def test_an_erased_image_excuses_no_other_file(project: Ledger) -> None:
    for path in (paths.TRAIN, paths.VAL):
        forget(project, path)
        project.write(path, b"others")
    project.know(**{A: "erased", B: "test"})
    project.decide(2, wrong=5)
    report = run_audit(project)
    assert [one.file for one in report.damage] == ["data/prepared/val.parquet"]
    assert len(report.erased) == 1


def test_what_an_earlier_run_had_excuses_nothing_of_a_later_one(project: Ledger) -> None:
    """The ledger of the second run has the image still, but not its files."""
    project.prepare()
    project.write(paths.TRAIN, b"of the second run")
    project.know(**{A: "train", B: "test"})
    project.decide(2, wrong=5)
    forget(project, paths.TRAIN)
    project.write(paths.TRAIN, b"of the third run")
    project.know(**{A: "erased", B: "test"})
    project.decide(3, wrong=5)
    report = run_audit(project)
    assert [(one.decision, one.file) for one in report.damage] == [("classifier@v0.2.0", "data/prepared/train.parquet")]
    assert report.erased == []
