"""The documents are in step with the code: commands, options, targets, recipes and parameters that they name exist."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from flows.cli import app
from tasks import STAGES
from tasks.core import config
from tasks.core.registry import Decision

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_readme_names_every_command_and_no_other() -> None:
    assert set(re.findall(r"`?weighin ([a-z]+)", README)) == set(COMMANDS)


def test_readme_uses_options_that_exist() -> None:
    for command, rest in re.findall(r"weighin ([a-z]+)((?: +[^\n`|#]+)?)", README):
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert set(re.findall(r"(--[a-z-]+)", rest)) <= known, (command, rest)


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (*DOCUMENTS, *(ROOT / "data/recipes").glob("*")):
        if path.is_file():
            assert set(re.findall(r"`make ([a-z]+)", path.read_text())) <= targets, path


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`(?:python )?((?:data|deploy|docs|tasks|flows|tests)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists() or path.startswith(("data/prepared", "data/models", "data/reports")), path


def test_readme_names_every_stage_in_order() -> None:
    positions = [README.index(f"`{name}`") for name in STAGES]
    assert positions == sorted(positions)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_yaml_in_documents_is_made_of_real_parameters(document: Path) -> None:
    shipped = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.S):
        changes = YAML(typ="safe").load(block)
        merged = {name: shipped[name] | new if isinstance(new, dict) else new for name, new in changes.items()}
        config.Params.model_validate(shipped | merged)


def test_keys_that_documents_name_exist() -> None:
    """Such as `prune.weights`, with or without a value."""
    known = {name for name, *_ in config.explained(config.load(ROOT / "params.yaml"))}
    known |= {".".join(name.split(".")[:depth]) for name in known for depth in range(1, 4)}
    for document in DOCUMENTS:
        named = re.findall(r"`((?:" + "|".join(config.fields(config.Params)) + r")\.[a-z_.]+)\b", document.read_text())
        assert {name for name in named if not name.endswith((".yaml", ".json"))} <= known, document


@pytest.mark.parametrize("path", sorted((ROOT / "data/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(path: Path) -> None:
    config.load(path)


def test_every_parameter_is_explained() -> None:
    params = config.load(ROOT / "params.yaml")
    explained = {name for name, *_ in config.explained(params)}
    assert {"gate.min_top1", "ingest.split.val", "finetune.training.learning_rate"} <= explained


def test_changelog_knows_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda command: " ".join(command) or "weighin"
)
def test_help_teaches(command: list[str]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "weighin"), *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: weighin" in done.stdout
    if command in (["run"], ["schedule"], ["search"], ["approve"], ["rollback"], ["audit"], ["reproduce"], ["lineage"]):
        assert "Example" in done.stdout


def test_the_published_schema_is_that_of_the_decisions() -> None:
    """`python -c 'from tasks.core.registry import *; print(json.dumps(Decision.model_json_schema(), indent=2))'`."""
    published = json.loads((ROOT / "deploy/decision.schema.json").read_text())
    assert published == Decision.model_json_schema()


def test_pins_have_no_addresses() -> None:
    assert not re.search(r"://|@ ", (ROOT / "constraints.txt").read_text())
