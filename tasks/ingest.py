"""ingest: bring a source of labelled images into `data/prepared/{train,val,test}.parquet` and a manifest.

Images are handled one at a time; what has to be known of all of them at once (which pixels were seen before,
which split they go to) is kept in SQLite on disk, so memory does not grow with the number of images.
"""

import csv
import hashlib
import io
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.images.listing import walk
from tasks.images.preprocessing import open_image, render
from tasks.images.sources import SHOWN, SPLITS, Item, Source, open_source, shown

ROWS_PER_GROUP = 512
BYTES_PER_GROUP = 8 * 2**20
ROWS_AT_ONCE = 256  # of pixels
UNREADABLE = paths.REPORTS / "unreadable.csv"

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
        ("white", pa.int32()),  # the largest value of a file with 16 bits
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("perceptual_hash", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),  # of each channel around its own mean, so 0 where all pixels are of one colour
        ("readable", pa.bool_()),
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
            row.update(_describe_pixels(opened, params))
        if item.label is None:
            raise ValueError("it has no label")
    except Exception as error:
        # Pillow's decoders raise whatever damaged bytes lead them to; each is a reason to set the image aside.
        reason = str(error).split(" <_io")[0][:200] or type(error).__name__  # without Pillow's memory address
        return row | {"readable": False, "reason": reason, "pixels_sha256": None}
    return row


def _describe_pixels(opened: Image.Image, params: config.Ingest) -> dict[str, object]:
    """What the manifest says of an image that is decoded, with no more of it in memory than it takes to decode it."""
    facts: dict[str, object] = {"mode": opened.mode, "frames": getattr(opened, "n_frames", 1), "readable": True}
    if opened.mode.startswith("I;16"):
        facts["white"] = int(np.asarray(opened).max())  # getextrema() does not know all orders of bytes
    facts["transparent"] = opened.has_transparency_data
    image = render(opened, params.background, params.white_level)
    facts.update(width=image.width, height=image.height, perceptual_hash=perceptual_hash(image))
    pixels = image if image.mode == "RGB" else image.convert("RGB")
    facts["mean"], facts["std"] = _moments(pixels)
    hashed = hashlib.sha256(repr((pixels.height, pixels.width, 3)).encode())
    for top in range(0, pixels.height, ROWS_AT_ONCE):  # what NumPy or tobytes copy is as large as the image
        hashed.update(pixels.crop((0, top, pixels.width, min(top + ROWS_AT_ONCE, pixels.height))).tobytes())
    facts["pixels_sha256"] = hashed.hexdigest()
    return facts


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


def assign_splits(database: sqlite3.Connection, split: config.Split, seed: int) -> None:
    """Give every distinct image its split in table `image(id, label, pixels, part, own, split)`.

    What has an `own` split keeps it, and what has none follows the rest of its part. What is left is drawn: within a
    class, parts are ordered by SHA-256 of seed and name, and cut at the shares of distinct images. A part is a group of
    images, or an image with its copies. Splits that some images have of their own are not drawn for others. What is
    train of its own is drawn from only if all images have splits of their own: for those that the source lacks.
    """

    def rank(part: str) -> str:
        return hashlib.sha256(f"{seed}:{part}".encode()).hexdigest()

    database.create_function("rank_of", 1, rank, deterministic=True)
    database.execute("CREATE INDEX by_part ON image(part)")
    own = "SELECT DISTINCT own FROM image WHERE pixels IS NOT NULL"
    owned = {row[0] for row in database.execute(own)}
    drawn = "own IS NULL" if None in owned else "own = 'train'"
    database.execute("CREATE TABLE followed (part TEXT PRIMARY KEY, own TEXT) WITHOUT ROWID")
    named = "SELECT part, MIN(own) FROM image WHERE pixels IS NOT NULL AND own IS NOT NULL GROUP BY part"
    if None in owned:
        database.execute(f"INSERT INTO followed {named}")
    database.execute("CREATE TABLE kept (part TEXT PRIMARY KEY, share REAL) WITHOUT ROWID")
    database.execute(
        f"""
        INSERT INTO kept
        SELECT part, (SUM(size) OVER (PARTITION BY label ORDER BY rank_of(part)) - size / 2.0)
                     / SUM(size) OVER (PARTITION BY label)
        FROM (SELECT part, MIN(label) AS label, COUNT(DISTINCT pixels) AS size FROM image
              WHERE pixels IS NOT NULL AND {drawn} AND part NOT IN (SELECT part FROM followed) GROUP BY part)
        """  # noqa: S608
    )
    test = 0.0 if "test" in owned else split.test
    val = 0.0 if "val" in owned else split.val
    database.execute(
        f"""
        UPDATE image SET split = CASE WHEN {drawn} THEN COALESCE(
            (SELECT own FROM followed WHERE followed.part = image.part),
            (SELECT CASE WHEN share < ? THEN 'test' WHEN share < ? THEN 'val' ELSE 'train' END
             FROM kept WHERE kept.part = image.part)) ELSE own END
        WHERE pixels IS NOT NULL
        """,  # noqa: S608
        (test, test + val),
    )


