"""ingest: bring a source of labelled images into `data/prepared/{train,val,test}.parquet` and a manifest.

A few images are handled at a time by each core; what has to be known of all of them at once (which pixels were seen
before, which split they go to) is kept in SQLite on disk, so memory does not grow with the number of images.
"""

import csv
import hashlib
import io
import itertools
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.images import ledger
from tasks.images.assignment import Assignment
from tasks.images.listing import walk
from tasks.images.preprocessing import WHITE_LEVEL, open_image, render
from tasks.images.sources import SHOWN, SPLITS, Item, Source, open_source, preview

ROWS_PER_GROUP = 512
BYTES_PER_GROUP = 8 * 2**20
ROWS_AT_ONCE = 256  # of pixels
BY_ITSELF = 1000  # images that this process describes before others are started, which takes two seconds
TOGETHER = 8  # that a process is given at once: more would be read ahead
MOST_PIXELS = 0.999
KNOWN_BY = ((255, 255, 255), WHITE_LEVEL)  # the background and white level of the pixels that an image is known by
UNREADABLE = paths.REPORTS / "unreadable.csv"
TEST_PART, FROZEN, NEW = (
    "test_part",
    "frozen",
    "new",
)  # a column of test: what came with the ledger's last growth is new

IMAGES = pa.schema([("image", pa.binary()), ("label", pa.string()), ("path", pa.string()), ("sha256", pa.string())])
MANIFEST = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("frames", pa.int32()),  # of an animation or a file of several pages; the first is taken
        ("transparent", pa.bool_()),  # in part, so that the background shows
        ("white", pa.int32()),  # of a file with 16 bits: what MOST_PIXELS are at most
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("perceptual_hash", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),  # of each channel around its own mean, so 0 where all pixels are of one colour
        ("readable", pa.bool_()),  # false for all that is set aside
        ("reason", pa.string()),
    ]
)


