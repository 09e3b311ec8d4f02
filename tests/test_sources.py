"""Sources as people have them: which files are taken, how labels, splits and groups are found, and which pixels."""

import json
import os
import socket
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import CLASSES, MAX_SIDE, SPLITS, encode, folder, ingest_all, noise, parameters, put, refusal, table, take
from PIL import Image, ImageCms

from tasks.core import config
from tasks.core.errors import StageError
from tasks.images.preprocessing import Preprocessing, decode, description, parse_description
from tasks.images.sources import Item, open_source
from tasks.ingest import describe, sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is listed in data/reports."""
    monkeypatch.chdir(tmp_path)


def passed_over(params: config.Ingest, outputs: Path) -> dict[str, int]:
    return {why: kind["files"] for why, kind in take(params, outputs)["passed_over"].items()}


# Which files are the source


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cat/.ipynb_checkpoints/dog.png", "in .ipynb_checkpoints/"),
        (".ipynb_checkpoints/dog.png", "in .ipynb_checkpoints/"),
        ("cat/deep/.thumbnails/small.png", "in .thumbnails/"),
        (".Trash-1000/files/cat.png", "in .Trash-1000/"),
        ("__MACOSX/cat/000.png", "in __MACOSX/"),
        ("cat/@eaDir/000.png", "in @eaDir/"),
        ("cat/._000.png", "hidden"),
        ("dog/.DS_Store.png", "hidden"),
        ("loose.png", "outside of the class folders"),
    ],
)
def test_leftovers_among_the_images_are_not_taken_but_counted_and_listed(tmp_path: Path, name: str, why: str) -> None:
    source = folder(tmp_path / "in")
    put(source / name, encode(noise(77, 8, 8)))
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    assert len(manifest) == 40
    assert passed_over(parameters(source), tmp_path / "again") == {why: 1}
    assert f"{source}/{name}" in sources(source)


def test_files_that_are_no_images_are_counted_by_their_kind(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for index in range(4):
        put(source / f"cat/{index}.heic", b"\0\0\0\x18ftypheic")
        put(source / f"dog/{index}", b"no picture")
    put(source / "cat/drawing.SVG", b"<svg/>")
    found = take(parameters(source), tmp_path / "out")
    assert found["passed_over"] == {
        ".heic": {"files": 4, "such_as": ("cat/0.heic", "cat/1.heic", "cat/2.heic")},
        "without a suffix": {"files": 4, "such_as": ("dog/0", "dog/1", "dog/2")},
        ".svg": {"files": 1, "such_as": ("cat/drawing.SVG",)},
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a.gif", "GIF"),
        ("a.avif", "AVIF"),
        ("a.jp2", "JPEG2000"),
        ("a.ppm", "PPM"),
        ("a.JPE", "JPEG"),
        ("without-a-suffix", "PNG"),
        ("a.png.part", "WEBP"),
        ("a.jpg", "PNG"),
    ],
)
def test_what_pillow_reads_is_taken_whatever_its_name(tmp_path: Path, name: str, kind: str) -> None:
    source = folder(tmp_path / "in")
    put(source / "cat" / name, encode(noise(5, 16, 16, 3), kind))
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    assert manifest.loc[f"cat/{name}", "readable"]
    assert len(manifest) == 41


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    put(tmp_path / "elsewhere.png", encode(noise(5, 8, 8)))
    (source / "cat/linked.png").symlink_to(tmp_path / "elsewhere.png")
    manifest, _ = ingest_all(parameters(source), tmp_path / "out")
    assert manifest.loc["cat/linked.png", "readable"]


def test_the_source_itself_may_be_a_link(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere")
    (tmp_path / "in").symlink_to(tmp_path / "elsewhere")
    assert len(ingest_all(parameters(tmp_path / "in"), tmp_path / "out")[0]) == 40


def link_to_a_folder(source: Path) -> None:
    put(source.parent / "more/1.png", b"")
    (source / "cat/more").symlink_to(source.parent / "more")


def loop(source: Path) -> None:
    (source / "cat/again").symlink_to(source)


def link_to_itself(source: Path) -> None:
    (source / "cat/me.png").symlink_to("me.png")


def bound(source: Path) -> None:
    here = Path.cwd()
    os.chdir(source)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind("s.png")
    os.chdir(here)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (link_to_a_folder, "cat/more is a link to a folder, which DVC does not follow"),
        (loop, "cat/again is a link to a folder, which DVC does not follow"),
        (lambda source: (source / "cat/gone.png").symlink_to("nowhere.png"), "cat/gone.png is a link to nowhere.png"),
        (link_to_itself, "cat/me.png is a link to me.png, which cannot be reached"),
        (lambda source: os.mkfifo(source / "cat/pipe.png"), "cat/pipe.png is a FIFO, not a file"),
        (bound, "s.png is a socket, not a file"),
        (lambda source: put(source / os.fsdecode(b"cat/caf\xe9.png"), b""), "cat has the name b'caf\\xe9.png' in it"),
        (lambda source: put(source / os.fsdecode(b"\xff/1.png"), b""), "has the name b'\\xff' in it"),
        (lambda source: put(source / "cat/.dvc/config", b""), "cat is a DVC project of its own"),
    ],
)
def test_what_dvc_cannot_hash_is_refused_by_name(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    source = folder(tmp_path / "in", per_class=2)
    make(source)
    assert says in refusal(parameters(source), tmp_path / "out")
    with pytest.raises(StageError) as caught:
        sources(source)
    assert says in str(caught.value)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_class_is_the_same_in_every_form_of_unicode(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    folder(tmp_path / "in")
    name = unicodedata.normalize(form, "café")
    (tmp_path / "in/dog").rename(tmp_path / "in" / name)
    found = open_source(parameters(tmp_path / "in"), ("cat", "café"))
    assert {item.label for item in found.items()} == {"cat", "café"}
    content = config.load(ROOT / "params.yaml").model_dump(by_alias=True)
    loaded = config.Params.model_validate(content | {"classes": ["cat", name]})
    assert loaded.classes == ("cat", "café")


def test_too_many_unreadable_files_are_counted_by_reason_with_their_first_names(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    for index in range(5):
        put(source / f"cat/bad-{index}.jpg", b"<html>404</html>")
    put(source / "dog/large.png", encode(Image.new("L", (MAX_SIDE + 1, 1))))
    says = refusal(parameters(source, max_corrupt_fraction=0.05), tmp_path / "out")
    assert says == (
        f"{source}: 6 of 46 images cannot be read, 5 of them: cannot identify image file "
        "(cat/bad-0.jpg, cat/bad-1.jpg, cat/bad-2.jpg ...); 1 of them: it has 4097 x 1 pixels, and validate.max_side "
        "is 4096 (dog/large.png); all are in data/reports/unreadable.csv; "
        "ingest.max_corrupt_fraction allows 0.05 of them"
    )


# Tables, labels, splits and groups


NAMES = [f"{label}/{index:03}.png" for label in CLASSES for index in range(20)]


@pytest.mark.parametrize("prefix", ["", "./", "././", "cat/../", "nothing/../"])
def test_paths_of_a_table_are_compared_as_paths(tmp_path: Path, prefix: str) -> None:
    source = folder(tmp_path / "in")
    table(source / "metadata.csv", [{"file_name": f"{prefix}{name}", "camera": "a"} for name in NAMES])
    manifest, _ = ingest_all(parameters(source, columns=["camera"]), tmp_path / "out")
    assert manifest["camera"].eq("a").all()


def test_paths_of_windows_are_paths(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    table(source / "metadata.csv", [{"file_name": name.replace("/", "\\"), "camera": "a"} for name in NAMES])
    manifest, _ = ingest_all(parameters(source, columns=["camera"]), tmp_path / "out")
    assert manifest["camera"].eq("a").all()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (NAMES[:-1], "1 of 40 images have no row in it (dog/019.png): ingest.max_unmatched_fraction allows 0"),
        ([*NAMES, "cat/gone.png"], "1 of 41 rows name no image (cat/gone.png): ingest.max_unmatched_fraction allows 0"),
        (
            [name.upper() for name in NAMES],
            "40 of 40 images have no row in it (cat/000.png, cat/001.png, cat/002.png ...) and 40 of 40 rows name no "
            "image (CAT/000.PNG, CAT/001.PNG, CAT/002.PNG ...): ingest.max_unmatched_fraction allows 0",
        ),
        ([f"/data/{name}" for name in NAMES], "40 of 40 images have no row in it"),
        ([*NAMES, "./cat/000.png"], "has more than one row for cat/000.png"),
        ([*NAMES[:-1], ""], "row 40 has no file_name"),
    ],
)
def test_a_join_that_does_not_fit_is_said(tmp_path: Path, rows: list[str], says: str) -> None:
    source = folder(tmp_path / "in")
    table(source / "metadata.csv", [{"file_name": name, "camera": "a"} for name in rows])
    assert says in refusal(parameters(source, columns=["camera"]), tmp_path / "out")


def test_a_join_may_have_gaps_where_that_is_allowed_and_counts_them(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    table(source / "metadata.csv", [{"file_name": name, "camera": "a"} for name in [*NAMES[4:], "cat/gone.png"]])
    found = take(parameters(source, columns=["camera"], max_unmatched_fraction=0.1), tmp_path / "out")
    assert found["matched_rows"] == 36
    assert found["unmatched"] == {"images without a row": 4, "rows without an image": 1}


def arrange(root: Path, layout: dict[str, int]) -> Path:
    """So many images in each folder, no two alike."""
    seed = 0
    for name, count in layout.items():
        for index in range(count):
            seed += 1
            put(root / name / f"{index}.png", encode(noise(seed, 8, 8)))
    return root


WITH_SPLITS = {
    f"{split}/{label}": count for split, count in (("train", 20), ("val", 5), ("test", 7)) for label in CLASSES
}


def counts(manifest: pd.DataFrame) -> dict[tuple[str, str], int]:
    return dict(Counter(zip(manifest["split"], manifest["label"], strict=True)))


def expect(train: int, val: int, test: int) -> dict[tuple[str, str], int]:
    return {(split, label): n for split, n in (("train", train), ("val", val), ("test", test)) for label in CLASSES}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("training", "validation", "testing"),
        ("Train", "valid", "Test"),
        ("TRAIN", "dev", "test"),
    ],
)
def test_folders_of_splits_are_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    called = dict(zip(SPLITS, names, strict=True))
    layout = {f"{called[one.split('/')[0]]}/{one.split('/')[1]}": count for one, count in WITH_SPLITS.items()}
    manifest, _ = ingest_all(parameters(arrange(tmp_path / "in", layout)), tmp_path / "out")
    assert counts(manifest) == expect(20, 5, 7)
    assert all(called[row.split] == path.split("/")[0] for path, row in manifest.iterrows())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("missing", "found"), [("val", expect(18, 2, 7)), ("test", expect(16, 5, 4))], ids=["no val", "no test"]
)
def test_a_split_that_the_source_lacks_is_drawn_from_train(tmp_path: Path, missing: str, found: object) -> None:
    layout = {name: count for name, count in WITH_SPLITS.items() if not name.startswith(missing)}
    manifest, _ = ingest_all(parameters(arrange(tmp_path / "in", layout)), tmp_path / "out")
    assert counts(manifest) == found


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    arrange(tmp_path / "in", {"train": 20, "test": 20})
    found = open_source(parameters(tmp_path / "in"), ("train", "test"))
    assert {(item.label, item.split) for item in found.items()} == {("train", None), ("test", None)}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_flat_folder_with_a_table(tmp_path: Path, name: str) -> None:
    arrange(tmp_path / "in", {".": 40})
    rows = [
        {
            "file_name": f"{index}.png",
            "kind": CLASSES[index % 2],
            "fold": "train" if index < 20 else "dev",
            "site": index % 3,
        }
        for index in range(40)
    ]
    table(tmp_path / "in" / name, rows)
    params = parameters(tmp_path / "in", label_column="kind", split_column="fold", columns=["site"])
    manifest, _ = ingest_all(params, tmp_path / "out")
    assert manifest.loc["7.png", ["label", "site"]].tolist() == ["dog", "1"]  # type: ignore[operator]
    assert manifest.loc[[f"{index}.png" for index in range(20, 40)], "split"].eq("val").all()
    assert counts(manifest) == expect(8, 10, 2)


def test_labels_of_another_file_and_other_columns(tmp_path: Path) -> None:
    arrange(tmp_path / "in", {"images": 40})
    rows = [{"path": f"images/{index}.png", "class": CLASSES[index % 2]} for index in range(40)]
    table(tmp_path / "in/labels.csv", rows)
    params = parameters(tmp_path / "in", table="labels.csv", file_column="path", label_column="class")
    assert counts(ingest_all(params, tmp_path / "out")[0]) == expect(14, 2, 4)


def test_hugging_face_folders_have_a_table_in_each_split(tmp_path: Path) -> None:
    arrange(tmp_path / "in", {"train": 20, "test": 20})
    for split in ("train", "test"):
        rows = [{"file_name": f"{index}.png", "label": CLASSES[index % 2]} for index in range(20)]
        table(tmp_path / "in" / split / "metadata.jsonl", rows)
    manifest, _ = ingest_all(parameters(tmp_path / "in", label_column="label"), tmp_path / "out")
    assert counts(manifest) == expect(9, 1, 10)


def test_images_in_no_class_folder_lead_to_the_column_of_labels(tmp_path: Path) -> None:
    arrange(tmp_path / "in", {".": 4})
    says = refusal(parameters(tmp_path / "in"), tmp_path / "out")
    assert says.startswith(f"{tmp_path}/in has 4 images that are in no class folder: put each")
    assert "set ingest.label_column" in says


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "metadata.jsonl: line 2 is not JSON: "),
        ("[1]", "metadata.jsonl: line 2 is not a JSON object"),
        (
            '{"file_name": "2.png"}',
            "metadata.jsonl: 1 of 2 images have no row in it (0.png) and 1 of 2 rows name no image",
        ),
        ('{"file_name": null, "label": "cat"}', "metadata.jsonl: row 2 has no file_name"),
        ("[" * 100_000, "metadata.jsonl: line 2 is not JSON: "),
    ],
)
def test_json_lines_that_are_not_right(tmp_path: Path, line: str, says: str) -> None:
    arrange(tmp_path / "in", {".": 2})
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": "1.png", "label": "cat"}\n' + line)
    assert says in refusal(parameters(tmp_path / "in", label_column="label"), tmp_path / "out")


def test_a_split_of_another_name_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    table(source / "metadata.csv", [{"file_name": name, "fold": "holdout"} for name in NAMES])
    says = refusal(parameters(source, split_column="fold"), tmp_path / "out")
    assert says == f"{source}/metadata.csv has the split 'holdout', which is none of train, val and test"


def test_an_image_without_a_label_is_set_aside(tmp_path: Path) -> None:
    content = {"image": [encode(noise(index, 8, 8)) for index in range(41)], "label": [*CLASSES * 20, None]}
    pq.write_table(pa.table(content), tmp_path / "in.parquet")
    manifest, _ = ingest_all(parameters(tmp_path / "in.parquet", "parquet"), tmp_path / "out")
    assert manifest.loc["in.parquet#40", ["readable", "reason", "split"]].fillna("").tolist() == [  # type: ignore[operator]
        *(False, "it has no label", ""),
    ]


def hugging_face(path: Path, labels: list[Any], names: list[str], column: str = "label") -> None:
    image = [{"bytes": encode(noise(1000 * len(labels) + index, 8, 8)), "path": None} for index in range(len(labels))]
    feature = {"names": names, "_type": "ClassLabel"}
    about = {"huggingface": json.dumps({"info": {"features": {column: feature, "image": {"_type": "Image"}}}})}
    made = pa.table({"image": image, column: pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made.replace_schema_metadata(about), path)


@pytest.mark.parametrize(
    "names",
    [
        (
            "data/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("plain/train/0000.parquet", "plain/validation/0000.parquet", "plain/test/0000.parquet"),
        ("train.parquet", "val.parquet", "test.parquet"),
    ],
)
def test_parquet_of_hugging_face_has_splits_and_names_for_its_numbers(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, count in zip(names, (20, 5, 7), strict=True):
        hugging_face(tmp_path / "in" / name, [0, 1] * count, ["cat", "dog"])
    manifest, _ = ingest_all(parameters(tmp_path / "in", "parquet"), tmp_path / "out")
    assert counts(manifest) == expect(20, 5, 7)


def test_a_number_without_a_name_is_refused_and_minus_one_is_no_label(tmp_path: Path) -> None:
    hugging_face(tmp_path / "in.parquet", [0, 1] * 20 + [-1], ["cat", "dog"], "kind")
    params = parameters(tmp_path / "in.parquet", "parquet", label_column="kind")
    assert ingest_all(params, tmp_path / "out")[0]["reason"].dropna().tolist() == ["it has no label"]
    hugging_face(tmp_path / "in.parquet", [0, 1, 2], ["cat", "dog"], "kind")
    assert "has the label 2, for which its schema has no name: it has 2" in refusal(params, tmp_path / "other")


def test_hidden_parquet_is_not_read(tmp_path: Path) -> None:
    hugging_face(tmp_path / "in/a.parquet", [0, 1] * 20, ["cat", "dog"])
    put(tmp_path / "in/.ipynb_checkpoints/a.parquet", b"no Parquet")
    assert len(ingest_all(parameters(tmp_path / "in", "parquet"), tmp_path / "out")[0]) == 40


def test_idx_files_keep_their_official_splits(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, count * 64, dtype=np.uint8).tobytes()
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 8, 8))
        put(tmp_path / "in" / f"{name}-images-idx3-ubyte", bytes([0, 0, 8, 3]) + sizes + pixels)
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(index % 2 for index in range(count))
        put(tmp_path / "in" / f"{name}-labels-idx1-ubyte", labels)
    manifest, _ = ingest_all(parameters(tmp_path / "in", "idx"), tmp_path / "out")
    assert counts(manifest) == expect(18, 2, 10)
    assert manifest.loc[manifest["split"] == "test"].index.str.startswith("t10k").all()


def test_a_group_goes_to_one_split_and_what_shares_pixels_with_it_too(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", per_class=60)
    names = [f"{label}/{index:03}.png" for label in CLASSES for index in range(60)]
    groups = {name: f"patient {int(name[4:7]) // 4}" for name in names}
    put(source / "cat/003.png", (source / "dog/030.png").read_bytes())  # links two patients
    for name in names[:2]:
        groups[name] = ""  # belongs to nobody
    table(source / "metadata.csv", [{"file_name": name, "patient": groups[name]} for name in names])
    manifest, _ = ingest_all(parameters(source, group_column="patient"), tmp_path / "out")
    assert manifest.groupby("group")["split"].nunique().eq(1).all()
    linked = manifest[manifest["group"].isin(["patient 0", "patient 7"])]
    assert linked["split"].nunique() == 1
    assert set(manifest["split"]) == set(SPLITS)
    shares = manifest["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.7, abs=0.15)


# Pixels


def pixels(data: bytes, **changes: Any) -> Any:
    """What a network of 8 pixels sees, in whole numbers."""
    preprocessing = Preprocessing(
        size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, **{"background": (255, 255, 255), **changes}
    )
    return np.asarray(decode(data, preprocessing))


RED, GREEN, MAGENTA, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 0, 255), (255, 255, 255), (0, 0, 0)


def palette_with_magenta() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *MAGENTA])
    return encode(image, transparency=1)


def hidden_colours() -> bytes:
    return encode(Image.new("RGBA", (8, 8), (*GREEN, 0)))


def drawn_in_alpha() -> bytes:
    image = Image.new("RGBA", (8, 8), (*BLACK, 0))
    image.paste((*BLACK, 255), (0, 0, 4, 8))
    return encode(image)


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (palette_with_magenta(), WHITE, WHITE),
        (hidden_colours(), WHITE, WHITE),
        (drawn_in_alpha(), BLACK, WHITE),
        (encode(Image.new("LA", (8, 8), (0, 0))), WHITE, WHITE),
        (encode(Image.new("RGB", (8, 8), RED), transparency=RED), WHITE, WHITE),
        (encode(Image.new("L", (8, 8), 7), transparency=7), WHITE, WHITE),
        (encode(Image.new("RGBA", (8, 8), (*RED, 128)), "WEBP", lossless=True), (255, 127, 127), (255, 127, 127)),
        (encode(Image.new("RGBA", (8, 8), (*BLACK, 0)), "GIF"), WHITE, WHITE),
    ],
    ids=["palette", "cut-out", "icon", "grey", "key colour", "key grey", "half", "gif"],
)
def test_what_is_transparent_shows_the_background(data: bytes, left: object, right: object) -> None:
    found = pixels(data)
    assert (tuple(found[4, 0]), tuple(found[4, 7])) == (left, right)
    row = describe(Item("a", "cat", data), parameters(Path("in")), MAX_SIDE)
    assert row["transparent"]


def test_icons_of_another_background_and_models_from_before(tmp_path: Path) -> None:
    assert tuple(pixels(drawn_in_alpha(), background=(10, 20, 30))[4, 7]) == (10, 20, 30)
    assert tuple(pixels(palette_with_magenta(), background=None)[0, 0]) == MAGENTA
    source = folder(tmp_path / "in")
    put(source / "cat/icon.png", drawn_in_alpha())
    assert take(parameters(source), tmp_path / "out")["on_the_background"] == 1


def test_the_device_has_the_background_and_the_white_level_from_the_file() -> None:
    made = Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3, background=(1, 2, 3), white_level=4095)
    text = json.dumps({"classes": ["a", "b"], **description(made)})
    assert parse_description(text) == (made, ("a", "b"))
    before = {"classes": ["a", "b"], "size": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert parse_description(json.dumps(before))[0] == Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3)
    assert "white_level" not in description(Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize(("bits", "white"), [(12, 4095), (10, 1023), (14, 16383), (16, 65535)])
def test_sixteen_bits_are_scaled_by_the_white_level(bits: int, white: int, tmp_path: Path) -> None:
    values = np.linspace(0, white, 64).astype(np.uint16).reshape(8, 8)
    data = encode(Image.fromarray(values))
    found = pixels(data, white_level=white)[:, :, 0]
    assert np.array_equal(found, values >> (bits - 8))
    assert len(np.unique(found)) > 60
    assert pixels(encode(Image.fromarray(values + 0)), white_level=255).max() == 255  # what is above is white
    row = describe(Item("a", "cat", data), parameters(Path("in")), MAX_SIDE)
    assert row["white"] == white


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
def test_a_grey_map_of_16_bits_says_itself_what_is_white(white: int) -> None:
    """Netpbm's PGM, section "maxval": two bytes a value, the most significant first, where it is over 255."""
    values = np.linspace(0, white, 64).round().astype(">u2" if white > 255 else "u1").reshape(8, 8)
    data = b"P5 8 8 %d\n" % white + values.tobytes()
    found = pixels(data)[:, :, 0]
    assert np.abs(found.astype(int) - values.astype(int) * 255 / white).max() <= 1
    assert np.array_equal(pixels(data, white_level=255), pixels(data))


