"""From an encoded image to what a network sees. Imports numpy and Pillow only, so that a device can use it as it is."""

import functools
import io
import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from tasks.core.errors import StageError

# What Pillow decodes by itself, whatever a file is called (JPEG with several pictures, MPO, as JPEG).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
WHITE_LEVEL = 65535


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; it travels in the ONNX file's metadata.

    The image is scaled with bilinear filtering so that its shorter side is `size` pixels, cut to the central
    square, converted to `channels` (1 grey, 3 RGB), divided by 255, and normalised with `mean` and `std`. What is
    transparent shows the `background` (red, green, blue); None leaves transparency out, as models before 0.3 have
    it. Grey of 16 bits becomes 256 levels, of which `white_level` and all above are the last.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}  # where it is a part of a pydantic model

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: tuple[int, int, int] | None = None
    white_level: int = WHITE_LEVEL

    @property
    def mode(self) -> str:
        """Pillow's name for the colour mode."""
        return "L" if self.channels == 1 else "RGB"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.channels, self.size, self.size)


def batch_of(preprocessing: Preprocessing, most: int) -> int:
    """How many images go through a network at once where nothing is trained: `most` of 64 x 64 pixels, or less.

    So that what comes after training needs no more memory than training did.
    """
    return max(1, min(most, most * 64 * 64 // preprocessing.size**2))


def open_image(data: bytes) -> Image.Image:
    """The image, not decoded yet, if it is one of FORMATS; whatever Pillow raises if not."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def render(image: Image.Image, background: tuple[int, int, int] | None, white_level: int = WHITE_LEVEL) -> Image.Image:
    """The first frame upright, by its EXIF orientation, in 8 bits a channel, and on the background.

    The argument is used up. `ValueError` if the range of its pixels is not known.
    """
    ImageOps.exif_transpose(image, in_place=True)  # else it copies what is upright
    own_white = image.mode == "I" and image.format == "PPM"  # its file says what is white, and Pillow makes that 65535
    if own_white or image.mode.startswith("I;16"):
        white_level = WHITE_LEVEL if own_white else white_level
        levels = np.asarray(image).astype(np.uint32) * 256 // (white_level + 1)  # convert() would clip, not scale
        return Image.fromarray(np.minimum(levels, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose range is not known: save it with 8 or 16 bits")
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_to_rgb())  # type: ignore[return-value]
    if background is None or not image.has_transparency_data:
        return image
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")


def decode(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """The image as `render` makes it, grey or RGB."""
    image = render(open_image(data), preprocessing.background, preprocessing.white_level)
    return image.convert(preprocessing.mode)


def preprocess(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Decode an image and return the network's input, float32 (C, H, W)."""
    return normalize(fit(data, preprocessing), preprocessing)


def fit(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode an image and return it in the network's size, uint8 (C, H, W)."""
    size = (preprocessing.size, preprocessing.size)
    image = ImageOps.fit(decode(data, preprocessing), size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(*size, preprocessing.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalize(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """What `fit` returns as the network takes it, float32 (C, H, W)."""
    levels = _levels(preprocessing)
    found = np.empty(pixels.shape, np.float32)
    for channel, values in enumerate(levels):
        np.take(values, pixels[channel], out=found[channel], mode="clip")  # "raise" would make a copy first
    return found


@functools.cache
def _levels(preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """What each of the 256 levels becomes, float32 (C, 256): looked up in a quarter of the time that it takes."""
    levels = np.arange(256, dtype=np.float32)[:, np.newaxis] / 255
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray(((levels - mean) / std).T)


def description(preprocessing: Preprocessing) -> dict[str, object]:
    """What the metadata of an ONNX file says of the preprocessing: all that is not as it was before it could differ."""
    optional: dict[str, object] = {"background": None, "white_level": WHITE_LEVEL}
    return {name: value for name, value in asdict(preprocessing).items() if value != optional.get(name, object())}


def parse_description(text: str) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing and the class names in the metadata of an ONNX file, under the key `weighin`.

    `StageError` if the text does not have them.
    """
    try:
        content = json.loads(text)
        background = content.get("background")
        preprocessing = Preprocessing(
            size=int(content["size"]),
            channels=int(content["channels"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            background=None if background is None else (int(background[0]), int(background[1]), int(background[2])),
            white_level=int(content.get("white_level", WHITE_LEVEL)),
        )
        return preprocessing, tuple(map(str, content["classes"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError):
        raise StageError("the ONNX file's metadata does not say how images are prepared for it") from None
