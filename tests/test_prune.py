"""prune: what goes, that it is gone exactly, and that recovery brings accuracy back, on digits and real networks."""

import copy
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tasks import prune, quantize, reduce
from tasks.budget import allocation, costs
from tasks.budget.plan import Block, Group, Plan
from tasks.core import config
from tasks.core.errors import StageError
from tasks.graphs import calibration
from tasks.images import splits
from tasks.nets import backbone, distillation, importance, masks, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export

ROOT = Path(__file__).parents[1]
CLASSES = tuple("0123456789")
# With sides of their inputs; ese_vovnet concatenates.
NETWORKS = {"mlp": 32, "lenet-5": 32, "mobilenetv2_050": 64, "resnet18": 32, "ese_vovnet19b_dw": 64}
RECOVERY = {
    "temperature": 2.0,
    "teacher_share": 0.7,
    "training": {
        "epochs": 3,
        "batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 0.005,
        "weight_decay": 0.01,
        "schedule": "one-cycle",
        "label_smoothing": 0.0,
        "augment": {"crop_scale": 1.0, "flip": 0.0},
        "seed": 0,
    },
}
CHANNELS = {"ratio": 0.5, "multiple": 16}


def parameters(**kinds: Any) -> config.Prune:
    return config.Prune.model_validate(kinds)


def spec_of(name: str, size: int) -> Spec:
    return Spec(backbone=name, classes=CLASSES, preprocessing=backbone.preprocessing(name, size), weights={})


def network(name: str, size: int, classes: int = 10) -> tuple[nn.Module, Tensor]:
    """A network in which no number is what initialisation left, and images for it."""
    torch.manual_seed(0)
    net = backbone.create(name, classes, backbone.preprocessing(name, size)).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return net, torch.rand(4, *backbone.preprocessing(name, size).shape)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, the parameters, and an mlp fine-tuned on the digits."""
    root, data = tmp_path_factory.mktemp("repository"), load_digits()
    (root / "data/prepared").mkdir(parents=True)
    rows_of = {"train": [row for row in range(800) if row % 4], "val": list(range(0, 800, 4))}
    for name, rows in rows_of.items():
        images = []
        for pixels in data.images[rows]:
            stream = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).save(stream, "PNG")
            images.append(stream.getvalue())
        table = {"image": images, "label": data.target[rows].astype(str)}
        pq.write_table(pa.table(table), root / f"data/prepared/{name}.parquet")
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["classes"] = list(CLASSES)
    params["compress"] = None
    params["prune"] = {"channels": CHANNELS, "weights": {"sparsity": 0.3}, "recovery": RECOVERY}
    with (root / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    spec = spec_of("mlp", 8)
    training.make_deterministic(0)
    net = backbone.create("mlp", 10, spec.preprocessing)
    train, val = (
        training.Images(root / f"data/prepared/{name}.parquet", spec.preprocessing, CLASSES)
        for name in ("train", "val")
    )
    values = RECOVERY["training"] | {"epochs": 8, "learning_rate": 0.01}  # type: ignore[operator]
    loss = training.cross_entropy(0.0)
    training.fit(net, train, val, loss, config.Training.model_validate(values), checkpoint=root / "checkpoint.pt")
    assert training.evaluate(net, val)[0] > 0.9
    folder = root / "data/models/finetune"
    backbone.save(net, spec, folder / "model.safetensors", folder / "model.json")
    return root


def teacher(repository: Path) -> tuple[nn.Module, Spec]:
    folder = repository / "data/models/finetune"
    return backbone.load(folder / "model.safetensors", folder / "model.json")


def run_prune(repository: Path, checkpoint: Path, net: nn.Module, spec: Spec, **kinds: Any) -> prune.Pruned:
    prepared = repository / "data/prepared"
    training.make_deterministic(0)
    return prune.prune(net, spec, parameters(**kinds), prepared / "train.parquet", prepared / "val.parquet", checkpoint)


@pytest.mark.parametrize(
    ("channels", "ratio", "multiple", "expected"),
    [
        (24, 0.5, 16, 16),
        (32, 0.5, 16, 16),
        (64, 0.5, 16, 32),
        (72, 0.5, 16, 32),  # 36 is 2.25 multiples
        (96, 0.6, 16, 32),  # 38.4 is 2.4 multiples
        (96, 0.55, 16, 48),  # 43.2 is 2.7 multiples
        (16, 0.5, 16, 16),
        (8, 0.5, 16, 8),
        (100, 0.99, 16, 16),
        (100, 0.01, 16, 96),
        (20, 0.1, 16, 16),
        (31, 0.01, 16, 31),
        (24, 0.5, 1, 12),
        (24, 0.99, 1, 1),
        (1280, 0.5, 16, 640),
    ],
)
def test_how_many_channels_stay(channels: int, ratio: float, multiple: int, expected: int) -> None:
    assert masks.count_kept(channels, ratio, multiple) == expected


def with_skip(name: str) -> list[str]:
    """The blocks in which timm itself has a shortcut that changes nothing."""
    return [
        name
        for name, module in timm.create_model(name).named_modules()
        if getattr(module, "has_skip", False)
        or (isinstance(module, timm.models.resnet.BasicBlock) and module.downsample is None)
    ]


@pytest.mark.parametrize(
    ("name", "size", "count"), [("resnet18", 64, 5), ("mobilenetv2_050", 64, 10), ("tf_efficientnet_lite0", 64, 9)]
)
def test_residual_blocks_are_those_of_timm(name: str, size: int, count: int) -> None:
    net, images = network(name, size)
    found = masks.residual_blocks(net, images)
    assert sorted(found) == sorted(with_skip(name))
    assert len(found) == count


@pytest.mark.parametrize("name", ["mlp", "lenet-5"])
def test_classics_have_no_residual_blocks(name: str) -> None:
    assert masks.residual_blocks(*network(name, 32)) == []


def test_residual_blocks_are_the_innermost() -> None:
    """A stage of nothing but residual blocks also passes its input on."""
    found = masks.residual_blocks(*network("test_convnext", 64))
    assert "stages.0.blocks.0" in found
    assert not [pair for pair in itertools.permutations(found, 2) if pair[0].startswith(pair[1] + ".")]


def test_networks_whose_features_are_lists_have_blocks_too() -> None:
    assert masks.residual_blocks(*network("densenet121", 32)) == []


class Passing(nn.Module):
    """A module with a child and nothing to remove."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(features)  # type: ignore[no-any-return]