def test_a_few_bright_defects_do_not_hide_that_bits_are_not_used() -> None:
    values = np.linspace(0, 4095, 6400).astype(np.uint16).reshape(80, 80)
    values.flat[[0, 77, 4000]] = 65535
    row = describe(Item("a", "cat", encode(Image.fromarray(values))), parameters(Path("in")), MAX_SIDE)
    assert row["white"] in range(4080, 4096)


def test_one_colour_is_one_colour_in_every_channel(tmp_path: Path) -> None:
    row = describe(Item("a", "cat", encode(Image.new("RGB", (8, 8), GREEN))), parameters(Path("in")), MAX_SIDE)
    assert (row["mean"], row["std"]) == (85.0, 0.0)
    values = np.asarray(noise(1, 9, 7, 3), np.float64)
    row = describe(Item("a", "cat", encode(noise(1, 9, 7, 3))), parameters(Path("in")), MAX_SIDE)
    assert row["std"] == pytest.approx(np.sqrt(values.var(axis=(0, 1)).mean()))


def test_an_image_over_the_largest_side_is_refused_by_its_header(tmp_path: Path) -> None:
    """A PNG that says that it has 13,000 x 13,000 pixels, and has no data at all."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    data = encode(Image.new("RGB", (4, 4)))
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    row = describe(Item("a", "cat", data), parameters(Path("in")), MAX_SIDE)
    assert row["reason"] == "it has 13000 x 13000 pixels, and validate.max_side is 4096"
    assert not row["readable"]


def exif(kind: str, **options: Any) -> bytes:
    about = Image.Exif()
    about[0x0112] = 6
    image = Image.new("RGB", (16, 8), BLACK)
    image.paste(WHITE, (0, 0, 8, 8))  # the left half, which is shown above
    return encode(image, kind, exif=about, **options)


def cmyk() -> bytes:
    return encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")


def lab() -> bytes:
    red = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), RED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert red is not None
    return encode(red, "TIFF")


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


ZOO: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "exif.jpg": (exif("JPEG", quality=100), WHITE),
    "exif.png": (exif("PNG"), WHITE),
    "exif.webp": (exif("WEBP", lossless=True), WHITE),
    "exif.tiff": (exif("TIFF"), WHITE),
    "cmyk.tiff": (cmyk(), RED),
    "lab.tiff": (lab(), RED),
    "la.png": (encode(Image.new("LA", (8, 8), (200, 255))), (200, 200, 200)),
    "one-bit.png": (encode(Image.new("1", (8, 8), 1)), WHITE),
    "one-bit.tiff": (encode(Image.new("1", (8, 8), 0), "TIFF"), BLACK),
    "deep.png": (encode(Image.fromarray(np.full((8, 8), 0x8001, np.uint16))), (128, 128, 128)),
    "animated.gif": (animated("GIF"), RED),
    "animated.webp": (animated("WEBP"), RED),
    "animated.png": (animated("PNG"), RED),
    "pages.tiff": (animated("TIFF"), RED),
    "several.mpo": (animated("MPO"), RED),
    "png.jpg": (encode(Image.new("RGB", (8, 8), RED)), RED),
    "gif.jpg": (encode(Image.new("RGB", (8, 8), RED), "GIF"), RED),
    "broken-icc.png": (encode(Image.new("RGB", (8, 8), RED), icc_profile=b"no profile"), RED),
    "interlaced.gif": (encode(Image.new("P", (8, 8), 0), "GIF", interlace=1), BLACK),
    "progressive.jpg": (encode(Image.new("RGB", (8, 8), RED), "JPEG", progressive=True, quality=100), RED),
    "jpeg2000.jp2": (encode(Image.new("RGB", (8, 8), RED), "JPEG2000"), RED),
    "avif.avif": (encode(Image.new("RGB", (8, 8), WHITE), "AVIF"), WHITE),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_has_the_right_pixels(name: str) -> None:
    data, expected_colour = ZOO[name]
    np.testing.assert_allclose(pixels(data)[1, 1], expected_colour, atol=5)
    row = describe(Item("a", "cat", data), parameters(Path("in")), MAX_SIDE)
    assert row["readable"], row["reason"]
    assert row["frames"] == (2 if name.startswith(("animated", "pages", "several")) else 1)
    if name.startswith("exif"):
        assert (row["width"], row["height"]) == (8, 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><title>404</title>", "cannot identify image file"),
        (b"", "it is empty"),
        (b"\xff\xd8\xff", "cannot identify image file"),
        (encode(noise(1, 64, 64, 3), "JPEG")[:900], "image file is truncated"),
        (encode(noise(1, 64, 64, 3))[:900], "image file is truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot identify image file"),
        (encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "its pixels are of mode F"),
        (encode(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "its pixels are of mode I"),
    ],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: str) -> None:
    row = describe(Item("a", "cat", data), parameters(Path("in")), MAX_SIDE)
    assert not row["readable"]
    assert row["reason"].startswith(reason)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (2**31, 8), (8, 2**31)])
def test_idx_files_of_impossible_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    sizes = b"".join(one.to_bytes(4, "big") for one in (1, *size))
    put(tmp_path / "in/train-images-idx3-ubyte", bytes([0, 0, 8, 3]) + sizes + bytes(64))
    put(tmp_path / "in/train-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 1, 0]))
    says = refusal(parameters(tmp_path / "in", "idx"), tmp_path / "out")
    assert says.endswith(f"declares images of {size[1]} x {size[0]} pixels: 1 to 4096 are possible")


def test_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    content = {"image": [encode(noise(index, 8, 8)) for index in range(40)], "label": [*CLASSES * 20]}
    pq.write_table(pa.table(content), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    for place in range(4, len(data), len(data) // 20):
        put(tmp_path / "in.parquet", data[:place] + bytes([data[place] ^ 0xFF] * 8) + data[place + 8 :])
        with suppress(StageError):
            list(open_source(parameters(tmp_path / "in.parquet", "parquet"), CLASSES).items())


def test_readers_take_or_refuse_what_is_changed_at_random(tmp_path: Path) -> None:
    """A small run of tests/bench/fuzz.py, which goes on for an hour."""
    command = [sys.executable, str(ROOT / "tests/bench/fuzz.py"), "--rounds", "60", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 12
