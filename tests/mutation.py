"""Mutants of a module, each changed at one place, and a copy of the project in which tests are run against them.

A process that has imported all that others wrote (torch, ONNX, pytest) forks for each run of the tests, so that a
mutant takes as long as the tests that find it. What is the project's own is imported anew in each, from the copy.
"""

import ast
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OWN = ("tasks", "flows", "conftest")
# Imported before the first fork, the others that the tests import after it.
SLOW_TO_IMPORT = ("pytest", "scipy.stats", "pandas", "torch", "torchvision", "timm", "torch_pruning", "onnxruntime")
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
LATE = 124  # the exit status of a run in which a test did not end
FACTOR, EXTRA_S = 5, 20.0  # a test may take so many times what it takes without a mutant, and this on top
NEIGHBOURS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


class Mutant(NamedTuple):
    """A module that is changed at one place; `number` is the same as long as the module is."""

    number: int
    line: int
    text: str  # of the line that the change begins in
    change: str  # with its number, where the line can be changed in the same way at several places
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    lines, found = source.splitlines(), list[tuple[int, str, str]]()
    for top in ast.parse(source).body:
        first = min([top.lineno, *(one.lineno for one in getattr(top, "decorator_list", ()))])
        head, tail = lines[: first - 1], lines[top.end_lineno :]
        for parent, field, index, child in _slots(top):
            before = _brief(child)
            for other in _alternatives(child):
                _put(parent, field, index, other)
                body = ast.unparse(top).splitlines()
                _put(parent, field, index, child)
                change = f"{before} -> {_brief(other)}"
                found.append((child.lineno, change, "\n".join([*head, *body, *tail]) + "\n"))
    found.sort(key=lambda one: one[0])
    seen, made = Counter[tuple[int, str]](), list[Mutant]()
    for line, change, text in found:
        seen[line, change] += 1
        nth = f" (no. {seen[line, change]})" if seen[line, change] > 1 else ""
        made.append(Mutant(len(made), line, lines[line - 1].strip(), change + nth, text))
    return made


