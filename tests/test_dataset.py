"""dataset: what a network sees of an image, against computation by hand."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.core.errors import StageError
from tasks.images import splits
from tasks.images.preprocessing import Preprocessing, preprocess

GREY = Preprocessing(size=8, channels=1, mean=(0.0,), std=(1.0,))
RGB = Preprocessing(size=8, channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))


def noise(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: npt.NDArray[np.uint8], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def parquet(path: Path, labels: list[str]) -> Path:
    images = [png(np.full((8, 8), index, np.uint8)) for index in range(len(labels))]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_pixels_are_normalised_by_channel() -> None:
    pixels = noise(8, 8, 3)
    found = preprocess(png(pixels), RGB)
    assert (found.shape, found.dtype) == (RGB.shape, np.float32) == ((3, 8, 8), np.float32)  # type: ignore[comparison-overlap]
    assert found.flags.c_contiguous
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.25, 0.25), (0.0, 2.0))):
        expected = (pixels[:, :, channel].astype(np.float64) / 255 - mean) / std
        np.testing.assert_allclose(found[channel], expected, rtol=1e-6, atol=1e-6)


def test_grey_pixels() -> None:
    pixels = noise(8, 8)
    found = preprocess(png(pixels), GREY)
    assert found.shape == (1, 8, 8)
    np.testing.assert_allclose(found[0], pixels / 255, rtol=1e-6)


def test_a_grey_image_for_a_colour_network_has_three_equal_channels() -> None:
    pixels = noise(8, 8)
    found = preprocess(png(pixels), replace(RGB, mean=(0.0,) * 3, std=(1.0,) * 3))
    for channel in found:
        np.testing.assert_allclose(channel, pixels / 255, rtol=1e-6)


def test_a_colour_image_for_a_grey_network_is_luminance() -> None:
    pixels = noise(8, 8, 3)
    found = preprocess(png(pixels), GREY)
    np.testing.assert_allclose(found[0], pixels @ [0.299, 0.587, 0.114] / 255, atol=1 / 255)


def test_transparency_is_left_out() -> None:
    pixels = noise(8, 8, 4)
    assert np.array_equal(preprocess(png(pixels), RGB), preprocess(png(pixels[:, :, :3]), RGB))


@pytest.mark.parametrize(("shape", "cut"), [((8, 16), np.s_[:, 4:12]), ((16, 8), np.s_[4:12, :])])
def test_the_central_square_is_cut(shape: tuple[int, int], cut: Any) -> None:
    pixels = noise(*shape)
    np.testing.assert_allclose(preprocess(png(pixels), GREY)[0], pixels[cut] / 255, rtol=1e-6)


def test_scaling_is_bilinear_over_all_the_pixels() -> None:
    """Half the size: pixel i is (p[2i-1] + 3 p[2i] + 3 p[2i+1] + p[2i+2]) / 8, the triangle's weights."""
    row = np.random.default_rng(1).integers(0, 256, 16).astype(np.uint8)
    found = preprocess(png(np.tile(row, (16, 1))), GREY)[0] * 255
    p = row.astype(np.float64)
    inner = [(p[2 * i - 1] + 3 * p[2 * i] + 3 * p[2 * i + 1] + p[2 * i + 2]) / 8 for i in range(1, 7)]
    np.testing.assert_allclose(found[:, 1:7], np.tile(inner, (8, 1)), atol=0.51)


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 1), (8, 3)])
def test_exif_orientation_is_applied(orientation: int, turn: int) -> None:
    upright, exif = noise(8, 8), Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(upright, turn)
    assert np.array_equal(preprocess(png(stored, exif=exif), GREY), preprocess(png(upright), GREY))


def test_labels_become_numbers_in_the_order_of_the_classes(tmp_path: Path) -> None:
    images, labels = splits.read(parquet(tmp_path / "train.parquet", ["b", "a", "c", "b"]), ("c", "b", "a"))
    assert labels == [1, 2, 0, 1]
    assert [int(np.asarray(Image.open(io.BytesIO(image)))[0, 0]) for image in images] == [0, 1, 2, 3]


def test_batches_are_the_split_in_order(tmp_path: Path) -> None:
    path = parquet(tmp_path / "val.parquet", ["a", "b", "b", "a", "b"])
    found = list(splits.batches(path, GREY, ("a", "b"), size=2))
    assert [(batch.shape, batch.dtype.name) for batch, _ in found] == [
        ((2, 1, 8, 8), "float32"),
        ((2, 1, 8, 8), "float32"),
        ((1, 1, 8, 8), "float32"),
    ]
    assert np.concatenate([labels for _, labels in found]).tolist() == [0, 1, 1, 0, 1]
    np.testing.assert_allclose(np.concatenate([batch for batch, _ in found])[:, 0, 0, 0] * 255, range(5), atol=1e-4)


