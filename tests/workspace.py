"""A clone of the project in which the command line is used, with a real Prefect server."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from tasks import STAGES
from tasks.core import quiet

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RECIPE = "data/recipes/mlp-digits.yaml"
PROMOTED, FAILED, USAGE, REFUSED = 0, 1, 2, 3
WAIT_S = 120
# A git that knows none of the machine's settings.
OWN_GIT = {"GIT_CONFIG_GLOBAL": str(Path(__file__).with_name("gitconfig")), "GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC"}


@contextmanager
def own_git() -> Iterator[None]:
    """A git that knows none of the machine's settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OWN_GIT.items():
            patch.setenv(name, value)
        yield


class Workspace:
    """A clone of this project in which the command line is used."""

    def __init__(self, root: Path, api: str) -> None:
        self.root, self.api = root, api
        self.environment = os.environ | {"PREFECT_API_URL": api, "PYTHONPATH": str(root), "COLUMNS": "120"}

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def output(self, *command: str) -> str:
        done = self.call(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *options: str, status: int = PROMOTED) -> dict[str, Any]:
        done = self.call("weighin", "run", "--json", *options)
        assert done.returncode == status, done.stdout + done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        return content

    def sentence(self, status: int = FAILED) -> str:
        """What `weighin run` says last when it cannot go on."""
        done = self.call("weighin", "run")
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        return told[0].removeprefix("error: ")

    def change(self, **sections: Any) -> None:
        """Change values in params.yaml, by section."""
        path, yaml = self.root / "params.yaml", YAML(typ="safe")
        content = yaml.load(path)
        for section, values in sections.items():
            content[section] = (content[section] or {}) | values if isinstance(values, dict) else values
        yaml.dump(content, path)

    def git(self, *args: str) -> str:
        return subprocess.run(["git", *args], cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers; 503 is its way to say that its database is busy just now."""

        def answer() -> httpx.Response | None:
            response = httpx.post(f"{self.api}/{path}", json=body, timeout=30)
            return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

        return wait_for(answer, f"an answer to {path}").raise_for_status().json()

    def states(self) -> dict[str, str]:
        """The state of each task in the newest flow run."""
        newest = self.post("flow_runs/filter", sort="START_TIME_DESC", limit=1)[0]
        tasks = self.post("task_runs/filter", flow_runs={"id": {"any_": [newest["id"]]}})
        return {task["name"]: task["state"]["name"] for task in tasks}

    def ran(self) -> list[str]:
        """The stages that had something to do in the newest run."""
        states = self.states()
        assert all(states[name] in ("Completed", "Skipped") for name in STAGES)
        return [name for name in STAGES if states[name] == "Completed"]

    def results(self) -> dict[str, str]:
        """SHA-256 of everything the stages left behind."""
        folders = [self.root / "data" / name for name in ("prepared", "models", "reports")]
        paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def shorten(source: Path, target: Path, images: int) -> None:
    """Every so many images of a source in IDX: all goes faster, where what is learned is not the point."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*-ubyte*"):
        head, size = (16, 28 * 28) if "images" in path.name else (8, 1)
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        every = (len(data) - head) // size // images
        kept = [data[place : place + size] for place in range(head, len(data), size * every)][:images]
        content = data[:4] + images.to_bytes(4, "big") + data[8:head] + b"".join(kept)
        (target / path.name.removesuffix(".gz")).write_bytes(content)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen in {WAIT_S} s")


@contextmanager
def server(home: Path) -> Iterator[str]:
    """A Prefect server of its own."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (quiet.SETTINGS | {"PREFECT_HOME": str(home)}).items():
            patch.setenv(name, value)
        command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        url = f"http://127.0.0.1:{port}/api"

        def healthy() -> bool:
            try:
                return httpx.get(f"{url}/health").is_success
            except httpx.HTTPError:
                return False

        try:
            wait_for(healthy, "the server's start")
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def checkout(target: Path) -> None:
    """The project as it is in the working copy, committed, with git settings of its own, and as if never run."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    trusted = target / "deploy/trusted_keys"
    trusted.write_text("".join(line for line in trusted.read_text().splitlines(True) if line.startswith("#")))
    for args in (
        ("init", "-q", "-b", "main"),
        ("add", "."),
        ("-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm", "1"),
    ):
        subprocess.run(["git", *args], cwd=target, check=True)
    for key, value in (("user.name", "Ada"), ("user.email", "ada@example.org")):
        subprocess.run(["git", "config", key, value], cwd=target, check=True)
