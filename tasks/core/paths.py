"""Where everything lies, relative to the repository's root, in which every stage runs."""

from pathlib import Path

PARAMS = Path("params.yaml")

DATA = Path("data")
PREPARED = DATA / "prepared"
TRAIN = PREPARED / "train.parquet"
VAL = PREPARED / "val.parquet"
TEST = PREPARED / "test.parquet"
MANIFEST = PREPARED / "manifest.parquet"
SOURCES = PREPARED / "sources.json"
CLASSES = PREPARED / "classes.json"
LEDGER = PREPARED / "ledger.parquet"
KNOWN_SPLITS = DATA / "splits" / "ledger.parquet"  # the ledger that ingest's grows from

DEVICE = DATA / "device.json"
RECIPES = DATA / "recipes"
MODELS = DATA / "models"
REPORTS = DATA / "reports"
PLAN = MODELS / "prune" / "plan.json"
PACKED = MODELS / "reduce" / "model.onnx.zst"
METRICS = REPORTS / "metrics.json"
STAGES = REPORTS / "stages.csv"
PREDICTIONS = REPORTS / "predictions.csv"
GOLDEN = REPORTS / "golden.npz"
DATA_DOCS = REPORTS / "data_docs"
CHECKPOINTS = DATA / "checkpoints"
START = DATA / "start" / "model.safetensors"
START_VERSION = DATA / "start" / "version"
CHAMPION = DATA / "champion"
CHAMPION_MODEL = CHAMPION / "model.onnx"
CHAMPION_RECORD = CHAMPION / "champion.json"


def weights(stage: str) -> Path:
    """The stage's weights, safetensors."""
    return MODELS / stage / "model.safetensors"


def spec(stage: str) -> Path:
    """What the stage's weights are: backbone, classes and preprocessing, JSON."""
    return MODELS / stage / "model.json"


def onnx(stage: str) -> Path:
    """The stage's model as the device would load it."""
    return MODELS / stage / "model.onnx"


def report(stage: str) -> Path:
    """The stage's numbers, JSON."""
    return REPORTS / f"{stage}.json"


def history(stage: str) -> Path:
    """One row per epoch of the stage's training, CSV."""
    return REPORTS / f"{stage}.csv"
