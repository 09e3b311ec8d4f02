"""The ledger of splits in the registry: what earlier runs had in which split, which the next run has to keep."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flows import dvc_bridge
from flows.registry import provenance
from flows.registry.chain import Link
from flows.registry.findings import Note
from flows.registry.git import Objects
from flows.registry.materials import Material
from tasks.core import files, paths
from tasks.core.errors import RegistryError, StageError, first_line
from tasks.images import ledger

RUNS = ("promoted", "refused", "held")  # an approval or a rollback repeats what an earlier run has recorded


def lay_splits(root: Path, links: Iterable[Link], models: Iterable[str], *, is_current: bool) -> bool:
    """Write what is known of the models' images to data/splits for `ingest`; return whether something was written.

    That is the ledger of each one's newest run, in one. If ingest `is_current` and its ledger has grown from these,
    nothing is written, and ingest need not run. `RegistryError` if a ledger cannot be brought.
    """
    newest = [link for model in models if (link := _find_last_run(links, model))]
    own = ledger.read(root / paths.LEDGER) if is_current and (root / paths.LEDGER).exists() else None
    with Objects(root) as objects:
        made = [(link, provenance.read_materials(objects, link.commit).outputs) for link in newest]
    if own is not None and all(_has_recorded(outputs, files.sha256(root / paths.LEDGER)) for _, outputs in made):
        return False
    known = ledger.unite(_bring(root, link, outputs) for link, outputs in made)
    if own is not None and not ledger.find_moved(known, own):
        return False
    ledger.write(root / paths.KNOWN_SPLITS, known)
    return True


def require_grown(root: Path, links: Iterable[Link], model: str, outputs: tuple[Material, ...]) -> None:
    """`RegistryError` if an image that the model's newest run knew has another split, or none, in these outputs."""
    last = _find_last_run(links, model)
    if last is None:
        return
    with Objects(root) as objects:
        before = provenance.read_materials(objects, last.commit).outputs
    if _has_recorded(before, str(_sha256(outputs))):
        return
    moved = ledger.find_moved(_bring(root, last, before), ledger.read(root / paths.LEDGER))
    if moved:
        raise RegistryError(
            f"{last.name} has put images into splits that this run did not know of ({moved[0]}"
            f"{f', and {len(moved) - 1} more' if len(moved) > 1 else ''}): run again"
        )


def read_intact(
    find: Callable[[Material], Path | None], outputs: tuple[Material, ...], *, of_the_run: bool = False
) -> pa.Table | None:
    """The ledger among these outputs, or what the manifest stands for; None if `find` has no intact file.

    With `of_the_run` always the latter: the ledger has images of earlier runs, too.
    """
    kinds = ((paths.LEDGER, ledger.read), (paths.MANIFEST, _read_manifest))
    for path, read in kinds[1:] if of_the_run else kinds:
        material = _find(outputs, path)
        if material is None:
            continue
        intact = find(material)
        return read(intact) if intact else None
    return None


def check_growth(before: pa.Table, after: pa.Table, note: Note) -> None:
    """Note the first image that has left its split between one run and a later one of the same model."""
    moved = ledger.find_moved(before, after)
    if moved:
        found = f"{len(moved)} that are not, the first: {moved[0]}"
        note(str(paths.LEDGER), "every image in the split that it was in before", found)


def find_erased(known: pa.Table | None, erased: set[str]) -> dict[str, int]:
    """How many images that are now erased the files of a run held, by path."""
    counts: dict[str, int] = {}
    rows = known.to_pylist() if known is not None else []
    for split in [row["split"] for row in rows if row["pixels_sha256"] in erased]:
        held = {"train": (paths.TRAIN,), "val": (paths.VAL,), "test": (paths.TEST, paths.GOLDEN)}.get(split, ())
        for path in held:
            counts[path.as_posix()] = counts.get(path.as_posix(), 0) + 1
    return counts


def erased_in(known: pa.Table | None) -> set[str]:
    """The images that a ledger names as erased."""
    rows = known.to_pylist() if known is not None else []
    return {row["pixels_sha256"] for row in rows if row["split"] == ledger.ERASED}


def _find_last_run(links: Iterable[Link], model: str) -> Link | None:
    """The model's newest decision that a run has made, of links from the first to the newest."""
    runs = [link for link in links if link.decision.model == model and link.decision.outcome in RUNS]
    return runs[-1] if runs else None


def _find(outputs: tuple[Material, ...], path: Path) -> Material | None:
    return next((one for one in outputs if one.path == path.as_posix()), None)


def _sha256(outputs: tuple[Material, ...]) -> str | None:
    found = _find(outputs, paths.LEDGER)
    return found.sha256 if found else None


def _has_recorded(outputs: tuple[Material, ...], sha256: str) -> bool:
    return _sha256(outputs) == sha256


def _bring(root: Path, link: Link, outputs: tuple[Material, ...]) -> pa.Table:
    """The ledger of a decision, out of DVC's cache or remote; of one that has none, what its manifest stands for."""
    path, read = (paths.LEDGER, ledger.read) if _find(outputs, paths.LEDGER) else (paths.MANIFEST, _read_manifest)
    material = _find(outputs, path)
    if material is None:
        raise RegistryError(f"{link.name} names neither {paths.LEDGER} nor {paths.MANIFEST}: `weighin audit`")
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        target = Path(scratch) / path.name
        dvc_bridge.copy_output(root, link.commit, path, target, link.name)
        if material.kind_of_hash(files.md5(target), files.sha256(target)) != material.hash:
            raise RegistryError(f"{path} of {link.name} is not what was recorded: `weighin audit`")
        return read(target)


def _read_manifest(path: Path) -> pa.Table:
    try:
        return ledger.from_manifest(pq.read_table(path))
    except (pa.ArrowInvalid, OSError, StageError) as error:
        raise RegistryError(f"{path} is no manifest ({first_line(error)})") from None