def _brief(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def _slots(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """Where each statement and expression below the node stands; annotations say nothing to the interpreter."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.stmt | ast.expr):
                yield node, field, index, child
            if isinstance(child, ast.AST):
                yield from _slots(child)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """What the node is replaced by, once each."""
    match node:
        case ast.Compare(left, ops, comparators):
            for index, op in enumerate(ops):
                for other in NEIGHBOURS[type(op)]:
                    yield ast.Compare(left, [*ops[:index], other(), *ops[index + 1 :]], comparators)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Constant(value):
            yield from map(ast.Constant, _others(value))
        case ast.BinOp(left, op, right) if type(op) in SWAPPED:
            yield ast.BinOp(left, SWAPPED[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in SWAPPED:
            yield ast.AugAssign(target, SWAPPED[type(op)](), value)
        case ast.Return(value) if value is not None:
            if not isinstance(value, ast.Constant) or value.value is not None:
                yield ast.Return(ast.Constant(None))
        case ast.Return() | ast.Raise() | ast.Continue() | ast.Expr(ast.Yield() | ast.YieldFrom()):
            yield ast.Pass()


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1] if isinstance(value, int | float) else []


class Round(NamedTuple):
    """Files of tests; of them those that use no fixture of `without`, and one of `only` if there are some."""

    files: tuple[str, ...]
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    keyword: str = ""


class Outcome(NamedTuple):
    """How a run of the tests ended: with which status, the test that failed first, and how long it took."""

    status: int
    failed: str | None
    seconds: float
    durations: dict[str, float]
    imported: list[str]


class Watch:
    """The part of pytest that chooses the tests, the fastest of each file first, and notes how they end."""

    def __init__(self, chosen: Round, durations: dict[str, float]) -> None:
        self.chosen, self.expected = chosen, durations
        self.failed: str | None = None
        self.running: str | None = None
        self.durations: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        chosen, places = self.chosen, {name: place for place, name in enumerate(self.chosen.files)}
        items[:] = [
            item
            for item in items
            if not set(chosen.without) & set(item.fixturenames)
            and (not chosen.only or set(chosen.only) & set(item.fixturenames))
        ]
        items.sort(key=lambda item: (places[item.nodeid.split("::")[0]], self.expected.get(item.nodeid, 0.0)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        if self.expected:
            signal.setitimer(signal.ITIMER_REAL, self.expected.get(nodeid, 0.0) * FACTOR + EXTRA_S)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = report.nodeid

    def pytest_runtest_logfinish(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.running = None


class Lab:
    """A copy of the project in a folder, in which one module is replaced by its mutants."""

    def __init__(self, folder: Path, module: str) -> None:
        self.root, self.module, self.folder = folder / "copy", module, folder
        self.source = (ROOT / module).read_text()
        self.durations: dict[str, float] = {}
        self.learned: set[Round] = set()
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)

    def learn(self, chosen: Round) -> None:
        """Run the tests without a mutant, and import here what they have imported of others."""
        (self.root / self.module).write_text(self.source)
        for name in SLOW_TO_IMPORT:
            importlib.import_module(name)
        outcome = self._run(chosen, {}, compiled=True)
        if outcome.status != 0:
            raise SystemExit(f"the tests fail without a mutant, {outcome.failed} first: {self.folder / 'log'}")
        self.durations |= outcome.durations
        self.learned.add(chosen)
        for cached in (self.root / self.module).parent.glob(f"__pycache__/{Path(self.module).stem}.*"):
            cached.unlink()
        for name in outcome.imported:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def judge(self, source: str, chosen: Round) -> tuple[str, Outcome]:
        """Run the tests against a mutant until one fails; once more if one did not end, as where all was halted."""
        (self.root / self.module).write_text(source)
        names = {0: SURVIVED, LATE: TIMED_OUT, -signal.SIGKILL: TIMED_OUT}
        for _ in range(2):
            outcome = self._run(chosen, self.durations, compiled=False)
            result = names.get(outcome.status, KILLED)
            if result != TIMED_OUT:
                break
        return result, outcome

    def _run(self, chosen: Round, durations: dict[str, float], compiled: bool) -> Outcome:
        started, told = time.monotonic(), self.folder / "told.json"
        told.unlink(missing_ok=True)
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            self._test(chosen, durations, compiled, told)
        limit = started + (sum(durations.values()) * FACTOR + 60 if durations else 3600)
        status = _wait(process, limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what the tests have started and not ended
        content = json.loads(told.read_text()) if told.exists() else {"failed": None, "durations": {}, "imported": []}
        return Outcome(status, seconds=time.monotonic() - started, **content)

    def _test(self, chosen: Round, durations: dict[str, float], compiled: bool, told: Path) -> None:
        """What the forked process does; it does not return."""
        status = os.EX_SOFTWARE
        try:
            os.setsid()
            watch = Watch(chosen, durations)
            self._move_in(compiled)
            import pytest

            signal.signal(signal.SIGALRM, lambda *_: _leave(LATE, watch, told, compiled))
            options = ["-q", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'scratch'}"]
            options += ["-k", chosen.keyword] if chosen.keyword else []
            options += [] if compiled else ["-x"]
            status = int(pytest.main([*options, *chosen.files], plugins=[watch]))
            _leave(status, watch, told, compiled)
        finally:
            os._exit(status)

    def _move_in(self, compiled: bool) -> None:
        """Let this process forget the project as it is elsewhere, and find it in the copy."""
        os.chdir(self.root)
        with (self.folder / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        for name in [name for name, module in sys.modules.items() if _is_own(name, module)]:
            if name != "__main__":
                del sys.modules[name]
        sys.path[:] = [
            str(self.root),
            *(path for path in sys.path if not Path(path).is_relative_to(ROOT) or ".venv" in path),
        ]
        os.environ |= {"PYTHONPATH": str(self.root)} | ({} if compiled else {"PYTHONDONTWRITEBYTECODE": "1"})
        sys.dont_write_bytecode = not compiled
        importlib.invalidate_caches()


def _leave(status: int, watch: Watch, told: Path, with_imports: bool) -> None:
    """End this process, and tell what it has seen."""
    names = [name for name, module in sys.modules.items() if _is_of_others(name, module)] if with_imports else []
    made = {"failed": watch.failed or watch.running, "durations": watch.durations, "imported": names}
    told.write_text(json.dumps(made))
    os._exit(status)


def _wait(process: int, limit: float) -> int:
    """The exit status of a child; if it has none in time it is killed, and the status is that signal's."""
    pause = 0.002
    while time.monotonic() < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.2, 0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGKILL


def _is_own(name: str, module: Any) -> bool:
    file = getattr(module, "__file__", None) or ""
    return name.split(".")[0] in OWN or (file.startswith(f"{ROOT}{os.sep}") and "site-packages" not in file)


def _is_of_others(name: str, module: Any) -> bool:
    file = getattr(module, "__file__", None) or ""
    return "site-packages" in file and getattr(module, "__spec__", None) is not None and name.split(".")[0] not in OWN
