"""The working copy that a run uses: one run at a time in it, and whose parameters they are."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.registry import git
from tasks.core import config, files, paths
from tasks.core.errors import ParamsError

LOCK = Path(".dvc/tmp/weighin.lock")
ADOPTED = Path(".dvc/tmp/weighin.params.yaml")


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


def adopt(recipe: Path) -> bytes:
    """Make the recipe the repository's params.yaml, which is what the stages and DVC read; returns its content.

    `ParamsError` if the recipe is not usable, or if params.yaml holds changes that exist nowhere else.
    """
    config.load(recipe)
    wanted, present = recipe.read_bytes(), paths.PARAMS.read_bytes() if paths.PARAMS.exists() else b""
    if wanted == present:
        return wanted
    # Lost is nothing that is a recipe, or was one when it was adopted.
    elsewhere = [path.read_bytes() for path in (ADOPTED, *paths.RECIPES.glob("*.yaml")) if path.exists()]
    if present and present not in elsewhere and not git.is_committed(Path.cwd(), paths.PARAMS):
        raise ParamsError(
            f"{paths.PARAMS} has changes that are not committed: commit them or keep them as a recipe before "
            f"{recipe} takes their place"
        )
    files.write_bytes(ADOPTED, wanted)
    files.write_bytes(paths.PARAMS, wanted)
    return wanted
