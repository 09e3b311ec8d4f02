"""The whole job through the command line: a real repository, real DVC stages, a real Prefect server."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ruamel.yaml import YAML
from workspace import (
    BIN,
    FAILED,
    PROMOTED,
    RECIPE,
    REFUSED,
    USAGE,
    WAIT_S,
    Workspace,
    checkout,
    free_port,
    shorten,
    wait_for,
)

from flows.retrain import find_exceeded
from tasks import STAGES
from tasks.core import config, shares


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, api: str) -> tuple[Workspace, dict[str, Any]]:
    """A workspace after the first run of the digits recipe, and what that run said."""
    root = tmp_path_factory.mktemp("workspace")
    checkout(root)
    subprocess.run([sys.executable, "data/recipes/mnist_5k.py"], cwd=root, check=True, capture_output=True)
    workspace = Workspace(root, api)
    return workspace, workspace.run("--params", RECIPE)


@pytest.fixture
def workspace(first: tuple[Workspace, dict[str, Any]]) -> Iterator[Workspace]:
    """The workspace as the first run left it, and so again afterwards."""
    used, _ = first
    tags = set(used.git("tag").split())
    tip = used.git("rev-parse", "registry")
    kept = {name: (used.root / name).read_bytes() for name in ("dvc.lock", "data/splits/ledger.parquet")}
    results = used.results()
    yield used
    shutil.copy(used.root / RECIPE, used.root / "params.yaml")
    for name, content in kept.items():
        (used.root / name).write_bytes(content)
    if used.results() != results:
        used.output("dvc", "checkout", "--force", "--quiet")
    used.git("update-ref", "refs/heads/registry", tip)
    (used.root / ".git/logs/refs/heads/registry").unlink(missing_ok=True)  # else the audit finds that it was moved back
    for tag in set(used.git("tag").split()) - tags:
        used.git("tag", "-d", tag)


def test_the_first_run_promotes_and_leaves_everything_a_user_looks_for(first: tuple[Workspace, dict[str, Any]]) -> None:
    workspace, decision = first
    assert decision["outcome"] == "promoted"
    assert decision["version"] == "v0.1.0"
    assert decision["recorded"] is True
    assert list(decision["stages"]) == ["finetune", "prune", "quantize", "reduce"]
    assert set(workspace.states()) == {*STAGES, "splits", "accept data", "champion", "decide"}
    assert workspace.ran() == list(STAGES)
    keys = {artifact["key"] for artifact in workspace.post("artifacts/filter")}
    assert keys == {"data-verdict", "stages", "gate"}
    assert workspace.git("status", "--porcelain").splitlines() == [
        "M deploy/trusted_keys",
        " M params.yaml",
        "?? dvc.lock",
    ]
    final = hashlib.sha256((workspace.root / "data/models/reduce/model.onnx").read_bytes()).hexdigest()
    assert decision["model_sha256"] == final == decision["stages"]["reduce"]["sha256"]


def test_dvc_and_gto_work_as_their_users_know_them(first: tuple[Workspace, dict[str, Any]], tmp_path: Path) -> None:
    workspace, _ = first
    assert all(name in workspace.output("dvc", "dag") for name in STAGES)
    assert "reduce.top1" in workspace.output("dvc", "metrics", "show")
    assert workspace.call("dvc", "metrics", "diff").returncode == 0
    assert (workspace.root / "dvc_plots").exists() is False
    workspace.output("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    assert "top1-by-epoch" in (tmp_path / "plots" / "index.html").read_text()
    assert "mlp-digits" in workspace.output("gto", "show")
    target = tmp_path / "model.onnx"
    workspace.output(
        "dvc", "get", ".", "data/models/reduce/model.onnx", "--rev", "mlp-digits@v0.1.0", "--out", str(target)
    )
    assert target.read_bytes() == (workspace.root / "data/models/reduce/model.onnx").read_bytes()


def test_an_unchanged_run_skips_every_stage_and_decides_nothing(workspace: Workspace) -> None:
    tip, before = workspace.git("rev-parse", "registry"), workspace.results()
    decision = workspace.run()
    assert (decision["recorded"], decision["outcome"]) == (False, "promoted")
    assert workspace.ran() == []
    assert workspace.git("rev-parse", "registry") == tip
    assert workspace.results() == before


def test_a_tighter_gate_runs_the_gate_alone_and_refuses(workspace: Workspace) -> None:
    workspace.change(gate={"max_size_bytes": 1000})
    decision = workspace.run(status=REFUSED)
    assert workspace.ran() == ["gate"]
    assert (decision["outcome"], decision["failed"], decision["version"]) == ("refused", ["size_bytes"], None)
    status = json.loads(workspace.output("weighin", "status", "--json"))
    assert status["production"]["version"] == "v0.1.0"
    assert status["latest"]["outcome"] == "refused"
    text = workspace.output("weighin", "status")
    assert "mlp-digits v0.1.0" in text
    assert "size_bytes" in text
    assert workspace.run(status=REFUSED)["recorded"] is False


def test_the_record_is_audited_explained_and_made_again(workspace: Workspace) -> None:
    assert "everything holds: 1 decision, " in workspace.output("weighin", "audit", "--all")
    explained = workspace.output("weighin", "gate", "--explain")
    assert "ok champion: bootstrap" in explained
    assert "must be >= 0.9" in explained
    assert "data/raw/mnist-5k/train-images-idx3-ubyte" in workspace.output("weighin", "lineage", "v0.1.0")
    seen = workspace.output("weighin", "lineage", "--json", "data/raw/mnist-5k/train-images-idx3-ubyte")
    assert [row["decision"] for row in json.loads(seen)] == ["mlp-digits@v0.1.0"]
    threads = json.loads((workspace.root / "data/reports/finetune.json").read_text())["threads"]
    done = workspace.call("weighin", "reproduce", "v0.1.0", "--json", OMP_NUM_THREADS=str(threads + 1))
    assert done.returncode == 0, done.stderr  # with the threads that it was made with
    again = json.loads(done.stdout)
    assert again["holds"] is True
    assert len(again["artifacts"]) == 27
    assert all(one["same"] for one in again["artifacts"])
    assert len(workspace.git("worktree", "list").splitlines()) == 1


def test_what_a_version_was_made_of_has_to_be_there_to_make_it_again(workspace: Workspace) -> None:
    labels = workspace.root / "data/raw/mnist-5k/train-labels-idx1-ubyte"
    before = labels.read_bytes()
    labels.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    done = workspace.call("weighin", "reproduce", "v0.1.0")
    labels.write_bytes(before)
    assert done.returncode == FAILED
    assert f"{labels.relative_to(workspace.root)} is not what the version was made of" in done.stderr
    assert "there is no version" in workspace.call("weighin", "audit", "v0.9.0").stderr
    assert "has no version mlp-digits@v0.9.0" in workspace.call("weighin", "reproduce", "v0.9.0").stderr


def test_a_verdict_written_by_hand_promotes_nothing(workspace: Workspace) -> None:
    workspace.change(gate={"max_size_bytes": 1000})
    workspace.run(status=REFUSED)
    path = workspace.root / "data/reports/gate.json"
    verdict = json.loads(path.read_text())
    for check in verdict["checks"]:
        check["passed"] = True
    path.unlink()
    path.write_text(json.dumps(verdict | {"passed": True}))
    workspace.output("dvc", "commit", "--force", "--quiet", "gate")
    tip = workspace.git("rev-parse", "registry")
    assert workspace.sentence().startswith("data/reports/gate.json is not what its evidence comes to")
    assert workspace.git("rev-parse", "registry") == tip


def test_another_pruning_parameter_leaves_the_stages_before_it_alone(workspace: Workspace) -> None:
    workspace.change(
        prune={"weights": {"threshold": 0.04}, "recovery": None}, gate={"min_top1": 0.5, "max_top1_drop": 0.5}
    )
    workspace.change(gate={"champion": {"margin": 0.9}, "slices": {"label": {"min_top1": 0.1}}})
    decision = workspace.run()
    assert workspace.ran() == ["prune", "quantize", "reduce", "benchmark", "gate"]
    assert (decision["version"], decision["replaces"]) == ("v0.2.0", "v0.1.0")


def test_lost_results_come_back_from_the_cache(workspace: Workspace) -> None:
    before = workspace.results()
    shutil.rmtree(workspace.root / "data/models")
    workspace.run()
    assert workspace.ran() == []
    assert workspace.results() == before


def test_the_table_ends_with_the_verdict_in_one_line_each(workspace: Workspace) -> None:
    done = workspace.call("weighin", "run")
    lines = done.stdout.strip().splitlines()
    assert lines[-2].startswith("gate: makes weight")
    assert lines[-1] == "decision: promoted mlp-digits v0.1.0 (nothing changed since that decision)"
    assert all(any(name in line for line in lines) for name in ("finetune", "prune", "quantize", "reduce"))


def test_it_runs_without_a_server(workspace: Workspace) -> None:
    done = workspace.call("weighin", "run", "--json", PREFECT_API_URL="")
    assert done.returncode == PROMOTED, done.stderr
    assert json.loads(done.stdout)["recorded"] is False


def test_it_runs_in_a_clone_that_is_shallow_detached_and_nameless(workspace: Workspace, tmp_path: Path) -> None:
    root, source = tmp_path / "clone", f"file://{workspace.root}"
    nobody = {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "clone", "-q", "--no-tags", "--depth", "1", source, root], check=True)
    clone = Workspace(root, workspace.api)
    clone.output("dvc", "cache", "dir", "--local", str(workspace.root / ".dvc/cache"))
    shutil.copytree(workspace.root / "data/raw/mnist-5k", root / "data/raw/mnist-5k")
    shutil.copy(workspace.root / "dvc.lock", root / "dvc.lock")
    clone.git("update-ref", "-d", "refs/remotes/origin/registry")
    clone.git("checkout", "-q", "--detach")
    head = clone.git("rev-parse", "HEAD")
    done = clone.call("weighin", "run", "--json", "--params", RECIPE, **nobody)
    assert done.returncode == PROMOTED, done.stdout + done.stderr
    assert json.loads(done.stdout)["recorded"] is True
    assert clone.ran() == []
    assert clone.git("rev-parse", "HEAD") == head


def test_a_recipe_may_be_edited_and_run_again(workspace: Workspace, tmp_path: Path) -> None:
    mine, text = tmp_path / "mine.yaml", (workspace.root / RECIPE).read_text()
    mine.write_text(text + "# mine\n")
    workspace.run("--params", str(mine))
    mine.write_text(text.replace("max_size_bytes: 60000", "max_size_bytes: 59999"))
    assert workspace.run("--params", str(mine))["failed"] == []
    assert workspace.ran() == ["gate"]


def test_a_server_that_does_not_answer_is_one_sentence(workspace: Workspace) -> None:
    done = workspace.call("weighin", "run", PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")
    assert done.returncode == FAILED
    assert done.stderr.splitlines()[-1].startswith("error: no Prefect server answers at http://127.0.0.1")
    assert "Traceback" not in done.stderr


def test_bad_parameters_end_with_status_2_before_anything_runs(workspace: Workspace) -> None:
    before = workspace.results()
    text = (workspace.root / "params.yaml").read_text()
    (workspace.root / "params.yaml").write_text(text.replace("min_top1", "min_topl", 1))
    assert workspace.sentence(USAGE).startswith("params.yaml: gate.min_topl is not a parameter; did you mean min_top1?")
    assert workspace.call("weighin", "run", "--params", "nowhere.yaml").returncode == USAGE
    assert workspace.call("weighin", "run", "--nonsense").returncode == USAGE
    assert workspace.results() == before


def test_a_recipe_does_not_take_the_place_of_changes_that_exist_nowhere_else(workspace: Workspace) -> None:
    workspace.change(gate={"min_top1": 0.91})
    mine = (workspace.root / "params.yaml").read_bytes()
    done = workspace.call("weighin", "run", "--params", "data/recipes/mlp-fashion.yaml")
    assert done.returncode == USAGE
    assert "params.yaml has changes that are not committed" in done.stderr
    assert (workspace.root / "params.yaml").read_bytes() == mine


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ingest": {"path": "data/raw/nowhere"}}, "data/raw/nowhere does not exist"),
        ({"finetune": {"backbone": "tf_efficientnet_lite9"}}, "is neither a timm model nor"),
        ({"validate": {"min_rows_per_class": 100000}}, "validate: "),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_last_results(
    workspace: Workspace, changes: dict[str, Any], sentence: str
) -> None:
    before, tip = workspace.results(), workspace.git("rev-parse", "registry")
    workspace.change(**changes)
    assert sentence in workspace.sentence()
    after = {
        path: sha256 for path, sha256 in workspace.results().items() if "validate" not in changes or "models" in path
    }
    assert after.items() <= before.items()
    assert len(after) == len(before) or "validate" in changes
    assert workspace.git("rev-parse", "registry") == tip


def test_what_dvc_would_wait_for_or_pass_over_is_refused(workspace: Workspace) -> None:
    source = workspace.root / "data/raw/mnist-5k"
    os.mkfifo(source / "pipe")
    assert workspace.sentence() == "data/raw/mnist-5k/pipe is a FIFO, not a file: remove it from the source"
    (source / "pipe").unlink()
    (source / "a.notes").write_text("not for DVC")
    before = (workspace.root / ".dvcignore").read_text()
    (workspace.root / ".dvcignore").write_text(before + "*.notes\n")
    workspace.change(ingest={"seed": 5})
    assert workspace.sentence().startswith("DVC has hashed 2 of 3 files in data/raw/mnist-5k, so that changes of the ")
    (workspace.root / ".dvcignore").write_text(before)
    (source / "a.notes").unlink()


@pytest.mark.parametrize("command", ["run", "search"])
def test_a_table_of_other_threads_is_refused_before_the_first_stage(workspace: Workspace, command: str) -> None:
    workspace.change(compress={"max_size_bytes": 20000}, prune={"channels": None}, benchmark={"threads": 2})
    done = workspace.call("weighin", command)
    assert done.returncode == 1
    assert "Running stage" not in done.stdout + done.stderr
    assert (
        "error: data/device.json is of 1 threads, but benchmark.threads in params.yaml is 2: `weighin pro"
        in done.stderr
    )


def test_what_is_over_the_budget_is_told() -> None:
    """A limit itself holds: 0.9 - 0.89 is 0.010000000000000009."""
    made = {"max_top1_drop": shares.subtract(0.9, 0.89), "max_size_bytes": 20001, "max_latency_ms": 0.125}
    held = config.Compress(max_top1_drop=0.01, max_size_bytes=20001, max_latency_ms=0.125)
    assert find_exceeded(held, made) == []
    limits = {"max_top1_drop": 0.009, "max_size_bytes": 20000, "max_latency_ms": 0.12}
    assert find_exceeded(config.Compress(**limits), made) == [
        "0.01 is over compress.max_top1_drop 0.009: the gate has limits of its own",
        "20,001 is over compress.max_size_bytes 20,000: the gate has limits of its own",
        "0.125 is over compress.max_latency_ms 0.12: the gate has limits of its own",
    ]
    assert find_exceeded(config.Compress(max_size_bytes=30000), made) == []


def group_members(group: int) -> list[str]:
    """Command lines of living processes in the process group."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], check=True, capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [args for pgid, stat, args in rows if int(pgid) == group and not stat.startswith("Z")]


