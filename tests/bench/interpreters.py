"""Does the project work with each Python? `python tests/bench/interpreters.py [--folder PATH] [--only VERSION]`.

Finds every Python 3.11, 3.12 and 3.13 on PATH and in pyenv's folder. For each, a clone of the repository as it is
committed is set up by `make setup`, gets the digits by `make digits`, and runs `weighin run` of their recipe with a
Prefect of its own. Prints a table, writes data/reports/bench/interpreters.json, and ends with status 1 if one that was
found did not work. Each takes several gigabytes of downloads and of the folder, which is a temporary one if none is
given; in one that is given the clones stay, and a second call uses what is set up in them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import files, paths, quiet

TARGET = ROOT / paths.REPORTS / "bench" / "interpreters.json"
RECIPE = "data/recipes/mlp-digits.yaml"
VERSIONS = ("3.11", "3.12", "3.13")
LATE = 124
# What would lead the clone's commands elsewhere.
LEFT_OUT = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PREFECT_API_URL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
REFUSED = 3  # the exit status of a run that refuses its model, which has worked, too
ASK = "import json, platform, sys; print(json.dumps([platform.python_version(), sys.prefix, sys.base_prefix]))"
ASKING_S, SETTING_UP_S, RUNNING_S = 30.0, 3600.0, 3600.0
HEADER = f"{'version':10} {'set-up':>7} {'seconds':>8} {'run':>9} {'seconds':>8} {'top-1':>7} {'bytes':>9}"


class Interpreter(NamedTuple):
    """A Python that answers: its version, as it says, and the path to start it by."""

    version: str
    path: Path


def candidates(environment: Mapping[str, str], versions: Iterable[str] = VERSIONS) -> list[Path]:
    """Executables by the names of these versions, first those on PATH and then those of pyenv."""
    names = [f"python{version}" for version in versions]
    folders = [Path(folder) for folder in environment.get("PATH", "").split(os.pathsep) if folder]
    home = environment.get("HOME", "")
    pyenv = Path(environment["PYENV_ROOT"]) if environment.get("PYENV_ROOT") else Path(home) / ".pyenv"
    folders += sorted(pyenv.glob("versions/*/bin"))
    found = (folder / name for name in names for folder in folders)
    return [path for path in found if path.is_file() and os.access(path, os.X_OK)]


def ask(path: Path) -> tuple[Interpreter, str] | None:
    """What an executable says of itself, and the folder of its installation.

    None if it does not answer, as pyenv's shims of versions that are not chosen, or if it is a virtual environment.
    """
    try:
        done = subprocess.run(
            [str(path), "-c", ASK],
            capture_output=True,
            text=True,
            timeout=ASKING_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        version, prefix, base = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return (Interpreter(version, path), base) if prefix == base else None


def discover(environment: Mapping[str, str], versions: tuple[str, ...] = VERSIONS) -> list[Interpreter]:
    """Each Python of these versions once, however many names it has."""
    found: dict[tuple[str, str], Interpreter] = {}
    for path in candidates(environment, versions):
        answer = ask(path)
        if answer and answer[0].version.startswith(tuple(f"{version}." for version in versions)):
            found.setdefault((answer[0].version, str(Path(answer[1]).resolve())), answer[0])
    return sorted(found.values(), key=lambda one: [int(part) for part in one.version.split(".")[:2]])


class Row(NamedTuple):
    """How one interpreter did; None is what it did not come to."""

    version: str
    set_up: bool
    set_up_seconds: float
    outcome: str | None = None
    run_seconds: float | None = None
    top1: float | None = None
    size_bytes: int | None = None
    error: str | None = None

    @property
    def works(self) -> bool:
        """Whether the run came to a decision."""
        return self.outcome is not None


def call(command: list[str], folder: Path, seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what takes too long is killed with all that it started, and has status 124."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    process = subprocess.Popen(
        command, cwd=folder, env=kept | environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return subprocess.CompletedProcess(command, LATE, "", f"it took more than {seconds:g} s")
    return subprocess.CompletedProcess(command, process.returncode, said, told)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said last."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"


def set_up(interpreter: Interpreter, clone: Path) -> str | None:
    """Clone the repository, install the project and prepare the digits; what went wrong, if something did."""
    if not clone.exists():
        cloned = call(["git", "clone", "--quiet", str(ROOT), str(clone)], clone.parent, SETTING_UP_S)
        if cloned.returncode != 0:
            return f"git clone: {last_line(cloned)}"
    for target in ("setup", "digits"):
        done = call(["make", target, f"PYTHON={interpreter.path}"], clone, SETTING_UP_S)
        if done.returncode != 0:
            return f"make {target}: {last_line(done)}"
    return None


def reduced(benchmark: Any) -> tuple[float, int]:
    """Top-1 and bytes of the shipped model in a benchmark's report."""
    model = benchmark["stages"]["reduce"]
    return float(model["top1"]), int(model["size_bytes"])


def examine(interpreter: Interpreter, folder: Path) -> Row:
    """Set up and run the project with one interpreter."""
    clone, began = folder / f"weighin-{interpreter.version}", time.monotonic()
    wrong = set_up(interpreter, clone)
    row = Row(interpreter.version, wrong is None, time.monotonic() - began, error=wrong)
    if wrong is not None:
        return row
    home, began = folder / f"prefect-{interpreter.version}", time.monotonic()
    command = [str(clone / ".venv/bin/weighin"), "run", "--params", RECIPE, "--json"]
    done = call(command, clone, RUNNING_S, PREFECT_HOME=str(home), **quiet.SETTINGS)
    row = row._replace(run_seconds=time.monotonic() - began)
    if done.returncode not in (0, REFUSED):
        return row._replace(error=f"weighin run: {last_line(done)}")
    try:
        outcome = str(json.loads(done.stdout)["outcome"])
        top1, size_bytes = reduced(files.read_json(clone / paths.report("benchmark")))
    except (ValueError, KeyError, TypeError) as error:
        return row._replace(error=f"weighin run left something else behind: {error}")
    return row._replace(outcome=outcome, top1=top1, size_bytes=size_bytes)


def line(row: Row) -> str:
    """The row as text under HEADER."""
    taken, top1, size = row.run_seconds, row.top1, row.size_bytes
    cells = (
        f"{row.version:10} {'worked' if row.set_up else 'failed':>7} {row.set_up_seconds:8.0f}",
        f"{row.outcome or ('failed' if row.set_up else '-'):>9} {'-' if taken is None else f'{taken:.0f}':>8}",
        f"{'-' if top1 is None else f'{top1:.2%}':>7} {'-' if size is None else f'{size:,}':>9}",
    )
    return " ".join(cells) + (f"  {row.error}" if row.error else "")


def compare(found: list[Interpreter], folder: Path) -> list[Row]:
    """A row for each interpreter, printed as it comes."""
    rows: list[Row] = []
    print(HEADER, flush=True)
    for interpreter in found:
        rows.append(examine(interpreter, folder))
        print(line(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the clones are made, and stay")
    parser.add_argument("--only", choices=VERSIONS, help="this version alone")
    arguments = parser.parse_args()
    found = discover(os.environ, (arguments.only,) if arguments.only else VERSIONS)
    if not found:
        sys.exit("error: no Python of these versions was found")
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        rows = compare(found, arguments.folder.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True) as scratch:
            rows = compare(found, Path(scratch))
    files.write_json(TARGET, {"recipe": RECIPE, "rows": [row._asdict() | {"works": row.works} for row in rows]})
    sys.exit(not all(row.works for row in rows))


if __name__ == "__main__":
    main()
