"""backbone: networks, and weights from every source, right ones and wrong ones."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from tasks.core import config, files
from tasks.core.errors import StageError
from tasks.images.preprocessing import Preprocessing, preprocess
from tasks.nets import backbone, training
from tasks.nets.backbone import Spec

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "fox")
SMALL = "test_efficientnet"  # timm's own network for tests: 100,000 parameters


def parameters(name: str, size: int = 32, **weights: Any) -> config.Finetune:
    values = config.load(ROOT / "params.yaml").finetune.model_dump()
    return config.Finetune.model_validate(values | {"backbone": name, "image_size": size, "weights": weights})


def spec(name: str, size: int = 32, classes: tuple[str, ...] = CLASSES) -> Spec:
    return Spec(backbone=name, classes=classes, preprocessing=backbone.preprocessing(name, size), weights={})


def created(name: str, size: int = 32, classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backbone.create(name, classes, backbone.preprocessing(name, size))


def load_pretrained(name: str, size: int = 32, classes: tuple[str, ...] = CLASSES, **weights: Any) -> nn.Module:
    if weights["source"] == "file":
        path = Path(weights["path"])
        weights = {"sha256": files.sha256(path) if path.exists() else "0" * 64} | weights
    return backbone.load_pretrained(parameters(name, size, **weights), spec(name, size, classes), None)


def refusal(name: str, **weights: Any) -> str:
    with pytest.raises(StageError) as caught:
        load_pretrained(name, **weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_weights(path: Path, state: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def same(one: nn.Module, two: nn.Module, but: str = "none") -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (name, a), b in pairs if not name.startswith(but))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tf_efficientnet_lite0", Preprocessing(size=64, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)),
        ("resnet18", Preprocessing(size=64, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
        ("mobilenetv2_050", Preprocessing(size=64, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
        ("mlp", Preprocessing(size=64, channels=1, mean=(0.0,), std=(1.0,))),
        ("lenet-300-100", Preprocessing(size=64, channels=1, mean=(0.0,), std=(1.0,))),
        ("lenet-5", Preprocessing(size=64, channels=1, mean=(0.0,), std=(1.0,))),
    ],
)
def test_each_backbone_gets_the_input_it_was_made_for(name: str, expected: Preprocessing) -> None:
    assert backbone.preprocessing(name, 64) == expected


@pytest.mark.parametrize(
    ("name", "size", "count"), [("lenet-300-100", 28, 266_610), ("lenet-5", 28, 431_080), ("mlp", 8, 9_610)]
)
def test_classics_have_the_parameters_of_the_literature(name: str, size: int, count: int) -> None:
    net = created(name, size, classes=10)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet19", "; close ones: resnet1"),
        ("efficentnet_lite0", "; close ones: efficientnet_lite0"),
        ("lenet5", "lenet-5"),
        ("qqq", "'qqq' is neither a timm model nor mlp, lenet-300-100, lenet-5"),
        ("resnet18.no_such_tag", "no_such_tag"),
    ],
)
def test_an_unknown_backbone(name: str, says: str) -> None:
    with pytest.raises(StageError) as caught:
        backbone.preprocessing(name, 64)
    assert str(caught.value).startswith(f"finetune.backbone {name!r}")
    assert says in str(caught.value)


def test_the_smallest_input_of_lenet_5() -> None:
    assert created("lenet-5", 16)(torch.zeros(1, 1, 16, 16)).shape == (1, 3)
    with pytest.raises(StageError, match="image_size 15 is too small for lenet-5: 16 is the least"):
        backbone.preprocessing("lenet-5", 15)


@pytest.fixture(scope="module")
def imagenet() -> nn.Module:
    classes = tuple(str(number) for number in range(1000))
    return load_pretrained("tf_efficientnet_lite0", 224, classes, source="packaged").eval()


@pytest.mark.parametrize(("photograph", "number"), [("china.jpg", 698), ("flower.jpg", 985)])
@torch.inference_mode()
def test_the_packaged_weights_know_imagenet_in_its_order(imagenet: nn.Module, photograph: str, number: int) -> None:
    """698 is a palace, 985 a daisy."""
    stream = io.BytesIO()
    Image.fromarray(load_sample_image(photograph)).save(stream, "PNG")
    image = preprocess(stream.getvalue(), backbone.preprocessing("tf_efficientnet_lite0", 224))
    logits = imagenet(torch.from_numpy(image)[None])
    assert logits.shape == (1, 1000)
    assert torch.isfinite(logits).all()
    assert logits.argmax().item() == number


def test_packaged_weights_under_a_new_head(imagenet: nn.Module) -> None:
    net = load_pretrained("tf_efficientnet_lite0", source="packaged")
    assert net.get_submodule("classifier").weight.shape == (3, 1280)
    assert same(net, imagenet, but="classifier.")


def test_packaged_weights_are_those_of_one_backbone() -> None:
    says = "finetune.weights packaged are those of tf_efficientnet_lite0, not resnet18: choose another"
    assert refusal("resnet18", source="packaged") == says


def test_a_damaged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = importlib.metadata.files(backbone.PACKAGE) or []
    original = next(file for file in listing if file.suffix == ".pth")
    damaged = bytearray(Path(str(original.locate())).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    description = tmp_path / f"{backbone.PACKAGE.replace('-', '_')}-0.1.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {backbone.PACKAGE}\nVersion: 0.1.0\n")
    (description / "RECORD").write_text("weights.pth,,\n")
    (tmp_path / "weights.pth").write_bytes(damaged)
    monkeypatch.syspath_prepend(tmp_path)
    says = refusal("tf_efficientnet_lite0", source="packaged")
    assert says.startswith(f"{tmp_path}/weights.pth has SHA-256 ")
    assert says.endswith(f", not {backbone.PACKAGED_SHA256}: these are not the weights that were meant")


@pytest.mark.parametrize("name", [SMALL, "mlp"])
def test_weights_from_a_file(tmp_path: Path, name: str) -> None:
    net = created(name, classes=3, seed=1)
    path = write_weights(tmp_path / "weights.safetensors", net.state_dict())
    found = load_pretrained(name, source="file", path=str(path), sha256=files.sha256(path))
    assert same(found, net)


def test_a_head_for_other_classes_is_new(tmp_path: Path) -> None:
    net = created(SMALL, classes=7, seed=1)
    path = write_weights(tmp_path / "weights.safetensors", net.state_dict())
    found = load_pretrained(SMALL, source="file", path=str(path))
    assert same(found, net, but=backbone.head(net))
    assert found(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_head_may_be_missing(tmp_path: Path) -> None:
    net = created(SMALL, seed=1)
    body = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("classifier.")}
    found = load_pretrained(SMALL, source="file", path=str(write_weights(tmp_path / "weights.safetensors", body)))
    assert same(found, net, but="classifier.")


def test_a_file_that_is_not_the_one_that_was_meant(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "weights.safetensors", created(SMALL).state_dict())
    says = refusal(SMALL, source="file", path=str(path), sha256="0" * 64)
    assert says == f"{path} has SHA-256 {files.sha256(path)}, not {'0' * 64}: these are not the weights that were meant"


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    says = refusal(SMALL, source="file", path=f"{tmp_path}/none.safetensors")
    assert says == f"{tmp_path}/none.safetensors does not exist: it should hold the weights, as safetensors"


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_file_of_another_format(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    says = refusal(SMALL, source="file", path=f"{tmp_path}/weights.safetensors")
    assert says.startswith(f"{tmp_path}/weights.safetensors is not a safetensors file: ")


@pytest.mark.parametrize(
    ("other", "wanted", "says"),
    [
        ("test_resnet", SMALL, "has a tensor 'conv1."),
        ("resnet34", "resnet18", "has a tensor 'layer1.2."),  # has all that resnet18 has, and more
        ("resnet18", "resnet34", "has no tensor 'layer1.2."),
        (
            "mobilenetv2_050",
            "mobilenetv2_100",
            ": tensor 'conv_stem.weight' has shape (16, 3, 3, 3), not (32, 3, 3, 3)",
        ),
    ],
)
def test_weights_of_another_network(tmp_path: Path, other: str, wanted: str, says: str) -> None:
    path = write_weights(tmp_path / "weights.safetensors", created(other).state_dict())
    assert refusal(wanted, source="file", path=str(path)).startswith(f"{path}{says if says[0] == ':' else ' ' + says}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = created(SMALL).state_dict()
    state["bn1.running_mean"][3] = value
    path = write_weights(tmp_path / "weights.safetensors", state)
    says = refusal(SMALL, source="file", path=str(path))
    assert says == f"{path}: tensor 'bn1.running_mean' holds NaN or infinite values"


def test_the_production_model(tmp_path: Path) -> None:
    net = created(SMALL, seed=1)
    path = write_weights(tmp_path / "weights.safetensors", net.state_dict())
    found = backbone.load_pretrained(parameters(SMALL, source="production"), spec(SMALL), path)
    assert same(found, net)


def test_random_weights_are_those_of_the_seed() -> None:
    torch.manual_seed(0)
    assert same(load_pretrained(SMALL, source="none"), created(SMALL, seed=0))


HUB = """
import sys
from tasks.nets import backbone
from tasks.core import config
from tasks.core.errors import StageError
values = config.load(backbone.Path(sys.argv[1]) / "params.yaml").finetune.model_dump()
for name in ("test_resnet", "vit_tiny_patch16_224", "test_efficientnet"):
    params = config.Finetune.model_validate({**values, "backbone": name, "weights": {"source": "hub"}})
    spec = backbone.Spec(backbone=name, classes=("a", "b"), preprocessing=backbone.preprocessing(name, 64), weights={})
    try:
        net = backbone.load_pretrained(params, spec, None)
        backbone.save(net, spec, backbone.Path(name), backbone.Path("model.json"))
    except StageError as error:
        print(error)
