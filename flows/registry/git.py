"""git by its plumbing: objects read in one process, written bare, and refs moved all at once or not at all.

The user's branch, index and work tree are never touched. What goes wrong is a `RegistryError` with git's own words.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tasks.core.errors import RegistryError

# Settings of the user that could stop a decision or change its bytes; older gits pass over the ones they do not know.
SETTINGS = (
    "core.fsync=objects,reference",
    f"core.hooksPath={os.devnull}",
    "i18n.commitEncoding=UTF-8",
    "push.gpgSign=false",
    "advice.graftFileDeprecated=false",
)
# Set while git runs a hook or an alias; with them, git would work on that repository, whatever the root.
AS_THEY_ARE = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull}  # objects, not what stands in for them
INHERITED = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")
RACES = ("but expected", "already exists", "stale info", "fetch first", "failed to update ref")
LOCKED = re.compile(
    r"Unable to create '([^']+/refs/(?:heads/registry|tags/[^/']+|remotes/[^']+|weighin/[^']+)\.lock)': File exists"
)
WAIT_S = 10.0  # git holds the lock of a ref for milliseconds; one that stays longer is told
TURN_S = 300.0  # another decision may be pushing meanwhile
MOVING = ("update-ref", "fetch", "push")  # the commands that move refs
MOVER = "weighin-mover.json"  # in git's own folder: whether a git of ours moves refs, and when one died of it


class Overtaken(RegistryError):
    """A ref was no longer what it was when the decision was made: another one came first."""


class Object(NamedTuple):
    """A git object: its name, its kind and its content."""

    name: str
    kind: str
    data: bytes

    def is_sound(self) -> bool:
        """Whether it hashes to its name, which git does not look at."""
        algorithm = hashlib.sha256 if len(self.name) == 64 else hashlib.sha1
        return algorithm(f"{self.kind} {len(self.data)}\0".encode() + self.data).hexdigest() == self.name


class Objects:
    """Reads a repository's objects, all in one process of git; use it in a `with` statement."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Self:
        command, environment = _command(self.root, "cat-file", "--batch"), _environment()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def find(self, name: str) -> Object | None:
        """The object of a name such as `COMMIT:decision.json`; None if there is none, or it is damaged."""
        reading, writing = self._process.stdout, self._process.stdin
        if reading is None or writing is None or "\n" in name:
            raise RegistryError(f"{name!r} cannot be read from git")
        try:
            writing.write(name.encode() + b"\n")
            writing.flush()
        except BrokenPipeError:
            pass  # the empty line below tells
        line = reading.readline().decode(errors="replace").rstrip("\n")
        fields = line.split(" ")
        if line and (len(fields) != 3 or not fields[2].isdigit()):
            return None
        data = reading.read(int(fields[2]) + 1) if line else b""
        if not line or len(data) != int(fields[2]) + 1:  # git ends at an object that is damaged
            self.__exit__(None, None, None)
            self.__enter__()
            return None
        found = Object(fields[0], fields[1], data[:-1])
        return found if found.is_sound() else None

    def read(self, name: str) -> bytes:
        """The content of an object that has to be there."""
        found = self.find(name)
        if found is None:
            hint = "`git fetch --unshallow` brings what a shallow clone lacks"
            raise RegistryError(f"git has no sound object {name} in {self.root}: {hint}")
        return found.data


def git(root: Path, *args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> str:
    """What git says, without the last newline; waits for the lock of a ref, and removes one that a killed git left.

    `RegistryError` in git's own words; it names the lock that somebody else holds.
    """
    verb = next(arg for arg in args if not arg.startswith("-"))
    if verb not in MOVING:
        return _run(root, verb, args, stdin, env)
    with _mover(root) as mover:
        return _run(root, verb, args, stdin, env, mover)


class Mover(NamedTuple):
    """The right to move refs, which one process has at a time, and when one that had it died of a kill."""

    descriptor: int
    died: tuple[int, int] | None  # from when to when, in nanoseconds of the file system's clock, it can have left locks

    def has_left(self, lock: Path) -> bool:
        """Whether the lock was left by a git of ours that was killed: none lives, and then it was made."""
        try:
            made = lock.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        return self.died is not None and self.died[0] <= made <= self.died[1]


@contextmanager
def _mover(root: Path) -> Iterator[Mover]:
    """Wait for the right to move refs in this repository.

    It is a lock of the operating system on a file, which git inherits: nobody gets it while a git of ours lives, even
    one that is only paused. The file says whether the last one came to its end.
    """
    path = _git_folder(root) / MOVER
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take_turn(descriptor, path)
        before, began = _read_mover(descriptor), os.fstat(descriptor).st_mtime_ns
        _write_mover(descriptor, {"moving": True, "died": before["died"]})
        died = before["died"]
        if before["moving"]:
            died = [died[0] if died else began, os.fstat(descriptor).st_mtime_ns]
            _write_mover(descriptor, {"moving": True, "died": died})
        try:
            yield Mover(descriptor, (died[0], died[1]) if died else None)
        finally:
            _write_mover(descriptor, {"moving": False, "died": died})
    finally:
        os.close(descriptor)


def _take_turn(descriptor: int, path: Path) -> None:
    give_up = time.monotonic() + TURN_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise RegistryError(f"another decision has been moving refs for {TURN_S:.0f} s ({path})") from None
            time.sleep(0.05)
        else:
            return


@functools.cache
def _git_folder(root: Path) -> Path:
    return root / _run(root, "rev-parse", ("rev-parse", "--git-common-dir"))


def _read_mover(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 1000, 0) or b"{}")
        died = content.get("died")
        return {"moving": content.get("moving") is True, "died": [int(died[0]), int(died[1])] if died else None}
    except (ValueError, TypeError, LookupError, AttributeError):  # cut off while it was written: then nothing has moved
        return {"moving": False, "died": None}


