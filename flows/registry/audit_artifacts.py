"""The audit of artifacts: hashed again in DVC's cache, at its remote, and in the working copy."""

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from flows import dvc_bridge
from flows.registry import git, materials, provenance
from flows.registry.audit_record import Reader
from flows.registry.chain import Link
from flows.registry.findings import Note, Report, count
from flows.registry.materials import Material
from tasks.core import files, paths
from tasks.core.errors import WeighinError


class Store:
    """DVC's cache and, if wanted, its remote; what was hashed once in an audit is not hashed again."""

    def __init__(self, root: Path, remotely: bool, report: Report) -> None:
        self.report = report
        self.cached = dvc_bridge.cache(root)
        self.remote = dvc_bridge.remote(root) if remotely else None
        self.known: dict[tuple[str, bool], tuple[str | None, str | None]] = {}
        self.fetched = tempfile.TemporaryDirectory(prefix="weighin-") if remotely else None

    def find(self, material: Material) -> Path | None:
        """An intact copy of the artifact out of the cache or, if wanted, the remote; None if there is none."""
        here = self.cached(material.md5)
        if _is_intact(here, material):
            return here
        if self.remote is None or self.fetched is None:
            return None
        there = Path(self.fetched.name) / material.md5
        with contextlib.suppress(FileNotFoundError), self.remote(material.md5) as file:
            there.write_bytes(file.read())
        return there if _is_intact(there, material) else None

    def check(self, link: Link, outputs: tuple[Material, ...], erased: dict[str, int]) -> None:
        """Every artifact of the decision is there, and hashes to what was recorded.

        One that held images which are `erased` by now, so many by path, may be gone: that is told.
        """
        self.report.audited.append(link.name)
        note = self.report.noting(link.name, "artifact", link.commit)
        for material in outputs:
            here, there = self._hash_both(material)
            expected = material.hash
            gone = material.path in erased and (there if self.remote else here) is None
            if gone:
                images = count(erased[material.path], "image")
                self.report.erased.append(f"{link.name}: {material.path} is gone, and held {images} erased on request")
            if here is None and there is None and not gone:
                where = "DVC's cache and remote" if self.remote else "DVC's cache (`dvc fetch`, or --remote)"
                note(material.path, expected, f"missing in {where}")
            elif here not in (None, expected):
                note(material.path, expected, f"{here} in DVC's cache, {self.cached(material.md5)}")
            if self.remote and there is None and here is not None and not gone:
                note(material.path, expected, "missing in DVC's remote")
            elif there not in (None, expected):
                note(material.path, expected, f"{there} in DVC's remote")

    def _hash_both(self, material: Material) -> tuple[str | None, str | None]:
        """The hashes of the artifact here and there, of the kind that was recorded; None where it is not."""
        key = (material.md5, material.sha256 is None)
        if key not in self.known:
            self.known[key] = self._here(material), self._there(material)
        return self.known[key]

    def _here(self, material: Material) -> str | None:
        path = self.cached(material.md5)
        if not path.is_file():
            return None
        self.report.artifacts += 1
        md5, sha256, size = materials.hashes(path)
        self.report.bytes_hashed += size
        return material.kind_of_hash(md5, sha256)

    def _there(self, material: Material) -> str | None:
        if self.remote is None:
            return None
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        try:
            with self.remote(material.md5) as file:
                while piece := file.read(materials.PIECE):
                    md5.update(piece)
                    sha256.update(piece)
                    self.report.bytes_hashed += len(piece)
        except FileNotFoundError:
            return None
        self.report.artifacts += 1
        return material.kind_of_hash(md5.hexdigest(), sha256.hexdigest())


def _is_intact(path: Path, material: Material) -> bool:
    return path.is_file() and material.kind_of_hash(files.md5(path), files.sha256(path)) == material.hash


def check_working_copy(root: Path, link: Link, outputs: tuple[Material, ...], reader: Reader, report: Report) -> None:
    """What lies here of the model's newest decision is what was decided on: sources and outputs.

    An output that dvc.lock names otherwise is of a later run, and no part of the record yet. A fresh clone has none of
    the outputs, and no sources but those that git has; where one lies, all have to.
    """
    note = report.noting(link.name, "working copy", link.commit)
    found = reader.objects.find(f"{link.commit}:provenance.json")
    with contextlib.suppress(WeighinError, ValueError, RecursionError):
        made_of = provenance.materials_of(json.loads(found.data if found else b""))
        listing = next((one.md5 for one in outputs if one.path == paths.SOURCES.as_posix()), None)
        sources = (
            materials.list_sources(root, made_of)
            if _read_lock(root).get(str(paths.SOURCES), listing) == listing
            else {}
        )
        fresh = not any((root / path).exists() for path in sources)
        for path, sha256 in sources.items():
            now = files.sha256(root / path) if (root / path).is_file() else "missing"
            if now != sha256 and not (fresh and git.git(root, "ls-files", "--", path) == ""):
                note(path, f"SHA-256 {sha256}, of which the model was made", now)
    _outputs(root, outputs, note)


def _read_lock(root: Path) -> dict[str, str]:
    lock = root / "dvc.lock"
    return {out["path"]: out["md5"] for _, out in materials.read_lock(lock.read_bytes())} if lock.exists() else {}


def _outputs(root: Path, outputs: tuple[Material, ...], note: Note) -> None:
    here = {one.path: materials.hashes(root / one.path) for one in outputs if (root / one.path).is_file()}
    try:
        locked = _read_lock(root)
    except WeighinError as error:
        note("dvc.lock", "the outputs of the stages", str(error))
        locked = {}
    recorded = {one.path: one.md5 for one in outputs}
    for one in outputs:
        folder = next((path for path in locked if one.path.startswith(f"{path}/")), one.path)
        later = locked.get(folder, recorded.get(folder)) != recorded.get(folder)
        if one.path not in here:
            if here and not later and not one.md5.endswith(".dir"):
                note(one.path, one.hash, "missing in the working copy (`dvc checkout`)")
            continue
        md5, sha256, _ = here[one.path]
        if later and folder == one.path and md5 != locked[folder]:
            note("dvc.lock", f"{one.path} with md5 {md5}, as it lies here", f"md5 {locked[folder]}")
        elif not later and one.kind_of_hash(md5, sha256) != one.hash:
            note(one.path, one.hash, f"{one.kind_of_hash(md5, sha256)} in the working copy")