"""


def test_weights_from_the_hub(tmp_path: Path) -> None:
    """timm's and the hub client's own code, on a cache as a download leaves it: one good, one absent, one damaged."""
    net = created("test_resnet", 64, classes=1000, seed=1)
    for name in ("test_resnet", "test_efficientnet"):
        repository = timm.get_pretrained_cfg(name).hf_hub_id.replace("/", "--")  # type: ignore[union-attr]
        snapshot = tmp_path / f"models--{repository}/snapshots/0123"
        snapshot.mkdir(parents=True)
        (snapshot / "../../refs").mkdir()
        (snapshot / "../../refs/main").write_text("0123")
        (snapshot / "model.safetensors").write_bytes(b"damaged")
        if name == "test_resnet":
            write_weights(snapshot / "model.safetensors", net.state_dict())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(ROOT)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    absent, damaged = done.stdout.splitlines()
    assert absent.startswith("finetune.weights hub: the weights of vit_tiny_patch16_224 cannot be had: ")
    assert damaged.startswith("finetune.weights hub: the weights of test_efficientnet cannot be had: ")
    found = safetensors.torch.load_file(tmp_path / "test_resnet")
    own = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("fc.")}
    assert found["fc.weight"].shape[0] == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def frozen_names(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not parameter.requires_grad}


def test_freezing_the_first_stages_of_a_timm_network() -> None:
    net = created(SMALL)
    names = {name for name, _ in net.named_parameters()}
    stem = {"conv_stem.weight", "bn1.weight", "bn1.bias"}
    for stages, prefixes in ((0, ()), (1, ("none",)), (2, ("blocks.0.",)), (3, ("blocks.0.", "blocks.1."))):
        backbone.freeze(net, stages)
        expected = {name for name in names if name.startswith(prefixes)} if prefixes else set()
        assert frozen_names(net) == (expected | stem if stages else set())


def test_freezing_the_first_layers_of_a_classic() -> None:
    net = created("lenet-5")
    backbone.freeze(net, 2)
    assert frozen_names(net) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    backbone.freeze(net, 1)
    assert frozen_names(net) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(("name", "stages"), [(SMALL, 7), ("mlp", 2)])
def test_freezing_everything(name: str, stages: int) -> None:
    net = created(name)
    backbone.freeze(net, stages - 1)
    with pytest.raises(StageError, match=f"{stages} freezes everything: the network has {stages} stages"):
        backbone.freeze(net, stages)


@pytest.mark.parametrize("name", [SMALL, "mlp"])
def test_training_leaves_frozen_stages_as_they_are(tmp_path: Path, name: str) -> None:
    """Their BatchNorm's running statistics too."""
    images = [io.BytesIO() for _ in range(12)]
    for index, stream in enumerate(images):
        Image.new("L", (32, 32), 20 * index).save(stream, "PNG")
    rows = {"image": [stream.getvalue() for stream in images], "label": list(CLASSES) * 4}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    split = training.Images(tmp_path / "train.parquet", backbone.preprocessing(name, 32), CLASSES)
    net, before = created(name), created(name).state_dict()
    backbone.freeze(net, 1)
    values = parameters(name, source="none").training.model_dump() | {"epochs": 1, "batch_size": 6}
    loss = training.cross_entropy(0.0)
    training.fit(net, split, split, loss, config.Training.model_validate(values), checkpoint=tmp_path / "checkpoint.pt")
    first = ("conv_stem.", "bn1.") if name == SMALL else ("1.",)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith(first)}