def _write_mover(descriptor: int, content: dict[str, object]) -> None:
    data = json.dumps(content).encode()
    os.pwrite(descriptor, data.ljust(os.fstat(descriptor).st_size), 0)  # in one write, so that it is never half there


def _run(
    root: Path,
    verb: str,
    args: tuple[str, ...],
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    mover: Mover | None = None,
) -> str:
    give_up = time.monotonic() + WAIT_S
    while True:
        done = subprocess.run(
            _command(root, *args),
            input=stdin,
            capture_output=True,
            check=False,
            env=_environment() | (env or {}),
            pass_fds=(mover.descriptor,) if mover else (),
        )
        if done.returncode == 0:
            return done.stdout.decode(errors="replace").strip()
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if not line.startswith("hint: ")]
        said = " ".join(" ".join(lines).split()).replace("fatal: ", "")
        lock = LOCKED.search(said)
        if lock is None:
            break
        if mover and mover.has_left(root / lock[1]):
            (root / lock[1]).unlink(missing_ok=True)
        elif time.monotonic() > give_up:
            raise RegistryError(
                f"another git holds {root / lock[1]}, or was killed and left it: if none is at work, remove that file"
            )
        else:
            time.sleep(0.05)
    kind = Overtaken if verb in ("push", "update-ref") and any(race in said for race in RACES) else RegistryError
    raise kind(f"git {verb} did not work in {root}: {said[:300] or f'status {done.returncode}'}")


def _command(root: Path, *args: str) -> list[str]:
    return ["git", "-C", str(root), *(word for setting in SETTINGS for word in ("-c", setting)), *args]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in INHERITED}
    return kept | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"} | AS_THEY_ARE


def identity(root: Path) -> dict[str, str]:
    """Names for the author and committer where git has none, as on a fresh runner."""
    names: dict[str, str] = {}
    for role in ("AUTHOR", "COMMITTER"):
        try:
            git(root, "var", f"GIT_{role}_IDENT")
        except RegistryError:
            names |= {f"GIT_{role}_NAME": "Weighin", f"GIT_{role}_EMAIL": "weighin@localhost"}
    return names


def tree(root: Path, folder: Path) -> str:
    """Write all files of a folder, byte for byte, as a tree; says its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{path}\n" for path in paths)
    blobs = git(root, "hash-object", "-w", "--no-filters", "--stdin-paths", stdin=listing.encode()).split()
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        entries = (
            f"100644 {blob}\t{path.relative_to(folder).as_posix()}\n" for path, blob in zip(paths, blobs, strict=True)
        )
        git(root, "update-index", "--index-info", stdin="".join(entries).encode(), env=index)
        return git(root, "write-tree", env=index)


def files(root: Path, revision: str) -> dict[str, bytes]:
    """The files of a revision by their paths, from the object store."""
    listed = git(root, "ls-tree", "-r", "-z", revision)
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    with Objects(root) as objects:
        return {path: objects.read(meta.split(" ")[2]) for meta, path in entries}


def tag(root: Path, name: str, commit: str, message: str, who: dict[str, str]) -> str:
    """Write an annotated tag object; says its name."""
    tagger = git(root, "var", "GIT_COMMITTER_IDENT", env=who)
    content = f"object {commit}\ntype commit\ntag {name}\ntagger {tagger}\n\n{message}\n"
    return git(root, "mktag", stdin=content.encode(), env=who)


def move(root: Path, moves: list[str], message: str, who: dict[str, str]) -> None:
    """Move refs, all of them or none: each names the value that it expects, or else `Overtaken`."""
    transaction = "\n".join(["start", *moves, "prepare", "commit", ""])
    git(root, "update-ref", "-m", message, "--stdin", stdin=transaction.encode(), env=who)


def is_committed(root: Path, path: Path) -> bool:
    """Whether the file at `path` is in the repository's HEAD as it is now."""
    return git(root, "--no-optional-locks", "status", "--porcelain", "--ignored", "--", path.as_posix()) == ""