def test_what_has_no_weights_is_no_residual_block() -> None:
    assert masks.residual_blocks(nn.Sequential(nn.Conv2d(3, 3, 1), Passing()), torch.rand(2, 3, 4, 4)) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_channels_are_zero_and_behind_those_that_stay(name: str) -> None:
    net, images = network(name, NETWORKS[name], classes=64)
    slim, full, head = copy.deepcopy(net), copy.deepcopy(net), backbone.head(net)
    removed = masks.cut_channels(slim, config.Channels(ratio=0.5, multiple=16), images[:2], head).removed
    masks.scatter(slim, full, removed)
    expected = slim(images).detach()
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(full(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(images), expected, rtol=1e-2)
    assert "out" not in removed[head]
    original, left = net.state_dict(), slim.state_dict()
    for key, tensor in full.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        gone = removed.get(key.rpartition(".")[0], {})
        assert torch.all(tensor[gone.get("out", [])] == (1.0 if key.endswith("running_var") else 0.0)), key
        if tensor.ndim > 1:
            assert not tensor[:, gone.get("in", [])].any(), key
        if name == "ese_vovnet19b_dw" and "in" in gone:  # behind those of each part
            continue
        assert torch.equal(tensor[tuple(map(slice, left[key].shape))], left[key]), key
    convolutions = [key for key, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert {key for key in removed if "out" in removed[key]} >= {
        key for key in convolutions if original[f"{key}.weight"].shape[0] > 24
    }
    for key, sides in removed.items():
        assert (original[f"{key}.weight"].shape[0] - len(sides.get("out", []))) % 16 == 0 or key == head


def test_the_least_important_channels_go() -> None:
    net, images = network("mlp", 32)
    weak = torch.arange(128) % 2 == 0
    with torch.no_grad():
        for key, index in (("1.weight", weak), ("1.bias", weak), ("3.weight", (slice(None), weak))):
            net.get_parameter(key)[index] *= 0.01
    slim = copy.deepcopy(net)
    removed, groups = masks.cut_channels(slim, config.Channels(ratio=0.5, multiple=16), images, "3")
    assert groups == [Group(name="1", channels=128, kept=64, removed=list(range(0, 128, 2)))]
    assert removed == {"1": {"out": list(range(64, 128))}, "3": {"in": list(range(64, 128))}}
    assert torch.equal(slim.get_parameter("1.weight"), net.get_parameter("1.weight")[~weak])
    assert torch.equal(slim.get_parameter("3.weight"), net.get_parameter("3.weight")[:, ~weak])


def test_grouped_convolutions_stay_as_they_are() -> None:
    net, images = network("regnetx_002", 64)
    slim, full = copy.deepcopy(net), copy.deepcopy(net)
    grouped = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    removed = masks.cut_channels(slim, config.Channels(ratio=0.5, multiple=16), images, "head.fc").removed
    assert removed
    assert not set(grouped) & set(removed)
    masks.scatter(slim, full, removed)
    torch.testing.assert_close(full(images), slim(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixnet_s", "test_convnext"])
def test_a_network_that_cannot_be_masked(repository: Path, tmp_path: Path, name: str) -> None:
    net, _ = network(name, 32)
    with pytest.raises(StageError, match=r"^prune\.channels does not know this backbone's structure: [^\n]+$"):
        run_prune(repository, tmp_path / "checkpoint.pt", net, spec_of(name, 32), channels=CHANNELS)


def test_channels_that_do_not_add_up_are_refused_before_recovery(repository: Path) -> None:
    net, _ = teacher(repository)
    slim = copy.deepcopy(net)
    images = torch.rand(2, 1, 8, 8)
    removed = masks.cut_channels(slim, config.Channels(**CHANNELS), images, "3").removed
    prune.build_masked(net, slim, removed, images)
    wrong = {"1": {"out": [(unit + 1) % 128 for unit in removed["1"]["out"]]}, "3": removed["3"]}
    with pytest.raises(
        StageError, match=r"the masked network differs from the slim one by .*: this backbone cannot be"
    ):
        prune.build_masked(net, slim, wrong, images)
    short = {"1": {"out": removed["1"]["out"][1:]}, "3": removed["3"]}
    with pytest.raises(StageError, match=r"structure: 1\.weight cannot be masked"):
        prune.build_masked(net, slim, short, images)


def test_the_least_missed_blocks_become_identities(repository: Path, tmp_path: Path) -> None:
    net, spec = network("mobilenetv2_050", 32)[0], spec_of("mobilenetv2_050", 32)
    val = training.Images(repository / "data/prepared/val.parquet", spec.preprocessing, CLASSES)
    _, before = training.evaluate(net, val)
    increases = {}
    for name in with_skip("mobilenetv2_050"):
        without = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in without.get_submodule(name).parameters():
                parameter.zero_()
        increases[name] = training.evaluate(without, val)[1] - before
    full, plan, history = run_prune(repository, tmp_path / "checkpoint.pt", net, spec, blocks={"remove": 2})
    assert (plan.channels, plan.weights, history) == ({}, {}, [])
    assert [block.name for block in plan.blocks] == sorted(increases, key=lambda name: increases[name])[:2]
    for block in plan.blocks:
        assert block.val_loss_increase == pytest.approx(increases[block.name], abs=1e-5)
        module = full.get_submodule(block.name)
        assert all(not parameter.any() for parameter in module.parameters())
        channels = [child for child in module.modules() if isinstance(child, nn.Conv2d)][-1].out_channels
        images = torch.randn(3, channels, 4, 4)
        assert torch.equal(module(images), images)
    kept = {name: p for name, p in net.named_parameters() if not name.startswith(tuple(b.name for b in plan.blocks))}
    assert all(torch.equal(full.get_parameter(name), parameter) for name, parameter in kept.items())


def weighted_network(name: str, size: int, factors: dict[int, float]) -> tuple[nn.Module, list[str]]:
    """A network in which the weights of some of its residual blocks, by number, are scaled; and all their names."""
    net, images = network(name, size)
    blocks = masks.residual_blocks(net, images)
    with torch.no_grad():
        for number, factor in factors.items():
            for parameter in net.get_submodule(blocks[number]).parameters():
                parameter.mul_(factor)
    return net, blocks


@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet18"])
def test_blocks_under_the_threshold_become_identities_and_no_others(
    name: str, repository: Path, tmp_path: Path
) -> None:
    net, blocks = weighted_network(name, 32, {1: 0.01, 3: 1e-4})
    means = {}
    for block in blocks:
        module = net.get_submodule(block)
        weights = [one.weight.detach() for one in module.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
        means[block] = sum(float(w.abs().sum()) for w in weights) / sum(w.numel() for w in weights)
    scores = {block: mean / max(means.values()) for block, mean in means.items()}
    threshold = (sorted(scores.values())[2] + sorted(scores.values())[3]) / 2  # three go
    expected = [block for block in blocks if scores[block] < threshold]
    full, plan, _ = run_prune(repository, tmp_path / "one.pt", net, spec_of(name, 32), blocks={"threshold": threshold})
    assert {blocks[1], blocks[3]} < set(expected)
    assert [block.name for block in plan.blocks] == expected
    assert plan.block_scores == pytest.approx(scores)
    assert all(block.score == (plan.block_scores or {})[block.name] for block in plan.blocks)
    for key, parameter in full.named_parameters():
        gone = any(key.startswith(f"{block}.") for block in expected)
        assert torch.equal(parameter, torch.zeros_like(parameter) if gone else net.get_parameter(key)), key


def test_blocks_under_the_threshold_leave_the_file_and_no_logit_changes(repository: Path, tmp_path: Path) -> None:
    net, blocks = weighted_network("mobilenetv2_050", 32, {1: 0.01, 3: 0.01})
    spec, prepared = spec_of("mobilenetv2_050", 32), repository / "data/prepared"
    found = run_prune(repository, tmp_path / "one.pt", net, spec, blocks={"threshold": 0.05})[0]
    export(found, spec, tmp_path / "pruned.onnx")
    params = config.Quantize(calibration_images=64, percentile=99.99)
    images = quantize.calibration_images(prepared / "train.parquet", CLASSES, 64)
    quantized = calibration.quantize(tmp_path / "pruned.onnx", images, spec.preprocessing, params)
    reduced, record = reduce.reduce(quantized)
    for name, model in (("before", quantized), ("after", reduced)):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    assert reduce.prove(tmp_path / "before.onnx", tmp_path / "after.onnx", prepared / "val.parquet", threads=1) == 200
    assert len(record["residual_sums_removed"]) == 2
    assert sum(node.op_type == "Add" for node in reduced.graph.node) == len(blocks) - 2


def test_with_no_block_under_the_threshold_the_network_stays_and_the_stage_says_so(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, _ = weighted_network("mobilenetv2_050", 32, {})
    spec = spec_of("mobilenetv2_050", 32)
    full, plan, _ = run_prune(repository, tmp_path / "one.pt", net, spec, blocks={"threshold": 0.01})
    assert (plan.blocks, len(plan.block_scores or {})) == ([], 10)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), full.parameters(), strict=True))
    lowest = min((plan.block_scores or {}).values())
    says = f"no residual block is under prune.blocks.threshold 0.01: the lowest of 10 is {lowest:.3f}\n"
    assert capsys.readouterr().out == says
    _, plan, _ = run_prune(repository, tmp_path / "two.pt", *teacher(repository), blocks={"threshold": 0.99})
    assert (plan.blocks, plan.block_scores) == ([], {})
    says = "no residual block is under prune.blocks.threshold 0.99: this backbone has none\n"
    assert capsys.readouterr().out == says


def test_blocks_that_are_zero_already_go(repository: Path, tmp_path: Path) -> None:
    """As those of a compressed model that another one starts from."""
    net, blocks = weighted_network("mobilenetv2_050", 32, dict.fromkeys(range(10), 0.0))
    spec = spec_of("mobilenetv2_050", 32)
    _, plan, _ = run_prune(repository, tmp_path / "one.pt", net, spec, blocks={"threshold": 0.01})
    assert plan.blocks == [Block(name=block, score=0.0) for block in blocks]


def test_more_blocks_than_there_are(repository: Path, tmp_path: Path) -> None:
    net, spec = teacher(repository)
    with pytest.raises(StageError) as caught:
        run_prune(repository, tmp_path / "checkpoint.pt", net, spec, blocks={"remove": 1})
    assert str(caught.value) == "prune.blocks.remove is 1, but this backbone has 0 residual blocks"


@torch.no_grad()
def test_single_weights_under_a_threshold() -> None:
    net, _ = network("lenet-5", 32)
    net.get_parameter("0.weight").mul_(100)  # each layer is measured by its own largest weight
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    counts = masks.zero_weights(net, config.SingleWeights(threshold=0.25))
    assert list(counts) == ["0.weight", "3.weight", "7.weight", "9.weight"]
    for name, parameter in net.named_parameters():
        sizes = before[name].abs()
        gone = (sizes - sizes.min()) / (sizes.max() - sizes.min()) < 0.25 if name in counts else sizes < 0
        assert torch.equal(parameter, before[name].where(~gone, torch.zeros(())))
        assert int((parameter == 0).sum()) == counts.get(name, 0)
    assert 0.2 < counts["0.weight"] / before["0.weight"].numel() < 0.3


@torch.no_grad()
def test_the_smallest_weight_of_a_layer_counts_as_zero_and_the_largest_as_one() -> None:
    """Of 1, -2, 3, 5 the normalised sizes are 0, 0.25, 0.5 and 1; weights of one size are all alike and stay."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 5.0]]))  # type: ignore[operator]
    net[1].weight.copy_(torch.tensor([[0.5, -0.5], [0.5, -0.5]]))  # type: ignore[operator]
    assert masks.zero_weights(net, config.SingleWeights(threshold=0.375)) == {"0.weight": 2, "1.weight": 0}
    assert net[0].weight.tolist() == [[0, 0], [3, 5]]  # type: ignore[operator]
    assert net[1].weight.all()  # type: ignore[operator]


@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.9])
@torch.no_grad()
def test_single_weights_by_share_of_the_whole_model(sparsity: float) -> None:
    net, _ = network("lenet-5", 32)
    weights = [parameter for name, parameter in net.named_parameters() if name.endswith("weight")]
    every = torch.cat([weight.abs().flatten() for weight in weights])
    counts = masks.zero_weights(net, config.SingleWeights(sparsity=sparsity))
    left = torch.cat([weight.abs().flatten() for weight in weights])
    expected = round(sparsity * every.numel())
    ties = int((every == every.sort().values[expected - 1]).sum()) - 1
    assert expected <= sum(counts.values()) == int((left == 0).sum()) <= expected + ties
    assert left[left > 0].min() > every[left == 0].max()


def test_a_layer_is_not_emptied() -> None:
    net, _ = network("mlp", 32)
    with torch.no_grad():
        net.get_parameter("3.weight").mul_(1e-6)
    with pytest.raises(StageError) as caught:
        masks.zero_weights(net, config.SingleWeights(sparsity=0.5))
    says = "prune.weights leaves nothing of 3.weight: lower the threshold or sparsity in params.yaml"
    assert str(caught.value) == says


def test_distance_is_the_divergence_of_softened_answers() -> None:
    student, target = torch.randn(5, 10), torch.randn(5, 10)
    p, q = (target / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation.distance(student, target, 3.0), expected)
    assert float(distillation.distance(target, target, 3.0)) == 0


def test_zeros_hold_after_every_step_of_recovery(repository: Path, tmp_path: Path) -> None:
    net, spec = teacher(repository)
    slim = copy.deepcopy(net)
    masks.zero_weights(slim, config.SingleWeights(sparsity=0.7))
    zeros = {name: parameter == 0 for name, parameter in slim.named_parameters()}
    hold, steps = masks.hold_zeros(slim, backbone.head(slim)), itertools.count()

    def check() -> None:
        hold()
        next(steps)
        for name, parameter in slim.named_parameters():
            assert torch.equal(parameter == 0, zeros[name]), name

    train, val = (
        training.Images(repository / f"data/prepared/{name}.parquet", spec.preprocessing, CLASSES)
        for name in ("train", "val")
    )
    params = config.Recovery.model_validate(RECOVERY)
    distillation.distill(slim, net, params, train, val, checkpoint=tmp_path / "checkpoint.pt", after_step=check)
    assert next(steps) == 3 * (600 // 32)


def test_the_bias_of_the_head_is_free() -> None:
    net, _ = network("mlp", 32)
    with torch.no_grad():
        net.get_parameter("1.bias").zero_()
        net.get_parameter("3.bias").zero_()
    hold = masks.hold_zeros(net, "3")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    hold()
    assert not net.get_parameter("1.bias").any()
    assert net.get_parameter("3.bias").all()


def test_recovery_brings_accuracy_back_under_the_masks(repository: Path, tmp_path: Path) -> None:
    net, spec = teacher(repository)
    kinds = {"channels": {"ratio": 0.75, "multiple": 16}, "weights": {"threshold": 0.1}}
    raw, plan, none = run_prune(repository, tmp_path / "none.pt", net, spec, **kinds)
    full, same_plan, history = run_prune(repository, tmp_path / "checkpoint.pt", net, spec, **kinds, recovery=RECOVERY)
    assert (none, len(history)) == ([], 3)
    assert same_plan == plan
    assert len(plan.channels["1"]["out"]) == 96
    val = training.Images(repository / "data/prepared/val.parquet", spec.preprocessing, CLASSES)
    assert training.evaluate(full, val)[1] < 0.7 * training.evaluate(raw, val)[1]
    for name, parameter in full.named_parameters():
        assert torch.equal(parameter == 0, raw.get_parameter(name) == 0)
        assert not torch.equal(parameter, raw.get_parameter(name))
    assert sum(plan.weights.values()) > 100
    found = prune.sparsity(full)
    assert found["parameters"] == 9610
    assert found["nonzero_parameters"] == 64 * 32 + 32 + 32 * 10 + 10 - sum(plan.weights.values())
    unchanged, _ = teacher(repository)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), unchanged.parameters(), strict=True))


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_answers_are_known_before_for_each_image_as_it_is_and_mirrored(flip: float, repository: Path) -> None:
    net, spec = teacher(repository)
    images = training.Images(repository / "data/prepared/val.parquet", spec.preprocessing, CLASSES)
    targets, seen = distillation.answers(net.eval(), images), distillation.Mirrored(images, flip)
    rows = []
    for index in range(len(seen)):
        image, row = seen[index]
        rows.append(row)
        assert row % len(images) == index
        assert torch.equal(image, images[index][0].flip(2) if row >= len(images) else images[index][0])
        assert torch.allclose(net(image[None])[0], targets[row], atol=1e-5)
    assert {row >= len(images) for row in rows} == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[flip]
    params = config.Recovery.model_validate(RECOVERY)
    batch, labels = torch.stack([images[index][0] for index in range(8)]), torch.tensor(images.labels[:8])
    logits = torch.rand(8, 10)
    known = distillation.loss_of_answers(targets, torch.tensor(images.labels), params)(batch, logits, torch.arange(8))
    assert torch.allclose(known, distillation.loss_with_teacher(net, params)(batch, logits, labels))


@pytest.mark.parametrize("crop_scale", [1.0, 0.9], ids=["with answers known before", "with the teacher beside"])
def test_the_teacher_teaches(crop_scale: float, repository: Path, tmp_path: Path) -> None:
    """With the whole loss, a teacher that knows nothing keeps the student from learning."""
    net, spec = teacher(repository)
    train, val = (
        training.Images(repository / f"data/prepared/{name}.parquet", spec.preprocessing, CLASSES)
        for name in ("train", "val")
    )
    top1 = {}
    for name, master in (("good", net), ("bad", network("mlp", 8)[0])):
        torch.manual_seed(1)
        student = backbone.create("mlp", 10, spec.preprocessing)
        schedule = RECOVERY["training"] | {"epochs": 5, "augment": {"crop_scale": crop_scale, "flip": 0.0}}  # type: ignore[operator]
        params = config.Recovery.model_validate(RECOVERY | {"teacher_share": 1.0, "training": schedule})
        distillation.distill(student, master, params, train, val, checkpoint=tmp_path / f"{name}.pt")
        top1[name] = training.evaluate(student, val)[0]
    assert top1["good"] > 0.8
    assert top1["bad"] < 0.5


def test_without_a_share_the_teacher_is_not_asked(repository: Path, tmp_path: Path) -> None:
    _, spec = teacher(repository)
    master, _ = network("mlp", 8)
    master.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    train, val = (
        training.Images(repository / f"data/prepared/{name}.parquet", spec.preprocessing, CLASSES)
        for name in ("train", "val")
    )
    params = config.Recovery.model_validate(RECOVERY | {"teacher_share": 0.0})
    torch.manual_seed(1)
    student = backbone.create("mlp", 10, spec.preprocessing)
    distillation.distill(student, master, params, train, val, checkpoint=tmp_path / "checkpoint.pt")
    assert training.evaluate(student, val)[0] > 0.8


def test_nothing_to_prune_is_the_same_network(repository: Path, tmp_path: Path) -> None:
    net, spec = teacher(repository)
    full, plan, history = run_prune(repository, tmp_path / "checkpoint.pt", net, spec)
    assert (plan, history) == (Plan(), [])
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), full.state_dict().values(), strict=True))


def survey(net: nn.Module, images: Tensor, head: str) -> tuple[allocation.Network, list[Any]]:
    _, groups = masks.channel_groups(net, images[:2], head)
    effects = dict.fromkeys(masks.residual_blocks(net, images[:2]), 1.0)
    scores = [torch.ones(len(group[0].idxs)) for group in groups]
    return importance.network(net, groups, scores, effects, images[:2]), groups


@pytest.mark.parametrize("name", ["lenet-5", "mobilenetv2_050"])
def test_taylor_scores_are_the_squared_slope_of_the_loss_along_each_channel(name: str) -> None:
    """The slope by another way: of a factor on each channel where it is made last, after its normalisation."""
    net, images = network(name, NETWORKS[name])
    labels = torch.tensor([1, 3, 5, 7])
    _, groups = masks.channel_groups(net, images[:2], backbone.head(net))
    scores = importance.taylor(net, groups, [(images, labels), (images.flip(3), labels)])
    group = next(one for one in groups if len({id(dep.target.module) for dep, _ in one}) <= 4)
    makers = [dep.target.module for dep, _ in group if masks.side_of(dep) == "out"]
    makers = [module for module in makers if list(module.parameters(recurse=False))]
    normalised = [module for module in makers if isinstance(module, nn.BatchNorm2d)] or makers
    factor = torch.ones(len(group[0].idxs), requires_grad=True)
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: out * factor.view(-1, *[1] * (out.ndim - 2)))
        for module in normalised
    ]
    squares = []
    for batch in (images, images.flip(3)):
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(batch), labels), factor)
        squares.append(slope**2)
    for hook in hooks:
        hook.remove()
    number = next(place for place, one in enumerate(groups) if one is group)
    assert torch.allclose(scores[number], torch.stack(squares).mean(0), rtol=1e-3, atol=1e-10)


def test_a_network_is_surveyed_whole() -> None:
    net, images = network("mobilenetv2_050", 64)
    found, groups = survey(net, images, backbone.head(net))
    layers = {layer.name: layer for layer in found.layers}
    modules = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert set(layers) == modules | {"input"} | {f"{block} sum" for block in found.blocks}
    assert len(found.blocks) == 10
    assert len(groups) == len(found.channels)
    block = next(iter(found.blocks))
    assert {name for name, layer in layers.items() if layer.block == block} == {
        f"{block} sum",
        *(name for name in modules if name.startswith(f"{block}.")),
    }
    depthwise = layers[f"{block}.conv_dw"]
    assert depthwise.reads == depthwise.writes == layers[f"{block}.conv_pw"].writes == layers[f"{block}.conv_pwl"].reads
    assert layers[f"{block}.conv_pw"].reads == layers[f"{block}.conv_pwl"].writes == layers[f"{block} sum"].writes
    assert depthwise.operator.kind == "depthwise"
    assert layers["classifier"].writes is None


def run_compress(repository: Path, checkpoint: Path, **budget: Any) -> prune.Pruned:
    net, spec = teacher(repository)
    example = torch.rand(2, 1, 8, 8)
    points = allocation.points_to_measure(survey(net, example, "3")[0])
    table = {point: 1e-6 * point[1] * point[2] for point in points}
    params = parameters(recovery=RECOVERY)
    prepared = repository / "data/prepared"
    training.make_deterministic(0)
    return prune.compress(
        net,
        spec,
        config.Compress.model_validate(budget),
        params,
        table,
        prepared / "train.parquet",
        prepared / "val.parquet",
        checkpoint,
    )


def test_the_plan_names_the_channels_that_went_as_the_teacher_numbers_them(repository: Path) -> None:
    net, spec = teacher(repository)
    slim, example = copy.deepcopy(net), torch.rand(2, 1, 8, 8)
    train = training.Images(repository / "data/prepared/train.parquet", spec.preprocessing, CLASSES)
    table = {point: 1e-6 * point[1] * point[2] for point in allocation.points_to_measure(survey(net, example, "3")[0])}
    *_, whole = prune.survey_channels(copy.deepcopy(net), {}, train, example, "3")
    plan = prune.prune_to_limits(
        slim,
        allocation.Limits(6000, None),
        whole,
        {},
        table,
        lambda net, left: prune.survey_channels(net, left, train, example, "3"),
    )
    (group,) = plan.groups
    gone = set(group.removed)
    assert len(gone) == 128 - group.kept > 0
    left = [unit for unit in range(128) if unit not in gone]
    assert torch.equal(slim.get_parameter("1.weight"), net.get_parameter("1.weight")[left])


def test_a_budget_is_met_by_the_file_that_comes_out(repository: Path, tmp_path: Path) -> None:
    found = run_compress(repository, tmp_path / "checkpoint.pt", max_size_bytes=6000)
    (group,) = found.plan.groups
    assert group.kept in range(16, 128, 16)
    spec = teacher(repository)[1]
    export(found.net, spec, tmp_path / "model.onnx")
    images = quantize.calibration_images(repository / "data/prepared/train.parquet", CLASSES, 64)
    quantized = calibration.quantize(
        tmp_path / "model.onnx",
        images,
        spec.preprocessing,
        config.Quantize(calibration_images=64, percentile=99.99),
    )
    reduced, _ = reduce.reduce(quantized)
    assert 4000 < len(reduced.SerializeToString()) <= 6000


def test_a_budget_that_cannot_be_met_is_told_with_the_nearest_that_can(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as told:
        run_compress(repository, tmp_path / "one.pt", max_size_bytes=500)
    text = str(told.value)
    assert text.startswith(
        "no network was found for compress in params.yaml (max_size_bytes 500): the nearest that holds"
    )
    offer = {name: float(value) for name, value in re.findall(r"(max_\w+) ([\d.e-]+)", text.split("has", 1)[1])}
    assert set(offer) == {"max_size_bytes", "max_latency_ms", "max_top1_drop"}
    found = run_compress(repository, tmp_path / "two.pt", **offer | {"max_size_bytes": int(offer["max_size_bytes"])})
    assert [group.kept for group in found.plan.groups] == [16]


def test_a_drop_that_is_the_limit_itself_holds(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.9 - 0.89 is 0.010000000000000009."""
    found = iter([(0.9, 1.0)])
    monkeypatch.setattr(training, "evaluate", lambda *_: next(found, (0.89, 1.0)))
    assert run_compress(repository, tmp_path / "one.pt", max_top1_drop=0.01, max_size_bytes=6000).plan.groups


def test_an_offered_drop_is_rounded_up() -> None:
    def attempt(limits: allocation.Limits) -> prune.Attempt:
        return prune.Attempt(prune.Pruned(torch.nn.Identity(), Plan(), []), costs.Cost(980.0, 0.95), 9 / 800, False)

    with pytest.raises(StageError, match=r"max_top1_drop 0\.0113$"):
        prune._fitting(attempt, config.Compress(max_top1_drop=0.01, max_size_bytes=100_000))


def test_a_plan_keeps_a_distance_from_its_limits_and_an_offer_has_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 % of the bytes and 15 % of the milliseconds, which are foretold less well."""
    asked: list[allocation.Limits] = []

    def attempt(limits: allocation.Limits) -> prune.Attempt:
        asked.append(limits)
        return prune.Attempt(prune.Pruned(torch.nn.Identity(), Plan(), []), costs.Cost(980.0, 0.95), 0.0, True)

    budget = config.Compress(max_size_bytes=100_000, max_latency_ms=2.0)
    prune._fitting(attempt, budget)
    assert asked == [pytest.approx((97_000, 1.7))]
    with pytest.raises(StageError, match=r"holds has max_size_bytes 2000, max_latency_ms 1\.118 and"):
        prune._fitting(attempt, budget.model_copy(update={"max_latency_ms": 1.0}))


def test_an_accuracy_that_a_budget_cannot_hold_is_told_with_the_nearest_that_holds(
    repository: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"no network was found .* the nearest that holds has max_size_bytes") as told:
        run_compress(repository, tmp_path / "one.pt", max_size_bytes=3200, max_top1_drop=0.0)
    size = int(re.search(r"has max_size_bytes (\d+)", str(told.value)).group(1))  # type: ignore[union-attr]
    assert size > 3200


def test_with_an_accuracy_alone_the_smallest_that_holds_it_is_found(repository: Path, tmp_path: Path) -> None:
    net, spec = teacher(repository)
    val = training.Images(repository / "data/prepared/val.parquet", spec.preprocessing, CLASSES)
    reference = training.evaluate(net, val)[0]
    kept = {}
    for drop in (0.01, 0.2):
        found = run_compress(repository, tmp_path / f"{drop}.pt", max_top1_drop=drop)
        assert training.evaluate(found.net, val)[0] >= reference - drop
        kept[drop] = found.plan.groups[0].kept
    assert kept[0.2] <= kept[0.01] < 128


def test_ranges() -> None:
    plan = Plan(channels={"conv": {"out": [0, 1, 2, 7], "in": [3]}, "fc": {"in": []}})
    assert plan.to_json()["channels"] == {"conv": {"out": "0-2,7", "in": "3"}, "fc": {"in": ""}}


def run_stage(repository: Path) -> dict[str, bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tasks.prune"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune: val top-1 " in done.stdout.splitlines()[-1]
    data = repository / "data"
    found = [path for folder in ("models/prune", "reports") for path in (data / folder).iterdir()]
    return {str(path.relative_to(data)): path.read_bytes() for path in found}


def test_the_stage_twice(repository: Path) -> None:
    results = run_stage(repository)
    assert set(results) == {
        "models/prune/model.safetensors",
        "models/prune/model.json",
        "models/prune/model.onnx",
        "models/prune/plan.json",
        "reports/prune.json",
        "reports/prune.csv",
    }
    assert run_stage(repository) == results
    data = repository / "data"
    assert list((data / "checkpoints").iterdir()) == []
    net, spec = backbone.load(data / "models/prune/model.safetensors", data / "models/prune/model.json")
    assert spec == teacher(repository)[1]
    plan, metrics = (json.loads(results[name]) for name in ("models/prune/plan.json", "reports/prune.json"))
    gone = [
        unit
        for part in plan["channels"]["1"]["out"].split(",")
        for unit in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert len(gone) == 64
    assert plan["channels"]["3"]["in"] == plan["channels"]["1"]["out"]
    assert torch.equal((net.get_parameter("1.weight") == 0).all(1).nonzero().flatten(), torch.tensor(gone))
    assert sum(plan["weights"].values()) == round(0.3 * 64 * 74)
    assert metrics["parameters"] - metrics["nonzero_parameters"] == 64 * 75 + sum(plan["weights"].values())
    assert len(results["reports/prune.csv"].splitlines()) == 1 + 3
    ((images, labels),) = splits.batches(data / "prepared/val.parquet", spec.preprocessing, CLASSES, size=200)
    (logits,) = onnxruntime.InferenceSession(results["models/prune/model.onnx"]).run(None, {"image": images})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, net.eval()(torch.from_numpy(images)).numpy(), atol=1e-4)
    assert np.mean(logits.argmax(1) == labels) == metrics["val_top1"] > 0.85
