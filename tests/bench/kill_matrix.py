"""SIGKILL everywhere: `python tests/bench/kill_matrix.py [decisions | stages]`.

Decisions: a promotion, a refusal, the first promotion, a rollback and a rotation of the key, kept here and shared with
remotes, are killed after git calls, before changes of files, some milliseconds into git's own work on refs, and at
seeded times; and from the states that git leaves for microseconds only, made by hand. Stages: `weighin run` of the
digits recipe is killed as each stage starts and ends: everything at once, or one of its processes. Each time the next
run has to end as an undisturbed one. Prints a table, writes data/reports/bench/kill_matrix.json, and ends with status
1 if that does not hold.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import crash
import httpx
import psutil
from ruamel.yaml import YAML
from workspace import BIN, FAILED, PROMOTED, RECIPE, Workspace, checkout, free_port, wait_for

from flows.registry.reproduce import MEASURED
from tasks import STAGES
from tasks.core import files, paths, quiet

TARGET = ROOT / paths.REPORTS / "bench" / "kill_matrix.json"
SEED = 1
INSIDE = TIMES = 3
EACH = {"first": (2, 18), "promotion": (1, 12), "refusal": (2, 18), "rollback": (4, 18), "rotation": (1, 1)}
LEAST = 200
DETERMINISTIC = ("outcome", "version", "model_sha256", "failed", "data_sha256", "params_sha256")
HIT_S = 30.0


class Row(NamedTuple):
    """One line of the table."""

    where: str
    how: str
    kills: int
    same: int
    healing: int  # how often the audit found something right after the kill, which the next run mended
    wrong: list[str]


def kill_decisions(name: str, shared: bool, folder: Path) -> list[Row]:
    """The rows of one scenario."""
    scenario = crash.prepare(folder, name, shared)
    kills = crash.at_steps(scenario, *EACH[name])
    kills += crash.inside(scenario, SEED, INSIDE) + crash.seeded(scenario, SEED, TIMES)
    outcomes = [(kill.how, crash.survive(scenario, folder / f"kill-{n}", kill)) for n, kill in enumerate(kills)]
    spoils = crash.SPECIAL.get((name, shared), ())
    outcomes += [("by hand", crash.recover(scenario, folder / spoil.__name__, spoil)) for spoil in spoils]
    how = {"after": "after a git call", "write": "before a change of a file", "within": "within git"}
    how |= {"time": "at a seeded time"}
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in outcomes):
        one = [outcome for other, outcome in outcomes if other == kind and (outcome.killed or outcome.wrong)]
        wrong = [text for outcome in one for text in outcome.wrong]
        healing = sum(bool(outcome.healing) for outcome in one)
        good = sum(not outcome.wrong for outcome in one)
        rows.append(Row(scenario.name, how.get(kind, kind), len(one), good, healing, wrong))
    return rows


@contextlib.contextmanager
def server(home: Path) -> Iterator[str]:
    """A Prefect server of its own."""
    port = free_port()
    os.environ |= quiet.SETTINGS | {"PREFECT_HOME": str(home)}
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)

    def healthy() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/api/health").is_success
        return False

    try:
        wait_for(healthy, "the server's start")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Point(NamedTuple):
    """Where a run is killed: the task, whether as it starts or has ended, and what of the run."""

    task: str
    edge: str
    what: str  # everything, weighin, dvc or stage


def points() -> list[Point]:
    """Everything as each stage starts, weighin alone as each ends, and alone what else works at it."""
    alone = ("dvc", "stage", "weighin")
    found = [Point(name, edge, what) for name in STAGES for edge, what in (("start", "everything"), ("end", "weighin"))]
    found += [Point(name, "start", alone[number % 3]) for number, name in enumerate(STAGES)]
    return [*found, Point("champion", "end", "everything"), Point("decide", "end", "everything")]


def until(workspace: Workspace, name: str) -> None:
    """The workspace as a run leaves it that has come to this stage, with nothing of the later ones to bring back."""
    later = STAGES[STAGES.index(name) :] if name in STAGES else ()
    lock, yaml = workspace.root / "dvc.lock", YAML(typ="safe")
    content = yaml.load(lock)
    for stage in later:
        for out in content["stages"].pop(stage)["outs"]:
            path = workspace.root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with lock.open("w") as file:
        yaml.dump(content, file)
    shutil.rmtree(workspace.root / ".dvc/cache/runs", ignore_errors=True)
    shutil.rmtree(workspace.root / "data/checkpoints", ignore_errors=True)


def disturb(workspace: Workspace, point: Point, drawn: random.Random) -> bool:
    """Run, and kill at the point; says whether that came before the run's end."""
    process = subprocess.Popen(
        [str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    sign = f"Running stage '{point.task}'" if point.edge == "start" else f"Task run '{point.task}' - Finished in state"
    hit = False
    for line in process.stderr or ():
        if sign in line and not hit:
            time.sleep(drawn.uniform(0.0, 0.3) if point.edge == "start" else 0.0)
            hit = strike(psutil.Process(process.pid), point)
    process.wait()
    return hit


def strike(run: psutil.Process, point: Point) -> bool:
    """Kill what the point names; False if it is over."""
    ends = {"dvc": ["repro", "--single-item", point.task], "stage": ["-m", f"tasks.{point.task}"]}
    deadline = time.monotonic() + HIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            below = run.children(recursive=True)
            chosen = {"everything": [run, *below], "weighin": [run]}.get(point.what)
            if chosen is None:
                tail = ends[point.what]
                chosen = [one for one in below if one.cmdline()[-len(tail) :] == tail]
            for one in chosen:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
            if chosen:
                return True
        if not run.is_running() or run.status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.02)
    return False


def results(workspace: Workspace) -> dict[str, str]:
    """SHA-256 of what is the same in each run."""
    measured = tuple(path.as_posix() for path in MEASURED)
    return {path: sha256 for path, sha256 in workspace.results().items() if not path.startswith(measured)}


def kill_stages(folder: Path) -> list[Row]:
    """The rows of the stages."""
    drawn, rows, found = random.Random(SEED), [], Counter[tuple[str, str]]()
    wrong: dict[tuple[str, str], list[str]] = {}
    with server(folder / "prefect") as api:
        whole = Workspace(folder / "whole", api)
        whole.root.mkdir()
        checkout(whole.root)
        subprocess.run([sys.executable, "data/recipes/mnist_5k.py"], cwd=whole.root, check=True, capture_output=True)
        refs = shutil.copytree(whole.root / ".git", folder / "git")
        decision, made = whole.run("--params", RECIPE), results(whole)
        crash.rewind(whole.root / ".git", refs)
        for number, point in enumerate(points()):
            place = shutil.copytree(whole.root, folder / f"run-{number}", symlinks=True)
            workspace = Workspace(Path(place), api)
            until(workspace, point.task)
            key = (f"weighin run, {point.edge} of a stage", f"{point.what} killed")
            hit = disturb(workspace, point, drawn)
            again = workspace.call("weighin", "run", "--json")
            told = differences(workspace, again, decision, made)
            if not hit:
                told.append("the kill came too late")
            print(f"{number:3} {point.task} {point.edge} {point.what}: {told or 'same'}", flush=True)
            found[key] += hit
            wrong.setdefault(key, []).extend(f"{point}: {text}" for text in told)
            if not told:
                shutil.rmtree(workspace.root)
    for (where, how), kills in found.items():
        bad = len({text.split(": ")[0] for text in wrong[where, how]})
        rows.append(Row(where, how, kills, kills - bad, 0, wrong[where, how]))
    return rows


def differences(
    workspace: Workspace, again: subprocess.CompletedProcess[str], decision: dict[str, Any], made: dict[str, str]
) -> list[str]:
    """What is not as after an undisturbed run."""
    if again.returncode != PROMOTED:
        return [f"the next run ended with status {again.returncode}: {again.stderr[-500:]}"]
    now, then = json.loads(again.stdout), results(workspace)
    told = [f"{name} is {now[name]}, not {decision[name]}" for name in DETERMINISTIC if now[name] != decision[name]]
    told += [f"{path} is another one" for path in sorted(made.keys() | then.keys()) if made.get(path) != then.get(path)]
    audited = workspace.call("weighin", "audit", "--all")
    told += [audited.stdout[-500:]] if audited.returncode == FAILED or "everything holds" not in audited.stdout else []
    temporary = list((workspace.root / "data").rglob("*.tmp"))
    return told + [f"{path.relative_to(workspace.root)} is left" for path in temporary]


def main() -> None:
    started, wanted = time.monotonic(), sys.argv[1:] or ["decisions", "stages"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        if "decisions" in wanted:
            chosen = [(name, shared) for shared in (False, True) for name in crash.ACTIONS]
            chosen.remove(("rotation", True))
            with ProcessPoolExecutor(2) as pool:
                waiting = [pool.submit(kill_decisions, *one, folder / f"{one[0]}-{one[1]}") for one in chosen]
                for one in waiting:
                    rows += one.result()
                    print(*(f"{row.where}, {row.how}: {row.same}/{row.kills}" for row in one.result()), sep="\n")
        if "stages" in wanted:
            rows += kill_stages(folder)
    kills, same = sum(row.kills for row in rows), sum(row.same for row in rows)
    print(f"\n{'where':34} {'how':26} {'kills':>5} {'same':>5} {'mended':>6}")
    for row in rows:
        print(f"{row.where:34} {row.how:26} {row.kills:5} {row.same:5} {row.healing:6}")
    for text in (text for row in rows for text in row.wrong):
        print(f"WRONG {text}")
    print(f"{kills} kills, {same} times the next run ended as an undisturbed one, {time.monotonic() - started:.0f} s")
    files.write_json(TARGET, {"seed": SEED, "kills": kills, "same": same, "rows": [row._asdict() for row in rows]})
    enough = kills >= LEAST or wanted != ["decisions", "stages"]
    sys.exit(any(row.wrong for row in rows) or not enough)


if __name__ == "__main__":
    main()
