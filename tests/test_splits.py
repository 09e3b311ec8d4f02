"""The ledger of splits: an image stays where it was, however the source changes, and what is new is marked."""

import random
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import SPLITS, encode, folder, ingest_all, noise, parameters, put, table, take

from tasks.core import config
from tasks.core.errors import StageError
from tasks.images import ledger
from tasks.images.assignment import Assignment

SHARES = config.Split(val=0.1, test=0.2)
Image = tuple[str, str, str | None, str | None]  # pixels, label, group, own split


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is listed in data/reports."""
    monkeypatch.chdir(tmp_path)


def assign_images(
    images: Iterable[Image],
    known: pa.Table = ledger.EMPTY,
    erased: tuple[str, ...] = (),
    shares: config.Split = SHARES,
    seed: int = 0,
) -> tuple[pa.Table, dict[str, str | None], list[str]]:
    """The ledger afterwards, the split of each image by its pixels, and the reasons for which images are set aside."""
    listed = list(images)
    one = Assignment(sqlite3.connect(":memory:", isolation_level=None), known, erased)
    for index, (pixels, label, group, own) in enumerate(listed):
        one.add(index, label, pixels, group, own)
    one.assign(shares, seed)
    rows = list(one.rows())
    splits = {image[0]: split for image, (split, _, _) in zip(listed, rows, strict=True)}
    return one.ledger(), splits, [reason for _, reason, _ in rows if reason]


def plain(start: int, stop: int, group: str | None = None) -> list[Image]:
    """Images of two classes."""
    return [(f"{index:064}", "cat" if index % 2 else "dog", group, None) for index in range(start, stop)]


def by_pixels(known: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["pixels_sha256"]: row for row in known.to_pylist()}


def test_images_that_come_later_leave_the_others_where_they_are_and_are_marked_in_test(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    _, before = ingest_all(parameters(source), tmp_path / "first")
    folder(source, 40)
    found = take(parameters(source), tmp_path / "second", ledger.read(tmp_path / "first/ledger.parquet"))
    assert (found["of_before"], found["of_the_newest_data"]) == (40, 40)
    after = {name: pd.read_parquet(tmp_path / f"second/{name}.parquet") for name in SPLITS}
    for name in SPLITS:
        assert set(before[name]["path"]) < set(after[name]["path"])
        assert len(after[name]) == 2 * len(before[name])
    assert set(before["test"]["test_part"]) == {"frozen"}
    marks = dict(zip(after["test"]["path"], after["test"]["test_part"], strict=True))
    assert {path for path, mark in marks.items() if mark == "frozen"} == set(before["test"]["path"])
    assert set(marks.values()) == {"frozen", "new"}
    assert "test_part" not in after["train"].columns


def test_without_the_ledger_images_would_move(tmp_path: Path) -> None:
    first, splits, _ = assign_images(plain(0, 100))
    _, moved, _ = assign_images(plain(0, 150))
    assert any(moved[pixels] != split for pixels, split in splits.items())
    _, kept, _ = assign_images(plain(0, 150), first)
    assert all(kept[pixels] == split for pixels, split in splits.items())


def test_the_same_source_again_leaves_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    take(parameters(source), tmp_path / "first")
    folder(source, 30)
    told = take(parameters(source), tmp_path / "second", ledger.read(tmp_path / "first/ledger.parquet"))
    again = take(parameters(source, seed=5), tmp_path / "third", ledger.read(tmp_path / "second/ledger.parquet"))
    assert told == again
    for name in (*SPLITS, "manifest", "ledger"):
        second, third = (tmp_path / f"{run}/{name}.parquet" for run in ("second", "third"))
        assert second.read_bytes() == third.read_bytes()


def test_images_that_come_one_by_one_are_split_like_those_that_come_at_once() -> None:
    known = ledger.EMPTY
    for step in range(100):
        known, _, _ = assign_images(plain(0, 2 * step + 2), known)
    counts = Counter(known["split"].to_pylist())
    assert (counts["test"], counts["val"], counts["train"]) == (40, 20, 140)
    assert max(known["generation"].to_pylist()) == 100


def test_what_has_gone_comes_back_to_its_split() -> None:
    known, splits, _ = assign_images(plain(0, 100))
    smaller, _, _ = assign_images(plain(50, 120), known)
    assert len(smaller) == 120
    _, again, _ = assign_images(plain(0, 120), smaller)
    assert all(again[pixels] == split for pixels, split in splits.items())


def test_other_shares_and_another_seed_hold_for_what_is_new() -> None:
    known, splits, _ = assign_images(plain(0, 100))
    shares = config.Split(val=0.2, test=0.4)
    _, after, _ = assign_images(plain(0, 200), known, shares=shares, seed=3)
    assert all(after[pixels] == split for pixels, split in splits.items())
    counts = Counter(after.values())
    assert (counts["test"], counts["val"]) == (80, 40)
    _, fewer, _ = assign_images(plain(0, 110), known, shares=config.Split(val=0.05, test=0.05))
    assert {split for pixels, split in fewer.items() if pixels not in splits} == {"train"}


def test_a_group_stays_in_its_split_though_its_first_images_are_gone() -> None:
    images = [image for number in range(20) for image in plain(10 * number, 10 * number + 10, f"patient {number}")]
    known, splits, _ = assign_images(images)
    later = [image for number in range(20) for image in plain(1000 + number, 1001 + number, f"patient {number}")]
    _, after, reasons = assign_images(later, known)
    assert all(after[f"{1000 + number:064}"] == splits[f"{10 * number:064}"] for number in range(20))
    assert reasons == []
    assert set(splits.values()) == set(SPLITS)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_classes_are_drawn_with_their_rarest(seed: int) -> None:
    images: list[Image] = []
    for number in range(200):
        labels = ["common"] * 9 + ["rare" if number < 20 else "common"]
        images += [(f"{10 * number + n:064}", label, f"patient {number}", None) for n, label in enumerate(labels)]
    _, splits, _ = assign_images(images, seed=seed)
    counts = Counter(splits[pixels] for pixels, label, _, _ in images if label == "rare")
    assert counts == {"train": 14, "val": 2, "test": 4}


def row(number: int, split: str, group: str | None = None) -> dict[str, Any]:
    return {"pixels_sha256": f"{number:064}", "split": split, "group": group, "generation": 1}


def known_rows(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), ledger.SCHEMA)


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("train", "val"), ("val", "test")])
def test_groups_that_turn_out_to_be_one_stay_where_more_was_learned_and_the_rest_is_set_aside(
    one: str, other: str
) -> None:
    known = known_rows(row(0, one, "A"), row(1, other, "B"))
    linked = [*plain(0, 1, "A"), *plain(1, 2, "B"), *plain(2, 3, "A"), (f"{2:064}", "dog", "B", None)]
    after, splits, reasons = assign_images([*linked, *plain(3, 4, "B")], known)
    assert splits == {f"{0:064}": one, f"{1:064}": None, f"{2:064}": one, f"{3:064}": one}
    assert reasons == [f"it was in {other}, and others of its group were in {one}"]
    assert by_pixels(after)[f"{1:064}"]["split"] == other  # it must never be trained on, whatever comes


def test_an_image_that_joins_a_group_brings_the_group_along() -> None:
    known = known_rows(row(0, "test"))
    after, splits, _ = assign_images([*plain(0, 2, "A")], known)
    assert set(splits.values()) == {"test"}
    assert by_pixels(after)[f"{0:064}"]["group"] == "A"


@pytest.mark.parametrize("group", [None, "A"])
def test_an_image_whose_own_split_contradicts_the_ledger_is_set_aside(group: str | None) -> None:
    known = known_rows(row(0, "train", group), row(1, "test"))
    number = 2 if group else 0
    images: list[Image] = [(f"{number:064}", "dog", group, "test"), (f"{1:064}", "cat", None, "test")]
    _, splits, reasons = assign_images(images, known)
    assert splits == {f"{number:064}": None, f"{1:064}": "test"}
    assert reasons == ["its own split is test, and it, a copy or its group is in train"]


def test_an_official_train_image_that_was_drawn_for_val_stays_there_when_another_has_no_split() -> None:
    images: list[Image] = [(pixels, label, None, "train") for pixels, label, _, _ in plain(0, 100)]
    images += [(pixels, label, None, "test") for pixels, label, _, _ in plain(100, 120)]
    known, splits, _ = assign_images(images)
    _, after, reasons = assign_images([*images, *plain(200, 201)], known)
    assert reasons == []
    assert {pixels: after[pixels] for pixels in splits} == splits


def test_groups_are_remembered_by_all_their_names() -> None:
    """In the second run all groups have other names, and in the third there are new images only."""

    def groups(name: str, start: int) -> list[Image]:
        return [image for one in range(40) for image in plain(start + 3 * one, start + 3 * one + 3, f"{name}{one}")]

    known, splits, _ = assign_images(groups("A", 0))
    known, _, _ = assign_images(groups("B", 0), known)
    for name in ("A", "B"):
        _, after, _ = assign_images(groups(name, 1000), known)
        for one in range(40):
            assert after[f"{1000 + 3 * one:064}"] == splits[f"{3 * one:064}"]


def test_an_image_is_the_same_one_on_another_background_and_by_another_white(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    rng = np.random.default_rng(0)
    for index in range(20):
        pixels = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
        put(source / f"cat/clear{index}.png", encode(PIL.Image.fromarray(pixels, "RGBA")))
        values = rng.integers(0, 4096, (8, 8)).astype(np.uint16) * 16
        put(source / f"dog/deep{index}.png", encode(PIL.Image.fromarray(values)))
    _, before = ingest_all(parameters(source), tmp_path / "first")
    other = parameters(source, background=(0, 0, 0), white_level=40000)
    take(other, tmp_path / "second", ledger.read(tmp_path / "first/ledger.parquet"))
    for name in SPLITS:
        assert set(pd.read_parquet(tmp_path / f"second/{name}.parquet")["path"]) == set(before[name]["path"])


def test_what_was_drawn_from_an_official_train_split_stays_where_it_was_drawn_to() -> None:
    images: list[Image] = [(pixels, label, None, "train") for pixels, label, _, _ in plain(0, 100)]
    images += [(pixels, label, None, "test") for pixels, label, _, _ in plain(100, 120)]
    known, splits, _ = assign_images(images)
    assert Counter(splits.values()) == {"train": 90, "val": 10, "test": 20}
    more: list[Image] = [(pixels, label, None, "train") for pixels, label, _, _ in plain(200, 300)]
    _, after, reasons = assign_images([*images, *more], known)
    assert {pixels: after[pixels] for pixels in splits} == splits
    assert Counter(after.values()) == {"train": 180, "val": 20, "test": 20}
    assert reasons == []


def test_an_erased_image_stays_erased_and_only_its_hash_is_kept() -> None:
    known, _, _ = assign_images(plain(0, 20, "patient"))
    gone = f"{3:064}"
    after, splits, reasons = assign_images(plain(0, 20, "patient"), known, (gone, "f" * 64))
    assert splits[gone] is None
    assert reasons == ["it is erased on request"]
    assert by_pixels(after)[gone] == {"pixels_sha256": gone, "split": "erased", "group": None, "generation": 1}
    assert by_pixels(after)["f" * 64]["split"] == "erased"
    later, _, reasons = assign_images(plain(0, 20, "patient"), after)
    assert later.equals(after)
    assert reasons == ["it is erased on request"]


def test_erased_images_are_told_and_do_not_count_as_damaged(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    manifest, _ = ingest_all(parameters(source), tmp_path / "first")
    erased = manifest["pixels_sha256"].iloc[:10].tolist()
    params = parameters(source, erased=erased, max_corrupt_fraction=0)
    found = take(params, tmp_path / "second", ledger.read(tmp_path / "first/ledger.parquet"))
    assert (found["erased"], found["set_aside_by_the_ledger"]) == (10, 0)
    after = pd.read_parquet(tmp_path / "second/manifest.parquet").set_index("pixels_sha256")
    assert set(after.loc[erased, "reason"]) == {"it is erased on request"}
    assert after.loc[erased, "split"].isna().all()


def test_more_contradictions_than_allowed_stop_the_run_with_the_first_one(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    take(parameters(source), tmp_path / "first")
    rows = [
        {"file_name": path.relative_to(source).as_posix(), "fold": ("test", "train", "val")[index % 3]}
        for index, path in enumerate(sorted(source.rglob("*.png")))
    ]
    table(source / "metadata.csv", rows)
    with pytest.raises(StageError) as caught:
        take(
            parameters(source, split_column="fold"),
            tmp_path / "second",
            ledger.read(tmp_path / "first/ledger.parquet"),
        )
    said = str(caught.value)
    assert "of 40 images fit no split (its own split is test, and it, a copy or its group is in train)" in said
    assert "begin anew under another model name" in said


def test_pixels_count_and_not_files(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    _, before = ingest_all(parameters(source), tmp_path / "first")
    path = before["test"]["path"].iloc[0]
    (source / path).rename(source / "dog/renamed.png")
    put(source / "cat/other.bmp", encode(noise(1000, 8, 8), "BMP"))
    found = take(parameters(source), tmp_path / "second", ledger.read(tmp_path / "first/ledger.parquet"))
    assert (found["of_before"], found["of_the_newest_data"]) == (0, 41)
    assert "dog/renamed.png" in set(pd.read_parquet(tmp_path / "second/test.parquet")["path"])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_to_a_source_no_image_changes_its_split(seed: int) -> None:
    chance = random.Random(seed)
    known, pool = ledger.EMPTY, list(range(80))
    own = {number: chance.choice(SPLITS) for number in pool}
    for _ in range(12):
        chosen = chance.sample(pool, chance.randint(5, 80))
        grouped, official = chance.random() < 0.5, chance.choice([None, None, "some", "all"])
        images: list[Image] = []
        for number in chosen:
            group = f"{number // chance.choice([3, 4, 5])}" if grouped else None
            has_own = official == "all" or (official == "some" and number % 3 == 0)
            images.append((f"{number:064}", "cat" if number % 2 else "dog", group, own[number] if has_own else None))
        erased = tuple(f"{number:064}" for number in chance.sample(pool, chance.randint(0, 1)))
        after, splits, reasons = assign_images(images, known, erased, seed=chance.randint(0, 9))
        assert ledger.find_moved(known, after) == []
        rows = by_pixels(after)
        assert all(split is None or rows[pixels]["split"] == split for pixels, split in splits.items())
        assert None not in splits.values() or reasons
        again, same, _ = assign_images(images, after, erased, seed=chance.randint(0, 9))
        assert (again, same) == (after, splits)
        known = after


def test_no_group_is_ever_learned_and_tested_in_one_run() -> None:
    chance = random.Random(1)
    known = ledger.EMPTY
    for _ in range(30):
        images: list[Image] = [
            (f"{number:064}", "cat" if number % 2 else "dog", f"{chance.randint(0, 30)}", None)
            for number in chance.sample(range(200), 60)
        ]
        known, splits, _ = assign_images(images, known)
        sides: dict[str, set[str]] = {}
        for pixels, _, group, _ in images:
            if splits[pixels]:
                sides.setdefault(str(group), set()).add(str(splits[pixels]))
        assert all(len(found) == 1 for found in sides.values())


def test_two_ledgers_are_one_and_what_they_disagree_on_is_in_no_split() -> None:
    one = known_rows(row(0, "train", "A"), row(1, "test"), row(2, "erased"))
    other = known_rows(row(1, "train", "B"), row(2, "val"), row(3, "val"))
    united = ledger.unite([one, other])
    assert {pixels: found["split"] for pixels, found in by_pixels(united).items()} == {
        f"{0:064}": "train",
        f"{1:064}": "excluded",
        f"{2:064}": "erased",
        f"{3:064}": "val",
    }
    _, splits, reasons = assign_images(plain(0, 4), united)
    assert splits == {f"{0:064}": "train", f"{1:064}": None, f"{2:064}": None, f"{3:064}": "val"}
    assert reasons == ["models that it was used for had it in different splits", "it is erased on request"]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ((row(0, "test"), row(1, "val")), f"the image with pixels {'0' * 12} was in train and is in test"),
        ((row(0, "train"),), f"the image with pixels {'0' * 12} was in val and is gone"),
        ((row(0, "train"), row(1, "val"), row(2, "test")), None),
        ((row(0, "erased"), row(1, "excluded")), None),
    ],
)
def test_a_ledger_that_lost_or_moved_an_image_has_not_grown(now: tuple[dict[str, Any], ...], said: str | None) -> None:
    assert ledger.find_moved(known_rows(row(0, "train"), row(1, "val")), known_rows(*now)) == ([said] if said else [])


@pytest.mark.parametrize("content", ["text", "table", "old"])
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.parquet"
    if content == "text":
        path.write_text("no Parquet")
    elif content == "table":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        pq.write_table(known_rows(row(0, "train")).replace_schema_metadata({"schema_version": "0"}), path)
    with pytest.raises(StageError, match=r"ledger\.parquet is no ledger of splits"):
        ledger.read(path)


def test_an_older_manifest_stands_for_a_ledger(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 20)
    _, before = ingest_all(parameters(source), tmp_path / "first")
    known = ledger.from_manifest(pq.read_table(tmp_path / "first/manifest.parquet"))
    assert (
        sorted(known.to_pylist(), key=lambda one: one["pixels_sha256"])
        == ledger.read(tmp_path / "first/ledger.parquet").to_pylist()
    )
    with pytest.raises(StageError, match="no columns pixels_sha256 and split"):
        ledger.from_manifest(pa.table({"path": ["a"]}))
    assert before


def test_classes_that_are_left_to_the_data_are_sorted_and_those_that_are_listed_keep_their_order(
    tmp_path: Path,
) -> None:
    source = folder(tmp_path / "in", 20)
    for index in range(20):
        put(source / f"ant/{index}.png", encode(noise(5000 + index, 8, 8)))
    put(source / "zoo/damaged.png", b"damaged")
    found = take(parameters(source), tmp_path / "auto", classes=None)
    assert found["classes"] == ["ant", "cat", "dog"]
    listed = take(parameters(source), tmp_path / "listed", classes=("dog", "zoo", "cat"))
    assert listed["classes"] == ["dog", "zoo", "cat"]
