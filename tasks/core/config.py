"""What `params.yaml` may say: types, bounds and units. The values themselves live in the file only."""

import difflib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.core import files
from tasks.core.errors import ParamsError
from tasks.core.paths import CLASSES, PARAMS

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Level = Annotated[int, Field(ge=0, le=255)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Column = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Remote = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w./-]*$")]  # a name, which git takes for no option


def _text(name: object) -> str:
    """A class name in Unicode's form NFC. YAML takes 007, 1e3 and null for something else than text."""
    if not isinstance(name, str):
        raise ValueError("YAML does not read it as text: put it in quotes")
    return unicodedata.normalize("NFC", name)


def read_auto(names: object) -> object:
    """None, which leaves the classes to the data, for the word that says so."""
    return None if names == "auto" else names


ClassName = Annotated[str, BeforeValidator(_text)]

RESERVED = (
    *("path", "label", "image", "width", "height", "mode", "frames", "transparent", "white", "bytes", "sha256"),
    *("pixels_sha256", "perceptual_hash", "group", "split", "mean", "std", "readable", "reason"),
    *("actual", "predicted", "champion", "test_part"),
)


class Section(BaseModel):
    """A part of `params.yaml`: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Split(Section):
    val: float = Field(gt=0, lt=0.5, description="share of the images for tuning decisions")
    test: float = Field(gt=0, lt=0.5, description="share of the images that only reduce, benchmark and gate see")


class Ingest(Section):
    """Where the images come from and how they are split."""

    kind: Literal["folder", "idx", "parquet"] = Field(description="folder of class folders, IDX files, or Parquet")
    path: str = Field(min_length=1, description="the folder or file, relative to the repository or absolute")
    table: str | None = Field(
        None, description="kind folder: CSV or .jsonl in it with a row for each image; null: metadata.csv or .jsonl"
    )
    file_column: Column = Field("file_name", description="kind folder: the table's column with the path of the image")
    image_column: Column = Field("image", description="kind parquet: the column with the image")
    label_column: Column | None = Field(None, description="null: the class folder; of Parquet, label")
    split_column: Column | None = Field(
        None, description="train, val or test of each image; null: as folders or files are named, else drawn"
    )
    group_column: Column | None = Field(None, description="images of a group, such as a patient, go to one split")
    columns: tuple[Column, ...] = Field((), description="columns of the source to carry, for the gate's slices")
    max_unmatched_fraction: Fraction = Field(0, description="more images without a row, or rows without an image, stop")
    split: Split
    max_corrupt_fraction: Fraction = Field(description="more unreadable images than this stop the run")
    background: tuple[Level, Level, Level] = Field(
        (255, 255, 255), description="red, green, blue behind what is transparent, here and on the device"
    )
    white_level: Annotated[int, Field(ge=255, le=65535)] = Field(
        65535, description="the value that is white in files of 16 bits, such as 4095 where 12 are used"
    )
    seed: Seed = Field(description="decides which image goes to which split")
    erased: tuple[Sha256, ...] = Field((), description="pixels_sha256 of images to leave out for good, on request")

    @field_validator("columns")
    @classmethod
    def _columns_are_new(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        taken = next((name for name in columns if name in RESERVED or columns.count(name) > 1), None)
        if taken:
            raise ValueError(f"{taken} is a column already")
        return columns


class Validate(Section):
    """What the data must look like before anything is trained on it."""

    min_rows_per_class: Count = Field(description="images of each class in each split, at least")
    max_class_imbalance: Annotated[float, Field(ge=1)] = Field(description="largest class over smallest, at most")
    min_side: Count = Field(description="image width and height in pixels, at least")
    max_side: Count = Field(description="image width and height in pixels, at most; larger ones are not decoded")
    max_passed_over_fraction: Fraction = Field(0.01, description="of the source's files, not taken: more are a warning")
    max_near_duplicates: Annotated[int, Field(ge=0)] = Field(
        0, description="images of test or val that look like one of another split: more are a warning"
    )

    @model_validator(mode="after")
    def _sides_in_order(self) -> Self:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} is larger than max_side {self.max_side}")
        return self


class Weights(Section):
    """Where training starts."""

    source: Literal["packaged", "hub", "file", "production", "none"] = Field(
        description="packaged EfficientNet-Lite0, timm's hub, a safetensors file, the model in production, or random"
    )
    path: str | None = Field(None, description="source file: the safetensors file")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="source file: what it must hash to")
    model: str | None = Field(None, description="source production: the registered model, if not this one")
    stage: Literal["finetune", "prune"] = Field(
        "finetune", description="source production: full weights, or the pruned ones, whose zeros are then held"
    )

    @model_validator(mode="after")
    def _needs_path(self) -> Self:
        if (self.source == "file") != (self.path is not None):
            raise ValueError("path goes with source: file, and only with it")
        if (self.source == "file") != (self.sha256 is not None):
            raise ValueError("sha256 goes with source: file, and only with it: it says which weights are meant")
        if self.source != "production" and (self.model is not None or self.stage != "finetune"):
            raise ValueError("model and stage go with source: production, and only with it")
        return self


class Augment(Section):
    """Random changes to training images (torchvision.transforms.v2)."""

    crop_scale: Annotated[float, Field(gt=0, le=1)] = Field(description="smallest share of the area a crop keeps")
    flip: Fraction = Field(description="probability of a horizontal flip")
    erase: Fraction = Field(0.0, description="probability of erasing a random rectangle")


class Training(Section):
    """One training run, for fine-tuning and for recovery after pruning alike."""

    epochs: int = Field(ge=0)
    batch_size: Annotated[int, Field(ge=2)]
    optimizer: Literal["adamw", "sgd"]
    learning_rate: Positive = Field(description="the peak of the schedule")
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["one-cycle", "cosine"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    balance: Literal["none", "loss", "sampler"] = Field(
        "none", description="where classes differ in size: as they are, weighed in the loss, or drawn equally often"
    )
    patience: Count | None = Field(None, description="stop after so many epochs without a better val top-1")
    augment: Augment
    bf16: bool = Field(False, description="bfloat16 autocast; pays at large images or on CPUs with AMX")
    devices: Count = Field(
        1,
        description="processes that train together, each on a GPU or its share of the cores, with a part of each batch",
    )
    threads: Count | None = Field(
        None,
        description="cores that PyTorch uses; null: all. With another number the weights differ in their last bits",
    )
    seed: Seed

    @model_validator(mode="after")
    def _equal_shares(self) -> Self:
        if self.devices > 1 and (self.batch_size % self.devices or self.batch_size < 2 * self.devices):
            raise ValueError(
                f"with devices {self.devices}, batch_size must be a multiple of it, and at least {2 * self.devices}"
            )
        return self


class Finetune(Section):
    """The fine-tuned model: backbone, starting weights, input and training."""

    backbone: str = Field(min_length=1, description="a timm model name, or mlp, lenet-300-100, lenet-5")
    weights: Weights
    image_size: Annotated[int, Field(ge=8, le=1024)] = Field(description="side of the square input in pixels")
    freeze_stages: Annotated[int, Field(ge=0)] = Field(0, description="leave the first n stages as they are")
    training: Training


class Blocks(Section):
    remove: Count | None = Field(None, description="how many residual blocks go, those that val misses least first")
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="residual blocks go whose mean |w|, divided by the largest mean of all of them, is under this"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.remove is None) == (self.threshold is None):
            raise ValueError("give remove or threshold, one of the two")
        return self


class Channels(Section):
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of each group's channels that goes")
    multiple: Count = Field(
        16, description="kept counts are multiples of this; reduce leaves whole vectors of 16 whole, which are fastest"
    )


class SingleWeights(Section):
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="weights go whose |w|, its layer's smallest as 0 and its largest as 1, is under this"
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of all weights that goes, smallest |w| of the whole model first"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.threshold is None) == (self.sparsity is None):
            raise ValueError("give threshold or sparsity, one of the two")
        return self


class Recovery(Section):
    """Training after pruning, by labels and by distillation from the fine-tuned teacher (arXiv:1503.02531)."""

    temperature: Positive = Field(description="softens both distributions")
    teacher_share: Fraction = Field(
        description="share of the loss that the teacher has, which is not asked at 0; the labels have the rest"
    )
    training: Training


class Compress(Section):
    """What the device can take and what accuracy must hold; which blocks and channels go is found from it."""

    max_top1_drop: Fraction | None = Field(None, description="on val, against the fine-tuned model")
    max_size_bytes: Count | None = Field(None, description="of the reduced model")
    max_latency_ms: Positive | None = Field(None, description="p50 at batch 1, by the table in data/device.json")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if (self.max_top1_drop, self.max_size_bytes, self.max_latency_ms) == (None, None, None):
            raise ValueError("give max_top1_drop, max_size_bytes or max_latency_ms, or null for no budget")
        return self


class Prune(Section):
    """What is taken away; a kind that is left out or null is off."""

    blocks: Blocks | None = None
    channels: Channels | None = None
    weights: SingleWeights | None = None
    recovery: Recovery | None = Field(None, description="retraining under the masks")


class Qat(Recovery):
    """Quantization-aware training, where calibration alone costs too much."""

    max_top1_drop: Fraction = Field(description="on val: what calibration may cost before the int8 model is trained")


class Int8(Section):
    """Codes from -127 to 127, by the range of each channel."""

    kind: Literal["int8"] = "int8"
    codebook: Annotated[int, Field(ge=2, le=127)] | None = Field(
        None,
        description="int8: so many nonzero codes in each weight tensor, which then packs better; null: all of them",
    )
    qat: Qat | None = Field(None, description="training on the grid, with the pruned network as the teacher")


# What a kind of grid goes without is None in its class, so that all kinds can be asked for it.
class Int7(Section):
    """Codes from -64 to 64, for x86 CPUs with AVX2 but no VNNI, whose sums would overflow."""

    kind: Literal["int7"]
    codebook: ClassVar[None] = None
    qat: ClassVar[None] = None


class Mixed(Section):
    """Codes of 8, 4 or 2 bits, by layer; calibration alone would cost too much."""

    kind: Literal["mixed"]
    codebook: ClassVar[None] = None
    mean_bits: Annotated[float, Field(ge=2, le=8)] = Field(
        description="mixed: of a weight, but for the last layer; each layer has 8, 4 or 2, by what they do to answers"
    )
    qat: Qat


class ByFactor(Section):
    """Every weight becomes round(w * factor), -127 to 127."""

    kind: Literal["factor"]
    factor: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        description="factor: every weight becomes round(w * factor), -127 to 127"
    )
    codebook: ClassVar[None] = None
    qat: ClassVar[None] = None


Grid = Int8 | Int7 | Mixed | ByFactor


class Quantize(Section):
    """int8 activations by calibration on training images, and the grid that weights lie on."""

    calibration_images: Annotated[int, Field(ge=32)]
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(description="share of activations inside the range")
    grid: Grid = Field(
        Int8(),
        discriminator="kind",
        description="what weights are rounded to",
    )


class Reduce(Section):
    """What the file looks like; it computes the same to the bit either way."""

    pack: Literal["auto", "plain"] = Field(
        "auto", description="auto: constants in fewer bits, where that is smaller, which ONNX Runtime unpacks at load"
    )


class Benchmark(Section):
    """The device profile."""

    threads: Count = Field(description="intra-op threads of ONNX Runtime")
    warmup: Annotated[int, Field(ge=0)] = Field(description="inferences before the clock starts")
    iterations: Annotated[int, Field(ge=10)] = Field(description="timed inferences of each stage's model")
    memory_limit_bytes: Annotated[int, Field(ge=2**26)] | None = Field(
        None, description="the device's memory; a model that cannot load and run within it fails the stage"
    )


class Trade(Section):
    """What accuracy may be given for: all of it must hold, and the verdict says that it was used."""

    margin: Fraction = Field(description="the margin that holds instead")
    min_times_smaller: Annotated[float, Field(ge=1)] = Field(1, description="bytes of the champion over ours")
    min_times_faster: Annotated[float, Field(ge=1)] = Field(1, description="p50 of the champion over ours")

    @model_validator(mode="after")
    def _gains_something(self) -> Self:
        if max(self.min_times_smaller, self.min_times_faster) == 1:
            raise ValueError("min_times_smaller or min_times_faster must be above 1: else nothing is had in return")
        return self


class Comparison(Section):
    """Non-inferiority to the model in production, on the same test images."""

    margin: Fraction = Field(description="the bound of the difference in top-1 must be above minus this")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="of that bound, one-sided")
    trade: Trade | None = Field(None, description="a wider margin for a model that is much smaller or faster")


class Slice(Section):
    """Limits for every value of a column: a class, a device, a source."""

    min_count: Count = Field(30, description="with fewer test images a slice is listed, not judged")
    min_top1: Fraction = Field(description="in the worst slice")
    max_regression: Fraction | None = Field(
        None, description="top-1 of the champion minus ours, in the slice that lost most"
    )


class Gate(Section):
    """Limits, all of which must hold for a promotion; null leaves an optional one out."""

    bootstrap: bool = Field(False, description="allow the first promotion, which has no champion to be compared with")
    approval: bool = Field(False, description="what passes is held until somebody puts their name to it")
    min_top1: Fraction
    min_balanced_accuracy: Fraction | None = Field(None, description="mean over the classes of the share that is right")
    max_top1_drop: Fraction = Field(description="against the fine-tuned model")
    max_size_bytes: Count
    max_zst_bytes: Count | None = Field(None, description="of the file packed by Zstandard, as a device may fetch it")
    max_latency_ratio: Positive = Field(description="p50 over that of the fine-tuned fp32 model")
    max_latency_ms: Positive | None = Field(None, description="p50 at batch 1")
    max_golden_difference: Annotated[float, Field(ge=0)] = Field(
        0.001, description="of any logit, between the benchmark and a fresh process"
    )
    champion: Comparison
    slices: dict[Column, Slice] = Field(description="by column: label, test_part, or one of ingest.columns")


class Registry(Section):
    """Where decisions are kept."""

    remote: Remote | None = Field(None, description="git remote that holds the registry; null: only here")
    reproduce_tolerance: Fraction = Field(
        0.01, description="top-1 may differ by this when reproduced on another kind of machine"
    )


class Params(Section):
    """The whole of `params.yaml`."""

    model: str = Field(pattern="^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", description="the model's name in the registry")
    classes: Annotated[tuple[ClassName, ...] | None, BeforeValidator(read_auto)] = Field(
        None,
        min_length=2,
        description="label names in the order of the outputs; auto: what ingest finds, sorted",
    )
    ingest: Ingest
    validate_: Validate = Field(alias="validate")
    finetune: Finetune
    compress: Compress | None = Field(description="a budget; null: prune has the shares themselves")
    prune: Prune
    quantize: Quantize
    reduce: Reduce
    benchmark: Benchmark
    gate: Gate
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _slices_by_columns_that_are_carried(self) -> Self:
        unknown = next(
            (name for name in self.gate.slices if name not in ("label", "test_part", *self.ingest.columns)), None
        )
        if unknown:
            raise ValueError(
                f"gate.slices has the column {unknown!r}, which is neither label nor test_part nor in ingest.columns"
            )
        return self

    @model_validator(mode="after")
    def _names_for_numbers(self) -> Self:
        if self.classes is None and self.ingest.kind == "idx":
            raise ValueError("classes must list the names for ingest.kind idx, whose labels are numbers")
        return self

    @model_validator(mode="after")
    def _one_way_to_say_what_goes(self) -> Self:
        if self.compress and (self.prune.blocks or self.prune.channels):
            raise ValueError("compress finds which blocks and channels go: leave prune.blocks and prune.channels out")
        return self

    @model_validator(mode="after")
    def _distinct_classes(self) -> Self:
        names = self.classes or ()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class {twice[0]!r} is listed twice")
        return self


def load(path: Path = PARAMS) -> Params:
    """The parameters in `path`, checked; `ParamsError` names the first key that is wrong and what it should be."""
    return read(read_bytes(path), path)


def class_names(params: Params) -> tuple[str, ...]:
    """The classes in the order of the model's outputs: those that params.yaml lists, or else those that ingest found.

    `ParamsError` if it lists none, and ingest has not run.
    """
    if params.classes is not None:
        return params.classes
    if not CLASSES.exists():
        raise ParamsError(f"{CLASSES} is missing: list classes in {PARAMS}, or run the pipeline first")
    return tuple(files.read_json(CLASSES))


def read_bytes(path: Path) -> bytes:
    """The content of a parameter file; `ParamsError` if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist: give a parameter file, such as params.yaml") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}; give a parameter file") from None


