"""Small real networks as ONNX files, and a repository in miniature to run stages in."""

import copy
import functools
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from torch import nn
from workspace import own_git, server

from tasks import prune
from tasks.core import config
from tasks.core.quiet import set_quiet
from tasks.graphs.calibration import quantize
from tasks.images.preprocessing import Preprocessing
from tasks.nets import backbone, masks, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export

set_quiet()  # for every process that a test starts, too
ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "owl", "fox")
CALIBRATION = config.Quantize(calibration_images=32, percentile=99.99)
# Input size, residual blocks that go, and the multiple that channel counts are pruned to, half of them going.
MASKED: dict[str, tuple[int, list[str], int]] = {
    "mlp": (28, [], 4),
    "lenet-5": (28, [], 2),
    "mobilenetv2_050": (32, ["blocks.2.1", "blocks.3.2"], 16),
    "resnet18": (96, ["layer2.1", "layer3.1"], 16),
}


# From some minutes to one; a long file that comes last would keep one core alone at work.
LONGEST = ("flow", "records", "search", "folder", "tamper", "registry", "reduce", "rehearsal", "rollback", "server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server of the tests' own."""
    with server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="module", name="own_git")
def _own_git() -> Iterator[None]:
    with own_git():
        yield


@dataclass(frozen=True)
class Network:
    """A network with masked channels and blocks, as fp32 and as int8, and what it was masked to."""

    path: Path
    quantized: onnx.ModelProto
    preprocessing: Preprocessing
    slim: dict[str, tuple[int, ...]]  # weights by name in the network that has what is masked removed


def png(seed: int, size: int = 32) -> bytes:
    """Coloured noise with large and small structure."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size))
    pixels = np.asarray(rough).astype(int) + rng.integers(-40, 40, (size, size, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_split(
    path: Path, images: list[bytes], classes: tuple[str, ...] = CLASSES, columns: dict[str, list[str]] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [classes[index % len(classes)] for index in range(len(images))]
    fixed = {"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.string())}
    pq.write_table(pa.table(fixed | (columns or {})), path)


@torch.no_grad()
def randomise(net: nn.Module) -> None:
    """Statistics and scales as after training, so that normalisation does something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return [png(seed) for seed in range(32)]


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Callable[[str], Network]:
    """The masked network of a name in MASKED, made once."""
    root = tmp_path_factory.mktemp("networks")
    write_split(root / "val.parquet", images[:4])

    @functools.cache
    def make(name: str) -> Network:
        torch.manual_seed(0)
        size, blocks, multiple = MASKED[name]
        preprocessing = backbone.preprocessing(name, size)
        spec = Spec(backbone=name, classes=CLASSES, preprocessing=preprocessing, weights={})
        full = backbone.create(name, len(CLASSES), preprocessing)
        randomise(full)
        slim = copy.deepcopy(full)
        masks.cut_blocks(slim, blocks)
        params = config.Prune(channels=config.Channels(ratio=0.5, multiple=multiple))
        val = training.Images(root / "val.parquet", preprocessing, CLASSES)
        plan = prune.decide(slim, params, val, backbone.head(full))
        masks.scatter(slim, full, plan.channels)
        path = root / f"{name}.onnx"
        export(full, spec, path)
        weights = {name: tuple(tensor.shape) for name, tensor in slim.state_dict().items() if tensor.ndim > 1}
        return Network(path, quantize(path, images, preprocessing, CALIBRATION), preprocessing, weights)

    return make


def load_bench(name: str) -> ModuleType:
    """A script of tests/bench as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/bench/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Repository:
    """A folder laid out as the repository, in which stages run as DVC runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def params(self, **changes: Any) -> None:
        """params.yaml of the repository for these classes, with some sections' values changed."""
        yaml = YAML(typ="safe")
        content = yaml.load(ROOT / "params.yaml") | {"classes": list(CLASSES)}
        content["quantize"] |= {"grid": {"kind": "int8"}}  # training takes what few tests have
        for section, values in changes.items():
            content[section] = content[section] | values
        yaml.dump(content, self.root / "params.yaml")

    def model(self, stage: str) -> Path:
        path = self.root / "data/models" / stage / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def split(self, name: str, images: list[bytes]) -> Path:
        path = self.root / "data/prepared" / f"{name}.parquet"
        write_split(path, images)
        return path

    def report(self, stage: str) -> Path:
        path = self.root / "data/reports" / f"{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, stage: str) -> subprocess.CompletedProcess[str]:
        """A stage by its name, or a script in the folder by its file name."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *([stage] if stage.endswith(".py") else ["-m", f"tasks.{stage}"])]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    def sentence(self, stage: str) -> str:
        """The one line that the stage says on stderr when it cannot go on."""
        done = self.run(stage)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("error: ").strip()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path)
    made.params()
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")  # the gate reads the code that judges
    return made
