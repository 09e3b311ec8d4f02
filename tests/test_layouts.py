"""bench/layouts.py: each of its ten layouts is read, with the splits and groups that it has."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, load_bench
from pictures import SPLITS
from ruamel.yaml import YAML

from tasks.core import config
from tasks.ingest import ingest

bench = load_bench("layouts")


@pytest.fixture(scope="module")
def digits() -> list[object]:
    return list(bench.digits())


@pytest.mark.parametrize("name", bench.LAYOUTS)
def test_a_layout_is_read_as_it_is(name: str, digits: list[object], tmp_path: Path) -> None:
    source, outputs = tmp_path / "source", {one: tmp_path / f"{one}.parquet" for one in (*SPLITS, "manifest", "ledger")}
    changes = bench.LAYOUTS[name](source, digits)
    recipe = YAML(typ="safe").load((ROOT / bench.RECIPE).read_text())["ingest"]
    params = config.Ingest.model_validate(recipe | {"kind": "folder", "path": str(source), **changes})
    ingest(params, bench.WORDS, 64, outputs)
    manifest = pd.read_parquet(outputs["manifest"])
    assert bench.keeps_splits(name, manifest, digits)
    assert manifest.groupby(["label", "split"]).size().min() >= bench.LEAST
