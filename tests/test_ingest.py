"""ingest: real sources of every kind to Parquet and manifest, and what it says of sources that are not right."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import CLASSES, MAX_SIDE, SPLITS, encode, folder, ingest_all, noise, parameters, put, refusal, take
from PIL import Image
from ruamel.yaml import YAML

from tasks.images import splits
from tasks.images.sources import Item
from tasks.ingest import describe, sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is listed in data/reports."""
    monkeypatch.chdir(tmp_path)


def idx(root: Path, count: int = 40, side: int = 8, gzipped: bool = False, classes: int = 2) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, count * side * side, dtype=np.uint8).tobytes()
    images = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (count, side, side)) + pixels
    labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(index % classes for index in range(count))
    for name, data in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        put(root / (f"{name}.gz" if gzipped else name), gzip.compress(data) if gzipped else data)
    return root


FORMATS: dict[str, Callable[[], bytes]] = {
    "gray.png": lambda: encode(noise(1, 9, 12)),
    "colour.jpg": lambda: encode(noise(2, 20, 30, 3), "JPEG"),
    "colour.JPEG": lambda: encode(noise(3, 8, 8, 3), "JPEG"),
    "alpha.png": lambda: encode(noise(4, 10, 11, 4)),
    "palette.png": lambda: encode(noise(5, 16, 17, 3).quantize(16)),
    "plain.bmp": lambda: encode(noise(6, 7, 5, 3), "BMP"),
    "lossy.webp": lambda: encode(noise(7, 33, 21, 3), "WEBP"),
    "scan.tiff": lambda: encode(noise(8, 14, 13), "TIFF"),
    "deep/under/scan.tif": lambda: encode(noise(9, 6, 6, 3), "TIFF", compression="tiff_lzw"),
}


