"""config: what `params.yaml` may say, and the one sentence for what it may not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.core import config, files, paths
from tasks.core.errors import ParamsError

SHIPPED = Path(__file__).parents[1] / "params.yaml"
TEXT = """\
model: classifier
classes: [shirt, trouser, dress]

ingest:
  kind: idx
  path: data/raw/fashion-mnist
  split: {val: 0.1, test: 0.2}
  max_corrupt_fraction: 0.01
  seed: 0

validate:
  min_rows_per_class: 20
  max_class_imbalance: 5
  min_side: 8
  max_side: 4096

finetune:
  backbone: tf_efficientnet_lite0
  weights: {source: packaged}
  image_size: 64
  freeze_stages: 0
  training:
    epochs: 4
    batch_size: 32
    optimizer: adamw
    learning_rate: 0.001
    weight_decay: 0.01
    schedule: one-cycle
    label_smoothing: 0.1
    patience: 3
    augment: {crop_scale: 0.8, flip: 0.5}
    seed: 0

compress: null

prune:
  blocks: null
  channels: {ratio: 0.5, multiple: 16}
  weights: null
  recovery:
    temperature: 2.0
    teacher_share: 0.7
    training:
      epochs: 6
      batch_size: 32
      optimizer: adamw
      learning_rate: 0.002
      weight_decay: 0.01
      schedule: one-cycle
      label_smoothing: 0.0
      augment: {crop_scale: 0.8, flip: 0.5}
      seed: 0

quantize:
  calibration_images: 512
  percentile: 99.999
  grid: {kind: int8}

reduce:
  pack: auto

benchmark:
  threads: 1
  warmup: 20
  iterations: 300
  memory_limit_bytes: null

gate:
  min_top1: 0.895
  max_top1_drop: 0.01
  max_size_bytes: 1348000
  max_latency_ratio: 0.25
  max_latency_ms: null
  champion: {margin: 0.01, trade: {margin: 0.02, min_times_smaller: 2}}
  slices:
    label: {min_top1: 0.6}