def stage_group(run: int, name: str) -> int | None:
    """The process group in which DVC runs this stage, if it does, for the run with this process number."""
    with suppress(psutil.NoSuchProcess):
        for one in psutil.Process(run).children(recursive=True):
            if one.cmdline()[-2:] == ["-m", f"tasks.{name}"]:
                return os.getpgid(one.pid)
    return None


def test_an_interrupted_run_ends_the_whole_stage_and_the_next_one_goes_on(workspace: Workspace) -> None:
    undisturbed = {path: sha for path, sha in workspace.results().items() if "finetune" in path and "models" in path}
    lasting(workspace, 11)
    shutil.rmtree(workspace.root / "data/checkpoints", ignore_errors=True)
    process = start_run(workspace)
    wait_for(lambda: list((workspace.root / "data/checkpoints").glob("finetune-*.pt")), "the first checkpoint")
    interrupt(process, signal.SIGTERM)
    assert undisturbed.items() <= workspace.results().items()
    again = start_run(workspace)
    assert again.stdout is not None
    assert any("resuming after epoch" in line for line in again.stdout)
    interrupt(again, signal.SIGINT)
    assert undisturbed.items() <= workspace.results().items()


def start_run(workspace: Workspace) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def interrupt(process: subprocess.Popen[str], ending: signal.Signals) -> None:
    """End the run while its fine-tuning is at work; nothing of that is left."""
    group = wait_for(lambda: stage_group(process.pid, "finetune"), "the stage's start")
    process.send_signal(ending)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + ending, output
    wait_for(lambda: not group_members(group), "the end of the process group")