def read(data: bytes, name: Path) -> Params:
    """The parameters in the content of a file, checked as `load` does."""
    content = parse_yaml(data, name)
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError(f"{name}: {_sentence(error)}") from None


def parse_yaml(data: bytes, name: Path) -> Any:
    """The content of a YAML file, unchecked; `ParamsError` if it is not YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(data.decode())
    except (YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise ParamsError(f"{name} is not YAML: {_problem(error)}") from None


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" in line {mark.line + 1}" if mark else ""
    return " ".join(str(getattr(error, "problem", None) or error).split()) + line


def _sentence(error: ValidationError) -> str:
    # A typo makes two errors, an unknown key and a missing one: the first tells more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location, sections = _locate(first["loc"])
    if first["type"].startswith("union_tag"):  # pydantic names the section, and not the key that chooses its kind
        location.append(first["ctx"]["discriminator"].strip("'"))
    where = ".".join(location) or "the file"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            return f"{where} is not a parameter{_suggestion(location[-1], sections)}{more}"
        case "missing" | "union_tag_not_found":
            return f"{where} is missing{more}"
        case "union_tag_invalid":
            return f"{where} must be one of {first['ctx']['expected_tags']}, not {first['ctx']['tag']!r}{more}"
    got = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{got}{more}"


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], tuple[type[Section], ...]]:
    """The keys of a place in the file, without the kinds that pydantic puts between them; and the sections there."""
    keys: list[str] = []
    sections: tuple[type[Section], ...] = (Params,)
    for part in location:
        chosen = tuple(one for one in sections if part in kinds(one))
        if chosen and len(sections) > 1:
            sections = chosen
            continue
        keys.append(str(part))
        inner = [sections_of(fields(one)[str(part)].annotation) for one in sections if str(part) in fields(one)]
        sections = inner[0] if inner and inner[0] else sections  # a key of a mapping of sections, such as a column
    return keys, sections


def _suggestion(key: str, sections: tuple[type[Section], ...]) -> str:
    known = list(dict.fromkeys(name for section in sections for name in fields(section)))
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def fields(section: type[Section]) -> dict[str, Any]:
    """The section's fields by the names the file uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def kinds(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind` that choose this section, where there are several for one place."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field and section in get_args(Grid) else ()


