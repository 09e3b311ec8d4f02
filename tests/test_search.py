"""The search through the command line: real trials of a small perceptron, a real Prefect server, real Dask workers."""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML
from workspace import BIN, RECIPE, WAIT_S, Workspace, checkout, shorten, wait_for

from flows import search
from flows.front import line
from tasks.budget import costs
from tasks.budget.costs import Operator
from tasks.core import config, files, paths
from tasks.core.errors import ParamsError, StageError

ROOT = Path(__file__).parents[1]
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
Found = dict[str, Any]


def table() -> costs.Table:
    """A device on which a perceptron's layers take what their widths say."""
    linear = [(read, made) for read in (512, 1024) for made in (16, 32, 64, 128)]
    linear += [(read, 10) for read in (16, 32, 64, 128)]
    layers = {(Operator("linear", 1, 1, 1, 1), *widths): 1e-3 + widths[0] * widths[1] * 1e-7 for widths in linear}
    return layers | {(Operator("frame", 1, 1, 28, 28), 1, 1): 9e-3}


def state(workspace: Workspace) -> dict[str, Any]:
    """What a search must not touch."""
    return {
        "params.yaml": (workspace.root / "params.yaml").read_bytes(),
        "index": workspace.git("ls-files", "--stage"),
        "tree": workspace.git("status", "--porcelain", "--", ":!dvc.lock"),
        "worktrees": workspace.git("worktree", "list"),
        "refs": workspace.git("for-each-ref"),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, api: str) -> tuple[Workspace, Found, Found]:
    """A workspace after a search of one trial, its state before, and what that search found."""
    root = tmp_path_factory.mktemp("workspace")
    checkout(root)
    subprocess.run([sys.executable, "data/recipes/mnist_5k.py"], cwd=root, check=True, capture_output=True)
    shorten(root / "data/raw/mnist-5k", root / "data/raw/mnist-5k", 1250)
    content = YAML(typ="safe").load(root / RECIPE)
    content["validate"] |= {"min_rows_per_class": 5, "max_class_imbalance": 5}
    content["quantize"] |= {"calibration_images": 64}
    content["finetune"]["training"]["epochs"] = 2
    content["prune"]["recovery"]["training"]["epochs"] = 1
    content["benchmark"] |= {"warmup": 0, "iterations": 10}
    YAML(typ="safe").dump(content, root / "params.yaml")
    costs.write(root / paths.DEVICE, table(), {"threads": 1})
    workspace = Workspace(root, api)
    before = state(workspace)
    return workspace, before, run_search(workspace, "--trials", "1")


def run_search(workspace: Workspace, *options: str) -> Found:
    found: Found = json.loads(workspace.output("weighin", "search", "--json", *options))
    return found


