"""The rooms: what each folder may import, and that no two modules import each other in a circle."""

import ast
from pathlib import Path

import pytest

from tasks import STAGES

ROOT = Path(__file__).parents[1]
JUDGING = "tasks.gate"  # whose judging functions the registry uses
# What the modules of a room may import besides the room itself; a stage is a room of its own.
ALLOWED: dict[str, set[str]] = {
    "tasks.core": set(),
    "tasks.images": {"tasks.core"},
    "tasks.budget": {"tasks.core"},
    "tasks.runtime": {"tasks.core", "tasks.images"},
    "tasks.graphs": {"tasks.core", "tasks.images", "tasks.budget", "tasks.runtime"},
    "tasks.nets": {"tasks.core", "tasks.images", "tasks.budget", "tasks.graphs"},
}
ROOMS = set(ALLOWED)
ALLOWED |= {f"tasks.{stage}": ROOMS for stage in STAGES}
ALLOWED |= {"flows.registry": ROOMS | {JUDGING, "flows.dvc_bridge"}}
ALLOWED |= {
    f"flows.{room}": ROOMS | {"flows.registry", "flows.dvc_bridge"}
    for room in ("production", "project", "report", "fleet")
}
# Libraries that only some may import, by the first part of their name.
ONLY_IN = {
    "prefect": {f"flows.{name}" for name in ("stage", "retrain", "artifacts", "schedule", "server", "search", "trial")},
    "dvc": {"flows.dvc_bridge"},
    "torch": {"tasks.nets", "tasks.finetune", "tasks.prune", "tasks.quantize", "flows.profile"},
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("tasks", "flows")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
}


def room(module: str) -> str:
    """The longest name in ALLOWED that the module is in, or the module itself."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ALLOWED), module)


def imports_of(module: str, for_checking: bool = False) -> set[str]:
    """The modules that this one imports, in functions too; and those for type checking only, if they are asked for."""
    tree = ast.parse(MODULES[module].read_text())
    checking = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in checking for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped and not for_checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_the_rooms_that_its_own_may_use(module: str) -> None:
    own = room(module)
    others = {name for name in imports_of(module) if name.startswith(("tasks", "flows")) and room(name) != own}
    if own in ALLOWED:
        assert {name for name in others if room(name) not in ALLOWED[own] and name not in ALLOWED[own]} == set()


@pytest.mark.parametrize("library", ONLY_IN)
def test_some_libraries_are_imported_in_a_few_places_only(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports_of(module))}
    assert {module for module in users if not any(module.startswith(place) for place in ONLY_IN[library])} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports in functions and for type checking count, too."""
    edges = {module: imports_of(module, for_checking=True) & MODULES.keys() for module in MODULES}
    left = dict(edges)
    while leaves := [module for module, names in left.items() if not names & left.keys()]:
        for module in leaves:
            del left[module]
    assert set(left) == set()


def test_the_runtime_brings_numpy_and_onnx_runtime_only() -> None:
    standard = {"__future__", "collections", "json", "os", "pathlib", "resource", "subprocess", "sys", "time", "typing"}
    for module in MODULES:
        if module.startswith("tasks.runtime"):
            libraries = {name.split(".")[0] for name in imports_of(module)} - standard
            assert libraries <= {"numpy", "onnxruntime", "tasks"}, module
