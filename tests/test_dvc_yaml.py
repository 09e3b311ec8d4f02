"""dvc.yaml, the flow and the modules say the same: the same stages in the same order, with complete dependencies."""

import ast
from pathlib import Path
from typing import Any

import pytest
from prefect import Task
from ruamel.yaml import YAML

from flows import retrain
from tasks import STAGES
from tasks.core import config, paths

ROOT = Path(__file__).parents[1]
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")


def outputs(stage: dict[str, Any]) -> list[str]:
    return [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]


def parse(path: Path) -> list[ast.stmt]:
    """The statements at the top level of a module."""
    return ast.parse(path.read_text()).body


def imports(path: Path) -> set[Path]:
    """Files of tasks/ that importing this one brings in, itself included; imports inside functions do not count."""
    found, pending = set(), [path]
    while pending:
        current = pending.pop()
        if current in found or not current.exists():
            continue
        found.add(current)
        for node in parse(current):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tasks":
                module = Path(*node.module.split("."))
                pending += [(ROOT / module).with_suffix(".py"), *(ROOT / module / f"{a.name}.py" for a in node.names)]
    return found


def function(path: Path, name: str) -> ast.FunctionDef:
    return next(node for node in parse(path) if isinstance(node, ast.FunctionDef) and node.name == name)


def calls(body: ast.FunctionDef) -> list[str]:
    """Names of the functions that it calls by their names, in the order of the text."""
    found = [node for node in ast.walk(body) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [node.func.id for node in sorted(found, key=lambda node: node.lineno)]  # type: ignore[attr-defined]


def read_sections(body: ast.FunctionDef) -> set[str]:
    """The sections of the parameters that it reads: attributes of `config.load()`, or of what that was assigned to."""

    def loads(node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node) == "config.load()"

    assigned = [node for node in ast.walk(body) if isinstance(node, ast.Assign) and loads(node.value)]
    names = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    read = (node for node in ast.walk(body) if isinstance(node, ast.Attribute))
    return {
        node.attr.removesuffix("_")
        for node in read
        if loads(node.value) or (isinstance(node.value, ast.Name) and node.value.id in names)
    } & set(config.fields(config.Params))


# What a stage imports inside a function, since few runs need it.
SELDOM = {
    "quantize": ["nets/distillation", "nets/qat", "nets/training"],
    "benchmark": ["runtime/golden", "runtime/session"],
    "gate": ["runtime/golden", "runtime/session"],
}
# The gate's verdict names the SHA-256 of params.yaml, so it depends on it whole.
WHOLE = {"gate": [str(paths.PARAMS)]}
# The version in production is no stage's output: the flow lays it there before these two.
FACE_THE_CHAMPION = ("benchmark", "gate")


def test_stages_are_the_same_list_in_the_same_order_everywhere() -> None:
    assert tuple(PIPELINE["stages"]) == STAGES
    called = [
        step
        for name in calls(function(ROOT / "flows/retrain.py", "retrain"))
        for step in (calls(function(ROOT / "flows/retrain.py", name)) if name == "prepare" else [name])
    ]
    tasks = [name for name in called if isinstance(getattr(retrain, name, None), Task)]
    assert tuple(name for name in tasks if name in STAGES) == STAGES
    assert tasks[-4:] == ["champion", "benchmark", "gate", "decide"]
    assert all(getattr(retrain, name).name == name for name in STAGES)
    assert {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_module_and_depends_on_all_the_code_it_imports(name: str) -> None:
    stage = PIPELINE["stages"][name]
    assert stage["cmd"] == f"python -m tasks.{name}"
    assert [dep for dep in stage["deps"] if dep == "tasks" or dep.endswith(".yaml")] == sorted(WHOLE.get(name, []))
    code = {dep for dep in stage["deps"] if dep.endswith(".py")}
    files = [ROOT / "tasks" / f"{one}.py" for one in (name, *SELDOM.get(name, []))]
    assert code == {str(path.relative_to(ROOT)) for file in files for path in imports(file)}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_its_own_section_of_the_parameters(name: str) -> None:
    stage = PIPELINE["stages"][name]
    if name in WHOLE:
        assert "params" not in stage
        return
    sections = {section.split(".")[0] for section in stage.get("params", [])}
    assert sections <= set(config.fields(config.Params))
    assert sections >= read_sections(function(ROOT / f"tasks/{name}.py", "main"))
    assert name in sections


@pytest.mark.parametrize("name", STAGES)
def test_data_dependencies_come_from_an_earlier_stage(name: str) -> None:
    earlier = [one for stage in STAGES[: STAGES.index(name)] for one in outputs(PIPELINE["stages"][stage])]
    data = [dep for dep in PIPELINE["stages"][name]["deps"] if dep.startswith("data/")]
    assert set(data) - {str(paths.CHAMPION), str(paths.DEVICE), str(paths.KNOWN_SPLITS)} <= set(earlier)
    assert (str(paths.KNOWN_SPLITS) in data) == (name == "ingest")
    assert (str(paths.CHAMPION) in data) == (name in FACE_THE_CHAMPION)
    assert (str(paths.DEVICE) in data) == (name == "prune")  # it is in git: `weighin profile` measures it


@pytest.mark.parametrize("laid", [paths.CHAMPION, paths.KNOWN_SPLITS])
def test_no_stage_makes_what_the_flow_lays(laid: Path) -> None:
    made = [output for stage in PIPELINE["stages"].values() for output in outputs(stage)]
    assert not [output for output in made if Path(output).is_relative_to(laid)]


def test_the_gate_depends_on_every_file_that_its_evidence_is_read_from() -> None:
    deps = PIPELINE["stages"]["gate"]["deps"]
    read = [
        paths.report("benchmark"),
        paths.PREDICTIONS,
        paths.GOLDEN,
        paths.onnx("reduce"),
        paths.PACKED,
        paths.TEST,
        paths.CHAMPION,
    ]
    assert {str(path) for path in read} == {dep for dep in deps if dep.startswith("data/")}


def test_the_test_split_is_for_reduce_benchmark_and_gate_only() -> None:
    readers = [name for name, stage in PIPELINE["stages"].items() if str(paths.TEST) in stage["deps"]]
    assert readers == ["reduce", "benchmark", "gate"]


def test_every_output_is_cached_so_that_the_run_cache_and_the_audit_have_it() -> None:
    for stage in PIPELINE["stages"].values():
        assert all(isinstance(output, str) for output in outputs(stage))


def test_only_training_stages_import_torch_and_none_prefect() -> None:
    """Imports inside functions, as those of the training in `quantize`, do not count."""

    def imports_torch(path: Path) -> bool:
        return any(isinstance(node, ast.Import) and node.names[0].name == "torch" for node in parse(path))

    trains = {name for name in STAGES if any(map(imports_torch, imports(ROOT / f"tasks/{name}.py")))}
    assert trains == {"finetune", "prune"}
    assert not any("import prefect" in p.read_text() for p in (ROOT / "tasks").rglob("*.py"))
