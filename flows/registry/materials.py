"""What a decision was made of: every output of every stage, every source file and the code, by SHA-256.

DVC knows its files by MD5 and does not read them again once they are in its cache, so the record names each by both:
MD5 to find it, SHA-256 to trust it.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from flows import dvc_bridge
from tasks.core import files, paths
from tasks.core.errors import RegistryError

CODE = Path("tasks")
PIECE = 2**20


class Material(BaseModel):
    """A file, or the listing of a folder, that a stage wrote; `md5` is DVC's name for it.

    `sha256` is None, and `size_bytes` too, where a record of the first days has DVC's name only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    stage: str
    md5: str
    sha256: str | None
    size_bytes: int | None

    @property
    def hash(self) -> str:
        """The strongest hash that was recorded, with its kind."""
        return self.kind_of_hash(self.md5.removesuffix(".dir"), self.sha256)

    def kind_of_hash(self, md5: str, sha256: str | None) -> str:
        """Of the two hashes of something, the one to compare with `hash`."""
        return f"MD5 {md5}" if self.sha256 is None else f"SHA-256 {sha256}"

    def names(self, data: bytes) -> bool:
        """Whether this is the artifact with that content."""
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return self.kind_of_hash(md5, files.sha256_of(data)) == self.hash


class Materials(NamedTuple):
    """All that a decision was made of: `sources` and `code` are SHA-256 by path, `weights` what training began with."""

    outputs: tuple[Material, ...]
    sources: dict[str, str]
    code: dict[str, str]
    weights: dict[str, str]


def read(root: Path, lock: bytes) -> Materials:
    """What a decision on the working copy is made of; `RegistryError` as `outputs` has it."""
    require_hashed(root, lock)
    weights = files.read_json(root / paths.spec("finetune"))["weights"]
    return Materials(outputs(root, lock), sources(root), code(root), {str(key): str(weights[key]) for key in weights})


def hashes(path: Path) -> tuple[str, str, int]:
    """MD5, SHA-256 and bytes of a file, read once and in pieces."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            md5.update(piece)
            sha256.update(piece)
            size += len(piece)
    return md5.hexdigest(), sha256.hexdigest(), size


def outputs(root: Path, lock: bytes) -> tuple[Material, ...]:
    """Every output that dvc.lock names, as it lies in the working copy.

    A folder has one entry for DVC's listing of it and one for each file in it. `RegistryError` if a file is missing or
    is not the one that dvc.lock names.
    """
    found: list[Material] = []
    cached = dvc_bridge.cache(root)
    for stage, out in read_lock(lock):
        path = root / out["path"]
        if not out["md5"].endswith(".dir"):
            found.append(_material(root, path, stage, out["md5"]))
            continue
        listing = cached(out["md5"])
        found.append(_material(root, listing, stage, out["md5"], out["path"]))
        entries = {path / entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
        unlisted = {one for one in path.rglob("*") if one.is_file()} - entries.keys()
        if unlisted:
            raise RegistryError(f"dvc.lock does not name {min(unlisted)}: run the pipeline again, or `dvc commit`")
        found += [_material(root, file, stage, md5) for file, md5 in entries.items()]
    return tuple(found)


def locked_outputs(lock: bytes) -> tuple[Material, ...]:
    """Every output that a dvc.lock names, by DVC's MD5 alone."""
    return tuple(
        Material(path=out["path"], stage=stage, md5=out["md5"], sha256=None, size_bytes=None)
        for stage, out in read_lock(lock)
    )


def read_lock(lock: bytes, kind: Literal["outs", "deps"] = "outs") -> list[tuple[str, dict[str, Any]]]:
    """The outputs (or dependencies) in a dvc.lock, each with its stage; `RegistryError` if it is not one."""
    from ruamel.yaml.error import YAMLError

    try:
        stages = _parse_lock(lock)["stages"]
        return [(stage, out) for stage, entry in stages.items() for out in entry.get(kind, []) if out["md5"]]
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise RegistryError("dvc.lock is malformed: run the pipeline again") from None


@functools.lru_cache(maxsize=16)
def _parse_lock(lock: bytes) -> Any:
    """The content of a dvc.lock, which nobody changes: an audit asks for each of them several times."""
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(lock.decode()) or {}


def _material(root: Path, path: Path, stage: str, md5: str, name: str | None = None) -> Material:
    if not path.is_file():
        raise RegistryError(f"{path} is missing: `dvc checkout` brings it back")
    found, sha256, size = hashes(path)
    name = name or path.relative_to(root).as_posix()
    if found != md5.removesuffix(".dir"):
        raise RegistryError(f"dvc.lock does not name {name} as it is now: run the pipeline again, or `dvc commit`")
    return Material(path=name, stage=stage, md5=md5, sha256=sha256, size_bytes=size)


def sources(root: Path) -> dict[str, str]:
    """SHA-256 of each source file by its path, as `ingest` read them."""
    content = files.read_json(root / paths.SOURCES)
    return {str(path): str(sha256) for path, sha256 in content.items()}


def require_hashed(root: Path, lock: bytes) -> None:
    """`RegistryError` if DVC has not hashed as many files of the source as `ingest` has listed.

    What it passes over, by .dvcignore, could change without any stage being run again.
    """
    listed = sources(root)
    for stage, source in read_lock(lock, "deps"):
        files_there = [path for path in listed if Path(path).is_relative_to(source["path"])]
        if stage == "ingest" and files_there and source.get("nfiles", len(files_there)) != len(files_there):
            raise RegistryError(
                f"DVC has hashed {source['nfiles']} of {len(files_there)} files in {source['path']}, so that changes "
                "of the others would go unnoticed: see what .dvcignore names, and move it out of there"
            )


def list_sources(root: Path, made_of: Materials) -> dict[str, str]:
    """The sources of a decision; if they were too many for the record, out of the listing in DVC's cache.

    `RegistryError` if that is missing or is not what was recorded.
    """
    if made_of.sources:
        return made_of.sources
    listing = next((one for one in made_of.outputs if one.path == paths.SOURCES.as_posix()), None)
    if listing is None:
        raise RegistryError(f"provenance.json names neither sources nor {paths.SOURCES}")
    content = files.read_json(require_intact(dvc_bridge.cache(root)(listing.md5), listing))
    return {str(name): str(sha256) for name, sha256 in content.items()}


def require_intact(path: Path, material: Material) -> Path:
    """The path, where DVC's cache has the material; `RegistryError` if it is not there, or not what was recorded."""
    if not path.is_file():
        raise RegistryError(f"{material.path} (md5 {material.md5}) is not in DVC's cache: `dvc fetch` it first")
    if material.kind_of_hash(files.md5(path), files.sha256(path)) != material.hash:
        raise RegistryError(f"{material.path} in DVC's cache ({path}) is not what was recorded: `weighin audit`")
    return path


def judging(lock: bytes, listing: dict[str, str]) -> dict[str, str]:
    """What judges, out of a listing of hashes by path: the code that a dvc.lock names as dependencies of `gate`."""
    named = [Path(dep["path"]) for stage, dep in read_lock(lock, "deps") if stage == "gate"]
    code = [path for path in listing if path.startswith(f"{CODE}/") and path.endswith(".py")]
    return {path: listing[path] for path in code if any(Path(path).is_relative_to(one) for one in named)}


def code(root: Path) -> dict[str, str]:
    """SHA-256 of each file of the code that the stages are made of, by its path."""
    return {path.relative_to(root).as_posix(): files.sha256(path) for path in sorted((root / CODE).rglob("*.py"))}
