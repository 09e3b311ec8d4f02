"""A backbone that the stages after fine-tuning cannot take is refused before hours are spent on it, in one sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Repository, load_bench
from ruamel.yaml import YAML

from flows import rehearsal
from tasks.core import config
from tasks.core.errors import StageError
from tasks.nets import backbone

CHANNELS = {"blocks": None, "channels": {"ratio": 0.5, "multiple": 8}}


def lay(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, name: str, prune: dict[str, Any], budget: bool = False
) -> None:
    """The plan for the backbone, in the repository, where this process works from then on."""
    repository.params(finetune={"backbone": name, "image_size": 64})
    path, yaml = repository.root / "params.yaml", YAML(typ="safe")
    content = yaml.load(path)
    yaml.dump(content | ({} if budget else {"compress": None, "prune": content["prune"] | prune}), path)
    (repository.root / "data").mkdir(exist_ok=True)
    shutil.copy(ROOT / "data/device.json", repository.root / "data")
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rehearse(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, name: str, prune: dict[str, Any], budget: bool = False
) -> list[str]:
    """What is said of the plan for the backbone."""
    lay(repository, monkeypatch, name, prune, budget)
    told: list[str] = []
    with rehearsal.rehearse(config.load(Path("params.yaml")), told.append, budget):
        pass
    return told


@pytest.mark.parametrize(
    ("name", "prune", "told"),
    [
        (
            "cs3darknet_focus_s",
            CHANNELS,
            r"its channels cannot be removed \(.*\): set prune.channels to null, or ",
        ),
        ("mixnet_s", CHANNELS, r"its channels cannot be removed \(.*\): set prune.channels to null, or "),
        ("convnext_atto", CHANNELS, r"its channels cannot be removed \(.*\): set prune.channels to null, or "),
        ("lambda_resnet26t", CHANNELS, r"it cannot be made \(RuntimeError: .* rank 4 .*\): choose another backbone"),
        ("resnet18", {"blocks": {"remove": 9}, "channels": None}, r"^prune.blocks.remove is 9, but resnet18 has \d"),
        ("halonet_h1", CHANNELS, r"^finetune.image_size 64 does not suit halonet_h1: \S"),
        ("resnet99", CHANNELS, "'resnet99' is neither a timm model nor .*; close ones: "),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_backbone_that_does_not_suit_is_one_sentence(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, name: str, prune: dict[str, Any], told: str
) -> None:
    """In this process, as the process of its own takes five seconds to start; others here go through that."""
    lay(repository, monkeypatch, name, prune)
    with pytest.raises(StageError, match=told) as error:
        rehearsal.main(budget=False)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_backbone_with_which_pruning_comes_to_no_end_is_one_sentence(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "LIMIT_S", 25.0)
    told = "^finetune.backbone 'ecaresnet26t' does not suit, as its channels .* within 25 s.*: .*another"
    with pytest.raises(StageError, match=told):
        rehearse(repository, monkeypatch, "ecaresnet26t", CHANNELS)


def test_a_budget_for_a_backbone_that_the_table_lacks_is_one_sentence(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match=r"the device's table has no .*: `weighin profile` measures"):
        rehearse(repository, monkeypatch, "resnet18", {}, budget=True)


def test_what_has_gone_well_is_not_tried_again_until_it_changes(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["trying the plan on an untrained resnet10t"]
    assert rehearse(repository, monkeypatch, "resnet10t", CHANNELS) == told
    assert rehearse(repository, monkeypatch, "resnet10t", CHANNELS) == []
    with pytest.raises(StageError, match=r"^prune.blocks.remove is 99"):
        rehearse(repository, monkeypatch, "resnet10t", CHANNELS | {"blocks": {"remove": 99}})


def test_what_fails_beside_the_trial_ends_it(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(repository, monkeypatch, "ecaresnet26t", CHANNELS)
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    with (
        pytest.raises(StageError, match="the source is empty"),
        rehearsal.rehearse(config.load(Path("params.yaml")), lambda _: None, budget=False),
    ):
        assert {one.pid for one in psutil.Process().children(recursive=True)} > before
        raise StageError("the source is empty")
    assert {one.pid for one in psutil.Process().children(recursive=True)} == before


def test_the_networks_of_our_own_need_no_trial(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(rehearsal.OWN) == set(backbone.CLASSICS)
    assert rehearse(repository, monkeypatch, "mlp", CHANNELS) == []


def test_the_bench_of_backbones_goes_on_where_it_was(tmp_path: Path) -> None:
    report = tmp_path / "backbones.jsonl"
    command = [sys.executable, str(ROOT / "tests/bench/backbones.py"), "--only", "hardcorenas", "--report", str(report)]
    done = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert done[0].stdout == done[1].stdout
    (row,) = map(json.loads, report.read_text().splitlines())
    assert (row["module"], row["suits"]) == ("hardcorenas", "with half of its channels")


@pytest.mark.parametrize(
    ("refusal", "clear"),
    [
        ("finetune.backbone 'net_a' does not suit, as it cannot be made (KeyError: x): choose another backbone", True),
        ("finetune.image_size 224 does not suit net_a: ", False),
        ("finetune.backbone 'net_a' does not suit, as \x1b[96mthis\x1b[0m failed", False),
        ("finetune.backbone 'net_b' does not suit", False),
        ("Traceback (most recent call last): net_a", False),
    ],
)
def test_a_clear_refusal_names_the_network_and_a_reason(refusal: str, clear: bool) -> None:
    assert load_bench("backbones").is_clear(refusal, "net_a") is clear
