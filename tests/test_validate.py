"""validate: real manifests through Great Expectations; the verdict, the sentences, Data Docs and the process."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tasks.core import config, files
from tasks.validate import COLUMNS, validate

ROOT = Path(__file__).parents[1]
CLASSES = ("bag", "coat", "shirt")
PARAMS = config.Validate(min_rows_per_class=2, max_class_imbalance=3, min_side=8, max_side=64)
CRITICAL = {
    *("columns", "sha256", "labels", "width", "height", "file_leaks", "pixel_leaks", "group_leaks", "contradictions"),
    *("rows", "classes"),
}
WARNING = {"decodable", "duplicates", "blank", "balance", "look_alikes", "passed_over", "depth"}
REPORT = {
    "images": 36,
    "passed_over": {},
    "of_16_bits": 0,
    "values_of_16_bits_up_to": None,
    "white_level": 65535,
}


def manifest(per_split: int = 4) -> pd.DataFrame:
    """A manifest that nothing is wrong with."""
    rows = []
    for label in CLASSES:
        for split in ("train", "val", "test"):
            for index in range(per_split):
                path = f"{label}/{split}-{index}.png"
                rows.append(
                    {
                        "path": path,
                        "label": label,
                        "width": 28,
                        "height": 32,
                        "mode": "L",
                        "bytes": 400,
                        "sha256": hashlib.sha256(path.encode()).hexdigest(),
                        "perceptual_hash": hashlib.sha256(b"looks" + path.encode()).hexdigest(),
                        "group": None,
                        "pixels_sha256": hashlib.sha256(b"pixels" + path.encode()).hexdigest(),
                        "split": split,
                        "mean": 90.0,
                        "std": 40.0,
                        "readable": True,
                        "reason": None,
                    }
                )
    return pd.DataFrame(rows).astype({"width": "Int32", "height": "Int32", "reason": "str"})


def judge(
    data: pd.DataFrame, docs: Path, report: dict[str, Any] = REPORT
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    verdict = json.loads(json.dumps(validate(data, report, PARAMS, CLASSES, docs), allow_nan=False))
    return verdict, {entry["name"]: entry for entry in verdict["expectations"]}


def failures(entries: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, entry in entries.items() if not entry["passed"]}


def row(data: pd.DataFrame, path: str) -> Any:
    return data.index[data["path"] == path][0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, dict[str, Any]], Path]:
    docs = tmp_path_factory.mktemp("good") / "docs"
    return *judge(manifest(), docs), docs


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, dict[str, Any]], Path]:
    """The verdict on a manifest with one fault of each kind."""
    data = manifest()
    data.loc[row(data, "bag/train-0.png"), "width"] = 7
    data.loc[row(data, "bag/train-1.png"), "height"] = 65
    data.loc[row(data, "bag/train-2.png"), "std"] = 0.0
    data.loc[row(data, "bag/train-3.png"), "sha256"] = "ABC"
    data.loc[row(data, "bag/val-0.png"), "label"] = "hat"
    for path, copy, columns in (
        ("coat/train-0.png", "coat/test-0.png", ["sha256", "pixels_sha256"]),
        ("shirt/train-1.png", "shirt/val-1.png", ["pixels_sha256"]),
    ):
        data.loc[row(data, copy), columns] = data.loc[row(data, path), columns]
    data.loc[row(data, "shirt/train-2.png"), "pixels_sha256"] = data["pixels_sha256"][row(data, "coat/train-2.png")]
    data.loc[[row(data, "coat/val-3.png"), row(data, "coat/train-3.png")], "group"] = "patient 7"
    data.loc[row(data, "shirt/test-3.png"), "perceptual_hash"] = "f" * 64
    data.loc[row(data, "shirt/val-3.png"), "perceptual_hash"] = "e" * 16 + "f" * 48  # 16 bits less
    lost = row(data, "bag/val-1.png")
    data.loc[lost, ["width", "height", "pixels_sha256", "split", "std"]] = None
    data.loc[lost, ["readable", "reason"]] = [False, "image file is truncated"]  # type: ignore[assignment, index]
    data = data[~data["path"].isin(["bag/val-2.png", "bag/val-3.png"])]
    more = manifest(per_split=40).query("label == 'shirt' and path not in @data.path")
    docs = tmp_path_factory.mktemp("bad") / "docs"
    report = {
        "images": 100,
        "passed_over": {".heic": {"files": 3, "such_as": ["bag/1.heic"]}, "hidden": {"files": 1, "such_as": ["._a"]}},
        "of_16_bits": 12,
        "values_of_16_bits_up_to": 4095,
        "white_level": 65535,
    }
    return *judge(pd.concat([data, more], ignore_index=True), docs, report), docs


def test_a_clean_manifest_passes_every_expectation(good: Any) -> None:
    verdict, entries, _ = good
    assert verdict["passed"] is True
    assert verdict["rows"] == 36
    assert failures(entries) == set()
    assert all(entry["offending"] == [] for entry in entries.values())
    assert entries["width"]["sentence"] == "Every image is 8 to 64 pixels wide (from 28 to 28)."


def test_look_alikes_are_found_where_many_images_have_much_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.validate.AT_ONCE", 32)
    random, data = np.random.default_rng(0), manifest(per_split=100)
    hashes = random.integers(0, 256, (len(data), 32), dtype=np.uint8)
    hashes[:, :8] = 7  # as where all have the same background
    for one, other in random.choice(len(data), (60, 2), replace=False):
        changed = random.choice(np.arange(64, 256), random.integers(12, 21), replace=False)
        hashes[other] = np.packbits(np.unpackbits(hashes[one]) ^ np.isin(np.arange(256), changed))
    data["perceptual_hash"] = [one.tobytes().hex() for one in hashes]
    ranks = data["split"].map({"train": 0, "val": 1, "test": 2}).to_numpy()
    close = np.unpackbits(hashes[:, None] ^ hashes, axis=2).sum(2) < 17
    expected = (close & (ranks < ranks[:, None])).any(1).sum()
    _, entries = judge(data, tmp_path / "docs", REPORT | {"images": len(data)})
    assert entries["look_alikes"]["observed"] == {"checked": len(data), "offending": expected}
    assert expected > 10


def test_severities(good: Any) -> None:
    severity = {name: entry["severity"] for name, entry in good[1].items()}
    assert {name for name in severity if severity[name] == "critical"} == CRITICAL
    assert {name for name in severity if severity[name] == "warning"} == WARNING


def test_every_fault_is_found(bad: Any) -> None:
    verdict, entries, _ = bad
    assert verdict["passed"] is False
    assert failures(entries) == (CRITICAL | WARNING) - {"columns", "classes"}


@pytest.mark.parametrize(
    ("name", "offending"),
    [
        ("width", [{"path": "bag/train-0.png", "value": 7}]),
        ("height", [{"path": "bag/train-1.png", "value": 65}]),
        ("blank", [{"path": "bag/train-2.png", "value": 0.0}]),
        ("sha256", [{"path": "bag/train-3.png", "value": "ABC"}]),
        ("labels", [{"path": "bag/val-0.png", "value": "hat"}]),
        ("decodable", [{"path": "bag/val-1.png", "value": "image file is truncated"}]),
        ("rows", [{"class": "bag", "split": "val", "value": 0}]),
        ("passed_over", [{"what": "4 of 104 files were not taken: 3 .heic, 1 hidden", "value": 4 / 104}]),
        ("depth", [{"what": "12 files have 16 bits and values up to 4095", "value": 4095 / 65535}]),
        ("look_alikes", [{"path": "shirt/test-3.png", "value": "val: shirt/val-3.png"}]),
        (
            "contradictions",
            [
                {"path": "coat/train-2.png", "value": "coat (coat/train-2.png) and shirt (shirt/train-2.png)"},
                {"path": "shirt/train-2.png", "value": "coat (coat/train-2.png) and shirt (shirt/train-2.png)"},
            ],
        ),
        (
            "group_leaks",
            [
                {"path": "coat/train-3.png", "value": "train and val"},
                {"path": "coat/val-3.png", "value": "train and val"},
            ],
        ),
        (
            "file_leaks",
            [
                {"path": "coat/train-0.png", "value": "test and train"},
                {"path": "coat/test-0.png", "value": "test and train"},
            ],
        ),
    ],
)
def test_the_offending_rows_are_named(bad: Any, name: str, offending: list[dict[str, Any]]) -> None:
    entry = bad[1][name]
    assert sorted(entry["offending"], key=str) == sorted(offending, key=str)
    assert entry["observed"]["offending"] == len(offending)
    first = entry["offending"][0]
    assert all(str(value).removesuffix(".0") in entry["sentence"] for value in first.values())


def test_the_observed_value_is_told(bad: Any) -> None:
    width, balance = bad[1]["width"], bad[1]["balance"]
    assert width["observed"] == {"checked": 141, "offending": 1, "min": 7, "max": 28}
    assert width["sentence"] == (
        "Expected that every image is 8 to 64 pixels wide, but not so for 1 of 141; "
        "observed from 7 to 28, such as bag/train-0.png: 7."
    )
    assert balance["observed"]["max"] == 120 / 8
    assert {item["class"] for item in balance["offending"]} == {"bag", "coat"}


def test_same_pixels_in_two_splits_leak_although_the_files_differ(bad: Any) -> None:
    leaks = {item["path"]: item["value"] for item in bad[1]["pixel_leaks"]["offending"]}
    assert leaks["shirt/val-1.png"] == leaks["shirt/train-1.png"] == "train and val"
    assert "shirt/val-1.png" not in str(bad[1]["file_leaks"])


def test_data_docs_open_at_index_and_show_each_table(bad: Any) -> None:
    docs = bad[2]
    assert "Validation" in (docs / "index.html").read_text()
    pages = {page.stem.removeprefix("manifest-"): page.read_text() for page in docs.glob("validations/**/*.html")}
    assert set(pages) == {"rows", "images", "splits", "classes", "source", "depth"}
    assert "every image is 8 to 64 pixels wide" in (docs / "expectations/images.html").read_text()
    assert "hat" in pages["images"]


def test_warnings_alone_pass(tmp_path: Path) -> None:
    data = manifest()
    data.loc[row(data, "bag/train-0.png"), "std"] = 0.0
    verdict, entries = judge(data, tmp_path / "docs")
    assert failures(entries) == {"blank"}
    assert verdict["passed"] is True


def test_a_declared_class_without_images_is_critical(tmp_path: Path) -> None:
    data = manifest()
    verdict, entries = judge(data[data["label"] != "coat"], tmp_path / "docs")
    assert failures(entries) == {"classes", "rows"}
    assert entries["classes"]["offending"] == [{"class": "coat", "value": 0}]
    assert verdict["passed"] is False


def test_holes_in_a_readable_row_do_not_slip_through(tmp_path: Path) -> None:
    data = manifest()
    data.loc[0, ["label", "width", "height", "sha256", "split", "std"]] = None
    _, entries = judge(data, tmp_path / "docs")
    assert failures(entries) == {"sha256", "labels", "width", "height", "blank", "file_leaks", "pixel_leaks"}


def test_five_offending_rows_at_most(tmp_path: Path) -> None:
    data = manifest()
    data["width"] = 4
    entry = judge(data, tmp_path / "docs")[1]["width"]
    assert entry["observed"]["offending"] == 36
    assert len(entry["offending"]) == 5


@pytest.mark.parametrize("column", ["sha256", "readable"])
def test_a_missing_column_is_named_and_nothing_else_is_judged(tmp_path: Path, column: str) -> None:
    verdict, entries = judge(manifest().drop(columns=column), tmp_path / "docs")
    assert verdict["passed"] is False
    assert list(entries) == ["columns"]
    assert entries["columns"]["observed"] == {"checked": len(COLUMNS), "offending": 1}
    assert entries["columns"]["sentence"].endswith(f"such as {column}: missing.")


def stage(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.validate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_stage_records_a_failed_verdict_and_ends_well(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "data/prepared").mkdir(parents=True)
    manifest().to_parquet(tmp_path / "data/prepared/manifest.parquet")
    files.write_json(tmp_path / "data/reports/ingest.json", REPORT)
    done = stage(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    verdict = json.loads((tmp_path / "data/reports/validate.json").read_text())
    assert verdict["passed"] is False
    assert (tmp_path / "data/reports/data_docs/index.html").is_file()
    assert sorted(path.name for path in (tmp_path / "data/reports").iterdir()) == [
        "data_docs",
        "ingest.json",
        "validate.json",
    ]
    lines = done.stdout.splitlines()
    assert lines[-1] == "validate: failed, 36 rows, 16 of 18 expectations hold"
    assert [line.split(":")[1:3] for line in lines[:-1]] == [[" critical", " rows"], [" critical", " classes"]]


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data/prepared").mkdir(parents=True)
    (tmp_path / "data/prepared/manifest.parquet").write_bytes(b"not parquet at all")
    done = stage(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/prepared/manifest.parquet is not Parquet; run ingest again")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data/reports/validate.json").exists()
