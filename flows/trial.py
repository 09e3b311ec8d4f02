"""A trial of the search: one budget through prune, quantize and reduce, in a folder of its own that shares DVC's cache.

The folder is no git worktree: it holds the code and the parameters as the search found them, changes that are not
committed included, and neither the working copy nor git hears of it.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from flows import dvc_bridge, leash
from flows.dvc_bridge import command, reason
from flows.retrain import hide_user_error_tracebacks
from tasks.budget.plan import read_plan
from tasks.core import files, paths
from tasks.core.errors import StageError

STAGES = ("prune", "quantize", "reduce")
GIVEN = ("ingest", "finetune")  # whose results a trial begins with
PREFIX = "weighin.trial."
SCRATCH = Path(".dvc/tmp")

_ended: set[str] = set()
_processes: dict[str, list[subprocess.Popen[str]]] = {}


class Result(NamedTuple):
    """What a trial is weighed by: bytes of the reduced file, milliseconds by the device's table, top-1 on val."""

    size_bytes: int
    latency_ms: float
    val_top1: float
    model: bytes


@task(name="trial", task_run_name="trial {number}", cache_policy=NO_CACHE, persist_result=False)
def trial(number: int, root: str, search: str, content: dict[str, bytes]) -> Result:
    """See `run`; the search is named by its flow run, and the trial by its number in the study."""
    hide_user_error_tracebacks()
    return run(Path(root), search, content, get_run_logger().info)


def run(root: Path, search: str, content: dict[str, bytes], say: Callable[[str], None]) -> Result:
    """The trial whose code and parameters are `content`, by path; `root` is where the search was started.

    It is made in the repository that this process runs in, or else in `root`. Stages that ran before with the same
    inputs come out of DVC's cache. `StageError` with a stage's own sentence, or if `end` was called for the search.
    """
    home = next((one for one in (Path.cwd(), root) if (one / "dvc.yaml").exists()), None)
    if home is None:
        raise StageError(f"neither {Path.cwd()} nor {root} is a Weighin repository here: start Dask's worker in one")
    with _folder(home, content) as folder:
        _bring(folder, home)
        started = _processes.setdefault(search, [])

        def enlist(process: subprocess.Popen[str]) -> None:
            started.append(process)
            if search in _ended:
                raise StageError("the search has ended")

        status, lines = command(["repro", "--single-item", *STAGES], say, folder, enlist)
        if status:
            raise StageError(reason(lines))
        return _measure(folder)


def end(search: str) -> None:
    """End what the trials of a search do in this process, for good: a thread does not hear of Ctrl-C."""
    _ended.add(search)
    for process in _processes.pop(search, []):
        leash.end(process)


def sweep(root: Path) -> None:
    """Remove the folders of trials that were killed."""
    for left in (root / SCRATCH).glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _folder(home: Path, content: dict[str, bytes]) -> Iterator[Path]:
    scratch = home / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=scratch) as name:
        folder = Path(name)
        for path, data in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        yield folder


def _bring(folder: Path, home: Path) -> None:
    """Make the folder a DVC repository with the cache of `home`, and lay what a trial begins with there."""
    cache = dvc_bridge.cache_folder(home)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(
        f"[core]\n    no_scm = true\n    analytics = false\n    site_cache_dir = {folder / '.dvc' / 'site'}\n"
        f"[cache]\n    dir = {cache}\n    type = reflink,hardlink,symlink,copy\n"
    )
    try:
        dvc_bridge.check_out(folder, GIVEN)
    except StageError as error:
        raise StageError(f"{cache} lacks what a trial begins with: `dvc fetch` brings it ({error})") from None


def _measure(folder: Path) -> Result:
    model = (folder / paths.onnx("reduce")).read_bytes()
    latency_ms = read_plan(folder / paths.PLAN).latency_ms
    top1: Any = files.read_json(folder / paths.report("quantize"))["val_top1"]  # reduce is exact: it is its top-1 too
    return Result(len(model), latency_ms, float(top1), model)
