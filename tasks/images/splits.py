"""The prepared splits: labelled images and their columns, read out of Parquet. Imports neither torch nor timm."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.errors import StageError, first_line
from tasks.images.preprocessing import Preprocessing, batch_of, preprocess

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def read(path: Path, classes: tuple[str, ...]) -> tuple[list[bytes], list[int]]:
    """All encoded images of a split and their class numbers; `StageError` at a label that `classes` lacks."""
    codes = {name: code for code, name in enumerate(classes)}
    with _open_parquet(path) as file:
        table = file.read(["image", "label"])
    return table["image"].to_pylist(), [codes[label] for label in _labels(table, path, classes)]


def columns(path: Path, classes: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """The label of each image of a split, and the values of the columns that `ingest.columns` carried to it.

    An image without a value has "". `StageError` at a label that `classes` lacks.
    """
    with _open_parquet(path) as file:
        table = file.read([name for name in file.schema_arrow.names if name not in ("image", "path", "sha256")])
    carried = [name for name in table.column_names if name != "label"]
    return _labels(table, path, classes), {name: [value or "" for value in table[name].to_pylist()] for name in carried}


def _labels(table: pa.Table, path: Path, classes: tuple[str, ...]) -> list[str]:
    labels: list[str] = table["label"].to_pylist()
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise StageError(f"{path} has the label {unknown[0]!r}, which classes in params.yaml does not list")
    return labels


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with path.open("rb") as file:
            opened = pq.ParquetFile(file)
            missing = {"image", "label"} - set(opened.schema_arrow.names)
            if missing:
                raise StageError(f"{path} does not hold prepared images (it has no column {min(missing)!r})")
            yield opened
    except pa.ArrowInvalid as error:
        raise StageError(f"{path} does not hold prepared images ({first_line(error)})") from None


def batches(path: Path, preprocessing: Preprocessing, classes: tuple[str, ...], size: int) -> Iterator[Batch]:
    """The split in order, decoded batch by batch: float32 (B, C, H, W) and int64 (B,).

    A batch has `size` images, or less if they are large: see `batch_of`.
    """
    encoded, codes = read(path, classes)
    labels = np.asarray(codes, dtype=np.int64)
    size = batch_of(preprocessing, size)
    for start in range(0, len(encoded), size):
        yield _stack(encoded[start : start + size], preprocessing), labels[start : start + size]


def images(path: Path, preprocessing: Preprocessing, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """The images of a split in order, whatever their labels: float32 (B, C, H, W)."""
    with _open_parquet(path) as file:
        encoded = file.read(["image"])["image"].to_pylist()
    for start in range(0, len(encoded), size):
        yield _stack(encoded[start : start + size], preprocessing)


def _stack(encoded: list[bytes], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    return np.stack([preprocess(image, preprocessing) for image in encoded])