def test_images_are_those_of_the_batches_whatever_their_labels(tmp_path: Path) -> None:
    path = parquet(tmp_path / "val.parquet", ["a", "z", "b", "a", "b"])
    found = list(splits.images(path, GREY, size=2))
    assert [(batch.shape, batch.dtype.name) for batch in found] == [
        ((2, 1, 8, 8), "float32"),
        ((2, 1, 8, 8), "float32"),
        ((1, 1, 8, 8), "float32"),
    ]
    labelled = list(splits.batches(path, GREY, ("a", "b", "z"), size=2))
    assert all(np.array_equal(one, other) for one, (other, _) in zip(found, labelled, strict=True))


def test_columns_are_labels_and_what_ingest_carried(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    content = {"image": [b""] * 3, "label": ["b", "a", "b"], "path": ["x"] * 3, "sha256": ["0"] * 3}
    pq.write_table(pa.table(content), path)
    assert splits.columns(path, ("a", "b")) == (["b", "a", "b"], {})
    pq.write_table(pa.table(content | {"site": ["s", None, ""], "device": ["1", "2", "3"]}), path)
    labels, columns = splits.columns(path, ("a", "b"))
    assert (labels, list(columns.items())) == (
        ["b", "a", "b"],
        [("site", ["s", "", ""]), ("device", ["1", "2", "3"])],
    )


@pytest.mark.parametrize("read", [splits.read, splits.columns])
def test_a_label_that_is_no_class(tmp_path: Path, read: Callable[[Path, tuple[str, ...]], object]) -> None:
    path = parquet(tmp_path / "train.parquet", ["a", "z", "y"])
    with pytest.raises(StageError) as caught:
        read(path, ("a", "b"))
    assert str(caught.value) == f"{path} has the label 'y', which classes in params.yaml does not list"


READERS: list[Callable[[Path], object]] = [
    lambda path: splits.read(path, ("a", "b")),
    lambda path: splits.columns(path, ("a", "b")),
    lambda path: next(splits.images(path, GREY, 2)),
]


@pytest.mark.parametrize("read", READERS, ids=["read", "columns", "images"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ".+"),
        ({"image": [b""]}, "it has no column 'label'"),
        ({"label": ["a"]}, "it has no column 'image'"),
    ],
)
def test_a_split_that_is_damaged(
    tmp_path: Path, content: dict[str, list[Any]] | None, says: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"not parquet at all") if content is None else pq.write_table(pa.table(content), path)
    with pytest.raises(StageError, match=rf"train\.parquet does not hold prepared images \({says}\)$"):
        read(path)


@pytest.mark.parametrize("read", READERS, ids=["read", "columns", "images"])
def test_a_split_that_is_missing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "train.parquet")
    assert Path(str(caught.value.filename)) == tmp_path / "train.parquet"


@pytest.mark.parametrize(("side", "sizes"), [(8, [8, 1]), (128, [2, 2, 2, 2, 1]), (1024, [1] * 9)])
def test_large_images_come_in_smaller_batches(tmp_path: Path, side: int, sizes: list[int]) -> None:
    path = parquet(tmp_path / "val.parquet", ["a"] * 9)
    assert [len(images) for images, _ in splits.batches(path, replace(GREY, size=side), ("a",), 8)] == sizes


def test_a_large_split_is_read_from_disk_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "train.parquet", ["a", "b"] * 40)
    expected, labels = splits.read(path, ("a", "b"))
    monkeypatch.setattr(splits, "IN_MEMORY_BYTES", 100)
    mapped, same = splits.read(path, ("a", "b"))
    assert isinstance(mapped, splits.MappedImages)
    assert (list(mapped), same) == (expected, labels)
    assert [mapped[index] for index in (79, 0, 41)] == [expected[index] for index in (79, 0, 41)]
    assert [one.name for one in tmp_path.iterdir()] == ["train.parquet"]


def test_batches_are_whole_though_the_file_is_written_in_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "val.parquet", ["a", "b"] * 40)
    pq.write_table(pq.read_table(path), path, row_group_size=7)
    found = list(splits.batches(path, GREY, ("a", "b"), size=30))
    assert [len(images) for images, _ in found] == [30, 30, 20]
    assert np.concatenate([labels for _, labels in found]).tolist() == [0, 1] * 40
