"""The only bridge to DVC: its stages are run here, its cache and remotes are read here, and it is imported here only.

Each function imports DVC when it is called, which takes half a second.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from flows import leash
from tasks.core import files, quiet
from tasks.core.errors import SMALLER, RegistryError, StageError
from tasks.core.paths import DEVICE, PARAMS

T = TypeVar("T")
Say = Callable[[str], None]
BUSY_WAIT_S = 2.0
GLIBC = (2, 35)  # older ones take no threshold over 32 MiB
ENVIRONMENT = quiet.SETTINGS | {
    "PYTHONUNBUFFERED": "1",
    "GOMP_SPINCOUNT": "1000",  # not 300,000: beside other load, threads that spin make training many times slower
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
KILLED = re.compile(r"failed to run: python -m tasks\.(?P<stage>\w+), exited with (?:-9|137)\b")
CACHED = "is cached - skipping run"


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


def _with_repository(use: Callable[[object], T], say: Callable[[str], None]) -> T:
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
            raise StageError(f"DVC cannot go on: {_one_line(error)}") from None


def run(name: str, say: Callable[[str], None]) -> bool:
    """Run the stage through DVC, handing on its output line by line; True if DVC had the result in its cache.

    Whatever ends this early (Ctrl-C, cancellation) ends the stage's whole process group. If the stage did not
    succeed, the results of its last good run are put back. `StageError` with the stage's own sentence if it failed.
    """
    said = False
    while True:
        try:
            status, lines = command(["repro", "--single-item", name], say)
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


def command(
    arguments: list[str],
    say: Callable[[str], None],
    folder: Path | None = None,
    started: Callable[[subprocess.Popen[str]], None] = lambda _: None,
    threads: int | None = None,
) -> tuple[int, list[str]]:
    """DVC's exit status and its lines, which are handed on one by one; it works in the folder, or here.

    Stages use so many `threads` where their parameters leave that open; if None, as many as there are cores.

    Whatever ends this early, `started` and `kill -9` included, ends the whole process group.
    """
    lines: list[str] = []
    process = leash.start(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        env={
            **os.environ,
            **ENVIRONMENT,
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
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
        leash.end(process)


def reason(lines: list[str]) -> str:
    """The sentence that a stage prints when it cannot go on, or else the last line that says anything.

    A stage that was killed could not print any.
    """
    killed = next((stage for line in lines if (stage := KILLED.search(line))), None)
    if killed:
        sizes = SMALLER.get(killed["stage"], "finetune.image_size")
        return f"it was killed, as the kernel does where memory runs out: then lower {sizes} in {PARAMS}"
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else next((line for line in reversed(lines) if line.strip()), "it ended without a word")


def cache(root: Path) -> Callable[[str], Path]:
    """Return the function that says for an MD5 where DVC's cache has that file, whether it is there or not."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        store = repo.cache.local
        return lambda md5: Path(store.oid_to_path(md5))


def remote(root: Path) -> Callable[[str], IO[bytes]]:
    """Return the function that opens a file of DVC's default remote by its MD5; it raises `FileNotFoundError`.

    `RegistryError` if there is no remote.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        try:
            store = repo.cloud.get_remote_odb()
        except DvcException as error:
            raise RegistryError(f"DVC has no remote to look at: {_one_line(error)}") from None

    def opened(md5: str) -> IO[bytes]:
        found: IO[bytes] = store.fs.open(store.oid_to_path(md5), "rb")
        return found

    return opened


def copy_output(root: Path, commit: str, path: Path, target: Path, name: str) -> None:
    """Copy `path` as a commit's dvc.lock names it to `target`, out of DVC's cache or remote.

    `name` is what messages call the commit. `RegistryError` if it cannot be had, or is not what dvc.lock names: DVC
    takes a cache object for intact if its size and time are. Then `target` is as it was.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        dvc = DVCFileSystem(url=str(root), rev=commit)
        with files.replacing(target) as (temporary,):
            dvc.get_file(path.as_posix(), str(temporary))
            recorded, found = dvc.info(path.as_posix()).get("md5"), files.md5(temporary)
            if recorded not in (None, found):
                raise RegistryError(f"{path} of {name} is damaged in DVC's cache (md5 {found}, recorded {recorded})")
    except (DvcException, OSError) as error:
        raise RegistryError(f"{path} of {name} cannot be brought: {_one_line(error)}") from None


def push(root: Path, names: Iterable[str]) -> list[str]:
    """Bring the files of these MD5 to DVC's default remote, and return those that did not get there.

    `RegistryError` if the remote cannot be used at all.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        with Repo(str(root)) as repo:
            result = repo.cloud.push([HashInfo("md5", name) for name in names])
    except DvcException as error:
        raise RegistryError(f"the outputs did not reach DVC's remote: {_one_line(error)}") from None
    return [str(one.value) for one in result.failed]


def check_out(folder: Path, stages: Iterable[str]) -> None:
    """Bring what the stages left out of the cache of the DVC repository in `folder`; `StageError` if it lacks it."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(folder)) as repo:
            repo.checkout(targets=[f"{folder}/dvc.yaml:{name}" for name in stages])  # names alone mean those here
    except DvcException as error:
        raise StageError(f"DVC's cache lacks results of {', '.join(stages)}: {_one_line(error)}") from None


def cache_folder(root: Path) -> str:
    """Return the folder of the cache of the DVC repository at `root`."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return str(repo.cache.local_cache_dir)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