def trials(workspace: Workspace, name: str) -> list[optuna.trial.FrozenTrial]:
    """All trials of the study, also those that were cut off."""
    storage = f"sqlite:///{workspace.root / 'data/reports/search/studies.db'}"
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def at_work(workspace: Workspace) -> list[psutil.Process]:
    """The stages that run in a trial's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if Path(process.info["cwd"] or "/").is_relative_to(workspace.root / ".dvc/tmp"):
            found += [process] if "tasks.prune" in (process.info["cmdline"] or []) else []
    return found


def folders(workspace: Workspace) -> list[Path]:
    return list((workspace.root / ".dvc/tmp").glob("weighin.trial.*"))


def test_the_search_leaves_models_tables_and_a_picture(first: tuple[Workspace, Found, Found]) -> None:
    workspace, _, found = first
    folder = workspace.root / "data/reports/search"
    assert [row["trial"] for row in found["trials"]] == [0]
    for row in found["front"]:
        model = folder / found["study"] / f"{row['trial']}.onnx"
        assert model.stat().st_size == row["size_bytes"] <= row["compress"]["max_size_bytes"]
        assert row["latency_ms"] <= row["compress"]["max_latency_ms"]
        assert row["p50_ms"] > 0
    assert json.loads((folder / "front.json").read_text()) == found
    with (folder / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["size_bytes"]) for row in rows] == [row["size_bytes"] for row in found["front"]]
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")


def test_it_touches_nothing_else(first: tuple[Workspace, Found, Found]) -> None:
    workspace, before, _ = first
    assert state(workspace) == before
    assert folders(workspace) == []
    assert not (workspace.root / "data/models/prune").exists()


def test_a_line_of_the_table_brings_that_model_from_the_cache(first: tuple[Workspace, Found, Found]) -> None:
    workspace, _, found = first
    row, params = found["front"][0], workspace.root / "params.yaml"
    before = params.read_bytes()
    content = YAML(typ="safe").load(before) | YAML(typ="safe").load(line(row))
    del content["prune"]["channels"]
    YAML(typ="safe").dump(content, params)
    said = workspace.output("dvc", "repro", "--single-item", "prune", "quantize", "reduce")
    params.write_bytes(before)
    assert said.count("is cached - skipping run") == 3
    kept = workspace.root / "data/reports/search" / found["study"] / f"{row['trial']}.onnx"
    assert (workspace.root / paths.onnx("reduce")).read_bytes() == kept.read_bytes()


@contextmanager
def cluster(workspace: Workspace, folder: Path) -> Iterator[str]:
    """Two processes of Dask that run in the workspace; yields their scheduler's address."""
    script = folder / "cluster.py"
    script.write_text(CLUSTER)
    workers = subprocess.Popen(
        [sys.executable, str(script)], cwd=workspace.root, env=workspace.environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert workers.stdout is not None
    try:
        yield workers.stdout.readline().strip()
    finally:
        workers.communicate("", timeout=WAIT_S)


@contextmanager
def cut(workspace: Workspace, ending: signal.Signals) -> Iterator[subprocess.Popen[str]]:
    """A search that is ended while its trial is at work."""
    process = subprocess.Popen(
        [str(BIN / "weighin"), "search", "--trials", "1"], cwd=workspace.root, env=workspace.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: at_work(workspace), "the trial's start")
    process.send_signal(ending)
    yield process


def test_what_is_cut_off_is_tried_again_and_dask_goes_on_with_it(
    first: tuple[Workspace, Found, Found], tmp_path: Path
) -> None:
    workspace, before, found = first
    with cut(workspace, signal.SIGINT) as process:
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 128 + signal.SIGINT, errors
        assert "error: interrupted" in errors
        assert "Running stage 'quantize'" not in errors
        assert (at_work(workspace), folders(workspace)) == ([], [])
    (workspace.root / ".dvc/tmp/weighin.trial.killed/data").mkdir(parents=True)
    with cluster(workspace, tmp_path) as address:
        resumed = run_search(workspace, "--trials", "2", "--dask", address)
    assert resumed["study"] == found["study"]
    done, cut_off, *new = trials(workspace, found["study"])
    assert [one.state for one in (done, cut_off, *new)] == [
        TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE
    ]  # fmt: skip
    assert new[0].params == cut_off.params
    assert len({str(one.params) for one in (done, *new)}) == 3
    assert [row["trial"] for row in resumed["trials"]] == [0, 2, 3]
    assert resumed["trials"][0] == found["trials"][0]
    assert all(row["p50_ms"] > 0 for row in resumed["front"])
    assert state(workspace) == before
    assert folders(workspace) == []


def test_the_front_is_what_no_trial_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_json(paths.report("finetune"), {"val_top1": 0.9})
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"])
    rough = [(one * 7 % 5 * 1000 + 1000, one * 3 % 7 / 10, (one * 5 % 11 + one * 7 % 5) / 10) for one in range(60)]
    for values in rough:
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs={"compress": {}}))
    front = [(row["size_bytes"], row["latency_ms"], row["val_top1"]) for row in search.results(study)["front"]]

    def beaten(size: float, latency: float, top1: float) -> bool:
        return any(
            one != (size, latency, top1) and one[0] <= size and one[1] <= latency and one[2] >= top1 for one in rough
        )

    assert front == sorted({one for one in rough if not beaten(*one)})
    assert 1 < len(front) < len(set(rough))


def test_a_study_belongs_to_what_its_trials_depend_on(
    first: tuple[Workspace, Found, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, found = first
    monkeypatch.chdir(workspace.root)
    content = search.snapshot()
    assert search.identity(content) == found["study"]
    assert search.identity(content | {"tasks/gate.py": b""}) == found["study"]
    other = content["params.yaml"].replace(b"percentile: 99.999", b"percentile: 99.9")
    changes = {
        "tasks/prune.py": b"",
        "data/device.json": b"",
        "params.yaml": other,
        str(paths.weights("finetune")): b"",
    }
    names = {search.identity(content | {path: data}) for path, data in changes.items()}
    assert len(names | {found["study"]}) == 1 + len(changes)


def test_limits_are_rounded_up() -> None:
    assert search.round_up(14_756.2, "size_bytes") == 14_757
    assert search.round_up(0.0111111, "latency_ms") == 0.01112
    assert search.round_up(12.0, "latency_ms") == 12.0


def test_a_device_that_was_not_measured_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = config.load(ROOT / RECIPE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"data/device.json does not exist: `weighin profile`"):
        search.bounds(params, costs.read(paths.DEVICE, 1))
    costs.write(paths.DEVICE, {}, {"threads": 1})
    with pytest.raises(StageError, match="`weighin profile` measures what this backbone needs"):
        search.bounds(params, costs.read(paths.DEVICE, 1))
    costs.write(paths.DEVICE, table(), {"threads": 1})
    assert list(search.bounds(params, costs.read(paths.DEVICE, 1))) == ["size_bytes", "latency_ms"]


def test_dask_needs_a_server_that_all_can_reach_and_a_scheduler() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ParamsError, match="set PREFECT_API_URL"),
    ):
        search.over("tcp://127.0.0.1:1", "params.yaml", 1)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(ParamsError, match="no Dask scheduler answers at nowhere://1"),
    ):
        search.over("nowhere://1", "params.yaml", 1)
