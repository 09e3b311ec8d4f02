"""Training in several processes: as in one but for rounding, resumed when one is lost, ended with the stage."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import parallel
import psutil
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from pydantic import ValidationError
from test_finetune import COMMAND, ENVIRONMENT, change, repository
from torch import Tensor
from workspace import free_port

from tasks.core import config
from tasks.core.errors import StageError
from tasks.nets import processes, training

PATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))


def trained() -> dict[str, Tensor]:
    return safetensors.torch.load_file(parallel.RESULT)


def children() -> list[psutil.Process]:
    """The processes that train."""
    return [one for one in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What three processes come to: with two, sums are the same in any order."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        parallel.lay(root, devices=3, augment={"crop_scale": 1.0, "flip": 0.5})
        assert processes.run_together(parallel.train, 3)
        assert parallel.AFTER.read_text() == "trained\n"  # once
        return trained()


def test_one_device_is_this_process() -> None:
    assert not processes.run_together(parallel.lose, 1)


def test_two_processes_come_to_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A perceptron knows nothing of the other images in its batch: same sums."""
    monkeypatch.chdir(tmp_path)
    parallel.lay(tmp_path, devices=1, augment={"crop_scale": 1.0, "flip": 0.5})
    before = torch.get_num_threads()
    parallel.train()
    torch.set_num_threads(before)
    one = trained()
    parallel.CHECKPOINT.unlink()
    assert processes.run_together(parallel.train, 2)
    two = trained()
    assert (one.pop("threads").tolist(), two.pop("threads").tolist()) == ([2, 2], [1, 2])
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert one["history"][-1, -1] > 0.9


@pytest.mark.parametrize("balance", ["none", "sampler"])
def test_processes_share_the_batches_of_one(monkeypatch: pytest.MonkeyPatch, balance: str) -> None:
    class Train:
        def __init__(self) -> None:
            self.labels = [0] * 30 + [1] * 20

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise NotImplementedError

    params = config.Training.model_validate(parallel.VALUES | {"balance": balance, "batch_size": 12})
    whole = list(training.Batches(Train(), params))
    assert [len(batch) for batch in whole] == [12] * 4
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(list(training.Batches(Train(), params)))
    together = [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in whole]
    assert {len(batch) for part in parts for batch in part} == {4}


def test_a_lost_process_costs_an_epoch_and_no_byte(
    undisturbed: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parallel.lay(tmp_path, devices=3, augment={"crop_scale": 1.0, "flip": 0.5})

    def kill() -> None:
        while not parallel.CHECKPOINT.exists():
            time.sleep(0.001)
        sorted(children(), key=psutil.Process.create_time)[0].kill()  # the one that writes

    killer = Thread(target=kill)
    killer.start()
    assert processes.run_together(parallel.train, 3)
    killer.join()
    said = capfd.readouterr().out
    assert "training has lost a process: all begin again after the last epoch" in said
    assert said.count("resuming after epoch ") == 1
    found = trained()
    assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)
    assert parallel.AFTER.read_text() == "trained\n"


@pytest.mark.parametrize(
    ("main", "kind", "told"),
    [
        (parallel.lose, StageError, "training has lost one of its 2 processes 3 times"),
        (parallel.refuse, StageError, "^cat/1.png is damaged$"),
        (parallel.fail, RuntimeError, "KeyError: 'bug'"),
    ],
    ids=["lost", "refused", "bug"],
)
def test_what_cannot_go_on_says_why(
    main: Callable[[], None], kind: type[Exception], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind, match=told):
        processes.run_together(main, 2)
    assert not children()
    assert capfd.readouterr().out.count("all begin again") == (2 if main is parallel.lose else 0)


def test_processes_may_have_others_that_prepare_their_batches(
    undisturbed: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parallel.lay(tmp_path, devices=3, augment={"crop_scale": 1.0, "flip": 0.5})
    assert processes.run_together(parallel.train_with_workers, 3)
    assert all(torch.equal(trained()[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize("differ", ["epochs", "zeros"])
def test_processes_that_begin_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch, differ: str) -> None:
    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    other = torch.nn.Linear(2, 2)
    if differ == "zeros":
        other.weight.data[0] = 0
    told: list[tuple[float, ...]] = []

    def listen(*numbers: float) -> list[float]:
        told.append(numbers)
        return [2 * one for one in numbers]

    monkeypatch.setattr(processes, "sum_over_processes", listen)
    processes.require_agreement(other, 4 if differ == "epochs" else 3)
    others = iter(told)
    monkeypatch.setattr(
        processes, "sum_over_processes", lambda *numbers: [a + b for a, b in zip(numbers, next(others), strict=True)]
    )
    with pytest.raises(StageError, match=r"disagree on which (epochs are done|weights are zero)"):
        processes.require_agreement(net, 3)


def test_torchrun_may_start_the_processes(
    undisturbed: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parallel.lay(tmp_path, devices=3, augment={"crop_scale": 1.0, "flip": 0.5})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, str(ROOT / "tests/parallel.py"), "3"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(trained()[name], undisturbed[name]) for name in undisturbed)
    assert done.stdout.count("epoch 1/6") == 1


def test_torchrun_and_the_parameters_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    try:
        with pytest.raises(StageError, match=r"^training\.devices is 4, but the world of torchrun has 1$"):
            processes.run_together(parallel.train, 4)
    finally:
        torch.distributed.destroy_process_group()


def test_processes_end_with_their_stage(tmp_path: Path) -> None:
    root = repository(tmp_path)
    change(root, "threads: 2", "threads: 2\n    devices: 2")
    process = subprocess.Popen(COMMAND, cwd=root, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not list((root / "data").glob("checkpoints/finetune-*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(started, timeout=10)
    assert left == []


def test_the_bench_runs_the_stage_with_one_and_two(tmp_path: Path) -> None:
    root = repository(tmp_path)
    command = [sys.executable, str(ROOT / "tests/bench/processes.py"), "--seeds", "1", "--rounds", "1"]
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("finetune: val top-1 9") == 2
    found = json.loads((root / "data/reports/bench/processes.json").read_text())
    assert all(row["val_top1"] > 0.9 for (row,) in found["devices"].values())
    assert set(found["images_per_s_by_parts"]) == {"1", "2", "4"}


@pytest.mark.parametrize(("devices", "batch_size"), [(0, 18), (4, 18), (2, 2), (32, 32)])
def test_each_process_has_at_least_two_images_of_a_batch(devices: int, batch_size: int) -> None:
    with pytest.raises(ValidationError, match="devices"):
        config.Training.model_validate(parallel.VALUES | {"devices": devices, "batch_size": batch_size})
