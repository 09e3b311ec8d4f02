"""The documents are in step with the code: commands, options, targets, recipes and parameters that they name exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.main import get_command

from flows.cli import app
from flows.registry.decision import Decision
from tasks import STAGES
from tasks.core import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
DOCUMENTS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_readme_names_every_command() -> None:
    assert set(re.findall(r"\bweighin ([a-z]+)", README)) == set(COMMANDS)


def test_readme_links_every_document() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", README)}
    assert {path for path in DOCUMENTS if path.name != "README.md"} <= linked


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_in_documents_exist(document: Path) -> None:
    for command, rest in re.findall(r"\bweighin ([a-z]+)((?: +[^\n`|#]+)?)", document.read_text()):
        assert command in COMMANDS
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert set(re.findall(r"(--[a-z-]+)", rest)) <= known, (command, rest)


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (*DOCUMENTS, *(ROOT / "data/recipes").glob("*")):
        if path.is_file():
            assert set(re.findall(r"`make ([a-z]+)", path.read_text())) <= targets, path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target
    made = ("data/prepared", "data/models", "data/reports", "data/splits", "data/raw/my-images")
    for path in re.findall(r"`(?:python )?((?:data|deploy|docs|tasks|flows|tests)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists() or path.startswith(made), path


def test_readme_names_every_stage_in_order() -> None:
    positions = [README.index(f"`{name}`") for name in STAGES]
    assert positions == sorted(positions)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_yaml_in_documents_is_made_of_real_parameters(document: Path) -> None:
    shipped = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.S):
        changes = YAML(typ="safe").load(block)
        merged = {
            name: (shipped.get(name) or {}) | new if isinstance(new, dict) else new for name, new in changes.items()
        }
        config.Params.model_validate(shipped | merged)


def test_keys_that_documents_name_exist() -> None:
    """Such as `prune.weights`, with or without a value."""
    known = {name for name, *_ in config.explain(config.load(ROOT / "params.yaml"))}
    known |= {".".join(name.split(".")[:depth]) for name in known for depth in range(1, 6)}
    for document in DOCUMENTS:
        text = document.read_text()
        if document.name == "CHANGELOG.md":
            text = text.split("\n## ")[1]  # a release had the keys of its time
        named = re.findall(r"`((?:" + "|".join(config.fields(config.Params)) + r")\.[a-z0-9_.]+)\b", text)
        assert {name for name in named if not name.endswith((".yaml", ".json", ".zst"))} <= known, document


@pytest.mark.parametrize("path", sorted((ROOT / "data/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(path: Path) -> None:
    config.load(path)


def test_every_parameter_is_explained() -> None:
    params = config.load(ROOT / "params.yaml")
    explained = {name for name, *_ in config.explain(params)}
    assert {"gate.min_top1", "ingest.split.val", "finetune.training.learning_rate"} <= explained


def test_the_lines_for_a_device_classify_as_weighin_does(tmp_path: Path) -> None:
    """Both listings in docs/device.md, as a script beside a colour model and a grey one."""
    listings = re.findall(r"```python\n(.*?)```", (ROOT / "docs/device.md").read_text(), re.S)
    assert len(listings) == 2
    for name, channels in (("grey", 1), ("colour", 3)):
        folder = tmp_path / name
        folder.mkdir()
        images = write_model(folder / "model.onnx", channels)
        said = [[classify(folder, listing, image) for image in images] for listing in listings]
        assert said[0] == said[1]
        assert len(set(said[0])) > 1


def write_model(path: Path, channels: int) -> list[Path]:
    """A model that looks at brightness only, and images for it beside it."""
    side = 4
    weight = np.zeros((channels * side * side, 2), np.float32)
    weight[:, 1] = 1
    flat = onnx.helper.make_node("Flatten", ["image"], ["flat"])
    product = onnx.helper.make_node("MatMul", ["flat", "weight"], ["logits"])
    given = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", channels, side, side])
    made = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])
    tensors = [onnx.numpy_helper.from_array(weight, "weight")]
    graph = onnx.helper.make_graph([flat, product], "brightness", [given], [made], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    about = {"size": side, "channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    onnx.helper.set_model_props(model, {"weighin": json.dumps({"classes": ["dark", "bright"], **about})})
    onnx.save(model, path)
    images = [path.parent / f"{level}.png" for level in (120, 140)]
    for image in images:
        Image.new("RGB", (9, 6), (int(image.stem),) * 3).save(image)
    return images


def classify(folder: Path, listing: str, image: Path) -> str:
    """What the listing prints for the image."""
    (folder / "classify.py").write_text(listing)
    command = [sys.executable, "classify.py", image.name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


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
    """What `Decision.model_json_schema()` gives is what is published."""
    published = json.loads((ROOT / "deploy/decision.schema.json").read_text())
    assert published == Decision.model_json_schema()


def test_pins_have_no_addresses() -> None:
    assert not re.search(r"://|@ ", (ROOT / "constraints.txt").read_text())


def test_the_newest_release_in_the_changelog_is_the_version_that_the_command_prints() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "weighin"), "--version"], capture_output=True, text=True, check=True
    )
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert done.stdout == f"weighin {released[0]}\n"