@pytest.mark.parametrize("name", [SMALL, "lenet-5"])
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    net, described = created(name), spec(name).model_copy(update={"weights": {"source": "none"}})
    weights, description = tmp_path / "deep/model.safetensors", tmp_path / "deep/model.json"
    backbone.save(net, described, weights, description)
    found, found_spec = backbone.load(weights, description)
    assert found_spec == described
    assert same(found, net)
    before = weights.read_bytes()
    backbone.save(found, found_spec, weights, description)
    assert weights.read_bytes() == before
    images = torch.rand(2, *described.preprocessing.shape)
    assert torch.equal(found.eval()(images), net.eval()(images))


def test_a_network_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    net, weights, description = created("mlp"), tmp_path / "model.safetensors", tmp_path / "model.json"
    backbone.save(net, spec("mlp"), weights, description)
    before = weights.read_bytes()
    with torch.no_grad():
        net.get_parameter("1.bias")[0] = float("nan")
    with pytest.raises(StageError, match=r"model\.safetensors: tensor '1\.bias' holds NaN or infinite values"):
        backbone.save(net, spec("mlp"), weights, description)
    assert weights.read_bytes() == before


def test_a_description_of_something_else(tmp_path: Path) -> None:
    backbone.save(created("mlp"), spec("mlp"), tmp_path / "model.safetensors", tmp_path / "model.json")
    content = json.loads((tmp_path / "model.json").read_text())
    for wrong, says in ((content | {"classes": 3}, "classes"), ({"a": 1}, "backbone"), ([], "")):
        (tmp_path / "model.json").write_text(json.dumps(wrong))
        with pytest.raises(StageError, match=rf"model\.json does not describe a model: {says}"):
            backbone.load(tmp_path / "model.safetensors", tmp_path / "model.json")


def test_a_size_that_the_backbone_cannot_take_is_a_sentence() -> None:
    preprocessing = backbone.preprocessing("vit_tiny_patch16_224", 64)
    spec = Spec(backbone="vit_tiny_patch16_224", classes=("a", "b"), preprocessing=preprocessing, weights={})
    with pytest.raises(StageError, match=r"finetune\.image_size 64 does not suit vit_tiny_patch16_224"):
        backbone.check_size(backbone.create("vit_tiny_patch16_224", 2, preprocessing), spec)
