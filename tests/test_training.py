"""training: the loop that fine-tuning and recovery share, on scikit-learn's digits."""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tasks.core import config, files
from tasks.core.errors import StageError
from tasks.nets import backbone, distillation, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export

CLASSES = tuple("0123456789")
SMALL = "test_efficientnet"  # convolutions, BatchNorm and 100,000 parameters
VALUES = {
    "epochs": 4,
    "batch_size": 32,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "schedule": "one-cycle",
    "label_smoothing": 0.1,
    "augment": {"crop_scale": 0.8, "flip": 0.5, "erase": 0.2},
    "seed": 0,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.parquet` with 300 digits and `val.parquet` with 200 others."""
    root, data = tmp_path_factory.mktemp("digits"), load_digits()
    for name, rows in (("train", slice(0, 300)), ("val", slice(300, 500))):
        images = []
        for pixels in data.images[rows]:
            stream = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).save(stream, "PNG")
            images.append(stream.getvalue())
        pq.write_table(pa.table({"image": images, "label": data.target[rows].astype(str)}), root / f"{name}.parquet")
    return root


def parameters(**changes: Any) -> config.Training:
    return config.Training.model_validate(VALUES | changes)


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return backbone.create(name, 10, backbone.preprocessing(name, 32 if name == SMALL else 8))


def fit(
    digits: Path,
    checkpoint: Path,
    params: config.Training,
    name: str = "mlp",
    after_step: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    preprocessing = backbone.preprocessing(name, 32 if name == SMALL else 8)
    train = training.Images(digits / "train.parquet", preprocessing, CLASSES, params.augment)
    val = training.Images(digits / "val.parquet", preprocessing, CLASSES)
    if name == SMALL:  # fewer, for it is slower
        train.images, train.labels, val.images = train.images[:70], train.labels[:70], val.images[:30]
    net = create(name)
    loss = training.cross_entropy(params.label_smoothing)
    hook = (lambda: after_step(net)) if after_step else None
    history = training.fit(net, train, val, loss, params, checkpoint=checkpoint, after_step=hook)
    return net, history


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def interruption(step: int) -> Callable[[nn.Module], None]:
    """What stops a run in the middle of an epoch, after so many steps."""
    steps = iter(range(step))

    def stop(_net: nn.Module) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    return stop


def test_training_learns(digits: Path, tmp_path: Path) -> None:
    net, history = fit(digits, tmp_path / "checkpoint.pt", parameters(epochs=8, augment={"crop_scale": 1, "flip": 0}))
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["val_top1"] > 0.85
    assert not same(net, create("mlp"))


def test_no_epochs_leave_the_network_as_it_is(digits: Path, tmp_path: Path) -> None:
    net, history = fit(digits, tmp_path / "checkpoint.pt", parameters(epochs=0))
    assert history == []
    assert same(net, create("mlp"))
    assert not (tmp_path / "checkpoint.pt").exists()


RUNS: dict[str, dict[str, Any]] = {
    "adamw, one-cycle": {},
    "adamw, cosine": {"schedule": "cosine"},
    "sgd, one-cycle": {"optimizer": "sgd"},
    "sgd, cosine": {"optimizer": "sgd", "schedule": "cosine"},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    params = parameters(epochs=3, **changes)
    net, history = fit(digits, tmp_path / "undisturbed.pt", params, SMALL)
    assert same(net, fit(digits, tmp_path / "again.pt", params, SMALL)[0])
    assert not same(net, create(SMALL))
    with pytest.raises(KeyboardInterrupt):  # in the last epoch, after one of its two steps
        fit(digits, tmp_path / "interrupted.pt", params, SMALL, interruption(5))
    resumed, whole_history = fit(digits, tmp_path / "interrupted.pt", params, SMALL)
    assert same(net, resumed)
    assert whole_history == history


def test_a_resumed_run_trains_the_missing_epochs_only(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(digits, tmp_path / "checkpoint.pt", parameters(), after_step=interruption(3 * 9))
    steps: list[None] = []
    fit(digits, tmp_path / "checkpoint.pt", parameters(), after_step=lambda _net: steps.append(None))
    assert f"resuming after epoch 3 from {tmp_path}/checkpoint.pt" in capsys.readouterr().out
    assert len(steps) == 9


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.02}, {"weight_decay": 1}, {"optimizer": "sgd"}])
def test_every_parameter_counts(digits: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    net, _ = fit(digits, tmp_path / "one.pt", parameters(epochs=1))
    other, _ = fit(digits, tmp_path / "two.pt", parameters(epochs=1, **change))
    assert not same(net, other)


def test_the_schedule_rises_to_the_learning_rate_and_falls(digits: Path, tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {}
    for schedule in ("one-cycle", "cosine"):
        for _ in range(1, 5):  # interrupted after each epoch, and resumed
            with pytest.raises(KeyboardInterrupt):
                fit(digits, tmp_path / schedule, parameters(epochs=5, schedule=schedule), after_step=interruption(9))
            saved = torch.load(tmp_path / schedule, weights_only=True)
            rates.setdefault(schedule, []).append(saved["optimizer"]["param_groups"][0]["lr"])
    for falling in rates.values():
        assert falling == sorted(falling, reverse=True)
        assert 0.008 < falling[0] <= 0.01
        assert falling[-1] < 0.002


def test_biases_and_normalisation_do_not_decay(digits: Path, tmp_path: Path) -> None:
    fit(digits, tmp_path / "checkpoint.pt", parameters(epochs=1, weight_decay=0.3), SMALL)
    groups = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    shapes = [parameter.ndim for parameter in create(SMALL).parameters()]
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.3, sum(ndim > 1 for ndim in shapes)),
        (0.0, sum(ndim <= 1 for ndim in shapes)),
    ]


def test_training_stops_when_it_gets_no_better(digits: Path, tmp_path: Path) -> None:
    params = parameters(epochs=20, learning_rate=1e-12, patience=3)
    net, history = fit(digits, tmp_path / "checkpoint.pt", params)
    assert len(history) == 4
    resumed, again = fit(digits, tmp_path / "checkpoint.pt", params)
    assert again == history
    assert same(net, resumed)


def test_the_best_epoch_is_kept(digits: Path, tmp_path: Path) -> None:
    """The learning rate rises to where training falls apart."""
    last: dict[str, Tensor] = {}
    params = parameters(epochs=4, optimizer="sgd", learning_rate=1.5, weight_decay=0.5, schedule="cosine")
    val = training.Images(digits / "val.parquet", backbone.preprocessing("mlp", 8), CLASSES)

    def remember(net: nn.Module) -> None:
        last.update({name: tensor.clone() for name, tensor in net.state_dict().items()})

    net, history = fit(digits, tmp_path / "checkpoint.pt", params, after_step=remember)
    best = max(history, key=lambda row: row["val_top1"])  # the first of equals
    assert best is not history[-1]
    assert training.evaluate(net, val) == (best["val_top1"], best["val_loss"])
    net.load_state_dict(last)
    assert training.evaluate(net, val) == (history[-1]["val_top1"], history[-1]["val_loss"])


def test_of_equal_epochs_the_first_is_kept(digits: Path, tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []

    def remember(net: nn.Module) -> None:
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})

    net, history = fit(digits, tmp_path / "checkpoint.pt", parameters(learning_rate=1e-6), after_step=remember)
    assert len({row["val_top1"] for row in history}) == 1
    kept = net.state_dict()
    for step, state in enumerate(states, start=1):
        assert all(torch.equal(state[name], kept[name]) for name in kept) == (step == 9)  # the first epoch's last


def test_every_epoch_has_an_order_of_its_own(digits: Path, tmp_path: Path) -> None:
    train = training.Images(digits / "train.parquet", backbone.preprocessing("mlp", 8), CLASSES)
    seen: list[bytes] = []

    def loss(_images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.numpy().tobytes())
        return nn.functional.cross_entropy(logits, labels)

    training.fit(create("mlp"), train, train, loss, parameters(epochs=3), checkpoint=tmp_path / "checkpoint.pt")
    assert len(seen) == 3 * 9
    assert len({seen[0], seen[9], seen[18]}) == 3


@pytest.mark.parametrize("balance", ["none", "sampler"])
def test_processes_that_prepare_batches_change_no_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: str
) -> None:
    def with_dropout(name: str, create: Callable[[str], nn.Module] = create) -> nn.Module:
        net = create(name)
        net.drop_rate = 0.3  # type: ignore[assignment]  # drawn in this process
        return net

    monkeypatch.setitem(globals(), "create", with_dropout)
    found = []
    for workers in (0, 2):
        monkeypatch.setattr(training, "_workers", lambda _, workers=workers: workers)
        found.append(fit(digits, tmp_path / f"{workers}.pt", parameters(epochs=2, balance=balance), SMALL))
    (net, history), (other, again) = found
    assert history == again
    assert same(net, other)


def test_bf16_is_another_arithmetic(digits: Path, tmp_path: Path) -> None:
    exact, (expected,) = fit(digits, tmp_path / "fp32.pt", parameters(epochs=1))
    rounded, (row,) = fit(digits, tmp_path / "bf16.pt", parameters(epochs=1, bf16=True))
    assert not same(exact, rounded)
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
    assert {tensor.dtype for tensor in rounded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite(digits: Path, tmp_path: Path, value: float) -> None:
    train = training.Images(digits / "train.parquet", backbone.preprocessing("mlp", 8), CLASSES)

    def loss(_images: Tensor, logits: Tensor, _labels: Tensor) -> Tensor:
        return logits.sum() * 0 + value

    with pytest.raises(StageError) as caught:
        training.fit(create("mlp"), train, train, loss, parameters(), checkpoint=tmp_path / "checkpoint.pt")
    assert str(caught.value) == f"the loss became {value} in epoch 1: lower learning_rate in params.yaml"
    assert not (tmp_path / "checkpoint.pt").exists()


def test_top1_and_loss_against_numpy(digits: Path) -> None:
    net, val = create("mlp"), training.Images(digits / "val.parquet", backbone.preprocessing("mlp", 8), CLASSES)
    data = load_digits()
    inputs = (data.images[300:500] * 15).astype(np.uint8).reshape(200, 64) / 255
    state = {name: tensor.numpy().astype(np.float64) for name, tensor in net.state_dict().items()}
    hidden = np.maximum(inputs @ state["1.weight"].T + state["1.bias"], 0)
    logits = hidden @ state["3.weight"].T + state["3.bias"]
    labels = data.target[300:500]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(200), labels]
    top1, loss = training.evaluate(net, val)
    assert top1 == np.mean(logits.argmax(1) == labels)
    assert loss == pytest.approx(losses.mean(), rel=1e-5)


def test_images_are_augmented_in_training_only(digits: Path) -> None:
    preprocessing = backbone.preprocessing("mlp", 8)
    plain = training.Images(digits / "train.parquet", preprocessing, CLASSES)
    assert torch.equal(plain[0][0], plain[0][0])
    augmented = training.Images(digits / "train.parquet", preprocessing, CLASSES, parameters().augment)
    assert len({augmented[0][0].numpy().tobytes() for _ in range(10)}) > 5
    flipped = parameters(augment={"crop_scale": 1.0, "flip": 1.0}).augment
    mirrored = training.Images(digits / "train.parquet", preprocessing, CLASSES, flipped)
    assert torch.equal(mirrored[0][0], plain[0][0].flip(2))
    assert mirrored[0][1] == plain[0][1]
    wide = io.BytesIO()
    Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16)).save(wide, "PNG")
    plain.images = mirrored.images = [wide.getvalue()]
    assert torch.equal(mirrored[0][0], plain[0][0].flip(2))
    cropped = parameters(augment={"crop_scale": 0.5, "flip": 0.0}).augment
    part = training.Images(digits / "train.parquet", preprocessing, CLASSES, cropped)
    assert (part[0][0].shape, part[0][0].dtype, part[0][1]) == ((1, 8, 8), torch.float32, plain[0][1])
    erased = parameters(augment={"crop_scale": 1.0, "flip": 0.0, "erase": 1.0}).augment
    torch.manual_seed(0)
    holed = training.Images(digits / "train.parquet", preprocessing, CLASSES, erased)
    holed.images = [wide.getvalue()]
    assert not torch.equal(holed[0][0], plain[0][0])


class Malicious:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle", "text", "nothing"])
def test_a_checkpoint_runs_no_code(digits: Path, tmp_path: Path, form: str) -> None:
    path, created_by_code = tmp_path / "checkpoint.pt", tmp_path / "created"
    if form == "torch":
        torch.save({"net": Malicious(created_by_code)}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(created_by_code), protocol=2))
    else:
        path.write_bytes(b"words" if form == "text" else b"")
    with pytest.raises(StageError) as caught:
        fit(digits, path, parameters())
    assert str(caught.value) == f"{path} is not a checkpoint of this training run: delete it to start afresh"
    assert not created_by_code.exists()


def test_another_run_has_another_checkpoint(digits: Path) -> None:
    spec = Spec(backbone="mlp", classes=CLASSES, preprocessing=backbone.preprocessing("mlp", 8), weights={})
    train, val = digits / "train.parquet", digits / "val.parquet"

    def path(*inputs: Path, stage: str = "finetune", params: config.Training | None = None, of: Spec = spec) -> Path:
        return training.checkpoint_path(stage, *inputs, described_by=(params or parameters(), of))

    assert path(train, val) == path(train, val)
    reordered = spec.model_copy(update={"classes": CLASSES[::-1]})
    other_start = spec.model_copy(update={"weights": {"version": "v2"}})
    paths = [path(train, val), path(val, train), path(train), path(train, val, stage="prune")]
    paths += [path(train, val, params=parameters(seed=1))]
    paths += [path(train, val, of=reordered), path(train, val, of=other_start)]
    assert len(set(paths)) == len(paths)


def test_checkpoints_are_forgotten_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/checkpoints").mkdir(parents=True)
    for name in ("finetune-1.pt", "finetune-2.pt", "prune-1.pt"):
        (tmp_path / "data/checkpoints" / name).touch()
    files.forget("finetune")
    assert [path.name for path in (tmp_path / "data/checkpoints").iterdir()] == ["prune-1.pt"]


def test_the_history_is_a_table(tmp_path: Path) -> None:
    row = {"epoch": 1, "train_loss": 0.123456789, "val_loss": 2.0, "val_top1": 0.5}
    training.write_history(tmp_path / "history.csv", [row, row | {"epoch": 2}])
    assert (tmp_path / "history.csv").read_text().splitlines() == [
        "epoch,train_loss,val_loss,val_top1",
        "1,0.123457,2,0.5",
        "2,0.123457,2,0.5",
    ]
    training.write_history(tmp_path / "history.csv", [])
    assert (tmp_path / "history.csv").read_text() == "epoch,train_loss,val_loss,val_top1\n"


def rare(split: training.Images, number: int, kept: int) -> training.Images:
    """The split with so few images of one class."""
    rows = [row for row, label in enumerate(split.labels) if label != number]
    rows += [row for row, label in enumerate(split.labels) if label == number][:kept]
    split.images, split.labels = [split.images[row] for row in rows], [split.labels[row] for row in rows]
    return split


def recall(net: nn.Module, split: training.Images, number: int) -> float:
    images = torch.stack([split[row][0] for row, label in enumerate(split.labels) if label == number])
    return float((net.eval()(images).argmax(1) == number).float().mean())


@pytest.mark.parametrize("how", ["fine-tuning", "recovery"])
@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_a_rare_class_is_answered_more_often_where_classes_are_balanced(
    digits: Path, tmp_path: Path, balance: str, how: str
) -> None:
    preprocessing = backbone.preprocessing("mlp", 8)
    val = training.Images(digits / "val.parquet", preprocessing, CLASSES)
    teacher, _ = fit(digits, tmp_path / "teacher.pt", parameters(epochs=8))
    found = {}
    for kind in ("none", balance):
        params = parameters(epochs=8, learning_rate=0.003, balance=kind, augment={"crop_scale": 1, "flip": 0})
        train, net = rare(training.Images(digits / "train.parquet", preprocessing, CLASSES), 3, 6), create("mlp")
        if how == "recovery":
            recovery = config.Recovery(temperature=2.0, teacher_share=0.5, training=params)
            distillation.distill(net, teacher, recovery, train, val, checkpoint=tmp_path / f"{kind}.pt")
        else:
            loss = training.cross_entropy(0.0, training.class_weights(params, train.labels))
            training.fit(net, train, val, loss, params, checkpoint=tmp_path / f"{kind}.pt")
        found[kind] = recall(net, val, 3)
    assert found[balance] > found["none"] + 0.2, found


def test_each_class_counts_as_much_as_any_other() -> None:
    weights = training.class_weights(parameters(balance="loss"), [0, 0, 0, 1])
    assert weights is not None
    assert weights.tolist() == pytest.approx([2 / 3, 2.0])
    assert training.class_weights(parameters(balance="sampler"), [0, 1]) is None


def test_a_weighed_distance_is_that_of_repeated_images() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    rows = torch.tensor([0, 1, 1, 2, 2, 2])
    repeated = distillation.distance(student[rows], teacher[rows], 3.0)
    assert torch.allclose(distillation.distance(student, teacher, 3.0, torch.tensor([1.0, 2.0, 3.0])), repeated)


def test_a_network_that_pytorch_cannot_export_is_one_sentence(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] if images.sum() > 0 else -images.flatten(1)[:, :2]

    spec = Spec(backbone="mine", classes=("a", "b"), preprocessing=backbone.preprocessing("mlp", 8), weights={})
    with pytest.raises(StageError, match=r"^torch\.onnx cannot export mine: \S.*") as error:
        export(Choosing(), spec, tmp_path / "model.onnx")
    assert str(error.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_the_bench_of_loaders_compares_with_a_bare_loop(tmp_path: Path) -> None:
    report = tmp_path / "loaders.json"
    options = ["--side", "32", "--network", "mlp", "--images", "256", "--rounds", "1", "--report", str(report)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/bench/loaders.py"), *options], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    (row,) = json.loads(report.read_text())["images_per_s"].values()
    assert set(row) == {"weighin", "bare"}
    assert all(speed > 0 for (speed,) in row.values())
