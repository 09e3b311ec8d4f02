"""Lineage: from a version back to all that it was made of, and from a data file forward to every model that saw it."""

from pathlib import Path

import pyarrow.parquet as pq

from flows import dvc_bridge
from flows.registry import git, materials, provenance, refs
from flows.registry.chain import read_chain
from flows.registry.decision import Decision
from flows.registry.materials import Materials
from flows.registry.parameters import Recorded, read_recorded
from flows.registry.view import read_view
from tasks.core import files, paths
from tasks.core.errors import RegistryError
from tasks.core.files import Json


def backward(root: Path, model: str, version: str) -> list[Json]:
    """What the version was made of, and what the model was made of that it was warmed from, and so on; newest first.

    Each has `version`, `commit`, `created`, `code`, `params`, `model_sha256`, `data_sha256`, `sources`, `artifacts`
    (SHA-256 by path) and `weights`, what training began with. `RegistryError` if there is no such version.
    """
    steps: list[dict[str, object]] = []
    wanted: tuple[str, str] | None = (model, version)
    with git.Objects(root) as objects:
        while wanted:
            view = read_view(root, wanted[0], None)
            view.require_sound()
            link = view.standing.promotions.get(wanted[1])
            if link is None:
                raise RegistryError(f"the registry has no version {'@'.join(wanted)}: `gto show` lists what there is")
            decision, made_of = link.decision, provenance.read_materials(objects, link.commit)
            steps.append(
                {
                    "version": "@".join(wanted),
                    "commit": link.commit,
                    "created": decision.created,
                    "code": decision.code.model_dump(),
                    "params": _params(objects, link.commit).content,
                    "model_sha256": decision.model_sha256,
                    "data_sha256": decision.data_sha256,
                    "sources": _sources(root, decision, made_of),
                    "artifacts": {one.path: one.sha256 for one in made_of.outputs},
                    "weights": made_of.weights,
                }
            )
            weights = made_of.weights
            wanted = (weights["model"], weights["version"]) if weights.get("source") == "production" else None
    return steps


def forward(root: Path, file: Path) -> list[dict[str, str]]:
    """Every decision whose model saw the file, newest first: a source file, or one image by its path in the source.

    Each has `decision`, `outcome`, `path`, `split`, which is the one of train, val and test that the image was in, or
    `all` for a source file that holds many, and `pixels_sha256`, which is "" for such a file. The same bytes under
    another name count too. An image is found in the manifest, in DVC's cache; `RegistryError` if that is missing, or if
    there is no registry.
    """
    if (root / file).is_dir():
        raise RegistryError(f"{file} is a folder: name one file in it")
    sha256 = files.sha256(root / file) if (root / file).is_file() else None
    tip, seen = refs.look(root).tip, {}
    if tip is None:
        raise RegistryError(f"{root} has no branch registry: nothing has been decided yet, or it was not fetched")
    cached, rows = dvc_bridge.cache(root), []
    with git.Objects(root) as objects:
        for link in read_chain(root, tip):
            if link.decision.outcome in ("approved", "rolled-back"):  # the same model once more
                continue
            made_of = provenance.read_materials(objects, link.commit)
            manifest = next(one for one in made_of.outputs if one.path == paths.MANIFEST.as_posix())
            source = _params(objects, link.commit).ingest.path
            if (manifest.md5, source) not in seen:
                path = materials.require_intact(cached(manifest.md5), manifest)
                seen[manifest.md5, source] = _images(path, source, file, sha256)
            found = seen[manifest.md5, source] or _files(_sources(root, link.decision, made_of), file, sha256)
            what = {"decision": link.name, "outcome": link.decision.outcome}
            rows += [what | {"path": path, "split": split, "pixels_sha256": pixels} for path, split, pixels in found]
    return rows


def _params(objects: git.Objects, commit: str) -> Recorded:
    return read_recorded(objects.read(f"{commit}:params.yaml"), f"{commit[:12]}:params.yaml")


def _sources(root: Path, decision: Decision, made_of: Materials) -> dict[str, str]:
    """The source files by their paths; a decision of the first days recorded none."""
    return materials.list_sources(root, made_of) if decision.schema_version else {}


def _files(sources: dict[str, str], file: Path, sha256: str | None) -> list[tuple[str, str, str]]:
    return [(path, "all", "") for path, one in sources.items() if path == file.as_posix() or one == sha256]


def _images(manifest: Path, source: str, file: Path, sha256: str | None) -> list[tuple[str, str, str]]:
    """The rows of a manifest that are this image, by its bytes or by its path in the source or from here."""
    table = pq.read_table(manifest, columns=["path", "sha256", "split", "pixels_sha256"]).to_pylist()
    return [
        (row["path"], row["split"] or "set aside", row["pixels_sha256"] or "")
        for row in table
        if row["sha256"] == sha256 or file in (Path(row["path"]), Path(source) / row["path"])
    ]
