"""Make the records beside this file: a small registry by each commit that kept its decisions in another form.

The code of the commit itself runs, from the images to the decision, on scikit-learn's digits: `python
tests/records/make.py 4cf5bde` makes one record anew, and without arguments all are made that are missing. A record is
one git bundle: `main` with that commit's code, `registry` with its tags, `refs/weighin/code/*` where there are any, and
`cache` with the files of DVC's cache that decisions name. tests/archive.py opens it.

What the commit's code audits is audited by it once more, in the opened bundle, before the bundle is kept. Great
Expectations runs without its pictures and fonts: Data Docs would bring a copy of them, 4 MB, into every record.
"""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from archive import CACHE, FOLDER, unpack  # noqa: E402
from workspace import server  # noqa: E402

RECIPE = Path("data/recipes/mlp-digits.yaml")
DIGITS = Path("data/raw/digits")
IMAGES = 300
LEFT_OUT = ("tests", "docs", ".ci", "data/raw", "README.md", "CHANGELOG.md")
HEAVY = ("*.gif", "*.otf", "*.png", "*.svg", "*.ico")
PROMOTED, REFUSED, HELD = 0, 3, 4
# git as on a new machine, whatever this one's settings are.
ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "TZ": "UTC",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
}

# What makes the recipe small, by dotted key.
SMALL = {
    "ingest.path": DIGITS.as_posix(),
    "validate.min_rows_per_class": 2,
    "validate.min_side": 8,
    "validate.max_side": 8,
    "finetune.image_size": 8,
    "finetune.training.epochs": 8,
    "finetune.training.learning_rate": 0.01,
    "prune.channels": {"ratio": 0.75, "multiple": 16},
    "prune.recovery.training.epochs": 4,
    "quantize.calibration_images": 128,
    "benchmark.warmup": 10,
    "benchmark.iterations": 100,
    "gate.min_top1": 0.5,
    "gate.max_top1_drop": 0.3,
    "gate.max_latency_ratio": 50.0,
}
BY_CLASS = SMALL | {"gate.min_class_recall": 0.1}
COMPARED = SMALL | {
    "gate.champion": {"margin": 0.4},
    "gate.slices": {"label": {"min_count": 3, "min_top1": 0.1, "max_regression": 0.9}},
}
BUDGET = COMPARED | {
    "compress": {"max_top1_drop": 0.3, "max_size_bytes": 6000},
    "prune.channels": None,
}
CODEBOOK = {"quantize.codebook": 16, "gate.max_zst_bytes": 20000}
BALANCED = {
    "ingest.background": [0, 0, 0],
    "ingest.white_level": 4095,
    "finetune.training.balance": "loss",
    "prune.recovery.training.balance": "sampler",
}
# The percentile clips so much that calibration alone does not do, and the training runs.
QAT = {
    "quantize.percentile": 60.0,
    "quantize.qat": {
        "max_top1_drop": 0.0,
        "temperature": 2.0,
        "teacher_share": 0.5,
        "training": {
            "epochs": 6,
            "batch_size": 32,
            "optimizer": "adamw",
            "learning_rate": 0.003,
            "weight_decay": 0.0,
            "schedule": "one-cycle",
            "label_smoothing": 0.0,
            "augment": {"crop_scale": 1.0, "flip": 0.0},
            "seed": 0,
        },
    },
}
# What goes together has been one key since the kinds of grids are.
GRID = {"quantize.grid": {"kind": "mixed", "mean_bits": 4, "qat": QAT["quantize.qat"]}}


class Project:
    """A commit's code in a repository of its own, with digits for images."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.environment = environment | {"PYTHONPATH": f"{root}{os.pathsep}{environment['PYTHONPATH']}"}

    def call(self, *command: str, status: int = 0, stdin: bytes | None = None, **environment: str) -> bytes:
        """What the command prints; `RuntimeError` with all it said if it ends with another status."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | environment, input=stdin, capture_output=True, check=False
        )
        if done.returncode != status:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}, not {status}:\n{said}")
        return done.stdout

    def git(self, *args: str, **options: Any) -> str:
        """What git says, without the last line end."""
        return self.call("git", *args, **options).decode().strip()

    def weighin(self, *args: str, status: int = 0) -> str:
        """What the commit's own command line says."""
        run = "from flows.cli import app; app()"
        return self.call(sys.executable, "-c", run, *args, status=status).decode()

    def commit(self, message: str) -> None:
        """Commit whatever changed, if anything did."""
        self.git("add", "--all")
        if self.git("status", "--porcelain"):
            self.git("commit", "--quiet", "--message", message)

    def change(self, changes: dict[str, Any]) -> None:
        """Change parameters by their dotted keys; a value of None takes the key out."""
        yaml, path = YAML(typ="safe"), self.root / "params.yaml"
        content = yaml.load(path)
        for name, value in changes.items():
            *sections, key = name.split(".")
            section = content
            for part in sections:
                section = section[part]
            section[key] = value
            if value is None:
                del section[key]
        yaml.dump(content, path)

    def run(self, message: str, changes: dict[str, Any], status: int) -> None:
        """Commit a change of the parameters, run the pipeline on it, and commit what the run left in its wake."""
        self.change(changes)
        self.commit(message)
        self.weighin("run", status=status)
        self.commit(f"{message}: decided")


