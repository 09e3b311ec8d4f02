"""Files that are either whole or not there: temporary name, sync, rename. And their SHA-256."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.core.errors import WeighinError
from tasks.core.paths import CHECKPOINTS

Json = dict[str, Any]  # a JSON object, as `to_json` writes it


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Yield one temporary path beside each target; on success sync them and rename them over the targets.

    A target may be a file or a directory. If the block raises, the targets stay as they were and the
    temporary ones are removed; an error of the operating system that names no file, as a full disk does,
    names the first target.
    """
    temporary = tuple(target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
    try:
        yield temporary
        for path in temporary:
            for part in (*path.rglob("*"), path):
                _sync(part)
        for path, target in zip(temporary, targets, strict=True):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
        for parent in {target.parent for target in targets}:
            _sync(parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(targets[0])) from error
    finally:
        for path in temporary:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Remove what a process that was killed has left beside the target."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as (temporary,):
        temporary.write_bytes(data)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON; numbers that are not finite are refused, since JSON has none."""
    try:
        data = to_json(content)
    except ValueError as error:
        raise WeighinError(f"{path}: a number is not finite, so it cannot be written as JSON") from error
    write_bytes(path, data)


def to_json(content: object) -> bytes:
    """`content` as every JSON file here has it; `ValueError` at a number that is not finite."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file; `WeighinError` if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise WeighinError(f"{path} is missing: run `weighin run`, or `dvc checkout` to bring it back") from None
    except ValueError as error:
        raise WeighinError(f"{path} is not JSON ({error}); run the stage that writes it again") from None


def pack(data: bytes) -> bytes:
    """The bytes as one frame of Zstandard (RFC 8878), as small as its level 19 makes them."""
    import zstandard

    return zstandard.ZstdCompressor(level=19).compress(data)


def unpack(path: Path) -> bytes:
    """What a file of `pack` bytes holds; `WeighinError` if it is not one frame and nothing behind it."""
    import zstandard

    try:
        return zstandard.ZstdDecompressor().decompress(path.read_bytes(), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WeighinError(f"{path} does not unpack as Zstandard ({error}): run the stage that writes it") from None


def sha256(path: Path) -> str:
    """The file's SHA-256, 64 hexadecimal digits; read in pieces, so memory does not grow with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: Path) -> str:
    """The file's MD5, by which DVC knows it, 32 hexadecimal digits; nothing is trusted for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256_of(data: bytes) -> str:
    """The SHA-256 of some bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(listing: dict[str, str]) -> str:
    """One SHA-256 for many files, from that of each by its path: of what `sha256sum` prints, sorted by path."""
    return sha256_of("".join(f"{sha256}  {path}\n" for path, sha256 in sorted(listing.items())).encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(stage: str) -> None:
    """Remove the stage's checkpoints, once its results are written."""
    for path in CHECKPOINTS.glob(f"*{stage}-*.pt*"):
        path.unlink()