class Table:
    """A Parquet file, written group by group: so many rows, or fewer if their images are large."""

    def __init__(self, path: Path, fields: pa.Schema, columns: tuple[str, ...] = ()) -> None:
        self.schema = pa.schema([*fields, *((name, pa.string()) for name in columns)])
        self.writer = pq.ParquetWriter(path, self.schema, compression="zstd" if fields is MANIFEST else "none")
        self.size = 0
        self.rows: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self.writer.close()

    def add(self, row: dict[str, object], size: int = 0) -> None:
        """Append a row that holds `size` bytes of image."""
        self.rows.append(row)
        self.size += size
        if len(self.rows) >= ROWS_PER_GROUP or self.size >= BYTES_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one group."""
        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows, self.size = [], 0


def describe(item: Item, params: config.Ingest, max_side: int) -> dict[str, Any]:
    """The manifest row of one image, all but its split; an image that cannot be read has a `reason`.

    One that is larger than `max_side` is not decoded.
    """
    row: dict[str, object] = dict.fromkeys(MANIFEST.names)
    row.update(path=item.path, label=item.label, group=item.group, bytes=len(item.image), readable=False)
    row.update(item.columns)
    row["sha256"] = hashlib.sha256(item.image).hexdigest()
    try:
        if not item.image:
            raise ValueError("it is empty, or has no bytes in the table")
        with open_image(item.image) as opened:
            width, height = opened.size
            if max(width, height) > max_side:
                raise ValueError(f"it has {width} x {height} pixels, and validate.max_side is {max_side}")
            row.update(_describe_pixels(opened, item.image, params))
        if item.label is None:
            raise ValueError("it has no label")
    except Exception as error:
        # Pillow's decoders raise whatever damaged bytes lead them to; each is a reason to set the image aside.
        reason = str(error).split(" <_io")[0][:200] or type(error).__name__  # without Pillow's memory address
        return row | {"readable": False, "reason": reason, "pixels_sha256": None}
    return row


def _describe_pixels(opened: Image.Image, data: bytes, params: config.Ingest) -> dict[str, object]:
    """What the manifest says of an image that is decoded, with no more of it in memory than it takes to decode it."""
    facts: dict[str, object] = {"mode": opened.mode, "frames": getattr(opened, "n_frames", 1), "readable": True}
    if opened.mode.startswith("I;16"):
        facts["white"] = _white(np.asarray(opened))
    facts["transparent"] = opened.has_transparency_data
    image = render(opened, params.background, params.white_level)
    facts.update(width=image.width, height=image.height, perceptual_hash=perceptual_hash(image))
    pixels = image if image.mode == "RGB" else image.convert("RGB")
    facts["mean"], facts["std"] = _moments(pixels)
    if (facts["transparent"] or facts.get("white")) and (params.background, params.white_level) != KNOWN_BY:
        pixels = render(open_image(data), *KNOWN_BY).convert("RGB")  # an image is the same one on any background
    hashed = hashlib.sha256(repr((pixels.height, pixels.width, 3)).encode())
    for top in range(0, pixels.height, ROWS_AT_ONCE):  # what NumPy or tobytes copy is as large as the image
        hashed.update(pixels.crop((0, top, pixels.width, min(top + ROWS_AT_ONCE, pixels.height))).tobytes())
    facts["pixels_sha256"] = hashed.hexdigest()
    return facts


def _white(pixels: npt.NDArray[np.uint16]) -> int:
    """The value that MOST_PIXELS do not exceed; a few may be defects of the sensor."""
    counts = np.zeros(2**16, np.int64)
    for top in range(0, len(pixels), ROWS_AT_ONCE):
        counts += np.bincount(pixels[top : top + ROWS_AT_ONCE].ravel(), minlength=2**16)
    return int(np.searchsorted(counts.cumsum(), MOST_PIXELS * pixels.size))


def _moments(image: Image.Image) -> tuple[float, float]:
    """Mean over all pixels and channels, and standard deviation around the mean of each channel."""
    counts = np.asarray(image.histogram(), np.float64).reshape(-1, 256)
    counts /= counts.sum(1, keepdims=True)
    levels = np.arange(256)
    means = counts @ levels
    variances = (counts * (levels - means[:, None]) ** 2).sum(1)
    return float(means.mean()), float(np.sqrt(variances.mean()))


def perceptual_hash(image: Image.Image) -> str:
    """256 bits in hexadecimal that images which look alike have in common, but for a few (pHash, by ImageHash).

    Of 4,000 images of Fashion-MNIST no two are closer than 25 bits, where 64 bits bring every tenth within 4. The same
    image as JPEG of quality 90, or of another size, is within 14 to 20.
    """
    import imagehash

    return str(imagehash.phash(image, hash_size=16))


def ingest(
    params: config.Ingest,
    classes: tuple[str, ...] | None,
    max_side: int,
    outputs: dict[str, Path],
    known: pa.Table = ledger.EMPTY,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Read the source twice, once to know every image, once to write each to its split.

    `outputs` has a Parquet path for each split, for `manifest` and for `ledger`; `known` is the ledger that this one
    grows from. Without `classes` they are those that the source has. Returns the number of images in each split and of
    those set aside under `aside`, and the report: what of the source was taken, and how. `StageError` if there is
    nothing to train with.
    """
    source = open_source(params, classes or ())
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        database = sqlite3.connect(Path(scratch) / "images.sqlite", isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        assignment = Assignment(database, known, params.erased)
        described = Path(scratch) / "described.parquet"
        with Table(described, MANIFEST, params.columns) as table:
            facts = _describe_all(source, max_side, assignment, table)
        _check(assignment, params, described)
        assignment.assign(params.split, params.seed)
        _check_kept(assignment, params)
        splits, labels = assignment.summary(), assignment.labels()
        counts = _write_splits(source, described, assignment, outputs)
        ledger.write(outputs["ledger"], assignment.ledger())
        database.close()
    empty = [name for name in SPLITS if counts[name] == 0]
    if empty:
        few = ", or more groups: there are few for the shares" if params.group_column else ""
        raise StageError(f"{params.path}: the {empty[0]} split is empty; add images{few} or change ingest.split")
    return counts, report(source, facts, splits) | {"classes": list(classes or labels)}


def _describe_all(source: Source, max_side: int, assignment: Assignment, table: Table) -> Counter[str]:
    """Put every image into the table and the database; returns how many there are of what the report tells."""
    facts: Counter[str] = Counter()
    assignment.database.execute("BEGIN")
    for index, (row, split) in enumerate(track(_describe_on_all_cores(source, max_side), "reading images")):
        table.add(row)
        assignment.add(index, row["label"], row["pixels_sha256"], row["group"], split)
        facts += Counter(
            images=1,
            transparent=bool(row["transparent"]),
            frames=(row["frames"] or 1) > 1,
            sixteen_bits=row["white"] is not None,
        )
        facts["white"] = max(facts["white"], row["white"] or 0)
    assignment.database.execute("COMMIT")
    return facts


def _describe_on_all_cores(source: Source, max_side: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each image's row and own split, in order; after the first images all cores work on them."""
    from concurrent.futures.process import BrokenProcessPool

    from joblib import Parallel, cpu_count, delayed

    items = source.items()
    for item in itertools.islice(items, BY_ITSELF):
        yield describe(item, source.params, max_side), item.split
    more = list(itertools.islice(items, 1))
    if not more:
        return
    ahead = (
        delayed(_describe)(item._replace(columns=dict(item.columns)), source.params, max_side)
        for item in itertools.chain(more, items)
    )
    try:
        with Parallel(n_jobs=cpu_count(), return_as="generator", batch_size=TOGETHER) as cores:
            yield from cores(ahead)
    except BrokenProcessPool:
        raise StageError(
            "a process that reads images was ended, out of memory perhaps: lower validate.max_side in params.yaml"
        ) from None


def _describe(item: Item, params: config.Ingest, max_side: int) -> tuple[dict[str, Any], str | None]:
    return describe(item, params, max_side), item.split


def report(source: Source, facts: Counter[str], splits: dict[str, int]) -> dict[str, Any]:
    """What of the source was taken and how, for `validate` and for the reader; fit for JSON."""
    passed_over = sorted(source.passed_over.items(), key=lambda one: -len(one[1]))
    return {
        "images": facts["images"],
        **splits,
        "passed_over": {why: {"files": len(names), "such_as": names[:SHOWN]} for why, names in passed_over},
        "on_the_background": facts["transparent"],
        "of_more_than_one_frame": facts["frames"],
        "of_16_bits": facts["sixteen_bits"],
        "values_of_16_bits_up_to": facts["white"] or None,
        "white_level": source.params.white_level,
        "matched_rows": source.matched,
        "unmatched": {what: len(names) for what, names in source.unmatched.items()},
    }


def _check(assignment: Assignment, params: config.Ingest, described: Path) -> None:
    images = assignment.count("SELECT COUNT(*) FROM image")
    if images == 0:
        raise StageError(f"{params.path} has no images: ingest.kind {params.kind} found nothing to read in it")
    corrupt = assignment.count("SELECT COUNT(*) FROM image WHERE pixels IS NULL")
    if corrupt > params.max_corrupt_fraction * images or corrupt == images:
        raise StageError(
            f"{params.path}: {corrupt} of {images} images cannot be read, {_list_unreadable(described)}; "
            f"ingest.max_corrupt_fraction allows {params.max_corrupt_fraction:g} of them"
        )
    labels = assignment.database.execute("SELECT DISTINCT label FROM image WHERE pixels IS NOT NULL LIMIT 2").fetchall()
    if len(labels) < 2:
        raise StageError(f"{params.path} has one class only ({labels[0][0]}): a classifier needs at least two")


def _check_kept(assignment: Assignment, params: config.Ingest) -> None:
    """Stop if the ledger and the source contradict each other on more images than may be left out."""
    contradictions, images = assignment.contradictions(), assignment.count("SELECT COUNT(*) FROM image")
    if len(contradictions) > params.max_corrupt_fraction * images:
        raise StageError(
            f"{params.path}: {len(contradictions)} of {images} images fit no split ({contradictions[0]}); "
            f"ingest.max_corrupt_fraction allows {params.max_corrupt_fraction:g} of them. Correct the splits or groups "
            "of the source, or begin anew under another model name"
        )


def _list_unreadable(described: Path) -> str:
    """Write all names and reasons to UNREADABLE; returns the counts by reason and the first names, in words."""
    rows = (row for row in _rows(described) if not row["readable"])
    kinds: dict[str, list[tuple[str, str]]] = {}  # reasons that differ in a number only are one
    for row in rows:
        kinds.setdefault(re.sub(r"\d+", "0", row["reason"]), []).append((row["path"], row["reason"]))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "reason"])
    writer.writerows(pair for found in kinds.values() for pair in found)
    files.write_bytes(UNREADABLE, text.getvalue().encode())
    worst = sorted(kinds.values(), key=lambda found: -len(found))
    told = [
        f"{len(found)} of them: {found[0][1]} ({preview([name for name, _ in found], len(found))})"
        for found in worst[:SHOWN]
    ]
    return "; ".join(told) + f"; all are in {UNREADABLE}"


