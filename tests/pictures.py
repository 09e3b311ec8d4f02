"""Pictures and sources of them for the tests, and what ingest makes of a source."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from tasks.core import config
from tasks.core.errors import StageError
from tasks.images import ledger
from tasks.ingest import ingest

SPLITS = ("train", "val", "test")
CLASSES = ("cat", "dog")
MAX_SIDE = 4096


def noise(seed: int, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def folder(root: Path, per_class: int = 20) -> Path:
    for offset, name in enumerate(CLASSES):
        for index in range(per_class):
            put(root / name / f"{index:03}.png", encode(noise(1000 * offset + index, 8, 8)))
    return root


def parameters(source: Path, kind: str = "folder", **changes: Any) -> config.Ingest:
    values = {"split": {"val": 0.1, "test": 0.2}, "max_corrupt_fraction": 0.1, "seed": 0, **changes}
    return config.Ingest.model_validate({"kind": kind, "path": str(source), **values})


def take(
    params: config.Ingest,
    outputs: Path,
    known: pa.Table = ledger.EMPTY,
    classes: tuple[str, ...] | None = CLASSES,
) -> dict[str, Any]:
    """What ingest reports of a source, whose images `known` may have splits for; it writes into the new folder."""
    outputs.mkdir()
    targets = {name: outputs / f"{name}.parquet" for name in (*SPLITS, "manifest", "ledger")}
    return ingest(params, classes, MAX_SIDE, targets, known)[1]


def ingest_all(params: config.Ingest, outputs: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The manifest by path, and the splits."""
    take(params, outputs)
    read = {name: pd.read_parquet(outputs / f"{name}.parquet") for name in (*SPLITS, "manifest")}
    manifest = read.pop("manifest").set_index("path")
    assert manifest.index.is_unique
    return manifest, read


def refusal(params: config.Ingest, outputs: Path) -> str:
    with pytest.raises(StageError) as caught:
        ingest_all(params, outputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows as JSON Lines or as CSV, as the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
