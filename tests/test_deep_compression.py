"""bench/deep_compression.py with a few digits and an epoch of everything."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_bench
from PIL import Image
from sklearn.datasets import load_digits


@pytest.mark.parametrize("network", ["lenet-300-100", "lenet-5"])
def test_a_network_becomes_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    bench, data = load_bench("deep_compression"), load_digits()
    for split, rows in {"train": slice(0, 1100), "val": slice(1100, 1300), "test": slice(1300, 1500)}.items():
        images = []
        for pixels in data.images[rows]:
            stream = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).resize((28, 28)).save(stream, "PNG")
            images.append(stream.getvalue())
        pq.write_table(
            pa.table({"image": images, "label": data.target[rows].astype(str)}), tmp_path / f"{split}.parquet"
        )
    short = bench.RECIPES[network]._replace(epochs=6, steps=((0.8, 2),), codebook_epochs=1)
    monkeypatch.setitem(bench.RECIPES, network, short)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    row = bench.measure(network, 0, tmp_path, scratch)
    assert row["bit_identical_images"] == 200
    assert row["error"] < 0.3
    assert row["times_smaller"] > 5
    assert network in bench.line(row)