def promote(project: Project) -> None:
    """The first version, v0.1.0, which has no champion."""
    project.run("First digits", {}, PROMOTED)


def refuse(project: Project) -> None:
    """The same model, by a limit that nothing holds."""
    project.run("Ask for every digit", {"gate.min_top1": 1.0}, REFUSED)


def improve(project: Project) -> None:
    """v0.2.0, recovered from another seed; where champions are compared with, v0.1.0 is."""
    project.run("Another seed", {"gate.min_top1": SMALL["gate.min_top1"], "prune.recovery.training.seed": 1}, PROMOTED)


def roll_back(project: Project) -> None:
    """v0.1.0 again."""
    project.weighin("rollback", "v0.1.0", "--reason", "v0.2.0 misreads sevens")
    project.commit("Rolled back")


def hold(project: Project) -> None:
    """A model that is held and then approved as v0.3.0."""
    changes = {"gate.approval": True, "quantize.calibration_images": 64, "prune.recovery.training.seed": 2}
    project.run("Ask for approval", changes, HELD)
    project.weighin("approve", "--reason", "seen by Ada")
    project.commit("Approved")


Decide = Callable[[Project], None]
FIRST: tuple[Decide, ...] = (promote, refuse, improve)
BACK: tuple[Decide, ...] = (*FIRST, roll_back)
ALL: tuple[Decide, ...] = (*BACK, hold)


class Record(NamedTuple):
    """What the commit's recipe is changed to, and the decisions that its code can make."""

    params: dict[str, Any]
    decisions: tuple[Decide, ...] = ALL

    @property
    def profiles(self) -> bool:
        """Whether the device is measured first, which a budget needs for its backbone."""
        return "compress" in self.params

    @property
    def audits(self) -> bool:
        """Whether the commit has an audit; it came with the rollback."""
        return roll_back in self.decisions


RECORDS = {
    "40a8c8b": Record(BY_CLASS, FIRST),
    "7b43fbf": Record(BY_CLASS, FIRST),
    "cf50a27": Record(BY_CLASS, FIRST),
    "4cf5bde": Record(COMPARED, BACK),
    "a6e0eac": Record(COMPARED),
    "2184867": Record(COMPARED),
    "d04c07c": Record(BUDGET),
    "c1013a2": Record(COMPARED | CODEBOOK),
    "46eb9bb": Record(COMPARED | QAT),
    "3f86773": Record(BUDGET),
    "31949c2": Record(COMPARED | {"prune.weights": {"threshold": 0.1}}),
    "2a6f7f8": Record(COMPARED | {"quantize.factor": 127.0}),
    "c861d07": Record(COMPARED | CODEBOOK | QAT),
    "3c445ea": Record(BUDGET | CODEBOOK | QAT),
    "8b26bfd": Record(BUDGET | CODEBOOK),
    "eae514a": Record(BUDGET | BALANCED),
    "904e84e": Record(BUDGET | BALANCED),
    "f93ee6c": Record(BUDGET | BALANCED | {"gate.min_balanced_accuracy": 0.4}),
    "2a4ab69": Record(BUDGET | BALANCED | GRID | {"finetune.training.threads": 1}),
    "5dbbd71": Record(BUDGET | BALANCED | GRID | {"finetune.training.devices": 2, "finetune.training.threads": 2}),
}


def lay_code(commit: str, target: Path) -> None:
    """The commit's files, but for those that neither run nor are read by what runs."""
    excluded = [f":(exclude){name}" for name in LEFT_OUT]
    command = ["git", "archive", commit, "--", ".", *excluded]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(target, filter="data")


