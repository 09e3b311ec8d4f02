"""Lineage: from a version to what it was made of, and from a file to the models that saw it."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import png
from forgery import flip, output
from ledger import MODEL, Ledger, opened

from flows.registry import lineage
from tasks.core import files, paths
from tasks.core.errors import RegistryError

RAW = "data/raw/cat/0.png"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory, own_git: None) -> Iterator[Ledger]:
    """v0.1.0; v0.2.0, warmed from it; v0.3.0, warmed from that, with another image; a refusal; a rollback."""
    made = Ledger.begin(tmp_path_factory.mktemp("lineage") / "project")
    made.decide(1)
    made.decide(2, weights=warm_start(made, "v0.1.0"))
    made.write("data/raw/cat/new.png", png(99, 8))
    made.prepare()
    made.commit("Another image")
    made.decide(3, weights=warm_start(made, "v0.2.0"))
    made.decide(4, wrong=150)
    opened(made.root).roll_back(None, "wrong at night")
    yield made


def warm_start(ledger: Ledger, version: str) -> dict[str, str]:
    sha256 = output(ledger, f"{MODEL}@{version}", paths.weights("finetune").as_posix())["digest"]["sha256"]
    return {"source": "production", "model": MODEL, "version": version, "sha256": sha256}


def test_backward_leads_to_the_first_model_by_way_of_the_weights(ledger: Ledger) -> None:
    steps = lineage.backward(ledger.root, MODEL, "v0.3.0")
    assert [step["version"] for step in steps] == [f"{MODEL}@v0.{minor}.0" for minor in (3, 2, 1)]
    assert [step["weights"]["source"] for step in steps] == ["production", "production", "none"]
    for step, before in itertools.pairwise(steps):
        assert step["weights"]["sha256"] == before["artifacts"][paths.weights("finetune").as_posix()]
    assert len(lineage.backward(ledger.root, MODEL, "v0.1.0")) == 1


def test_backward_names_code_parameters_data_and_artifacts(ledger: Ledger) -> None:
    (step,) = lineage.backward(ledger.root, MODEL, "v0.1.0")
    commit = ledger.git("rev-list", "--max-parents=0", "main")
    assert step["code"] == {"commit": commit, "dirty": False}
    assert step["commit"] == ledger.git("rev-parse", f"{MODEL}@v0.1.0^{{}}")
    assert step["params"]["gate"]["min_top1"] == 0.6
    assert step["sources"] == {
        f"data/raw/cat/{index}.png": files.sha256(ledger.root / f"data/raw/cat/{index}.png") for index in range(3)
    }
    record = json.loads(ledger.git("show", f"{MODEL}@v0.1.0:decision.json"))
    assert step["artifacts"][paths.onnx("reduce").as_posix()] == step["model_sha256"] == record["model_sha256"]
    assert step["artifacts"][paths.TEST.as_posix()] == step["data_sha256"] == record["data_sha256"]
    assert step["created"] == record["created"]


def test_an_unknown_version_is_told(ledger: Ledger) -> None:
    with pytest.raises(RegistryError, match=rf"{MODEL}@v0\.9\.0"):
        lineage.backward(ledger.root, MODEL, "v0.9.0")
    assert ledger.weighin("lineage", "v0.9.0", status=1) == ""


def decisions(rows: list[dict[str, str]]) -> list[str]:
    return [row["decision"].split(" (")[0] for row in rows]


def test_forward_leads_to_every_model_that_saw_a_file_newest_first(ledger: Ledger) -> None:
    rows = lineage.forward(ledger.root, Path(RAW))
    versions = [f"{MODEL}@v0.{minor}.0" for minor in (3, 2, 1)]
    assert decisions(rows) == [f"{MODEL} refusal", *versions]
    assert [row["outcome"] for row in rows] == ["refused", *["promoted"] * 3]
    assert {(row["path"], row["split"]) for row in rows} == {("cat/0.png", "train")}


def test_forward_leaves_out_the_models_before_the_file(ledger: Ledger) -> None:
    assert decisions(lineage.forward(ledger.root, Path("data/raw/cat/new.png"))) == [
        f"{MODEL} refusal",
        f"{MODEL}@v0.3.0",
    ]


def test_the_same_bytes_under_another_name_count(ledger: Ledger) -> None:
    shutil.copy(ledger.root / RAW, ledger.root / "copy.png")
    rows = lineage.forward(ledger.root, Path("copy.png"))
    assert {row["path"] for row in rows} == {"cat/0.png"}
    assert len(rows) == 4


def test_a_file_that_is_gone_is_found_by_its_path(ledger: Ledger) -> None:
    content = (ledger.root / RAW).read_bytes()
    (ledger.root / RAW).unlink()
    try:
        assert len(lineage.forward(ledger.root, Path(RAW))) == 4
        assert len(lineage.forward(ledger.root, Path("cat/0.png"))) == 4
    finally:
        (ledger.root / RAW).write_bytes(content)


def test_a_file_that_nobody_saw_is_in_no_row(ledger: Ledger) -> None:
    ledger.write("stranger.png", png(1234, 8))
    assert lineage.forward(ledger.root, Path("stranger.png")) == []
    assert "no model" in ledger.weighin("lineage", "stranger.png")


def test_a_folder_is_told(ledger: Ledger) -> None:
    with pytest.raises(RegistryError, match="data/raw is a folder"):
        lineage.forward(ledger.root, Path("data/raw"))


def test_without_a_registry_nothing_saw_the_file(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no branch registry"):
        lineage.forward(Ledger.begin(tmp_path / "project").root, Path(RAW))


def test_the_command_prints_either_way(ledger: Ledger) -> None:
    said = ledger.weighin("lineage", "v0.2.0")
    assert f"{MODEL}@v0.2.0" in said
    assert f"{MODEL}@v0.1.0" in said
    assert RAW in said
    assert len(json.loads(ledger.weighin("lineage", RAW, "--json"))) == 4
    assert [one["version"] for one in json.loads(ledger.weighin("lineage", "v0.1.0", "--json"))] == [f"{MODEL}@v0.1.0"]


def test_a_manifest_that_is_missing_or_damaged_is_told(ledger: Ledger, tmp_path: Path) -> None:
    found = output(ledger, f"{MODEL}@v0.1.0", paths.MANIFEST.as_posix())
    copy = Ledger(shutil.copytree(ledger.root, tmp_path / "copy"))
    path = copy.cached(found["annotations"]["md5"])
    flip(path)
    with pytest.raises(RegistryError, match="not what was recorded"):
        lineage.forward(copy.root, Path(RAW))
    path.unlink()
    with pytest.raises(RegistryError, match="dvc fetch"):
        lineage.forward(copy.root, Path(RAW))


def test_a_file_of_that_name_elsewhere_is_another_file(tmp_path: Path) -> None:
    ledger = Ledger.begin(tmp_path / "project", bootstrap=True)
    ledger.decide(1)
    assert [row["path"] for row in lineage.forward(ledger.root, Path("data/raw/cat/0.png"))] == ["cat/0.png"]
    assert lineage.forward(ledger.root, Path("data/elsewhere/cat/0.png")) == []