"""


def write_changed(tmp_path: Path, old: str, new: str) -> Path:
    """A parameter file with one passage changed."""
    assert old in TEXT
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ParamsError) as caught:
        config.load(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}")
    assert "\n" not in sentence
    return sentence.removeprefix(f"{path}").removeprefix(": ")


def test_the_shipped_file_loads() -> None:
    params = config.load(SHIPPED)
    assert len(config.class_names(params)) == 10
    assert params.finetune.weights.source == "packaged"


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    params = config.load(write_changed(tmp_path, "min_side: 8", "min_side: 9"))
    assert params.classes == ("shirt", "trouser", "dress")
    assert params.validate_.min_side == 9
    assert params.prune.blocks is None
    assert params.prune.channels == config.Channels(ratio=0.5, multiple=16)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    epochs: 4", "    epoch: 4", "finetune.training.epoch is not a parameter; did you mean epochs? (1 more)"),
        ("    patience: 3", "    patiense: 3", "finetune.training.patiense is not a parameter; did you mean patience?"),
        ("  min_rows_per_class", "  max_sid: 1\n  min_rows_per_class", "validate.max_sid is not a parameter; did you"),
        ("{ratio: 0.5,", "{ratios: 0.5, ratio: 0.5,", "prune.channels.ratios is not a parameter; did you mean ratio?"),
        (
            "quantize:",
            "extra: 1\n\nquantize:",
            "extra is not a parameter; known here: model, classes, ingest, validate, finetune",
        ),
        ("quantize:", "quantise:", "quantise is not a parameter; did you mean quantize? (1 more)"),
        ("  kind: idx\n", "", "ingest.kind is missing"),
        ("kind: idx", "kind: zip", "ingest.kind: Input should be 'folder', 'idx' or 'parquet', not 'zip'"),
        ("epochs: 4", "epochs: four", "finetune.training.epochs: Input should be a valid integer"),
        ("epochs: 4", "epochs: 4.5", "finetune.training.epochs: Input should be a valid integer"),
        ("epochs: 4", "epochs: -1", "finetune.training.epochs: Input should be greater than or equal to 0, not -1"),
        ("val: 0.1", "val: 0.5", "ingest.split.val: Input should be less than 0.5, not 0.5"),
        ("learning_rate: 0.001", "learning_rate: 0", "learning_rate: Input should be greater than 0, not 0"),
        ("learning_rate: 0.001", "learning_rate: .nan", "learning_rate: Input should be a finite number, not nan"),
        ("max_latency_ratio: 0.25", "max_latency_ratio: .inf", "gate.max_latency_ratio: Input should be a finite"),
        ("[shirt, trouser", "[trouser, trouser", "class 'trouser' is listed twice"),
        (
            "classes: [shirt, trouser",
            "classes: auto #",
            "classes must list the names for ingest.kind idx",
        ),
        ("classes: [shirt, trouser", "classes: any #", "classes: Input should be a valid tuple, not 'any'"),
        ("[shirt, trouser", "[1, trouser", "classes.0: YAML does not read it as text: put it in quotes, not 1"),
        ("model: classifier", "model: A model", "model: String should match pattern"),
        ("source: packaged", "source: file", "finetune.weights: path goes with source: file, and only"),
        ("source: packaged", "source: file, path: a", "finetune.weights: sha256 goes with source: file, and only"),
        (
            "source: packaged",
            "source: packaged, stage: prune",
            "finetune.weights: model and stage go with source: prod",
        ),
        ("min_side: 8", "min_side: 5000", "validate: min_side 5000 is larger than max_side 4096"),
        (
            "source: packaged",
            "source: none, path: a",
            "finetune.weights: path goes with source: file, and only",
        ),
        (
            "  seed: 0\n\nvalidate",
            "  seed: 0\n  columns: [label]\n\nvalidate",
            "ingest.columns: label is a column already",
        ),
        *(
            (
                "  seed: 0\n\nvalidate",
                f"  seed: 0\n  columns: [site, {name}]\n\nvalidate",
                f"columns: {name} is a column",
            )
            for name in ("path", "image", "split", "predicted", "actual", "champion", "reason", "site", "sha256")
        ),
        ("  seed: 0\n\nvalidate", "  seed: 0\n  columns: ['']\n\nvalidate", "ingest.columns.0: String should have at"),
        (
            "    label: {min",
            "    device: {min",
            "gate.slices has the column 'device', which is neither label nor test_part nor in ingest.columns",
        ),
        ("{min_top1: 0.6}", "{min_top1: 1.6}", "gate.slices.label.min_top1: Input should be less than or equal to 1"),
        ("{min_top1: 0.6}", "{min_recall: 0.6, min_top1: 0.6}", "gate.slices.label.min_recall is not a parameter"),
        ("{min_top1: 0.6}", "{min_count: 0, min_top1: 0.6}", "gate.slices.label.min_count: Input should be greater"),
        (
            ", min_times_smaller: 2",
            "",
            "gate.champion.trade: min_times_smaller or min_times_faster must be above 1: else nothing is had in return",
        ),
        ("min_times_smaller: 2", "min_times_smaller: 1, min_times_faster: 1.0", "must be above 1: else nothing is had"),
        ("min_times_smaller: 2", "min_times_smaller: 0.5", "trade.min_times_smaller: Input should be greater than or"),
        ("{margin: 0.01, ", "{", "gate.champion.margin is missing"),
        ("{margin: 0.01, ", "{margin: -0.01, ", "gate.champion.margin: Input should be greater than or equal to 0"),
        ("{margin: 0.01, ", "{margin: 0.01, confidence: 1, ", "gate.champion.confidence: Input should be less than 1"),
        (
            "{margin: 0.01, ",
            "{margin: 0.01, confidence: 0.5, ",
            "gate.champion.confidence: Input should be greater than",
        ),
        ("  slices:\n    label: {min_top1: 0.6}\n", "", "gate.slices is missing"),
        ("gate:\n", "gate:\n  max_golden_difference: -1\n", "gate.max_golden_difference: Input should be greater"),
        (
            "compress: null",
            "compress: {max_size_bytes: 1000}",
            ": compress finds which blocks and channels go: leave prune.blocks and prune.channels out",
        ),
        ("compress: null", "compress: {}", "compress: give max_top1_drop, max_size_bytes or max_latency_ms"),
        ("compress: null\n", "", "compress is missing"),
        ("blocks: null", "blocks: {}", "prune.blocks: give remove or threshold, one of the two"),
        ("blocks: null", "blocks: {remove: 1, threshold: 0.1}", "prune.blocks: give remove or threshold, one of the"),
        ("blocks: null", "blocks: {threshold: 1}", "prune.blocks.threshold: Input should be less than 1"),
        ("blocks: null", "blocks: {threshold: 0}", "prune.blocks.threshold: Input should be greater than 0"),
        ("weights: null", "weights: {}", "prune.weights: give threshold or sparsity, one of the two"),
        ("weights: null", "weights: {threshold: 0.1, sparsity: 0.1}", "prune.weights: give threshold or sparsity"),
        ("{kind: int8}", "{kind: factor, factor: 0}", "quantize.grid.factor: Input should be greater than or equal to"),
        ("{kind: int8}", "{kind: factor, factor: .inf}", "quantize.grid.factor: Input should be a finite number"),
        ("{kind: int8}", "{kind: factor}", "quantize.grid.factor is missing"),
        ("{kind: int8}", "{kind: int7, codebook: 8}", "quantize.grid.codebook is not a parameter; known here: kind"),
        ("{kind: int8}", "{kind: int8, codebok: 8}", "grid.codebok is not a parameter; did you mean codebook?"),
        ("{kind: int8}", "{kind: mixed}", "quantize.grid.mean_bits is missing (1 more)"),
        ("{kind: int8}", "{kind: mixed, mean_bits: 4}", "quantize.grid.qat is missing"),
        ("{kind: int8}", "{kind: mixed, mean_bits: 1}", "grid.mean_bits: Input should be greater than or equal to 2"),
        (
            "{kind: int8}",
            "{kind: int3}",
            "grid.kind must be one of 'int8', 'int7', 'mixed', 'factor', not 'int3'",
        ),
        ("{kind: int8}", "{codebook: 8}", "quantize.grid.kind is missing"),
        ("{kind: int8}", "int8", "quantize.grid: Input should be a valid dictionary"),
        ("grid: {kind: int8}", "bits: 4", "quantize.bits is not a parameter; known here: calibration_images"),
        ("    seed: 0\n\ncompress", "    seed: 0\n    seed: 1\n\ncompress", ' is not YAML: found duplicate key "seed"'),
        ("model: classifier", "model: [", " is not YAML: "),
        ("model: classifier", "model: 2025-13-40", " is not YAML: month must be in 1..12"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    sentence = refusal(write_changed(tmp_path, old, new))
    assert says in sentence
    assert "http" not in sentence


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file: Input should be a valid dictionary"),
        (b"- 1\n", "the file: Input should be a valid dictionary"),
        (b"just words", "the file: Input should be a valid dictionary"),
        (b"a: \xff\xfe", " is not YAML: "),
        (b"a: \x00", " is not YAML: unacceptable character"),
    ],
)
def test_what_is_no_parameter_file_at_all(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    assert refusal(tmp_path / "params.yaml").startswith(says)


def test_a_yaml_error_names_its_line(tmp_path: Path) -> None:
    assert refusal(write_changed(tmp_path, "model: classifier", "model: a\nmodel: b")).endswith("in line 2")


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == " does not exist: give a parameter file, such as params.yaml"


def test_keys_of_sections_that_are_null_are_explained_too(tmp_path: Path) -> None:
    shown = {name: (value, bounds) for name, value, bounds, _ in config.explain(config.load(SHIPPED))}
    assert shown["prune.blocks"] == ("null", "")
    assert shown["prune.blocks.threshold"] == ("", "> 0, < 1")
    assert shown["prune.blocks.remove"] == ("", ">= 1")
    assert shown["quantize.grid.kind"] == ("mixed", "int8 | int7 | mixed | factor")
    assert shown["quantize.grid.qat.max_top1_drop"] == ("0.0", ">= 0, <= 1")
    assert shown["quantize.grid.factor"] == ("", ">= 1e-06, <= 1e+06")
    given = config.load(write_changed(tmp_path, "blocks: null", "blocks: {threshold: 0.3}"))
    shown = {name: (value, bounds) for name, value, bounds, _ in config.explain(given)}
    assert shown["prune.blocks.threshold"] == ("0.3", "> 0, < 1")
    assert "prune.blocks" not in shown


def test_slices_by_columns_that_ingest_carries(tmp_path: Path) -> None:
    path = write_changed(tmp_path, "  seed: 0\n\nvalidate", "  seed: 0\n  columns: [site, device]\n\nvalidate")
    path.write_text(path.read_text() + "    device: {min_top1: 0.5, max_regression: 0.1}\n")
    params = config.load(path)
    assert params.ingest.columns == ("site", "device")
    assert list(params.gate.slices) == ["label", "device"]
    assert params.gate.slices["label"] == config.Slice(min_count=30, min_top1=0.6, max_regression=None)
    shown = {name: (value, bounds) for name, value, bounds, _ in config.explain(params)}
    assert shown["gate.slices.device.min_top1"] == ("0.5", ">= 0, <= 1")
    assert shown["gate.slices.label.max_regression"] == ("null", ">= 0, <= 1")
    assert shown["ingest.columns"][0] == "site, device"


def test_what_the_gate_does_if_it_is_not_told(tmp_path: Path) -> None:
    """Nothing goes without a champion, no trade is made, and golden outputs are met closely."""
    gate = config.load(write_changed(tmp_path, ", trade: {margin: 0.02, min_times_smaller: 2}", "")).gate
    assert (gate.bootstrap, gate.champion.trade, gate.champion.confidence) == (False, None, 0.95)
    assert gate.max_golden_difference == 0.001


@pytest.mark.parametrize("gain", ["min_times_smaller: 1.01", "min_times_faster: 1.01"])
def test_a_trade_gains_size_or_speed(tmp_path: Path, gain: str) -> None:
    trade = config.load(write_changed(tmp_path, "min_times_smaller: 2", gain)).gate.champion.trade
    assert trade is not None
    assert sorted([trade.min_times_smaller, trade.min_times_faster]) == [1, 1.01]


@pytest.mark.parametrize("recipe", sorted((SHIPPED.parent / "data/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_load(recipe: Path) -> None:
    assert "label" in config.load(recipe).gate.slices


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_numbers_however_they_are_written(tmp_path: Path, number: str) -> None:
    params = config.load(write_changed(tmp_path, "learning_rate: 0.001", f"learning_rate: {number}"))
    assert params.finetune.training.learning_rate == 0.001


UNCHANGEABLE: list[Callable[[config.Params], object]] = [
    lambda params: setattr(params, "model", "other"),
    lambda params: setattr(params.gate, "min_top1", 0.0),
]


@pytest.mark.parametrize("change", UNCHANGEABLE)
def test_parameters_do_not_change(tmp_path: Path, change: Callable[[config.Params], object]) -> None:
    params = config.load(write_changed(tmp_path, "model: classifier", "model: digits"))
    with pytest.raises(ValueError, match="frozen"):
        change(params)


def test_a_message_is_one_line_whatever_a_key_has_in_it(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text() + '\n"one\\ntwo\\u2028three": 1\n')
    with pytest.raises(ParamsError) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}: one two three is not a parameter")


@pytest.mark.parametrize("said", ["classes: auto\n", "classes: null\n", ""])
def test_classes_may_be_left_to_the_data(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SHIPPED.parent / "data/recipes/folder.yaml"
    text = path.read_text()
    assert "\nclasses: auto\n" in text
    params = config.read(text.replace("\nclasses: auto\n", f"\n{said}").encode(), path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=r"classes\.json is missing: list classes in params\.yaml, or run"):
        config.class_names(params)
    files.write_json(paths.CLASSES, ["b", "a"])
    assert config.class_names(params) == ("b", "a")
    assert config.class_names(params.model_copy(update={"classes": ("c", "d")})) == ("c", "d")
