"""Prepared images: from encoded bytes in Parquet to what the network sees. Imports neither torch nor timm."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from tasks.core.errors import StageError, first_line

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


class Preprocessing(BaseModel):
    """How an image becomes the network's input; it travels in the ONNX file's metadata.

    The image is scaled with bilinear filtering so that its shorter side is `size` pixels, cut to the central
    square, converted to `channels` (1 grey, 3 RGB), divided by 255, and normalised with `mean` and `std`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def mode(self) -> str:
        """Pillow's name for the colour mode."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.channels, self.size, self.size)


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it, 16-bit grey as 8-bit; `ValueError` if its range is not known."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))  # convert() would clip, not scale
    if turned.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {turned.mode}, whose range is not known: save it with 8 or 16 bits")
    return turned


def decode(data: bytes, mode: str) -> Image.Image:
    """The image upright and in the given mode."""
    return upright(Image.open(io.BytesIO(data))).convert(mode)


def tensor(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Encoded bytes to the network's input, float32 (C, H, W)."""
    size = (preprocessing.size, preprocessing.size)
    image = ImageOps.fit(decode(data, preprocessing.mode), size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32).reshape(*size, preprocessing.channels) / 255
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    normal = (pixels - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def read(path: Path, classes: tuple[str, ...]) -> tuple[list[bytes], list[int]]:
    """All encoded images of a split and their class numbers; `StageError` at a label that `classes` lacks."""
    codes = {name: code for code, name in enumerate(classes)}
    with _opened(path) as file:
        table = file.read(["image", "label"])
    return table["image"].to_pylist(), [codes[label] for label in _labels(table, path, classes)]


def columns(path: Path, classes: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """The label of each image of a split, and the values of the columns that `ingest.columns` carried to it.

    An image without a value has "". `StageError` at a label that `classes` lacks.
    """
    with _opened(path) as file:
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
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
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
    """The split in order, decoded batch by batch: float32 (B, C, H, W) and int64 (B,)."""
    encoded, codes = read(path, classes)
    labels = np.asarray(codes, dtype=np.int64)
    for start in range(0, len(encoded), size):
        yield _stack(encoded[start : start + size], preprocessing), labels[start : start + size]


def images(path: Path, preprocessing: Preprocessing, size: int) -> Iterator[npt.NDArray[np.float32]]:
    """The images of a split in order, whatever their labels: float32 (B, C, H, W)."""
    with _opened(path) as file:
        encoded = file.read(["image"])["image"].to_pylist()
    for start in range(0, len(encoded), size):
        yield _stack(encoded[start : start + size], preprocessing)


def _stack(encoded: list[bytes], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    return np.stack([tensor(image, preprocessing) for image in encoded])
