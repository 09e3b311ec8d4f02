"""The prepared splits: labelled images and their columns, read out of Parquet. Imports neither torch nor timm."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.errors import StageError, first_line
from tasks.images.preprocessing import Preprocessing, batch_of, preprocess

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
AT_ONCE = 256  # images that are copied together
IN_MEMORY_BYTES = (
    2**29
)  # of a split's file; a larger one is mapped, and the system keeps as much of it as there is room


class MappedImages(Sequence[bytes]):
    """The images of a split in any order, out of a copy on disk that has no name and goes with the process."""

    def __init__(self, file: pq.ParquetFile, folder: Path) -> None:
        schema = pa.schema([("image", pa.binary())])
        with tempfile.TemporaryFile(dir=folder) as copy:
            with pa.ipc.new_file(copy, schema) as writer:
                for batch in file.iter_batches(AT_ONCE, columns=["image"]):
                    writer.write_batch(batch)
            copy.flush()
            mapped = pa.py_buffer(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ))
        self.images = pa.ipc.open_file(mapped).read_all()["image"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index].as_py()


def read(path: Path, classes: tuple[str, ...]) -> tuple[Sequence[bytes], list[int]]:
    """All encoded images of a split and their class numbers; `StageError` at a label that `classes` lacks."""
    with _open_parquet(path) as file:
        labels = _codes(_labels(file, path, classes), classes)
        if path.stat().st_size > IN_MEMORY_BYTES:
            return MappedImages(file, path.parent), labels
        return file.read(["image"])["image"].to_pylist(), labels


def columns(path: Path, classes: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """The label of each image of a split, and the values of the columns that `ingest.columns` carried to it.

    An image without a value has "". `StageError` at a label that `classes` lacks.
    """
    with _open_parquet(path) as file:
        labels = _labels(file, path, classes)
        carried = [name for name in file.schema_arrow.names if name not in ("image", "label", "path", "sha256")]
        table = file.read(carried)
    return labels, {name: [value or "" for value in table[name].to_pylist()] for name in carried}


def batches(path: Path, preprocessing: Preprocessing, classes: tuple[str, ...], size: int) -> Iterator[Batch]:
    """The split in order, read and decoded batch by batch: float32 (B, C, H, W) and int64 (B,).

    A batch has `size` images, or less if they are large: see `batch_of`.
    """
    with _open_parquet(path) as file:
        codes = np.asarray(_codes(_labels(file, path, classes), classes), dtype=np.int64)
    start = 0
    for found in images(path, preprocessing, batch_of(preprocessing, size)):
        yield found, codes[start : start + len(found)]
        start += len(found)


def images(path: Path, preprocessing: Preprocessing, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """The images of a split in order, whatever their labels: float32 (B, C, H, W)."""
    with _open_parquet(path) as file:
        for batch in file.iter_batches(size, columns=["image"]):
            yield np.stack([preprocess(image, preprocessing) for image in batch["image"].to_pylist()])


def _labels(file: pq.ParquetFile, path: Path, classes: tuple[str, ...]) -> list[str]:
    labels: list[str] = file.read(["label"])["label"].to_pylist()
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise StageError(f"{path} has the label {unknown[0]!r}, which classes in params.yaml does not list")
    return labels


def _codes(labels: list[str], classes: tuple[str, ...]) -> list[int]:
    codes = {name: code for code, name in enumerate(classes)}
    return [codes[label] for label in labels]


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
