"""The only bridge between Prefect and DVC: one Prefect task for one DVC stage."""

import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from tasks.core.errors import StageError
from tasks.core.paths import DEVICE

T = TypeVar("T")
LOCK = Path(".dvc/tmp/weighin.lock")
GRACE_S = 10.0
BUSY_WAIT_S = 2.0
GLIBC = (2, 35)  # older ones take no threshold over 32 MiB
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "GOMP_SPINCOUNT": "30000",  # a tenth of the default: beside other load, spinning makes training many times slower
}
if tuple(int(part) for part in platform.libc_ver()[1].split(".") if part.isdigit()) >= GLIBC:
    # It would give a batch's memory back to the kernel and ask for it again: evaluation takes 1.7 times as long.
    ENVIRONMENT |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1073741824")
HINTS = (
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
BUSY = ("Unable to acquire lock", "it is being blocked by")  # DVC has no exit status of its own for this
CACHED = "is cached - skipping run"


def stage(name: str) -> Callable[[], Any]:
    """The Prefect task that brings a DVC stage up to date; its state is named Skipped if there was nothing to do."""

    @task(name=name, task_run_name=name)
    def reproduce() -> State[None]:
        say = get_run_logger().info
        if is_current(name, say):
            return Completed(name="Skipped", message="nothing changed")
        if run(name, say):
            return Completed(name="Skipped", message="brought back from DVC's cache")
        return Completed(message="ran")

    return reproduce


@contextmanager
def exclusive(say: Callable[[str], None], lock: Path = LOCK) -> Iterator[None]:
    """One run at a time in a working copy; waits for the other one, and says so."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"another run (process {file.read().strip() or 'unknown'}) is at work here: waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_current(name: str, say: Callable[[str], None]) -> bool:
    """Whether the stage's results are there and belong to its code, parameters and inputs as they are now.

    `StageError` if an input does not exist.
    """

    def ask(repo: Any) -> bool:
        found = repo.stage.load_one(name=name)
        for dependency in found.deps:
            if not dependency.exists:
                mended = "git has it" if dependency.def_path == str(DEVICE) else "see params.yaml for its path"
                raise StageError(f"{dependency.def_path} does not exist, but {name} reads it: {mended}")
        return not found.changed()

    return _with_repository(ask, say)


def restore(name: str, say: Callable[[str], None]) -> None:
    """Put back the results of the last good run, which DVC removed before the stage ran."""

    def bring(repo: Any) -> None:
        if repo.stage.load_one(name=name).outs[0].hash_info:
            repo.checkout(targets=[name], force=True, allow_missing=True)

    _with_repository(bring, say)


def _with_repository(use: Callable[[Any], T], say: Callable[[str], None]) -> T:
    """What `use` makes of the locked DVC repository; waits while another DVC command holds a lock that it needs."""
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    said = False
    while True:
        try:
            with Repo() as repo, lock_repo(repo):
                return use(repo)
        except LockError:
            if not said:
                say("another DVC command holds the lock of these files: waiting for it to end")
            said = True
            time.sleep(BUSY_WAIT_S)
        except DvcException as error:
            raise StageError(f"DVC cannot go on: {' '.join(str(error).split())}") from None


def run(name: str, say: Callable[[str], None]) -> bool:
    """Run the stage through DVC, handing on its output line by line; True if DVC had the result in its cache.

    Whatever ends this early (Ctrl-C, cancellation) ends the stage's whole process group. If the stage did not
    succeed, the results of its last good run are put back. `StageError` with the stage's own sentence if it failed.
    """
    said = False
    while True:
        try:
            status, lines = dvc(["repro", "--single-item", name], say)
        except BaseException:  # Ctrl-C and cancellation too; it goes on rising
            restore(name, say)
            raise
        if status == 0:
            return any(CACHED in line for line in lines)
        if not any(busy in line for line in lines for busy in BUSY):
            restore(name, say)
            raise StageError(f"{name}: {reason(lines)}")
        if not said:
            say("another DVC command is working on the same files: waiting for it to end")
        said = True
        time.sleep(BUSY_WAIT_S)


def dvc(
    arguments: list[str],
    say: Callable[[str], None],
    folder: Path | None = None,
    started: Callable[[subprocess.Popen[str]], None] = lambda _: None,
) -> tuple[int, list[str]]:
    """DVC's exit status and its lines, which are handed on one by one; it works in the folder, or here.

    Whatever ends this early, `started` included, ends the whole process group.
    """
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
    )
    try:
        started(process)
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if line.strip() and not line.strip().startswith(HINTS):
                say(line.rstrip())
        return process.wait(), lines
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """End whatever is left of the process group, politely first: a stage removes its temporary files on SIGTERM."""
    with suppress(ProcessLookupError):
        for ending in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, ending)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline:
                process.poll()  # a leader that nobody has waited for would still count as there
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def reason(lines: list[str]) -> str:
    """The sentence that a stage prints when it cannot go on, or else the last line that says anything."""
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else next((line for line in reversed(lines) if line.strip()), "it ended without a word")