def sections_of(annotation: object) -> tuple[type[Section], ...]:
    """The section types in an annotation such as `Blocks | None`; empty for a plain value."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return tuple(one for one in candidates if isinstance(one, type) and issubclass(one, Section))


def explain(params: Params) -> list[tuple[str, str, str, str]]:
    """Every parameter in the file's order: dotted name, value, bounds, meaning.

    The keys of a section that is null, or of another kind than the one that is given, are there without a value.
    """
    return list(_explain_section((Params,), params, ""))


def _explain_section(
    types: tuple[type[Section], ...], section: Section | None, prefix: str
) -> Iterator[tuple[str, str, str, str]]:
    merged: dict[str, list[Any]] = {}
    for one in types:
        for name, field in fields(one).items():
            merged.setdefault(name, []).append(field)
    for name, same in merged.items():
        field, given = same[0], section is not None and name in fields(type(section))
        value = getattr(section, f"{name}_" if field.alias else name, None)
        if isinstance(value, dict):
            for key, part in value.items():
                yield from _explain_section((type(part),), part, f"{prefix}{name}.{key}.")
            continue
        if not isinstance(value, Section):
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else "null" if value is None else str(value)
            bounds = " | ".join(dict.fromkeys(filter(None, map(_bounds, same))))
            yield f"{prefix}{name}", shown if given else "", bounds, field.description or ""
        inner = sections_of(field.annotation)
        if inner:
            yield from _explain_section(inner, value, f"{prefix}{name}.")


def _bounds(field: Any) -> str:
    """What pydantic would enforce, as JSON Schema has it."""
    schema = TypeAdapter(Annotated[field.annotation, field]).json_schema()
    choices = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {choices[0][key]:g}" for key, sign in signs.items() if key in choices[0]]
    values = [choices[0]["const"]] if "const" in choices[0] else choices[0].get("enum", [])
    return " | ".join(map(str, values)) or ", ".join(limits)
