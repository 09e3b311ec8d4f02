"""Ten layouts through the whole flow: `python tests/bench/layouts.py [--only NAME]`.

scikit-learn's digits, laid out in ten ways in which people keep labelled images, and `weighin run` on each by changing
the parameters of data/recipes/mlp-digits.yaml alone. Where the layout has splits of its own, the manifest must have the
same; where it has groups, each must be in one split. Prints a row for each, writes data/reports/bench/layouts.json, and
ends with status 1 if one of them did not come to a decision. About a minute each on two quiet cores.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pictures import put, table
from workspace import PROMOTED, Workspace, checkout, own_git, server

from tasks.core import files, paths

TARGET = ROOT / paths.REPORTS / "bench" / "layouts.json"
RECIPE = "data/recipes/mlp-digits.yaml"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT, LEAST = 1200, 2  # images, and those of a class in a split
HEADER = f"{'layout':24} {'train':>6} {'val':>6} {'test':>6} {'outcome':>9} {'top-1':>7} {'seconds':>8}"


class Digit(NamedTuple):
    """An image of the source, its class, a split that somebody gave it, and its writer, of whom each wrote four."""

    number: int
    label: int
    png: bytes
    split: str
    writer: str


def digits() -> list[Digit]:
    """The first of scikit-learn's digits, 16 by 16 pixels."""
    from sklearn.datasets import load_digits

    found, made = load_digits(), []
    for number in range(COUNT):
        stream = io.BytesIO()
        pixels = Image.fromarray((found.images[number] * 15).astype(np.uint8)).resize((16, 16))
        pixels.save(stream, "PNG")
        split = "train" if number % 10 < 7 else "val" if number % 10 == 7 else "test"
        made.append(Digit(number, int(found.target[number]), stream.getvalue(), split, f"writer {number // 4}"))
    return made


Changes = dict[str, Any]  # of `ingest` in the recipe


def class_folders(root: Path, found: list[Digit]) -> Changes:
    for one in found:
        put(root / WORDS[one.label] / f"{one.number}.png", one.png)
    return {}


def split_folders(root: Path, found: list[Digit]) -> Changes:
    for one in found:
        put(root / one.split / WORDS[one.label] / f"{one.number}.png", one.png)
    return {}


def train_and_test_folders(root: Path, found: list[Digit]) -> Changes:
    for one in found:
        split = "testing" if one.split == "test" else "training"
        put(root / split / WORDS[one.label] / f"{one.number}.png", one.png)
    return {}


def class_folders_with_splits(root: Path, found: list[Digit]) -> Changes:
    class_folders(root, found)
    rows = [{"file_name": f"{WORDS[one.label]}/{one.number}.png", "fold": one.split} for one in found]
    table(root / "metadata.csv", rows)
    return {"split_column": "fold"}


def class_folders_with_groups(root: Path, found: list[Digit]) -> Changes:
    class_folders(root, found)
    rows = [{"file_name": f"./{WORDS[one.label]}/{one.number}.png", "writer": one.writer} for one in found]
    table(root / "metadata.csv", rows)
    return {"group_column": "writer"}


def flat_folder(root: Path, found: list[Digit]) -> Changes:
    for one in found:
        put(root / "images" / f"{one.number}.png", one.png)
    rows = [{"path": f"images/{one.number}.png", "digit": WORDS[one.label], "split": one.split} for one in found]
    table(root / "labels.csv", rows)
    return {"table": "labels.csv", "file_column": "path", "label_column": "digit", "split_column": "split"}


def hugging_face_folder(root: Path, found: list[Digit]) -> Changes:
    for split in ("train", "val", "test"):
        part = [one for one in found if one.split == split]
        folder = root / ("validation" if split == "val" else split)
        for one in part:
            put(folder / f"{one.number}.png", one.png)
        rows = [{"file_name": f"{one.number}.png", "label": WORDS[one.label]} for one in part]
        table(folder / "metadata.jsonl", rows)
    return {"label_column": "label"}


