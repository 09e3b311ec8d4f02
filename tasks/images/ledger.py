"""The ledger of splits: for each image that a run of this model ever used, the split that it is in for good.

An image is known by the SHA-256 of its pixels. A row of the table has `pixels_sha256`; `split`, which is train, val,
test, `erased` (on request) or `excluded` (two models disagree on it); `group`, if it has one, with a row for each; and
`generation`: the first images are of generation 1, those that came with the next growth of generation 2, and so on.
Rows are never removed, and an image never goes from one of the three splits to another: what was trained on is never
tested on.
"""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import files
from tasks.core.errors import StageError, first_line

VERSION = {b"schema_version": b"1"}
SCHEMA = pa.schema(
    [("pixels_sha256", pa.string()), ("split", pa.string()), ("group", pa.string()), ("generation", pa.int32())],
    metadata=VERSION,
)
ERASED, EXCLUDED = "erased", "excluded"
EMPTY: pa.Table = SCHEMA.empty_table()


def read(path: Path) -> pa.Table:
    """The ledger in a file; `StageError` if it holds none of this version."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(f"{path} is no ledger of splits ({first_line(error)})") from None
    if (
        not table.schema.equals(SCHEMA, check_metadata=False)
        or not VERSION.items() <= (table.schema.metadata or {}).items()
    ):
        raise StageError(f"{path} is no ledger of splits of this version of Weighin")
    return table


def write(path: Path, ledger: pa.Table) -> None:
    """Write the ledger, ordered by the hashes, so that the same ledger is the same file."""
    with files.replacing(path) as (temporary,):
        pq.write_table(
            ledger.sort_by([("pixels_sha256", "ascending"), ("group", "ascending")]).cast(SCHEMA),
            temporary,
            compression="zstd",
        )


def find_moved(before: pa.Table, after: pa.Table) -> list[str]:
    """What of the ledger `before` has no place in `after`, which should have grown from it, a phrase for each image.

    A row may become `erased` or `excluded`; nothing else may change but a group.
    """
    splits = dict(zip(after["pixels_sha256"].to_pylist(), after["split"].to_pylist(), strict=True))
    moved = []
    for pixels, split in zip(before["pixels_sha256"].to_pylist(), before["split"].to_pylist(), strict=True):
        now = splits.get(pixels)
        if now not in (split, ERASED, EXCLUDED):
            moved.append(f"the image with pixels {pixels[:12]} was in {split} and is {f'in {now}' if now else 'gone'}")
    return moved


def unite(ledgers: Iterable[pa.Table]) -> pa.Table:
    """One ledger of several, where only the first one's generations count. What they disagree on is `excluded`."""
    splits: dict[str, tuple[str, int]] = {}
    groups: dict[str, set[str | None]] = {}
    for number, ledger in enumerate(ledgers):
        for row in ledger.to_pylist():
            pixels, split = row["pixels_sha256"], row["split"]
            known, generation = splits.setdefault(pixels, (split, 0 if number else row["generation"]))
            if known != split:
                splits[pixels] = (ERASED if ERASED in (known, split) else EXCLUDED, generation)
            groups.setdefault(pixels, set()).add(row["group"])
    return _table((pixels, *found, groups[pixels]) for pixels, found in splits.items())


def from_manifest(manifest: pa.Table) -> pa.Table:
    """The ledger that a manifest stands for, of a run that kept none yet."""
    names = manifest.column_names
    if not {"pixels_sha256", "split"} <= set(names):
        raise StageError("it is no manifest: it has no columns pixels_sha256 and split")
    splits: dict[str, str] = {}
    groups: dict[str, set[str | None]] = {}
    for row in manifest.select([name for name in ("pixels_sha256", "split", "group") if name in names]).to_pylist():
        if row["split"] is not None and row["pixels_sha256"] is not None:
            splits.setdefault(row["pixels_sha256"], row["split"])
            groups.setdefault(row["pixels_sha256"], set()).add(row.get("group"))
    return _table((pixels, split, 1, groups[pixels]) for pixels, split in splits.items())


def _table(images: Iterable[tuple[str, str, int, set[str | None]]]) -> pa.Table:
    """A row for each image and group of it, or one without a group."""
    none: list[str | None] = [None]
    rows = [
        {"pixels_sha256": pixels, "split": split, "group": group, "generation": generation}
        for pixels, split, generation, groups in images
        for group in (sorted(filter(None, groups)) if split != ERASED else none) or none
    ]
    return pa.Table.from_pylist(rows, SCHEMA)
