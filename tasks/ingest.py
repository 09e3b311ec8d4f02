"""ingest: bring a source of labelled images into `data/prepared/{train,val,test}.parquet` and a manifest.

Images are handled one at a time; what has to be known of all of them at once (which pixels were seen before,
which split they go to) is kept in SQLite on disk, so memory does not grow with the number of images.
"""

import csv
import gzip
import hashlib
import io
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.images.preprocessing import upright

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
SPLITS = ("train", "val", "test")
METADATA = "metadata.csv"
ROWS_PER_GROUP = 512
BYTES_PER_GROUP = 8 * 2**20
SOURCE_BATCH = 16

IMAGES = pa.schema([("image", pa.binary()), ("label", pa.string()), ("path", pa.string()), ("sha256", pa.string())])
MANIFEST = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("pixels_sha256", pa.string()),
        ("split", pa.string()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("readable", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class Item(NamedTuple):
    """One labelled image as the source has it, with the values of the columns that the parameters name."""

    path: str
    label: str
    image: bytes
    columns: Mapping[str, str | None] = MappingProxyType({})


def examples(params: config.Ingest, classes: tuple[str, ...]) -> Iterator[Item]:
    """Every image of the source in a fixed order; `StageError` if the source is missing or not of its kind."""
    source = Path(params.path)
    if not source.exists():
        raise StageError(f"{source} does not exist: set ingest.path in params.yaml to the {params.kind} source")
    match params.kind:
        case "folder":
            return folder_examples(source, params.columns)
        case "idx":
            if params.columns:
                raise StageError(
                    f"{source}: IDX files have no column {params.columns[0]!r}; take it out of ingest.columns"
                )
            return idx_examples(source, classes)
        case "parquet":
            return parquet_examples(source, params.columns)


def folder_examples(source: Path, columns: tuple[str, ...] = ()) -> Iterator[Item]:
    """Images in class folders: `source/<class>/**/<image>`, sorted by path; `columns` are those of metadata.csv."""
    if not source.is_dir():
        raise StageError(f"{source} is not a folder: ingest.kind folder needs one folder per class in it")
    metadata = _metadata(source / METADATA, columns) if columns else {}
    unknown = dict.fromkeys(columns)
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                name = path.relative_to(source).as_posix()
                yield Item(name, folder.name, path.read_bytes(), metadata.get(name, unknown))


def _metadata(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str | None]]:
    """The named columns of a CSV by its column `file_name`, which is relative to the CSV's folder."""
    if not path.exists():
        raise StageError(f"{path} does not exist, but ingest.columns names {columns[0]!r}: it needs file_name and that")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = {"file_name", *columns} - set(rows.fieldnames or ())
            if missing:
                raise StageError(f"{path} has no column {min(missing)!r}; its columns are {rows.fieldnames}")
            return {row["file_name"]: {name: row[name] or None for name in columns} for row in rows}
    except (UnicodeDecodeError, csv.Error) as error:
        raise StageError(f"{path} is not CSV in UTF-8: {error}") from None


def idx_examples(source: Path, classes: tuple[str, ...]) -> Iterator[Item]:
    """Images of the IDX pairs `*images*` and `*labels*` in a folder, gzipped or not, encoded as PNG.

    The format: https://yann.lecun.com/exdb/mnist (unsigned bytes, big-endian sizes).
    """
    pairs = [
        (images, images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1")))
        for images in sorted(source.glob("*images*idx3*"))
    ]
    if not pairs:
        raise StageError(f"{source} has no IDX images: ingest.kind idx needs files such as train-images-idx3-ubyte.gz")
    for images, labels in pairs:
        yield from _idx_pair(images, labels, classes)


def _idx_pair(images: Path, labels: Path, classes: tuple[str, ...]) -> Iterator[Item]:
    if not labels.exists():
        raise StageError(f"{labels} does not exist: {images} needs its labels beside it")
    with _open(images) as pixels, _open(labels) as codes:
        count, height, width = _idx_sizes(pixels, images, dimensions=3)
        (label_count,) = _idx_sizes(codes, labels, dimensions=1)
        if count != label_count:
            raise StageError(f"{images} has {count} images but {labels} has {label_count} labels")
        for index in range(count):
            raw, code = _read(pixels, height * width, images), _read(codes, 1, labels)[0]
            if code >= len(classes):
                raise StageError(f"{labels}: label {code} at {index} has no name: classes lists {len(classes)}")
            png = io.BytesIO()
            Image.frombytes("L", (width, height), raw).save(png, "PNG")
            yield Item(f"{images.name}#{index}", classes[code], png.getvalue())
        for file, path in ((pixels, images), (codes, labels)):
            if _read(file, 1, path, exactly=False):  # at its end gzip compares the checksum
                raise StageError(f"{path} is longer than the {count} items that it declares")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _idx_sizes(file: IO[bytes], path: Path, dimensions: int) -> list[int]:
    magic = _read(file, 4, path)
    if magic != bytes([0, 0, 8, dimensions]):
        raise StageError(f"{path} is not an IDX file of {dimensions}-dimensional unsigned bytes (magic {magic.hex()})")
    return [int.from_bytes(_read(file, 4, path), "big") for _ in range(dimensions)]


def _read(file: IO[bytes], count: int, path: Path, exactly: bool = True) -> bytes:
    try:
        data = file.read(count)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StageError(f"{path} is damaged: {error}") from None
    if exactly and len(data) != count:
        raise StageError(f"{path} ends too early: {count} more bytes expected, {len(data)} found")
    return data


def parquet_examples(source: Path, columns: tuple[str, ...] = ()) -> Iterator[Item]:
    """Rows of Parquet files (one, or all in a folder): `label`, `image` as bytes or as {bytes, path}, and `columns`."""
    tables = sorted(source.glob("**/*.parquet")) if source.is_dir() else [source]
    if not tables:
        raise StageError(f"{source} has no .parquet file in it")
    for table in tables:
        try:
            file = pq.ParquetFile(table)
        except pa.ArrowInvalid as error:
            raise StageError(f"{table} is not Parquet: {error}") from None
        missing = {"image", "label", *columns} - set(file.schema_arrow.names)
        if missing:
            raise StageError(f"{table} has no column {min(missing)!r}; its columns are {file.schema_arrow.names}")
        kind = file.schema_arrow.field("image").type
        kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise StageError(f"{table}: column 'image' is {kind}; it has to be encoded bytes or {{bytes, path}}")
        name = table.relative_to(source).as_posix() if source.is_dir() else table.name
        row = 0
        for batch in file.iter_batches(batch_size=SOURCE_BATCH, columns=["image", "label", *columns]):
            for values in batch.to_pylist():
                image = values["image"]
                data = image["bytes"] if isinstance(image, dict) else image
                more = {column: None if values[column] is None else str(values[column]) for column in columns}
                yield Item(f"{name}#{row}", str(values["label"]), data or b"", more)
                row += 1


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


def describe(item: Item) -> dict[str, Any]:
    """The manifest row of one image, all but its split; an image that cannot be decoded has a `reason`."""
    row: dict[str, object] = dict.fromkeys(MANIFEST.names)
    row.update(path=item.path, label=item.label, bytes=len(item.image), readable=False)
    row.update(item.columns)
    row["sha256"] = hashlib.sha256(item.image).hexdigest()
    try:
        with Image.open(io.BytesIO(item.image), formats=FORMATS) as opened:
            mode, image = opened.mode, upright(opened)
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:
        # Pillow's decoders raise whatever damaged bytes lead them to; each is a reason to set the image aside.
        row["reason"] = str(error).split(" <_io")[0][:200] or type(error).__name__  # without Pillow's memory address
        return row
    row.update(width=image.width, height=image.height, mode=mode, readable=True)
    row.update(mean=float(pixels.mean()), std=float(pixels.std()))
    row["pixels_sha256"] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return row


def assign_splits(database: sqlite3.Connection, split: config.Split, seed: int) -> None:
    """Give every distinct image its split in table `image(id, label, pixels, split)`.

    Within a class, distinct images are ordered by SHA-256 of seed and pixels, and cut at the shares. Copies
    of an image go where the image goes, whatever their label.
    """

    def rank(pixels: str) -> str:
        return hashlib.sha256(f"{seed}:{pixels}".encode()).hexdigest()

    database.create_function("rank_of", 1, rank, deterministic=True)
    database.execute("CREATE INDEX by_pixels ON image(pixels)")
    database.execute("CREATE TABLE kept (pixels TEXT PRIMARY KEY, share REAL) WITHOUT ROWID")
    database.execute(
        """
        INSERT INTO kept
        SELECT pixels, (ROW_NUMBER() OVER (PARTITION BY label ORDER BY rank_of(pixels)) - 0.5)
                       / COUNT(*) OVER (PARTITION BY label)
        FROM (SELECT pixels, MIN(label) AS label FROM image WHERE pixels IS NOT NULL GROUP BY pixels)
        """
    )
    database.execute(
        """
        UPDATE image SET split = (
            SELECT CASE WHEN share < ? THEN 'test' WHEN share < ? THEN 'val' ELSE 'train' END
            FROM kept WHERE kept.pixels = image.pixels)
        """,
        (split.test, split.test + split.val),
    )


def ingest(params: config.Ingest, classes: tuple[str, ...], outputs: dict[str, Path]) -> dict[str, int]:
    """Read the source twice, once to know every image, once to write each to its split.

    `outputs` has a Parquet path for each split and for `manifest`. Returns the number of images in each
    split, and of the quarantined ones under `corrupt`.
    """
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        database = sqlite3.connect(Path(scratch) / "images.sqlite", isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE image (id INTEGER PRIMARY KEY, label TEXT, pixels TEXT, split TEXT)")
        described = Path(scratch) / "described.parquet"
        with Table(described, MANIFEST, params.columns) as table:
            _describe_all(params, classes, database, table)
        _check(database, params)
        assign_splits(database, params.split, params.seed)
        counts = _write_splits(params, classes, described, database, outputs)
        database.close()
    empty = [name for name in SPLITS if counts[name] == 0]
    if empty:
        raise StageError(f"{params.path}: the {empty[0]} split is empty; add images or change ingest.split")
    return counts


def _describe_all(params: config.Ingest, classes: tuple[str, ...], database: sqlite3.Connection, table: Table) -> None:
    database.execute("BEGIN")
    for index, item in enumerate(track(examples(params, classes), "reading images")):
        row = describe(item)
        table.add(row)
        database.execute("INSERT INTO image VALUES (?, ?, ?, NULL)", (index, row["label"], row["pixels_sha256"]))
    database.execute("COMMIT")


def _check(database: sqlite3.Connection, params: config.Ingest) -> None:
    def count(query: str) -> int:
        return int(database.execute(query).fetchone()[0])

    images = count("SELECT COUNT(*) FROM image")
    if images == 0:
        raise StageError(f"{params.path} has no images: ingest.kind {params.kind} found nothing to read in it")
    corrupt = count("SELECT COUNT(*) FROM image WHERE pixels IS NULL")
    if corrupt > params.max_corrupt_fraction * images:
        raise StageError(
            f"{params.path}: {corrupt} of {images} images cannot be read, more than "
            f"ingest.max_corrupt_fraction {params.max_corrupt_fraction:g} allows"
        )
    if corrupt == images:
        raise StageError(f"{params.path}: none of its {images} images can be read")
    labels = [row[0] for row in database.execute("SELECT DISTINCT label FROM image WHERE pixels IS NOT NULL LIMIT 2")]
    if len(labels) < 2:
        raise StageError(f"{params.path} has one class only ({labels[0]}): a classifier needs at least two")


def _write_splits(
    params: config.Ingest,
    classes: tuple[str, ...],
    described: Path,
    database: sqlite3.Connection,
    outputs: dict[str, Path],
) -> dict[str, int]:
    counts = dict.fromkeys((*SPLITS, "corrupt"), 0)
    items = examples(params, classes)
    splits = database.execute("SELECT split FROM image ORDER BY id")
    batches = pq.ParquetFile(described).iter_batches(ROWS_PER_GROUP)
    with ExitStack() as opened:
        tables = {name: opened.enter_context(Table(outputs[name], IMAGES, params.columns)) for name in SPLITS}
        manifest = opened.enter_context(Table(outputs["manifest"], MANIFEST, params.columns))
        for row in track((row for batch in batches for row in batch.to_pylist()), "writing splits"):
            item = next(items, None)
            if item is None or hashlib.sha256(item.image).hexdigest() != row["sha256"]:
                raise StageError(f"{params.path} changed while it was read ({row['path']}): run again")
            row["split"] = splits.fetchone()[0]
            counts[row["split"] or "corrupt"] += 1
            manifest.add(row)
            if row["split"]:
                kept = {name: row[name] for name in ("label", "path", "sha256", *params.columns)}
                tables[row["split"]].add({"image": item.image, **kept}, size=len(item.image))
    return counts


def sources(source: Path) -> dict[str, str]:
    """SHA-256 of every file of the source by its path from here; DVC takes the same files for the dependency."""
    found = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return {path.as_posix(): files.sha256(path) for path in track(found, "hashing sources")}


def main() -> None:
    params = config.load()
    targets = (paths.TRAIN, paths.VAL, paths.TEST, paths.MANIFEST, paths.SOURCES)
    with files.replacing(*targets) as (*temporary, listing):
        outputs = dict(zip((*SPLITS, "manifest"), temporary, strict=True))
        try:
            counts = ingest(params.ingest, params.classes, outputs)
        except sqlite3.OperationalError as error:
            raise StageError(f"{tempfile.gettempdir()} cannot hold the index of the images: {error}") from None
        files.write_json(listing, sources(Path(params.ingest.path)))
    if counts["corrupt"]:
        print(f"ingest: unreadable images are set aside, with their reasons, in {paths.MANIFEST}")
    print("ingest: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    run(main)