def test_a_folder_of_mixed_formats(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for name, make in FORMATS.items():
        put(source / "cat" / name, make())
    put(source / "cat/notes.txt", b"no image")
    put(source / "README", b"no class")
    manifest, splits = ingest_all(parameters(source), tmp_path / "out")
    assert len(manifest) == 40 + len(FORMATS)
    assert manifest["readable"].all()
    assert manifest["reason"].isna().all()
    assert manifest["label"].tolist() == [path.split("/")[0] for path in manifest.index]
    shown = {name: tuple(manifest.loc[f"cat/{name}", ["width", "height", "mode"]]) for name in FORMATS}
    assert shown["gray.png"] == (12, 9, "L")
    assert shown["colour.jpg"] == (30, 20, "RGB")
    assert shown["alpha.png"] == (11, 10, "RGBA")
    assert shown["palette.png"] == (17, 16, "P")
    assert shown["deep/under/scan.tif"] == (6, 6, "RGB")
    rows = pd.concat(splits, names=["split"]).reset_index("split").set_index("path")
    assert set(rows.index) == set(manifest.index)
    for path, row in rows.iterrows():
        assert row["image"] == (source / str(path)).read_bytes()
        assert row["sha256"] == manifest.loc[path, "sha256"] == hashlib.sha256(row["image"]).hexdigest()  # type: ignore[index]
        assert (row["split"], row["label"]) == tuple(manifest.loc[path, ["split", "label"]])  # type: ignore[index]


def test_exif_orientation_is_applied_before_size_and_pixels(tmp_path: Path) -> None:
    source, upright = folder(tmp_path / "in"), noise(1, 10, 20, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    put(source / "cat/turned.png", encode(upright.transpose(Image.Transpose.ROTATE_90), exif=exif))
    put(source / "cat/upright.png", encode(upright))
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    turned, plain = manifest.loc["cat/turned.png"], manifest.loc["cat/upright.png"]
    assert (turned["width"], turned["height"]) == (20, 10)
    assert turned["pixels_sha256"] == plain["pixels_sha256"]
    assert turned["sha256"] != plain["sha256"]


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    put(source / "cat/blank.png", encode(Image.new("L", (8, 8), 77)))
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    assert tuple(manifest.loc["cat/blank.png", ["mean", "std"]]) == (77.0, 0.0)
    expected = np.asarray(noise(0, 8, 8))
    assert manifest.loc["cat/000.png", "std"] == pytest.approx(expected.std())


@pytest.mark.parametrize("gzipped", [False, True])
def test_idx_files(tmp_path: Path, gzipped: bool) -> None:
    manifest, splits = ingest_all(parameters(idx(tmp_path / "in", gzipped=gzipped), "idx"), tmp_path / "out")
    assert manifest["label"].tolist() == ["cat", "dog"] * 20
    pixels = np.random.default_rng(0).integers(0, 256, 40 * 64, dtype=np.uint8).reshape(40, 8, 8)
    for row in pd.concat(splits.values()).itertuples():
        index = int(str(row.path).split("#")[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(bytes(row.image)))), pixels[index])  # type: ignore[arg-type]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_files(tmp_path: Path, struct: bool) -> None:
    images = [encode(noise(index, 8, 8)) for index in range(40)]
    column = [{"bytes": image, "path": "x.png"} for image in images] if struct else images
    for part, rows in (("a/0.parquet", slice(0, 25)), ("b/0.parquet", slice(25, 40))):
        (tmp_path / "in" / part).parent.mkdir(parents=True)
        labels = [CLASSES[index % 2] for index in range(40)][rows]
        pq.write_table(pa.table({"image": column[rows], "label": labels, "id": labels}), tmp_path / "in" / part)
    manifest, splits = ingest_all(parameters(tmp_path / "in", "parquet"), tmp_path / "out")
    assert list(manifest.index[[0, 24, 25]]) == ["a/0.parquet#0", "a/0.parquet#24", "b/0.parquet#0"]
    assert manifest["sha256"].tolist() == [hashlib.sha256(image).hexdigest() for image in images]
    assert {image for split in splits.values() for image in split["image"]} == set(images)


def test_one_parquet_file_is_a_source_too(tmp_path: Path) -> None:
    images = [encode(noise(index, 8, 8)) for index in range(40)]
    pq.write_table(pa.table({"image": images, "label": list(CLASSES) * 20}), tmp_path / "in.parquet")
    manifest, _ = ingest_all(parameters(tmp_path / "in.parquet", "parquet"), tmp_path / "out")
    assert manifest.index[0] == "in.parquet#0"


def test_every_split_has_its_share_of_every_class(tmp_path: Path) -> None:
    manifest, splits = ingest_all(parameters(folder(tmp_path / "in", per_class=50)), tmp_path / "out")
    for label in CLASSES:
        counts = manifest[manifest["label"] == label]["split"].value_counts().to_dict()
        assert counts == {"train": 35, "test": 10, "val": 5}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 70, "val": 10, "test": 20}


