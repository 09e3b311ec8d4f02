"""The report of `benchmark`, as `benchmark.json` has it. The gate reads it loosely, since it fails closed."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.core import files
from tasks.core.errors import StageError


class Latency(BaseModel):
    """Percentiles of the timed inferences at batch 1, and how many there would be in a second."""

    model_config = ConfigDict(frozen=True)

    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    throughput_per_s: float


class Measurements(Latency):
    """What one model's file weighs: accuracy on the test split, latency, what loading costs, bytes and operators."""

    top1: float
    balanced_accuracy: float  # mean recall over the classes that have images
    macro_f1: float  # mean F1 over the classes that have images or are answered
    class_recall: dict[str, float | None]  # None for a class without images
    confusion: list[list[int]]  # rows: true class
    load_ms: float
    first_inference_ms: float
    peak_rss_bytes: int
    sha256: str
    size_bytes: int
    zst_bytes: int
    params: int
    nonzero_params: int
    sparsity: float
    macs: int
    operators: dict[str, int]


class Report(BaseModel):
    """The models of all stages and the champion, run in turns on this machine, and the files that belong to it."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[3] = 3  # schema 1 named no version, and 2 had top-1 alone of the means
    profile: dict[str, object]  # `benchmark` in params.yaml
    machine: dict[str, str]
    data_sha256: str
    classes: tuple[str, ...]  # in the order of the model's outputs
    champion_classes: tuple[str, ...] | None
    champion: Measurements | None
    float32: Latency  # of a model of the reduced one's shape
    stages: dict[str, Measurements]
    predictions_sha256: str = ""
    golden_sha256: str = ""
    packed_sha256: str = ""


def read_report(path: Path) -> Report:
    """The report in a file; `StageError` if it is not one of this version of Weighin."""
    try:
        return Report.model_validate(files.read_json(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StageError(f"{path} is no report of this version of Weighin ({where}): run benchmark again") from None


def stage_rows(stages: dict[str, Measurements], champion: Measurements | None) -> list[dict[str, Any]]:
    """One row per weighed model, the champion last: top-1, size and latency, and both against the fine-tuned model."""
    first = stages["finetune"]
    weighed = stages | ({"champion": champion} if champion else {})
    return [
        {
            "stage": name,
            **stage.model_dump(include={"top1", "size_bytes", "zst_bytes", "latency_p50_ms"}),
            "times_smaller": first.size_bytes / stage.size_bytes,
            "times_faster": first.latency_p50_ms / stage.latency_p50_ms,
        }
        for name, stage in weighed.items()
    ]
