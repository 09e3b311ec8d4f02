"""The layouts in which people keep labelled images, each as the same sequence of items.

Class folders, with or without folders for the splits above them and a table beside them; a folder of images with a
table; pairs of IDX files; Parquet, as Hugging Face has it, too.
"""

import csv
import dataclasses
import functools
import gzip
import io
import json
import posixpath
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.core import config
from tasks.core.errors import StageError, first_line
from tasks.images.listing import File, normal, walk
from tasks.images.preprocessing import FORMATS

SPLITS = ("train", "val", "test")
# What people call the splits.
SPLIT_NAMES = MappingProxyType(
    {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
    | {"test": "test", "testing": "test", "t10k": "test"}
)
TABLES = ("metadata.csv", "metadata.jsonl")
SHOWN = 3  # names in a sentence
SOURCE_BATCH = 16
MAX_IDX_SIDE = 4096  # pixels; a damaged file can declare anything


class Item(NamedTuple):
    """One image as the source has it: its label, if any, its own split and group, if the source says, and columns."""

    path: str
    label: str | None
    image: bytes
    split: str | None = None
    group: str | None = None
    columns: Mapping[str, str | None] = MappingProxyType({})


class Row(NamedTuple):
    """What a table says of an image."""

    label: str | None
    split: str | None
    group: str | None
    columns: Mapping[str, str | None]


@dataclass(frozen=True)
class Source:
    """A source of images, opened: what of it is read, and what is not.

    `passed_over` has the names of files that are not read, by reason. `unmatched` has the names of images without a row
    in the table, and of rows without an image.
    """

    params: config.Ingest
    classes: tuple[str, ...]  # none, if they are left to the source
    files: tuple[File, ...]
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    matched: int = 0
    table: Mapping[str, Row] = field(default_factory=dict)
    own_splits: bool = False

    def items(self) -> Iterator[Item]:
        """Every image in a fixed order; the same ones each time."""
        match self.params.kind:
            case "folder":
                return self._of_folder()
            case "idx":
                return _of_idx(self.files, self.classes)
            case "parquet":
                return _of_parquet(self.files, self.params)

    def _of_folder(self) -> Iterator[Item]:
        none = Row(None, None, None, dict.fromkeys(self.params.columns))
        for file in self.files:
            row, folders = self.table.get(file.name, none), file.name.split("/")[:-1]
            split = row.split
            if self.own_splits:
                split = SPLIT_NAMES[folders.pop(0).casefold()]
            label = row.label if self.params.label_column else folders[0]
            yield Item(file.name, label, file.path.read_bytes(), split, row.group, row.columns)


def open_source(params: config.Ingest, classes: tuple[str, ...] = ()) -> Source:
    """The source that the parameters name; `StageError` if it is missing, not of its kind, or not as its table says."""
    source = Path(params.path)
    if not source.exists():
        raise StageError(f"{source} does not exist: set ingest.path in params.yaml to the {params.kind} source")
    found = walk(source)
    match params.kind:
        case "folder":
            if not source.is_dir():
                raise StageError(f"{source} is not a folder: ingest.kind folder needs one folder per class in it")
            return _open_folder(found, params, classes)
        case "idx":
            _require_no_columns(source, params)
            return Source(params, classes, _idx_files(source, found))
        case "parquet":
            tables = tuple(one for one in found if not one.hidden and one.path.suffix == ".parquet")
            if source.is_dir() and not tables:
                raise StageError(f"{source} has no .parquet file in it")
            return Source(params, classes, tables if source.is_dir() else tuple(found))


def preview(names: Iterable[str], count: int) -> str:
    """The first names of so many, in words."""
    first = [name for name, _ in zip(names, range(SHOWN), strict=False)]
    return ", ".join(first) + (" ..." if count > SHOWN else "")


def _split_of(name: str) -> str | None:
    """The split that a word stands for, as `Validation` does; None if for none."""
    return SPLIT_NAMES.get(name.casefold())


def _split_in(name: str) -> str | None:
    """The split that a word in the name of a file or of a folder above it stands for, as in `data/train-0.parquet`."""
    *folders, last = name.split("/")
    words = [*re.split(r"[-_.]", last), *reversed(folders)]
    return next((split for word in words if (split := _split_of(word))), None)


def _own_splits(found: Mapping[str, str | None], source: Path) -> bool:
    """Whether the parts of a source, by name, are its own splits: each belongs to one, to train and to others.

    `StageError` if that is so for some of them only: nobody could say what the others are.
    """
    named = {name for name, split in found.items() if split}
    others = found.keys() - named
    if named and others and {"train"} < {found[name] for name in named}:
        raise StageError(
            f"{source} has {preview(sorted(named), len(named))}, which are named as splits, beside "
            f"{preview(sorted(others), len(others))}, which belong to none: take them out, or put all images into "
            "splits"
        )
    return not others and {"train"} < set(found.values())


# Folders


def _open_folder(found: list[File], params: config.Ingest, classes: tuple[str, ...]) -> Source:
    source = Path(params.path)
    visible = [one for one in found if not one.hidden]
    pictures = (one for one in visible if "/" in one.name and one.path.suffix.lower() in image_suffixes())
    tops = {one.name.split("/")[0]: None for one in pictures}
    own = params.split_column is None and not set(classes) & set(tops)
    own = own and _own_splits({top: _split_of(top) for top in tops}, source)
    tables = _tables(visible, params, own) if _named_columns(params) else []
    taken: list[File] = []
    passed_over: dict[str, list[str]] = {}
    folders = own + (params.label_column is None)  # so many are above an image at least
    for one in found:
        reason = None if one in tables else _reason_to_pass_over(one, folders)
        if reason:
            passed_over.setdefault(reason, []).append(one.name)
        elif one not in tables:
            taken.append(one)
    if not taken:
        raise StageError(_no_image(source, visible, folders))
    made = Source(params, classes, tuple(taken), {name: tuple(of) for name, of in passed_over.items()}, own_splits=own)
    return _join(made, tables) if _named_columns(params) else made


def _tables(visible: list[File], params: config.Ingest, own: bool) -> list[File]:
    """The table, or those of the splits' folders; `StageError` if there is none."""
    by_name, place = {one.name: one for one in visible}, Path(params.path)
    if params.table is not None:
        name = posixpath.normpath(normal(params.table))
        if name not in by_name:
            raise StageError(
                f"{place / params.table} is no file in {place}, or is hidden: ingest.table is a path in there"
            )
        return [by_name[name]]
    folders = ["", *sorted({one.name.split("/")[0] + "/" for one in visible if own and "/" in one.name})]
    found = [
        next((by_name[f"{folder}{name}"] for name in TABLES if f"{folder}{name}" in by_name), None)
        for folder in folders
    ]
    tables = [one for one in found if one]
    if not tables:
        raise StageError(
            f"{place / TABLES[0]} does not exist, but ingest names the column {_named_columns(params)[0]!r}: it needs "
            f"{params.file_column} and that"
        )
    return tables


def _reason_to_pass_over(one: File, folders: int) -> str | None:
    if one.hidden:
        return f"in {one.hidden}" if one.hidden.endswith("/") else "hidden"
    suffix = one.path.suffix.lower()
    if suffix not in image_suffixes() and not _is_image(one.path):
        return suffix or "without a suffix"
    return "outside of the class folders" if one.name.count("/") < folders else None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """What the names of images end with; other files are images if their content says so."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except OSError as error:
        if error.errno is not None:
            raise  # of the operating system; Pillow has some without a number
        return False
    except (ValueError, RuntimeError, Image.DecompressionBombError):
        return False  # what else Pillow raises of a header, in 30,000 damaged files


def _no_image(source: Path, visible: list[File], folders: int) -> str:
    flat = sum("/" not in one.name and one.path.suffix.lower() in image_suffixes() for one in visible)
    if flat and folders:
        return (
            f"{source} has {flat} images that are in no class folder: put each into a folder of its class, or set "
            "ingest.label_column to the column of metadata.csv that has the label"
        )
    return f"{source} has no images: ingest.kind folder found nothing to read in it"


# Tables beside a folder's images


def _named_columns(params: config.Ingest) -> tuple[str, ...]:
    """The columns that are wanted of a table."""
    special = (params.label_column, params.split_column, params.group_column)
    return tuple(dict.fromkeys([*(name for name in special if name), *params.columns]))


def _join(source: Source, tables: list[File]) -> Source:
    """The source with its tables' rows; `StageError` if too few of images or rows have a partner."""
    params = source.params
    rows: dict[str, Row] = {}
    for one in tables:
        folder = one.name.rpartition("/")[0]
        for name, row in _read_table(one.path, params):
            key = normal(posixpath.normpath(posixpath.join(folder, name.strip().replace("\\", "/"))))
            if key in rows:
                raise StageError(f"{one.path} has more than one row for {key}")
            rows[key] = row
    found = [one.name for one in source.files]
    images = tuple(one for one in found if one not in rows)
    lonely = tuple(sorted(rows.keys() - set(found)))
    most = params.max_unmatched_fraction
    if len(images) > most * len(found) or len(lonely) > most * len(rows):
        raise StageError(_mismatch(tables, images, lonely, len(found), len(rows), most))
    unmatched = {"images without a row": images, "rows without an image": lonely}
    return dataclasses.replace(source, table=rows, matched=len(found) - len(images), unmatched=unmatched)


def _mismatch(
    tables: list[File], images: tuple[str, ...], rows: tuple[str, ...], all_images: int, all_rows: int, most: float
) -> str:
    parts = []
    if images:
        parts.append(f"{len(images)} of {all_images} images have no row in it ({preview(images, len(images))})")
    if rows:
        parts.append(f"{len(rows)} of {all_rows} rows name no image ({preview(rows, len(rows))})")
    return f"{tables[0].path}: {' and '.join(parts)}: ingest.max_unmatched_fraction allows {most:g}"


def _read_table(path: Path, params: config.Ingest) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV or JSON Lines file in UTF-8, with the name of the image that each is of."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_json_rows(file)) if path.suffix == ".jsonl" else csv.DictReader(file)
            if isinstance(rows, csv.DictReader):
                columns = list(rows.fieldnames or ())
            else:  # a line may leave out what is null
                columns = list(dict.fromkeys(name for row in rows for name in row))
            _require_once({params.file_column, *_named_columns(params)}, columns, path)
            for number, row in enumerate(rows):
                name = row.get(params.file_column)
                if not name:
                    raise StageError(f"{path}: row {number + 1} has no {params.file_column}")
                yield str(name), _row(row, params, path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise StageError(f"{path} is not CSV in UTF-8: {error}") from None


def _json_rows(file: IO[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StageError(f"{file.name}: line {number} is not JSON: {first_line(error)}") from None
        if not isinstance(row, dict):
            raise StageError(f"{file.name}: line {number} is not a JSON object with the columns as keys")
        yield row


def _require_once(asked: Iterable[str], columns: list[str], path: Path) -> None:
    missing = set(asked) - set(columns)
    if missing:
        raise StageError(f"{path} has no column {min(missing)!r}; its columns are {', '.join(columns) or 'none'}")
    twice = sorted(name for name in set(asked) if columns.count(name) > 1)
    if twice:
        raise StageError(f"{path} has more than one column {twice[0]!r}")


def text_of(value: object, where: Path) -> str | None:
    """A label, split, group or value as text in Unicode's form NFC, without spaces around; None if nothing is left."""
    if value is None:
        return None
    text = normal(str(value)).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StageError(f"{where} has the value {text!a}, which is not Unicode: correct it") from None
    return text or None


def _row(row: Mapping[str, Any], params: config.Ingest, where: Path) -> Row:
    def text(column: str | None) -> str | None:
        return text_of(row.get(column), where) if column else None

    return Row(
        text(params.label_column),
        _named_split(text(params.split_column), where),
        text(params.group_column),
        {name: text(name) for name in params.columns},
    )


def _named_split(value: str | None, where: Path) -> str | None:
    if value is None:
        return None
    split = _split_of(value)
    if split is None:
        raise StageError(f"{where} has the split {value!r}, which is none of train, val and test")
    return split


# IDX


def _require_no_columns(source: Path, params: config.Ingest) -> None:
    columns = _named_columns(params)
    if columns:
        raise StageError(f"{source}: IDX files have no column {columns[0]!r}; take it out of ingest")


def _idx_files(source: Path, found: list[File]) -> tuple[File, ...]:
    pairs = tuple(one for one in found if "/" not in one.name and not one.hidden and fnmatch(one.name, "*images*idx3*"))
    if not pairs:
        raise StageError(f"{source} has no IDX images: ingest.kind idx needs files such as train-images-idx3-ubyte.gz")
    return pairs


def _of_idx(pairs: tuple[File, ...], classes: tuple[str, ...]) -> Iterator[Item]:
    """Images of the IDX pairs `*images*` and `*labels*`, gzipped or not, encoded as PNG.

    The format: https://yann.lecun.com/exdb/mnist (unsigned bytes, big-endian sizes).
    """
    splits = {one: _split_in(one.name) for one in pairs}
    own = _own_splits({one.name: split for one, split in splits.items()}, pairs[0].path.parent)
    for one in pairs:
        labels = one.path.with_name(one.path.name.replace("images", "labels").replace("idx3", "idx1"))
        yield from _idx_pair(one.path, labels, classes, splits[one] if own else None)


def _idx_pair(images: Path, labels: Path, classes: tuple[str, ...], split: str | None) -> Iterator[Item]:
    if not labels.exists():
        raise StageError(f"{labels} does not exist: {images} needs its labels beside it")
    with _open(images) as pixels, _open(labels) as codes:
        count, height, width = _idx_sizes(pixels, images, dimensions=3)
        if not (0 < height <= MAX_IDX_SIDE and 0 < width <= MAX_IDX_SIDE):
            raise StageError(f"{images} declares images of {width} x {height} pixels: 1 to {MAX_IDX_SIDE} are possible")
        (label_count,) = _idx_sizes(codes, labels, dimensions=1)
        if count != label_count:
            raise StageError(f"{images} has {count} images but {labels} has {label_count} labels")
        for index in range(count):
            raw, code = _read(pixels, height * width, images), _read(codes, 1, labels)[0]
            if code >= len(classes):
                raise StageError(f"{labels}: label {code} at {index} has no name: classes lists {len(classes)}")
            png = io.BytesIO()
            Image.frombytes("L", (width, height), raw).save(png, "PNG")
            yield Item(f"{images.name}#{index}", classes[code], png.getvalue(), split)
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


# Parquet


def _of_parquet(tables: tuple[File, ...], params: config.Ingest) -> Iterator[Item]:
    """Rows of Parquet files: encoded images as bytes or as {bytes, path}, labels, and the columns that are wanted."""
    splits = {one: _split_in(one.name) for one in tables}
    by_name = {one.name: split for one, split in splits.items()}
    own = params.split_column is None and _own_splits(by_name, Path(params.path))
    for one in tables:
        yield from _of_table(one, params, splits[one] if own else None)


def _of_table(one: File, params: config.Ingest, split: str | None) -> Iterator[Item]:
    label, image = params.label_column or "label", params.image_column
    asked = tuple(dict.fromkeys((image, label, *_named_columns(params))))
    try:
        file = pq.ParquetFile(one.path)
        _require_columns(file.schema_arrow, image, asked, one.path)
        names = _class_names(file.schema_arrow, label)
        row = 0
        for batch in file.iter_batches(batch_size=SOURCE_BATCH, columns=list(asked)):
            for values in batch.to_pylist():
                found = _row(values, params, one.path)
                data = values[image]["bytes"] if isinstance(values[image], dict) else values[image]
                yield Item(
                    f"{one.name}#{row}",
                    _name_of(values[label], names, one.path),
                    data or b"",
                    found.split or split,
                    found.group,
                    found.columns,
                )
                row += 1
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the operating system; Arrow has some without a number
        raise StageError(f"{one.path} is not Parquet, or is damaged: {first_line(error)}") from None


def _require_columns(schema: pa.Schema, image: str, asked: tuple[str, ...], path: Path) -> None:
    _require_once(asked, schema.names, path)
    kind = schema.field(image).type
    kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise StageError(f"{path}: column {image!r} is {kind}; it has to be encoded bytes or {{bytes, path}}")


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """The names that a Hugging Face schema has for the numbers in a column of labels (`ClassLabel`)."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _name_of(label: object, names: list[str] | None, path: Path) -> str | None:
    if names is None or not isinstance(label, int):
        return text_of(label, path)
    if label == -1:  # how Hugging Face says that there is none
        return None
    if not 0 <= label < len(names):
        raise StageError(f"{path} has the label {label}, for which its schema has no name: it has {len(names)}")
    return text_of(names[label], path)
