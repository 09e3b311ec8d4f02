"""From an encoded image to what a network sees. Imports numpy and Pillow only, so that a device can use it as it is."""

import io
import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tasks.core.errors import StageError


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; it travels in the ONNX file's metadata.

    The image is scaled with bilinear filtering so that its shorter side is `size` pixels, cut to the central
    square, converted to `channels` (1 grey, 3 RGB), divided by 255, and normalised with `mean` and `std`.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}  # where it is a part of a pydantic model

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


def preprocess(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Decode an image and return the network's input, float32 (C, H, W)."""
    size = (preprocessing.size, preprocessing.size)
    image = ImageOps.fit(decode(data, preprocessing.mode), size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32).reshape(*size, preprocessing.channels) / 255
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    normal = (pixels - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def parse_description(text: str) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing and the class names in the metadata of an ONNX file, under the key `weighin`.

    `StageError` if the text does not have them.
    """
    try:
        content = json.loads(text)
        preprocessing = Preprocessing(
            int(content["size"]), int(content["channels"]), tuple(content["mean"]), tuple(content["std"])
        )
        return preprocessing, tuple(map(str, content["classes"]))
    except (ValueError, KeyError, TypeError):
        raise StageError("the ONNX file's metadata does not say how images are prepared for it") from None