def family(pid: int) -> list[psutil.Process]:
    """The process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def lasting(workspace: Workspace, seed: int) -> None:
    """Make the next run train for long."""
    training = YAML(typ="safe").load(workspace.root / "params.yaml")["finetune"]["training"]
    workspace.change(finetune={"training": training | {"epochs": 400, "seed": seed}})


LOOK_SOON = {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}  # not after ten seconds, whether a run is due
ENDINGS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -signal.SIGKILL}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_ends_with_its_server_and_its_stage(workspace: Workspace, ending: signal.Signals) -> None:
    lasting(workspace, 100 + ending)
    process = subprocess.Popen(
        [str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment | {"PREFECT_API_URL": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any("python -m tasks.finetune" in line for line in process.stderr)
    started = family(process.pid)
    lines = [" ".join(one.cmdline()) for one in started]
    assert sum("-m prefect server start" in line for line in lines) == 2  # one of them is the leash
    process.send_signal(ending)
    _, told = process.communicate(timeout=WAIT_S)
    assert process.returncode == ENDINGS[ending]
    assert "Traceback" not in told
    assert [line.startswith("error: ") for line in told.splitlines()[-1:]] == [True] * (ending != signal.SIGKILL)
    assert psutil.wait_procs(started, timeout=WAIT_S)[1] == []


def test_a_run_that_nohup_started_goes_on_when_the_terminal_closes(workspace: Workspace) -> None:
    process = subprocess.Popen(
        ["nohup", str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("Beginning flow run" in line for line in process.stdout)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == PROMOTED


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_schedule_ends_with_its_server_and_with_the_run_that_it_has_started(
    workspace: Workspace, ending: signal.Signals, tmp_path: Path
) -> None:
    lasting(workspace, 200 + ending)
    if ending == signal.SIGKILL:  # what serves misses its server then, and waits for it as long as it may
        shorten_grace(workspace)
    port = str(free_port())
    own = {"PREFECT_API_URL": "", "PREFECT_SERVER_API_PORT": port, "PREFECT_HOME": str(tmp_path)} | LOOK_SOON
    process = subprocess.Popen(
        [str(BIN / "weighin"), "schedule", "--cron", "0 3 * * 1"], cwd=workspace.root, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, env=workspace.environment | own,
    )  # fmt: skip
    assert process.stderr is not None
    api = Workspace(workspace.root, f"http://127.0.0.1:{port}/api")
    (deployment,) = wait_for(lambda: answering(api) and deployments(api), "the schedule")
    api.post(f"deployments/{deployment['id']}/create_flow_run")
    assert any("python -m tasks.finetune" in line for line in process.stderr)
    started = family(process.pid)
    process.send_signal(ending)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == ENDINGS[ending]
    assert psutil.wait_procs(started, timeout=WAIT_S)[1] == []
    workspace.git("checkout", "--quiet", "flows/schedule.py")


def shorten_grace(workspace: Workspace) -> None:
    """Kill what serves the schedule after five seconds, not after a minute, if it does not end by itself."""
    path = workspace.root / "flows/schedule.py"
    text = path.read_text()
    assert text.count("GRACE_S = 60.0") == 1
    path.write_text(text.replace("GRACE_S = 60.0", "GRACE_S = 5.0"))


def answering(workspace: Workspace) -> bool:
    try:
        return httpx.get(f"{workspace.api}/health").is_success
    except httpx.HTTPError:
        return False


def test_two_runs_take_turns(workspace: Workspace) -> None:
    import fcntl

    lock = workspace.root / ".dvc/tmp/weighin.lock"
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        assert any("waiting for it to end" in line for line in process.stderr)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == PROMOTED


HOLD = {
    "repository": "repo.lock",
    "files": "rwlock(repo.tmp_dir, repo.fs, 'other', [], [str(Path('data/models').resolve())], False)",
}


@pytest.mark.parametrize("what", HOLD)
def test_it_waits_for_the_lock_of_another_dvc_command(workspace: Workspace, what: str) -> None:
    hold = f"""
