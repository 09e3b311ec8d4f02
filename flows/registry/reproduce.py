"""Reproduction: the whole of a version once more, from its code, parameters and data, and compared with the record."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flows import dvc_bridge
from flows.registry import git, materials, provenance
from flows.registry.audit import audit
from flows.registry.chain import Standing
from flows.registry.decision import DECISION, MODEL, Champion, Decision, parse_decision, parse_document
from flows.registry.environment import describe_environment
from flows.registry.materials import Materials
from flows.registry.parameters import Recorded, read_recorded
from flows.registry.view import read_view
from tasks.core import files, paths
from tasks.core.errors import RegistryError

# What is measured anew each time: it cannot be the same to the byte, and what is not time or memory in it comes from
# files that are compared. Data Docs carry the time at which they were made.
MEASURED = (paths.report("benchmark"), paths.report("gate"), paths.METRICS, paths.STAGES, paths.DATA_DOCS)
KIND = ("processor", "python", "packages")  # what may change a bit of a result, of what environment.json tells


class Comparison(NamedTuple):
    """One artifact: recorded and reproduced SHA-256; None if it was not made again."""

    stage: str
    path: str
    recorded: str
    reproduced: str | None

    @property
    def same(self) -> bool:
        return self.recorded == self.reproduced


class Result(NamedTuple):
    """How a reproduction went. `differs` tells in what the machine is another kind; then top-1 decides."""

    holds: bool
    differs: list[str]
    top1_recorded: float
    top1_reproduced: float
    tolerance: float
    artifacts: list[Comparison]

    @property
    def first(self) -> Comparison | None:
        """The first artifact, in the order of the stages, that is not the same."""
        return next((one for one in self.artifacts if not one.same), None)


def reproduce(root: Path, model: str, version: str, say: Callable[[str], None] = print) -> Result:
    """Run the whole pipeline again as `version` had it, in a clean worktree with an empty cache, and compare.

    Byte for byte where machine and packages are of the same kind; otherwise the reduced model's top-1 has to be within
    the tolerance that the record states. `RegistryError` if something that it was made of cannot be had.
    """
    tag = f"{model}@{version}"
    view = read_view(root, model, None)
    promotions = view.standing.promotions
    if version not in promotions:
        raise RegistryError(f"the registry has no version {tag}; there are: {', '.join(promotions) or 'none'}")
    commit = promotions[version].commit
    view.require_sound(since=commit)
    damage = [one for one in audit(root, model, commit, working_copy=False).damage if one.decision == tag]
    if any(not one.found.startswith("missing in DVC") for one in damage):
        raise RegistryError(f"the record of {tag} does not hold, so none of its code is run: `weighin audit {version}`")
    record = git.files(root, commit)
    decision = parse_decision(record[DECISION])
    if decision.schema_version == 0:
        raise RegistryError(
            f"{tag} is of the first days, when neither code nor sources were recorded: it cannot be made again"
        )
    made_of = provenance.materials_of(json.loads(record["provenance.json"]))
    params = read_recorded(record["params.yaml"], f"{commit[:12]}:params.yaml")
    with _worktree(root, decision) as clean:
        device = [str(paths.DEVICE)] if str(paths.DEVICE) in record else []  # not carried by all of schema 1
        for path in ("params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", *device, *made_of.code):
            if path not in record:
                raise RegistryError(f"the record of {tag} lacks {path}: `weighin audit {version}`")
            files.write_bytes(clean / path, record[path])
        _lay_champion(root, view.standing, record, clean)
        _lay_start(root, made_of, params.finetune.weights.stage, clean)
        _lay_splits(root, commit, made_of, clean, tag)
        _bring_sources(root, clean, params.ingest.path, made_of)
        say(f"reproducing {tag} in {clean}")
        _run(clean, say, _threads_of(record))
        return _compare(clean, record, made_of, params)


@contextmanager
def _worktree(root: Path, decision: Decision) -> Iterator[Path]:
    """A clean worktree at the decision's code, gone afterwards; the record's own files are laid over it."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        clean = Path(scratch) / "worktree"
        try:
            git.git(root, "worktree", "add", "--quiet", "--detach", str(clean), str(decision.code.commit))
        except RegistryError as error:
            raise RegistryError(
                f"the code of this version, commit {decision.code.commit}, is not here: {error}"
            ) from None
        try:
            local = root / ".dvc" / "config.local"
            if local.exists():
                shutil.copy(local, clean / ".dvc" / "config.local")
            yield clean
        finally:
            git.git(root, "worktree", "remove", "--force", str(clean))