def _rows(described: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(described).iter_batches(ROWS_PER_GROUP):
        yield from batch.to_pylist()


def _write_splits(source: Source, described: Path, assignment: Assignment, outputs: dict[str, Path]) -> dict[str, int]:
    params = source.params
    counts = dict.fromkeys((*SPLITS, "aside"), 0)
    items, assigned = source.items(), assignment.rows()
    columns = dict.fromkeys(SPLITS, params.columns) | {"test": (*params.columns, TEST_PART)}
    with ExitStack() as opened:
        tables = {name: opened.enter_context(Table(outputs[name], IMAGES, columns[name])) for name in SPLITS}
        manifest = opened.enter_context(Table(outputs["manifest"], MANIFEST, params.columns))
        for row in track(_rows(described), "writing splits"):
            item = next(items, None)
            if item is None or hashlib.sha256(item.image).hexdigest() != row["sha256"]:
                raise StageError(f"{params.path} changed while it was read ({row['path']}): run again")
            row["split"], reason, is_new = next(assigned)
            if reason:
                row.update(readable=False, reason=reason)
            counts[row["split"] or "aside"] += 1
            manifest.add(row)
            if row["split"]:
                row[TEST_PART] = NEW if is_new else FROZEN
                kept = {name: row[name] for name in ("label", "path", "sha256", *columns[row["split"]])}
                tables[row["split"]].add({"image": item.image, **kept}, size=len(item.image))
    return counts


def sources(source: Path) -> dict[str, str]:
    """SHA-256 of every file of the source by its path from here; DVC takes the same files for the dependency."""
    return {one.path.as_posix(): files.sha256(one.path) for one in track(walk(source), "hashing sources")}


def main() -> None:
    params = config.load()
    prepared = (paths.TRAIN, paths.VAL, paths.TEST, paths.MANIFEST, paths.LEDGER)
    written = (*prepared, paths.SOURCES, paths.CLASSES, paths.report("ingest"))
    UNREADABLE.unlink(missing_ok=True)
    known = ledger.read(paths.KNOWN_SPLITS) if paths.KNOWN_SPLITS.exists() else ledger.EMPTY
    with files.replacing(*written) as (*temporary, listing, names, told):
        outputs = dict(zip((*SPLITS, "manifest", "ledger"), temporary, strict=True))
        try:
            counts, found = ingest(params.ingest, params.classes, params.validate_.max_side, outputs, known)
        except sqlite3.OperationalError as error:
            raise StageError(f"{tempfile.gettempdir()} cannot hold the index of the images: {error}") from None
        files.write_json(listing, sources(Path(params.ingest.path)))
        files.write_json(names, found["classes"])
        files.write_json(told, found)
    for line in tell(found):
        print(f"ingest: {line}")
    if counts["aside"]:
        print(f"ingest: images that are set aside are in {paths.MANIFEST}, with their reasons")
    print("ingest: " + ", ".join(f"{count} {name}" for name, count in counts.items() if name in SPLITS or count))


def tell(found: dict[str, Any]) -> Iterator[str]:
    """What a reader should know of the report, a sentence each."""
    own = found["with_a_split_of_their_own"]
    if own:
        drawn = found["drawn_from_train"]
        more = f"; {drawn} are drawn from its train for a split that it lacks" if drawn else ""
        yield f"{own} of {found['images']} images keep the split that the source has for them{more}"
    if found["of_before"]:
        new = found["of_the_newest_data"]
        yield f"{found['of_before']} images keep their splits of before, and {new} came with the newest data"
    if found["erased"]:
        yield f"{found['erased']} images are left out, as ingest.erased asks"
    if found["set_aside_by_the_ledger"]:
        yield f"{found['set_aside_by_the_ledger']} images fit no split and are set aside"
    if found["matched_rows"]:
        lonely = ", ".join(f"{count} {what}" for what, count in found["unmatched"].items())
        yield f"{found['matched_rows']} images have their row in the table; {lonely}"
    if found["on_the_background"]:
        yield f"{found['on_the_background']} images are transparent in part and are put on ingest.background"
    if found["of_more_than_one_frame"]:
        yield f"{found['of_more_than_one_frame']} images have more than one frame or page: the first is taken"


if __name__ == "__main__":
    run(main)