def write_parquet(path: Path, part: list[Digit], numbers: bool) -> None:
    about = {"huggingface": json.dumps({"info": {"features": {"label": {"names": WORDS, "_type": "ClassLabel"}}}})}
    content = {
        "image": [{"bytes": one.png, "path": f"{one.number}.png"} if numbers else one.png for one in part],
        "label": [one.label if numbers else WORDS[one.label] for one in part],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(content)
    pq.write_table(made.replace_schema_metadata(about) if numbers else made, path)


def hugging_face_parquet(root: Path, found: list[Digit]) -> Changes:
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        part = [one for one in found if one.split == split]
        write_parquet(root / f"data/{name}-00000-of-00001.parquet", part, numbers=True)
    return {"kind": "parquet"}


def one_parquet_file(root: Path, found: list[Digit]) -> Changes:
    write_parquet(root / "all.parquet", found, numbers=False)
    return {"kind": "parquet", "path": str(root / "all.parquet")}


def idx_pairs(root: Path, found: list[Digit]) -> Changes:
    for name, splits in (("train", ("train", "val")), ("t10k", ("test",))):
        part = [one for one in found if one.split in splits]
        pixels = b"".join(Image.open(io.BytesIO(one.png)).tobytes() for one in part)
        sizes = b"".join(size.to_bytes(4, "big") for size in (len(part), 16, 16))
        put(root / f"{name}-images-idx3-ubyte", bytes([0, 0, 8, 3]) + sizes + pixels)
        labels = bytes([0, 0, 8, 1]) + len(part).to_bytes(4, "big") + bytes(one.label for one in part)
        put(root / f"{name}-labels-idx1-ubyte", labels)
    return {"kind": "idx"}


LAYOUTS: dict[str, Callable[[Path, list[Digit]], Changes]] = {
    function.__name__.replace("_", " "): function
    for function in (
        *(class_folders, split_folders, train_and_test_folders, class_folders_with_splits, class_folders_with_groups),
        *(flat_folder, hugging_face_folder, hugging_face_parquet, one_parquet_file, idx_pairs),
    )
}
OWN = {"split folders", "class folders with splits", "flat folder", "hugging face folder", "hugging face parquet"}


def keeps_splits(name: str, manifest: pd.DataFrame, found: list[Digit]) -> bool:
    """Whether all images are there, in the splits that the layout has, and each group in one."""
    counts, expected = manifest["split"].value_counts(), pd.Series([one.split for one in found]).value_counts()
    return bool(
        (name not in OWN or (counts.sort_index() == expected.sort_index()).all())
        and manifest.groupby("group")["split"].nunique().le(1).all()
        and len(manifest) == COUNT
    )


def examine(name: str, workspace: Workspace, folder: Path) -> dict[str, Any]:
    """Lay the digits out, run, and look at what came of it."""
    found = digits()
    began = time.monotonic()
    changes = LAYOUTS[name](folder, found)
    workspace.git("checkout", "--quiet", "--", "params.yaml")
    (workspace.root / "params.yaml").write_bytes((ROOT / RECIPE).read_bytes())
    workspace.change(
        model=name.replace(" ", "-"),
        classes=list(WORDS),
        ingest={"kind": "folder", "path": str(folder), **changes},
        validate={"min_rows_per_class": LEAST, "min_side": 16, "max_side": 16},
        finetune={"image_size": 16},
        quantize={"calibration_images": 64},
        gate={"min_top1": 0.5, "max_top1_drop": 0.2, "max_latency_ratio": 10, "slices": {}},
    )
    decision = workspace.run("--bootstrap", status=PROMOTED)
    manifest = pd.read_parquet(workspace.root / paths.MANIFEST)
    counts = manifest["split"].value_counts()
    return {
        "layout": name,
        **{split: int(counts[split]) for split in ("train", "val", "test")},
        "outcome": decision["outcome"],
        "top1": decision["stages"]["reduce"]["top1"],
        "seconds": round(time.monotonic() - began, 1),
        "right": keeps_splits(name, manifest, found),
    }


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    counts = " ".join(f"{row[split]:6}" for split in ("train", "val", "test"))
    mark = "" if row["right"] else "  its splits are not those of the source"
    return f"{row['layout']:24} {counts} {row['outcome']:>9} {row['top1']:7.2%} {row['seconds']:8.1f}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=LAYOUTS, action="append", help="this layout; may be repeated")
    names = parser.parse_args().only or list(LAYOUTS)
    rows = []
    kept = tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True)
    with kept as scratch, own_git(), server(Path(scratch) / "prefect") as api:
        checkout(Path(scratch) / "workspace")
        workspace = Workspace(Path(scratch) / "workspace", api)
        print(HEADER, flush=True)
        for name in names:
            rows.append(examine(name, workspace, Path(scratch) / name.replace(" ", "-")))
            print(line(rows[-1]), flush=True)
    files.write_json(TARGET, rows)
    sys.exit(not all(row["right"] for row in rows))


if __name__ == "__main__":
    main()
