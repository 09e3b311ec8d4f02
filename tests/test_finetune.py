"""finetune: the whole stage as a process on scikit-learn's digits, killed and started again, and what it refuses."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from conftest import load_bench
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_digits

from tasks import finetune
from tasks.core import config, files
from tasks.core.errors import StageError, WeighinError
from tasks.images import splits
from tasks.nets import backbone
from tasks.nets.backbone import Spec

ROOT = Path(__file__).parents[1]
CLASSES = tuple("0123456789")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "tasks.finetune"]
RESULTS = ("models/finetune/model.safetensors", "models/finetune/model.json", "models/finetune/model.onnx")
REPORTS = ("reports/finetune.json", "reports/finetune.csv")


def repository(root: Path, passed: Any = True, **changes: Any) -> Path:
    """A folder with everything that the stage reads: digits, verdict and parameters."""
    data = load_digits()
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
    files.write_json(root / "data/reports/validate.json", {"passed": passed})
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["classes"] = list(CLASSES)
    params["finetune"] |= {
        "freeze_stages": 0,
        "backbone": "mlp",
        "weights": {"source": "none"},
        "image_size": 8,
        **changes,
    }
    params["finetune"]["training"] = {
        "epochs": 8,
        "batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "weight_decay": 0.01,
        "schedule": "one-cycle",
        "label_smoothing": 0.1,
        "augment": {"crop_scale": 1.0, "flip": 0.1, "erase": 0.1},
        "threads": 2,
        "seed": 0,
    }
    with (root / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return root


def change(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = repository(tmp_path_factory.mktemp("undisturbed"))
    done = subprocess.run(COMMAND, cwd=root, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finetune: val top-1 9" in done.stdout.splitlines()[-1]
    return root


def test_what_the_stage_leaves(undisturbed: Path) -> None:
    data = undisturbed / "data"
    for name in (*RESULTS, *REPORTS):
        assert (data / name).is_file()
    metrics = json.loads((data / "reports/finetune.json").read_text())
    assert set(metrics) == {"val_top1", "val_loss", "parameters", "threads"}
    assert metrics["threads"] == 2  # though the tests' processes have one each
    assert metrics["parameters"] == 64 * 128 + 128 + 128 * 10 + 10
    history = (data / "reports/finetune.csv").read_text().splitlines()
    assert history[0] == "epoch,train_loss,val_loss,val_top1"
    assert len(history) > 4
    assert max(float(row.split(",")[3]) for row in history[1:]) == pytest.approx(metrics["val_top1"], rel=1e-5)
    described = json.loads((data / "models/finetune/model.json").read_text())
    assert described == {
        "backbone": "mlp",
        "classes": list(CLASSES),
        "preprocessing": {
            "size": 8,
            "channels": 1,
            "mean": [0.0],
            "std": [1.0],
            "background": [255, 255, 255],
            "white_level": 65535,
        },
        "weights": {"source": "none"},
    }
    assert list((data / "checkpoints").iterdir()) == []


def test_the_onnx_file_computes_what_the_network_does(undisturbed: Path) -> None:
    model = undisturbed / "data/models/finetune"
    net, spec = backbone.load(model / "model.safetensors", model / "model.json")
    session = onnxruntime.InferenceSession(model / "model.onnx")
    val = undisturbed / "data/prepared/val.parquet"
    (images, labels), *more = splits.batches(val, spec.preprocessing, spec.classes, size=200)
    assert not more
    with torch.inference_mode():
        expected = net.eval()(torch.from_numpy(images)).numpy()
    (logits,) = session.run(None, {"image": images})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    (one,) = session.run(None, {"image": images[:1]})
    np.testing.assert_allclose(one, expected[:1], atol=1e-4)
    metrics = json.loads((undisturbed / "data/reports/finetune.json").read_text())
    assert np.mean(logits.argmax(1) == labels) == metrics["val_top1"] > 0.9


def test_the_onnx_file_says_what_a_device_needs(undisturbed: Path) -> None:
    session = onnxruntime.InferenceSession(undisturbed / "data/models/finetune/model.onnx")
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape, image.type) == ("image", ["batch", 1, 8, 8], "tensor(float)")
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 10], "tensor(float)")
    assert json.loads(session.get_modelmeta().custom_metadata_map["weighin"]) == {
        "classes": list(CLASSES),
        "size": 8,
        "channels": 1,
        "mean": [0.0],
        "std": [1.0],
        "background": [255, 255, 255],
    }


def test_a_killed_run_ends_in_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    root = repository(tmp_path)
    process = subprocess.Popen(COMMAND, cwd=root, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not list((root / "data").glob("checkpoints/finetune-*.pt")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (root / "data/models").exists()
    done = subprocess.run(COMMAND, cwd=root, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resuming after epoch ")
    for name in (*RESULTS, *REPORTS):
        assert (root / "data" / name).read_bytes() == (undisturbed / "data" / name).read_bytes()
    assert list((root / "data/checkpoints").iterdir()) == []


def test_a_full_device_leaves_the_previous_model(tmp_path: Path) -> None:
    root = repository(tmp_path)
    old = root / "data/models/finetune/model.safetensors"
    files.write_bytes(old, b"old")
    done = subprocess.run(
        COMMAND,
        cwd=root,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: data/checkpoints/finetune-")
    assert sentence.endswith(".pt: File too large")
    assert old.read_bytes() == b"old"
    assert list((root / "data/checkpoints").iterdir()) == []


def test_nothing_is_trained_before_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository(tmp_path))
    Path("data/reports/validate.json").unlink()
    with pytest.raises(WeighinError, match=r"^data/reports/validate\.json is missing: "):
        finetune.main()
    assert not Path("data/models").exists()


@pytest.mark.parametrize("passed", [False, None, "true", 1])
def test_nothing_is_trained_on_data_that_did_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: Any
) -> None:
    monkeypatch.chdir(repository(tmp_path, passed=passed))
    with pytest.raises(StageError) as caught:
        finetune.main()
    says = "data/reports/validate.json says that the data did not pass: nothing is trained on it"
    assert str(caught.value) == says
    assert not Path("data/models").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("['0', '1',", "['0',", "data/prepared/train.parquet has the label '1', which classes in params.yaml does not"),
        ("source: none", "source: packaged", "finetune.weights packaged are those of tf_efficientnet_lite0, not mlp"),
        ("backbone: mlp", "backbone: mlq", "finetune.backbone 'mlq' is neither a timm model nor mlp"),
        ("freeze_stages: 0", "freeze_stages: 2", "finetune.freeze_stages 2 freezes everything"),
        ("learning_rate: 0.01", "learning_rate: 1.0e+30", "the loss became "),
    ],
)
def test_what_the_stage_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, says: str) -> None:
    monkeypatch.chdir(repository(tmp_path))
    yaml = YAML()
    yaml.default_flow_style = None
    content = yaml.load(Path("params.yaml").read_text())
    with Path("params.yaml").open("w") as file:
        yaml.dump(content, file)
    change(tmp_path, old, new)
    with pytest.raises(StageError) as caught:
        finetune.main()
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert not Path("data/models").exists()


def test_where_the_weights_came_from_is_recorded(tmp_path: Path) -> None:
    spec = Spec(backbone="mlp", classes=CLASSES, preprocessing=backbone.preprocessing("mlp", 8), weights={})
    path = tmp_path / "start.safetensors"
    backbone.save(backbone.create("mlp", 10, spec.preprocessing), spec, path, tmp_path / "start.json")
    everything = config.load(ROOT / "params.yaml")
    weights = config.Weights(source="file", path=str(path), sha256=files.sha256(path))
    params = everything.finetune.model_copy(update={"backbone": "mlp", "image_size": 8, "weights": weights})
    net, found = finetune.start(everything.model_copy(update={"finetune": params, "classes": CLASSES}))
    assert found.weights == {"source": "file", "path": str(path), "sha256": files.sha256(path)}
    start = safetensors.torch.load_file(path)
    assert all(torch.equal(tensor, start[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("stage", ["finetune", "prune"])
def test_zeros_of_a_compressed_network_stay_when_they_are_asked_to(tmp_path: Path, stage: str) -> None:
    root = repository(tmp_path)
    everything = config.load(root / "params.yaml")
    net, spec = finetune.start(everything)
    params = everything.finetune.model_copy(update={"weights": config.Weights(source="production", stage=stage)})
    with torch.no_grad():
        net.get_parameter("1.weight")[:64] = 0
        net.get_parameter("1.bias")[:64] = 0
        net.get_parameter("3.weight")[:, :64] = 0
        net.get_parameter("3.weight")[torch.rand(10, 128) < 0.3] = 0
        net.get_parameter("3.bias")[:] = 0  # that of the head is free
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    prepared = root / "data/prepared"
    metrics, _ = finetune.finetune(
        net, spec, params, prepared / "train.parquet", prepared / "val.parquet", tmp_path / "checkpoint.pt"
    )
    assert metrics["val_top1"] > 0.8
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[name])
        zeros = before[name] == 0
        if name == "3.bias":
            assert (parameter != 0).all()
        elif stage == "prune":
            assert torch.equal(parameter == 0, zeros)
    if stage == "finetune":
        assert int(net.get_parameter("3.weight").count_nonzero()) > int(before["3.weight"].count_nonzero())


def test_the_bench_of_memory_measures_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_bench("memory")
    monkeypatch.setattr(bench, "MEASURED", ("finetune",))
    (peak,) = bench.examine(32).values()
    assert 200 < peak < 2000