def _join_parts(database: sqlite3.Connection) -> None:
    """Name the part of each image: its group, with all groups that share pixels with it, or its pixels."""
    parents: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while parents.setdefault(root, root) != root:
            root = parents[root]
        while parents[name] != root:
            parents[name], name = root, parents[name]
        return root

    pairs = "SELECT DISTINCT pixels, part FROM image WHERE part IS NOT NULL AND pixels IS NOT NULL ORDER BY 1, 2"
    last: tuple[str, str] | None = None
    for pixels, part in database.execute(pairs):
        if last and last[0] == pixels:
            parents[find(part)] = find(last[1])
        else:
            find(part)
            last = (pixels, part)
    database.execute("CREATE INDEX by_pixels ON image(pixels)")
    database.execute("CREATE TABLE joined (pixels TEXT PRIMARY KEY, part TEXT) WITHOUT ROWID")
    groups = database.execute(pairs)
    database.executemany(
        "INSERT OR IGNORE INTO joined VALUES (?, ?)", ((pixels, f"group {find(part)}") for pixels, part in groups)
    )
    database.execute(
        "UPDATE image SET part = COALESCE((SELECT part FROM joined WHERE joined.pixels = image.pixels), pixels)"
    )


def ingest(
    params: config.Ingest, classes: tuple[str, ...], max_side: int, outputs: dict[str, Path]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Read the source twice, once to know every image, once to write each to its split.

    `outputs` has a Parquet path for each split and for `manifest`. Returns the number of images in each split and of
    the quarantined ones under `corrupt`, and the report: what of the source was taken, and how.
    """
    source = open_source(params, classes)
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        database = sqlite3.connect(Path(scratch) / "images.sqlite", isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        database.execute(
            "CREATE TABLE image (id INTEGER PRIMARY KEY, label TEXT, pixels TEXT, part TEXT, own TEXT, split TEXT)"
        )
        described = Path(scratch) / "described.parquet"
        with Table(described, MANIFEST, params.columns) as table:
            facts = _describe_all(source, max_side, database, table)
        _check(database, params, described)
        _join_parts(database)
        assign_splits(database, params.split, params.seed)
        kept = database.execute("SELECT COUNT(*) FROM image WHERE own = split AND own IS NOT NULL").fetchone()[0]
        moved = database.execute("SELECT COUNT(*) FROM image WHERE own <> split").fetchone()[0]
        facts.update(own_split=kept, moved=moved)
        counts = _write_splits(source, described, database, outputs)
        database.close()
    empty = [name for name in SPLITS if counts[name] == 0]
    if empty:
        few = ", or more groups: there are few for the shares" if params.group_column else ""
        raise StageError(f"{params.path}: the {empty[0]} split is empty; add images{few} or change ingest.split")
    return counts, report(source, facts)


def _describe_all(source: Source, max_side: int, database: sqlite3.Connection, table: Table) -> Counter[str]:
    """Put every image into the table and the database; returns how many there are of what the report tells."""
    facts: Counter[str] = Counter()
    database.execute("BEGIN")
    for index, item in enumerate(track(source.items(), "reading images")):
        row = describe(item, source.params, max_side)
        table.add(row)
        database.execute(
            "INSERT INTO image VALUES (?, ?, ?, ?, ?, NULL)",
            (index, row["label"], row["pixels_sha256"], row["group"] if row["readable"] else None, item.split),
        )
        facts += Counter(
            images=1,
            transparent=bool(row["transparent"]),
            frames=(row["frames"] or 1) > 1,
            sixteen_bits=row["white"] is not None,
        )
        facts["white"] = max(facts["white"], row["white"] or 0)
    database.execute("COMMIT")
    return facts


def report(source: Source, facts: Counter[str]) -> dict[str, Any]:
    """What of the source was taken and how, for `validate` and for the reader; fit for JSON."""
    passed_over = sorted(source.passed_over.items(), key=lambda one: -len(one[1]))
    return {
        "images": facts["images"],
        "with_a_split_of_their_own": facts["own_split"],
        "drawn_from_train": facts["moved"],
        "passed_over": {why: {"files": len(names), "such_as": names[:SHOWN]} for why, names in passed_over},
        "on_the_background": facts["transparent"],
        "of_more_than_one_frame": facts["frames"],
        "of_16_bits": facts["sixteen_bits"],
        "largest_value_of_16_bits": facts["white"] or None,
        "white_level": source.params.white_level,
        "matched_rows": source.matched,
        "unmatched": {what: len(names) for what, names in source.unmatched.items()},
    }


def _check(database: sqlite3.Connection, params: config.Ingest, described: Path) -> None:
    def count(query: str) -> int:
        return int(database.execute(query).fetchone()[0])

    images = count("SELECT COUNT(*) FROM image")
    if images == 0:
        raise StageError(f"{params.path} has no images: ingest.kind {params.kind} found nothing to read in it")
    corrupt = count("SELECT COUNT(*) FROM image WHERE pixels IS NULL")
    if corrupt > params.max_corrupt_fraction * images or corrupt == images:
        raise StageError(
            f"{params.path}: {corrupt} of {images} images cannot be read, {_list_unreadable(described)}; "
            f"ingest.max_corrupt_fraction allows {params.max_corrupt_fraction:g} of them"
        )
    labels = [row[0] for row in database.execute("SELECT DISTINCT label FROM image WHERE pixels IS NOT NULL LIMIT 2")]
    if len(labels) < 2:
        raise StageError(f"{params.path} has one class only ({labels[0]}): a classifier needs at least two")


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
        f"{len(found)} of them: {found[0][1]} ({shown([name for name, _ in found], len(found))})"
        for found in worst[:SHOWN]
    ]
    return "; ".join(told) + f"; all are in {UNREADABLE}"


def _rows(described: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(described).iter_batches(ROWS_PER_GROUP):
        yield from batch.to_pylist()


def _write_splits(
    source: Source, described: Path, database: sqlite3.Connection, outputs: dict[str, Path]
) -> dict[str, int]:
    params = source.params
    counts = dict.fromkeys((*SPLITS, "corrupt"), 0)
    items = source.items()
    splits = database.execute("SELECT split FROM image ORDER BY id")
    with ExitStack() as opened:
        tables = {name: opened.enter_context(Table(outputs[name], IMAGES, params.columns)) for name in SPLITS}
        manifest = opened.enter_context(Table(outputs["manifest"], MANIFEST, params.columns))
        for row in track(_rows(described), "writing splits"):
            item = next(items, None)
            if item is None or hashlib.sha256(item.image).hexdigest() != row["sha256"]:
                raise StageError(f"{params.path} changed while it was read ({row['path']}): run again")
            split = splits.fetchone()[0]
            row["split"] = split if row["readable"] else None
            counts[row["split"] or "corrupt"] += 1
            manifest.add(row)
            if row["split"]:
                kept = {name: row[name] for name in ("label", "path", "sha256", *params.columns)}
                tables[row["split"]].add({"image": item.image, **kept}, size=len(item.image))
    return counts


def sources(source: Path) -> dict[str, str]:
    """SHA-256 of every file of the source by its path from here; DVC takes the same files for the dependency."""
    return {one.path.as_posix(): files.sha256(one.path) for one in track(walk(source), "hashing sources")}


def main() -> None:
    params = config.load()
    targets = (paths.TRAIN, paths.VAL, paths.TEST, paths.MANIFEST, paths.SOURCES, paths.report("ingest"))
    UNREADABLE.unlink(missing_ok=True)
    with files.replacing(*targets) as (*temporary, listing, told):
        outputs = dict(zip((*SPLITS, "manifest"), temporary, strict=True))
        try:
            counts, found = ingest(params.ingest, params.classes, params.validate_.max_side, outputs)
        except sqlite3.OperationalError as error:
            raise StageError(f"{tempfile.gettempdir()} cannot hold the index of the images: {error}") from None
        files.write_json(listing, sources(Path(params.ingest.path)))
        files.write_json(told, found)
    for line in tell(found):
        print(f"ingest: {line}")
    if counts["corrupt"]:
        print(f"ingest: unreadable images are set aside, with their reasons, in {paths.MANIFEST}")
    print("ingest: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def tell(found: dict[str, Any]) -> Iterator[str]:
    """What a reader should know of the report, a sentence each."""
    own = found["with_a_split_of_their_own"]
    if own:
        drawn = found["drawn_from_train"]
        more = f"; {drawn} are drawn from its train for a split that it lacks" if drawn else ""
        yield f"{own} of {found['images']} images keep the split that the source has for them{more}"
    if found["matched_rows"]:
        lonely = ", ".join(f"{count} {what}" for what, count in found["unmatched"].items())
        yield f"{found['matched_rows']} images have their row in the table; {lonely}"
    if found["on_the_background"]:
        yield f"{found['on_the_background']} images are transparent in part and are put on ingest.background"
    if found["of_more_than_one_frame"]:
        yield f"{found['of_more_than_one_frame']} images have more than one frame or page: the first is taken"


if __name__ == "__main__":
    run(main)