def test_the_seed_alone_decides_the_split(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", per_class=50)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        ingest_all(parameters(source, seed=seed), tmp_path / name)
    for name in (*SPLITS, "manifest"):
        one, again, two = ((tmp_path / run / f"{name}.parquet").read_bytes() for run in ("one", "again", "two"))
        assert one == again
        assert one != two


def test_the_same_pixels_end_in_one_split_whatever_their_file_or_label(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for index in range(20):
        image = noise(index, 8, 8)  # the pixels of cat/<index>.png
        put(source / f"cat/copy-{index:03}.png", encode(image))
        put(source / f"dog/copy-{index:03}.bmp", encode(image.convert("RGB"), "BMP"))
        put(source / f"dog/copy-{index:03}.tiff", encode(image, "TIFF"))
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    copies = manifest.groupby("pixels_sha256")["split"]
    assert sorted(copies.size()) == [1] * 20 + [4] * 20
    assert (copies.nunique() == 1).all()
    assert set(manifest.loc[[f"cat/{index:03}.png" for index in range(20)], "split"]) == set(SPLITS)


DAMAGED: dict[str, bytes] = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "cut.png": encode(noise(1, 64, 64))[:2000],
    "cut.jpg": encode(noise(1, 64, 64, 3), "JPEG")[:1500],
    "other.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


def test_damaged_images_are_quarantined_with_a_reason(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for name, data in DAMAGED.items():
        put(source / "dog" / name, data)
    manifest, splits = ingest_all(parameters(source, max_corrupt_fraction=0.12), tmp_path / "out")
    bad = manifest[~manifest["readable"]]
    assert set(bad.index) == {f"dog/{name}" for name in DAMAGED}
    assert bad["reason"].str.len().gt(0).all()
    assert not bad["reason"].str.contains("0x").any()
    assert bad[["split", "width", "height", "pixels_sha256", "std"]].isna().all(axis=None)
    assert bad.loc["dog/text.jpg", "sha256"] == hashlib.sha256(DAMAGED["text.jpg"]).hexdigest()
    assert manifest.loc[manifest["readable"], "split"].isin(SPLITS).all()
    assert not set(bad.index) & set(pd.concat(splits.values())["path"])


def test_more_damaged_images_than_allowed_stop(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for name, data in DAMAGED.items():
        put(source / "dog" / name, data)
    sentence = refusal(parameters(source, max_corrupt_fraction=0.11), tmp_path / "out")
    assert sentence.startswith(f"{source}: 5 of 45 images cannot be read, ")
    assert sentence.endswith(
        "; all are in data/reports/unreadable.csv; ingest.max_corrupt_fraction allows 0.11 of them"
    )
    listed = list(csv.DictReader((tmp_path / "data/reports/unreadable.csv").open()))
    assert {row["path"] for row in listed} == {f"dog/{name}" for name in DAMAGED}
    assert all(row["reason"] for row in listed)


@pytest.mark.parametrize("kind", ["folder", "idx", "parquet"])
def test_a_missing_source(tmp_path: Path, kind: str) -> None:
    assert refusal(parameters(tmp_path / "in", kind), tmp_path / "out").startswith(f"{tmp_path}/in does not exist")


@pytest.mark.parametrize(
    ("kind", "says"), [("folder", "has no images"), ("idx", "has no IDX images"), ("parquet", "has no .parquet file")]
)
def test_an_empty_source(tmp_path: Path, kind: str, says: str) -> None:
    (tmp_path / "in/cat").mkdir(parents=True)
    assert refusal(parameters(tmp_path / "in", kind), tmp_path / "out").startswith(f"{tmp_path}/in {says}")


def test_a_file_where_class_folders_should_be(tmp_path: Path) -> None:
    put(tmp_path / "in", b"")
    assert "in is not a folder" in refusal(parameters(tmp_path / "in"), tmp_path / "out")


def test_one_class(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for path in (source / "dog").iterdir():
        path.unlink()
    assert refusal(parameters(source), tmp_path / "out").startswith(f"{source} has one class only (cat)")


def test_no_readable_image(tmp_path: Path) -> None:
    for name in CLASSES:
        put(tmp_path / "in" / name / "a.png", b"damaged")
    says = refusal(parameters(tmp_path / "in", max_corrupt_fraction=1.0), tmp_path / "out")
    assert says.startswith(f"{tmp_path}/in: 2 of 2 images cannot be read, 2 of them: cannot identify image file (cat/")


def test_too_few_images_for_every_split(tmp_path: Path) -> None:
    says = refusal(parameters(folder(tmp_path / "in", per_class=2)), tmp_path / "out")
    assert "split is empty" in says


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip(data: bytes) -> bytes:
    """A gzip file with one pixel changed and the old checksum."""
    content = bytearray(gzip.decompress(data))
    content[-1] ^= 1
    return gzip.compress(bytes(content))[:-8] + data[-8:]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        (IMAGES, lambda data: data[:-1], "ends too early"),
        (IMAGES, lambda data: data[:10], "ends too early"),
        (IMAGES, lambda data: data + b"x", "is longer than the 40 items"),
        (IMAGES, lambda data: b"\0\0\x0d\x03" + data[4:], "is not an IDX file of 3-dimensional unsigned bytes"),
        (LABELS, lambda data: data[:-1], "ends too early"),
        (LABELS, lambda data: data[:4] + bytes([0, 0, 0, 39]) + data[8:-1], "has 39 labels"),
        (LABELS, lambda data: data[:-1] + b"\x02", "label 2 at 39 has no name: classes lists 2"),
        (f"{IMAGES}.gz", lambda data: data[: len(data) // 2], "is damaged"),
        (f"{IMAGES}.gz", lambda data: data[:10] + b"\xff" + data[11:], "is damaged: Error -3"),
        (f"{IMAGES}.gz", flip, "is damaged: CRC check failed"),
        (f"{IMAGES}.gz", gzip.decompress, "is damaged: Not a gzipped file"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, name: str, edit: Callable[[bytes], bytes], says: str) -> None:
    source = idx(tmp_path / "in", gzipped=name.endswith(".gz"))
    change(source / name, edit)
    sentence = refusal(parameters(source, "idx"), tmp_path / "out")
    assert says in sentence
    assert str(source / name) in sentence


def test_idx_images_without_labels(tmp_path: Path) -> None:
    source = idx(tmp_path / "in")
    (source / LABELS).unlink()
    assert refusal(parameters(source, "idx"), tmp_path / "out").startswith(f"{source / LABELS} does not exist")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"image": [b"x"], "class": ["cat"]}, "has no column 'label'"),
        ({"image": ["x"], "label": ["cat"]}, "column 'image' is string"),
        ({"image": [{"path": "x"}], "label": ["cat"]}, "column 'image' is struct<path: string>"),
    ],
)
def test_parquet_of_another_shape(tmp_path: Path, table: dict[str, list[Any]], says: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    assert says in refusal(parameters(tmp_path / "in.parquet", "parquet"), tmp_path / "out")


def test_what_is_not_parquet(tmp_path: Path) -> None:
    put(tmp_path / "in.parquet", b"not parquet at all")
    assert "in.parquet is not Parquet" in refusal(parameters(tmp_path / "in.parquet", "parquet"), tmp_path / "out")


# Columns for the slices of the gate


def metadata(source: Path, rows: dict[str, tuple[str, str]]) -> None:
    """A metadata.csv with a device and a site for each file."""
    lines = ["file_name,note,device,site", *(f'{name},"a, b",{one},{two}' for name, (one, two) in rows.items())]
    put(source / "metadata.csv", "\n".join(lines).encode() + b"\n")


def check_columns(manifest: pd.DataFrame, tables: dict[str, pd.DataFrame], outputs: Path, names: list[str]) -> None:
    """Splits and `splits.columns` have of each image what the manifest has, and nothing else is new."""
    for name, rows in tables.items():
        part = ["test_part"] if name == "test" else []
        assert list(rows.columns) == ["image", "label", "path", "sha256", *names, *part]
        wanted = manifest.loc[list(rows["path"]), names]
        assert rows.set_index("path")[names].equals(wanted)
        labels, columns = splits.columns(outputs / f"{name}.parquet", CLASSES)
        assert labels == list(rows["label"])
        assert list(columns) == [*names, *part]
        assert {column: columns[column] for column in names} == {
            column: wanted[column].fillna("").tolist() for column in names
        }


def test_columns_of_metadata_csv_go_with_the_images_of_a_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    put(source / "cat/bad.png", b"damaged")
    known = {f"{name}/{index:03}.png": (f"phone-{index % 3}", "") for name in CLASSES for index in range(20)}
    known |= {"cat/bad.png": ("ölhaut", "north"), "cat/003.png": ("", "south"), "dog/none.png": ("gone", "gone")}
    del known["dog/007.png"]
    metadata(source, known)
    manifest, splits = ingest_all(
        parameters(source, columns=["site", "device"], max_unmatched_fraction=0.03), tmp_path / "out"
    )
    assert list(manifest.columns[-2:]) == ["site", "device"]
    assert len(manifest) == 41
    for path, (device, site) in known.items():
        if path != "dog/none.png":
            assert manifest.loc[path, ["site", "device"]].fillna("").tolist() == [site, device]  # type: ignore[operator]
    assert manifest.loc[["dog/007.png", "cat/003.png"], "device"].isna().all()
    assert manifest.loc[["dog/007.png", "cat/000.png"], "site"].isna().all()
    assert not manifest.loc["cat/bad.png", "readable"]
    check_columns(manifest, splits, tmp_path / "out", ["site", "device"])


def test_a_byte_order_mark_and_a_short_row_are_read(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    put(source / "metadata.csv", b"\xef\xbb\xbffile_name,device\r\ncat/000.png,phone\r\ncat/001.png\r\n")
    params = parameters(source, columns=["device"], max_unmatched_fraction=1)
    manifest, _ = ingest_all(params, tmp_path / "out")
    assert manifest.loc["cat/000.png", "device"] == "phone"
    assert manifest["device"].notna().sum() == 1


def test_without_columns_metadata_csv_is_a_file_like_any_other(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    put(source / "metadata.csv", b"\xff")
    manifest, splits = ingest_all(parameters(source), tmp_path / "out")
    check_columns(manifest, splits, tmp_path / "out", [])


def test_columns_of_parquet_go_with_its_rows_as_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part, first in (("a", 0), ("b", 20)):
        span = range(first, first + 20)
        content = {
            "image": [encode(noise(index, 8, 8)) for index in span],
            "label": [CLASSES[index % 2] for index in span],
            "other": list(span),
            "device": [None if index == 7 else f"phone-{index % 3}" for index in span],
            "night": [index % 5 == 0 for index in span],
            "year": [2000 + index for index in span],
        }
        pq.write_table(pa.table(content), tmp_path / "in" / f"{part}.parquet")
    names = ["year", "device", "night"]
    manifest, splits = ingest_all(parameters(tmp_path / "in", "parquet", columns=names), tmp_path / "out")
    assert manifest.loc["b.parquet#3", names].tolist() == ["2023", "phone-2", "False"]  # type: ignore[operator]
    assert manifest.loc["a.parquet#7", names].fillna("").tolist() == ["2007", "", "False"]  # type: ignore[operator]
    check_columns(manifest, splits, tmp_path / "out", names)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "metadata.csv does not exist, but ingest names the column 'device': it needs file_name and that"),
        (b"", "metadata.csv has no column 'device'; its columns are none"),
        (b"file_name,site\na,b\n", "metadata.csv has no column 'device'; its columns are file_name, site"),
        (b"device\na\n", "metadata.csv has no column 'file_name'; its columns are device"),
        (b"file_name,device\ncat/000.png,\xff\n", "metadata.csv is not CSV in UTF-8: "),
        (b"file_name,device\ncat/000.png,a\rb\n".replace(b"a", b"a" * 200_000), "metadata.csv is not CSV in UTF-8: "),
    ],
)
def test_metadata_that_is_not_right(tmp_path: Path, content: bytes | None, says: str) -> None:
    source = folder(tmp_path / "in")
    if content is not None:
        put(source / "metadata.csv", content)
    sentence = refusal(parameters(source, columns=["device"]), tmp_path / "out")
    assert sentence.startswith(f"{source}/{says}")


def test_a_column_that_parquet_lacks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": ["cat"]}), tmp_path / "in.parquet")
    sentence = refusal(parameters(tmp_path / "in.parquet", "parquet", columns=["device"]), tmp_path / "out")
    assert sentence == f"{tmp_path}/in.parquet has no column 'device'; its columns are image, label"


def test_idx_has_no_columns(tmp_path: Path) -> None:
    sentence = refusal(parameters(idx(tmp_path / "in"), "idx", columns=["device", "site"]), tmp_path / "out")
    assert sentence == f"{tmp_path}/in: IDX files have no column 'device'; take it out of ingest"


# The listing of the source


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_of_a_source_is_listed(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", per_class=2)
    for name in ("metadata.csv", "cat/deep/under/notes.txt", ".hidden/a.png", "cat/bad.png"):
        put(source / name, name.encode())
    found = sources(source)
    assert found == {path.as_posix(): sha256(path) for path in source.rglob("*") if path.is_file()}
    assert len(found) == 8
    assert list(found) == [path.as_posix() for path in sorted(map(Path, found))]
    put(source / "cat/000.png", b"other")
    changed = sources(source)
    assert {path for path in found if changed[path] != found[path]} == {f"{source}/cat/000.png"}


def test_a_source_that_is_one_file(tmp_path: Path) -> None:
    put(tmp_path / "in.parquet", b"any")
    assert sources(tmp_path / "in.parquet") == {f"{tmp_path}/in.parquet": sha256(tmp_path / "in.parquet")}


def test_the_stage_writes_the_listing_by_paths_as_the_parameters_have_them(tmp_path: Path) -> None:
    root = repository(tmp_path / "repository", Path("in"), "idx")
    idx(root / "in")
    done = stage(root)
    assert done.returncode == 0, done.stderr
    listing = json.loads((root / "data/prepared/sources.json").read_text())
    assert listing == {f"in/{name}": sha256(root / "in" / name) for name in (IMAGES, LABELS)}


def repository(root: Path, source: Path, kind: str) -> Path:
    """A folder with a `params.yaml` in which the stage can run."""
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["classes"] = list(CLASSES)
    params["ingest"] = parameters(source, kind).model_dump(mode="json")
    root.mkdir()
    with (root / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return root


def stage(root: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m tasks.ingest` in `root`; its peak memory in kilobytes ends stdout.

    The peak is the kernel's VmHWM: getrusage's ru_maxrss starts at what the parent process used.
    """
    code = (
        "import pathlib, runpy; runpy.run_module('tasks.ingest', run_name='__main__'); "
        "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def test_a_failing_run_leaves_the_previous_outputs_as_they_were(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    root = repository(tmp_path / "repository", source, "folder")
    done = stage(root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ingest: 28 train, 4 val, 8 test\n")
    before = {path.name: path.read_bytes() for path in (root / "data/prepared").iterdir()}
    assert set(before) == {
        *(f"{name}.parquet" for name in (*SPLITS, "manifest", "ledger")),
        "sources.json",
        "classes.json",
    }
    for index in range(10):
        put(source / f"cat/{index:03}.png", b"damaged")
    done = stage(root)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {source}: 10 of 40 images cannot be read, 10 of them: cannot identify image")
    assert {path.name: path.read_bytes() for path in (root / "data/prepared").iterdir()} == before


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """7,000 more noise images of 64x64, kept, would take 80 MB; the allocators' reserve settles at about 20 MB."""
    peaks = {}
    for count in (1000, 8000):
        source = idx(tmp_path / f"in-{count}", count=count, side=64)
        done = stage(repository(tmp_path / f"repository-{count}", source, "idx"))
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.splitlines()[-1]) / 1024
    assert peaks[8000] - peaks[1000] < 45, peaks  # MB


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    row = describe(Item("a", "cat", encode(Image.fromarray(values), kind)), parameters(Path("in")), MAX_SIDE)
    assert (row["readable"], row["mode"][:4]) == (True, "I;16")
    assert row["mean"] == pytest.approx((values >> 8).mean())


def test_pixels_of_unknown_range_are_quarantined() -> None:
    image = encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    row = describe(Item("a", "cat", image), parameters(Path("in")), MAX_SIDE)
    assert row["readable"] is False
    assert "mode F, whose range is not known" in row["reason"]


def test_a_damaged_exif_block_is_a_reason_not_a_crash() -> None:
    image = encode(noise(0, 8, 8), exif=b"MM\0*\0\0")
    row = describe(Item("a", "cat", image), parameters(Path("in")), MAX_SIDE)
    assert row["readable"] is False
    assert row["reason"]


def test_many_images_are_described_by_all_cores_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "source", per_class=30)
    put(source / CLASSES[0] / "029.png", b"damaged")
    outputs = [tmp_path / "alone", tmp_path / "together"]
    take(parameters(source), outputs[0])
    monkeypatch.setattr("tasks.ingest.BY_ITSELF", 7)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    started: list[int] = []

    def start(n_jobs: int, **options: Any) -> joblib.Parallel:
        started.append(n_jobs)
        return real(n_jobs=n_jobs, **options)

    real = joblib.Parallel
    monkeypatch.setattr("joblib.Parallel", start)
    take(parameters(source), outputs[1])
    assert started == [2]
    for name in (*SPLITS, "manifest", "ledger"):
        assert (outputs[0] / f"{name}.parquet").read_bytes() == (outputs[1] / f"{name}.parquet").read_bytes()


def test_the_bench_of_many_images_runs_the_stages(tmp_path: Path) -> None:
    report = tmp_path / "many.json"
    command = [sys.executable, str(ROOT / "tests/bench/many_images.py"), "--images", "1200", "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(report.read_text())["rows"].values()
    assert set(row) == {"ingest", "validate", "finetune"}
    assert all(one["seconds"] > 0 and one["peak_mb"] > 50 for one in row.values())