import sys
from pathlib import Path
from dvc.repo import Repo
from dvc.rwlock import rwlock
with Repo() as repo, {HOLD[what]}:
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=workspace.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    process = subprocess.Popen(
        [str(BIN / "weighin"), "run"], cwd=workspace.root, env=workspace.environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any("another DVC command holds the lock" in line for line in process.stderr)
    holder.communicate("")
    process.communicate(timeout=WAIT_S)
    assert process.returncode == PROMOTED


def test_the_compressed_model_is_transferred_to_another_task(workspace: Workspace) -> None:
    digits = (workspace.root / "data/models/reduce/model.onnx").stat().st_size
    shutil.copy(workspace.root / "data/recipes/mlp-fashion.yaml", workspace.root / "params.yaml")
    shorten(workspace.root / "data/raw/fashion-mnist", workspace.root / "data/raw/fashion", 2000)
    training = YAML(typ="safe").load(workspace.root / "params.yaml")["finetune"]["training"] | {"epochs": 2}
    workspace.change(
        ingest={"path": "data/raw/fashion"},
        validate={"min_rows_per_class": 5},
        finetune={"training": training},
        gate={"min_top1": 0.5, "max_top1_drop": 0.2, "slices": {"label": {"min_count": 10, "min_top1": 0.0}}},
    )
    decision = workspace.run()
    assert (decision["model"], decision["version"]) == ("mlp-fashion", "v0.1.0")
    assert decision["stages"]["reduce"]["size_bytes"] < digits * 1.01
    spec = json.loads((workspace.root / "data/models/finetune/model.json").read_text())
    assert spec["weights"]["model"] == "mlp-digits"
    assert spec["weights"]["version"] == "v0.1.0"


def deployments(workspace: Workspace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workspace.post("deployments/filter")
    return found


def finished_run(workspace: Workspace, deployment: str) -> dict[str, Any] | None:
    runs = workspace.post("flow_runs/filter", deployments={"id": {"any_": [deployment]}})
    done = [one for one in runs if one["state"] and one["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]
    return done[0] if done else None


def test_the_deployment_runs_on_a_process_work_pool(workspace: Workspace) -> None:
    workspace.output("prefect", "work-pool", "create", "weighin", "--type", "process")
    done = workspace.call(
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        "deploy/prefect.yaml",
        WEIGHIN_HOME=str(workspace.root),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (deployment,) = deployments(workspace)
    assert [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 3 * * 1"]
    workspace.post(f"deployments/{deployment['id']}/create_flow_run")
    workspace.output("prefect", "worker", "start", "--pool", "weighin", "--run-once")
    run = wait_for(lambda: finished_run(workspace, deployment["id"]), "the deployment's run")
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert workspace.ran() == []
    httpx.delete(f"{workspace.api}/deployments/{deployment['id']}").raise_for_status()


def test_a_schedule_is_served_until_it_is_stopped(workspace: Workspace) -> None:
    serving = subprocess.Popen(
        [str(BIN / "weighin"), "schedule", "--cron", "0 3 * * 1"], cwd=workspace.root,
        env=workspace.environment | {"TZ": "Europe/Berlin"} | LOOK_SOON, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        (deployment,) = wait_for(lambda: deployments(workspace), "the schedule")
        (kept,) = deployment["schedules"]
        assert (kept["schedule"]["cron"], kept["schedule"]["timezone"]) == ("0 3 * * 1", "Europe/Berlin")
        assert kept["active"] is True
        workspace.post(f"deployments/{deployment['id']}/create_flow_run")
        run = wait_for(lambda: finished_run(workspace, deployment["id"]), "the scheduled run")
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(WAIT_S)
    (deployment,) = deployments(workspace)
    assert deployment["schedules"][0]["active"] is True  # it is still there when the process comes back
    httpx.delete(f"{workspace.api}/deployments/{deployment['id']}").raise_for_status()


def test_a_schedule_that_is_not_cron_is_wrong_usage(workspace: Workspace) -> None:
    done = workspace.call("weighin", "schedule", "--cron", "now and then")
    assert done.returncode == USAGE
    assert "'now and then' is not a cron expression" in done.stderr