def lay_digits(target: Path) -> None:
    """The first of scikit-learn's digits as an IDX pair."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = (found.images[:IMAGES] * 15).astype("uint8"), found.target[:IMAGES].astype("uint8")
    for name, array in (("digits-images-idx3-ubyte", pixels), ("digits-labels-idx1-ubyte", labels)):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (target / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def begin(commit: str, record: Record, project: Project) -> None:
    """The project as somebody would have begun it that day."""
    root = project.root
    lay_code(commit, root)
    (root / DIGITS).mkdir(parents=True)
    lay_digits(root / DIGITS)
    shutil.copy(root / RECIPE, root / "params.yaml")
    project.git("init", "--quiet", "--initial-branch=main")
    for key, value in (("user.name", "Ada"), ("user.email", "ada@example.org")):
        project.git("config", key, value)
    project.change(record.params)
    if record.profiles:
        project.weighin("profile")
    project.commit(f"Weighin as of {commit}, and some digits")


def cached_files(project: Project) -> list[str]:
    """The files of DVC's cache that decisions name, by their paths in it."""
    yaml, found = YAML(typ="safe"), set[str]()
    for commit in project.git("rev-list", "registry").split():
        stages = yaml.load(project.git("show", f"{commit}:dvc.lock"))["stages"].values()
        found |= {out["md5"] for stage in stages for out in stage.get("outs", [])}
    for folder in [name for name in found if name.endswith(".dir")]:
        found |= {entry["md5"] for entry in json.loads((project.root / CACHE / cache_path(folder)).read_bytes())}
    return sorted(map(cache_path, found))


def cache_path(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"


def commit_cache(project: Project) -> None:
    """The branch `cache`: a commit without parents that has those files as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}
        lines = []
        for name in cached_files(project):
            blob = project.git("hash-object", "-w", "--no-filters", str(CACHE / name))
            lines.append(f"100644 {blob}\t{name}\n")
        project.git("update-index", "--add", "--index-info", stdin="".join(lines).encode(), **index)
        tree = project.git("write-tree", **index)
    commit = project.git("commit-tree", tree, "-m", "The files of DVC's cache that decisions name")
    project.git("branch", "cache", commit)


def bundle(project: Project, target: Path) -> None:
    """Every branch and tag, and the revisions that the registry keeps, as small as git can."""
    refs = project.git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags", "refs/weighin").split()
    small = ("-c", "pack.window=250", "-c", "pack.depth=50", "-c", "pack.compression=9", "-c", "pack.threads=1")
    project.git(*small, "bundle", "create", "--quiet", str(target), *refs)


def make(commit: str, environment: dict[str, str]) -> Path:
    """Make the record of a commit; it is kept only if it is whole."""
    record, target = RECORDS[commit], FOLDER / f"{commit}.bundle"
    with tempfile.TemporaryDirectory(prefix="record-") as scratch:
        project = Project(Path(scratch) / "weighin", environment)
        project.root.mkdir()
        begin(commit, record, project)
        for decide in record.decisions:
            print(f"{commit}: {decide.__name__}", flush=True)
            decide(project)
        commit_cache(project)
        made = Path(scratch) / target.name
        bundle(project, made)
        opened = Project(unpack(made, Path(scratch) / "opened"), environment)
        if record.audits:
            print(opened.weighin("audit", "--all"), flush=True)
        shutil.copy(made, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
    return target


def lean_packages(target: Path) -> Path:
    """A folder for PYTHONPATH with a Great Expectations that has no pictures and fonts."""
    spec = importlib.util.find_spec("great_expectations")
    if spec is None or spec.origin is None:
        raise RuntimeError("Great Expectations is not installed")
    package = Path(spec.origin).parent
    shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__", *HEAVY))
    return target


def main(commits: Iterable[str]) -> None:
    wanted = list(commits) or [name for name in RECORDS if not (FOLDER / f"{name}.bundle").exists()]
    with tempfile.TemporaryDirectory(prefix="records-") as scratch, server(Path(scratch) / "prefect") as api:
        search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "WEIGHIN_"))}
        site = lean_packages(Path(scratch) / "packages")
        environment = kept | ENVIRONMENT | {"PATH": search, "PREFECT_API_URL": api, "PYTHONPATH": str(site)}
        for commit in wanted:
            made = make(commit, environment)
            print(f"{made.name}: {made.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
