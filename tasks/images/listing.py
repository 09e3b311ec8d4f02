"""Which files a source has: one walk, which reading, DVC's dependency and the recorded listing share.

DVC hashes every file below the source, hidden ones too, and follows links to files, but not to folders. What it cannot
hash, or would pass over so that a change went unnoticed, is refused here by its name, before anything is read.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.core.errors import StageError

# Folders that programs leave among pictures, with copies or remains of them. Whatever begins with a dot is hidden, too.
LEFTOVERS = ("__MACOSX", "@eaDir")
IGNORED = (".git", ".hg")  # by DVC as well


class File(NamedTuple):
    """A file of a source: where it lies, and its name in there, with slashes and in Unicode's form NFC."""

    path: Path
    name: str

    @property
    def hidden(self) -> str | None:
        """The first part of the name that is hidden, with a slash if it is a folder; None if none is."""
        *folders, last = self.name.split("/")
        hidden = [f"{one}/" for one in folders if one.startswith(".") or one in LEFTOVERS]
        return hidden[0] if hidden else last if last.startswith(".") else None


def walk(source: Path) -> list[File]:
    """Every file of the source, a folder or one file, ordered by name; what git and Mercurial keep is left out.

    `StageError` names the first link to a folder, link to nowhere, special file, or name that is not UTF-8.
    """
    if not source.is_dir():
        if not (source.exists() or source.is_symlink()):
            raise StageError(f"{source} does not exist: set ingest.path in params.yaml to the source")
        _require_file(source)
        return [File(source, normal(source.name))]
    return sorted(_walk(source, ""), key=lambda file: (file.name, os.fsencode(file.path)))


def normal(name: str) -> str:
    """A name in Unicode's form NFC: some file systems keep é as e with an accent after it."""
    return unicodedata.normalize("NFC", name)


def _walk(folder: Path, prefix: str) -> Iterator[File]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            name = prefix + normal(_readable(entry.name, folder))
            if entry.name in IGNORED:
                continue
            if entry.is_dir(follow_symlinks=False):
                if entry.name == ".dvc":
                    raise StageError(f"{folder} is a DVC project of its own, which DVC passes over: move it out of it")
                yield from _walk(path, f"{name}/")
                continue
            _require_file(path)
            yield File(path, name)


def _readable(name: str, folder: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StageError(f"{folder} has the name {os.fsencode(name)!r} in it, which is not UTF-8: rename it") from None
    return name


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode  # of what a link leads to
    except OSError:
        if not path.is_symlink():
            raise
        raise StageError(f"{path} is a link to {path.readlink()}, which cannot be reached: remove the link") from None
    if stat.S_ISDIR(mode):
        raise StageError(
            f"{path} is a link to a folder, which DVC does not follow, so that changes in it would go unnoticed: "
            "put the folder there, or set ingest.path to a folder that has it"
        )
    if not stat.S_ISREG(mode):
        kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise StageError(f"{path} is {kind}, not a file: remove it from the source")