def _lay_start(root: Path, made_of: Materials, stage: str, clean: Path) -> None:
    """The weights that training began with, where those were of a version in the registry: of that one, not today's."""
    start = made_of.weights
    if start.get("source") != "production":
        return
    name = f"{start['model']}@{start['version']}"
    link = read_view(root, start["model"], None).standing.promotions.get(start["version"])
    if link is None:
        raise RegistryError(f"{name}, which the version was warmed from, is not in the registry")
    dvc_bridge.copy_output(root, link.commit, paths.weights(stage), clean / paths.START, name)
    if (found := files.sha256(clean / paths.START)) != start["sha256"]:
        raise RegistryError(f"{paths.weights(stage)} of {name} has SHA-256 {found}, but {start['sha256']} was recorded")
    files.write_bytes(clean / paths.START_VERSION, start["version"].encode())


def _lay_splits(root: Path, commit: str, made_of: Materials, clean: Path, name: str) -> None:
    """The ledger of splits as the run left it: with nothing new in the source, ingest comes to the same again."""
    if any(one.path == paths.LEDGER.as_posix() for one in made_of.outputs):
        dvc_bridge.copy_output(root, commit, paths.LEDGER, clean / paths.KNOWN_SPLITS, name)


def _lay_champion(root: Path, standing: Standing, record: dict[str, bytes], clean: Path) -> None:
    champion = parse_document(Champion, record["champion.json"], "champion.json")
    files.write_bytes(clean / paths.CHAMPION_RECORD, record["champion.json"])
    if champion.version:
        if champion.version not in standing.promotions:
            raise RegistryError(f"the champion that it faced, {champion.version}, is not in the registry")
        commit = standing.promotions[champion.version].commit
        dvc_bridge.copy_output(root, commit, MODEL, clean / paths.CHAMPION_MODEL, champion.version)


def _bring_sources(root: Path, clean: Path, source: str, made_of: Materials) -> None:
    """The source files as they were: from git, else from DVC's remote, else from here; each is verified."""
    if not (clean / source).exists() and (clean / f"{source}.dvc").exists():
        _call(clean, "pull", f"{source}.dvc")
    for path, sha256 in materials.list_sources(root, made_of).items():
        inside = (clean / path).resolve().is_relative_to(clean.resolve())
        if inside and not (clean / path).exists() and (root / path).is_file():
            (clean / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, clean / path)
        found = files.sha256(clean / path) if (clean / path).is_file() else "missing"
        if found != sha256:
            raise RegistryError(f"{path} is not what the version was made of: SHA-256 {sha256} recorded, {found} found")


def _threads_of(record: dict[str, bytes]) -> int | None:
    """How many threads training had where its parameters left that open: other numbers give other bits."""
    then = json.loads(record["environment.json"])
    asked = str(then.get("threads", {}).get("OMP_NUM_THREADS", ""))
    return int(asked) if asked.isdigit() else then.get("cores", {}).get("usable")


def _run(clean: Path, say: Callable[[str], None], threads: int | None) -> None:
    status, lines = dvc_bridge.command(["repro", "--force", "--no-run-cache", "gate"], say, clean, threads=threads)
    if status:
        raise RegistryError(f"the version does not run again: {dvc_bridge.reason(lines)}")


def _call(clean: Path, *args: str) -> None:
    status, lines = dvc_bridge.command([*args], lambda _: None, clean)
    if status:
        raise RegistryError(f"dvc {' '.join(args)} did not work: {dvc_bridge.reason(lines)}")


def _compare(clean: Path, record: dict[str, bytes], made_of: Materials, params: Recorded) -> Result:
    now, then = describe_environment(), json.loads(record["environment.json"])
    differs = [name for name in KIND if now.get(name) != then.get(name)]
    compared = [one for one in made_of.outputs if not any(Path(one.path).is_relative_to(path) for path in MEASURED)]
    artifacts = [
        Comparison(
            one.stage,
            one.path,
            str(one.sha256),
            files.sha256(clean / one.path) if (clean / one.path).is_file() else None,
        )
        for one in compared
        if not one.md5.endswith(".dir")
    ]
    before = json.loads(record["metrics.json"])["stages"]["reduce"]["top1"]
    after = files.read_json(clean / paths.report("benchmark"))["stages"]["reduce"]["top1"]
    tolerance = params.registry.reproduce_tolerance
    same = all(one.same for one in artifacts)
    holds = same or (bool(differs) and abs(after - before) <= tolerance)
    return Result(holds, differs, before, after, tolerance, artifacts)
