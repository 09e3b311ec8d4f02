"""Which Prefect server a command talks to, and the one sentence where there is none that it could use."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Repository
from workspace import BIN, FAILED, USAGE, free_port

from flows import leash, server
from tasks.core.errors import StageError

OWN = {"PREFECT_API_URL": ""}  # no server is configured


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of Prefect's that nothing was done in."""
    return tmp_path_factory.mktemp("home")


def sentence(repository: Repository, home: Path, *command: str, status: int = FAILED, **environment: str | None) -> str:
    """The one line on stderr with which a command ends that comes to nothing."""
    asked = os.environ | {"PREFECT_HOME": str(home)} | OWN | environment
    done = subprocess.run(
        [str(BIN / "weighin"), *command], cwd=repository.root, capture_output=True, text=True, check=False,
        env={name: value for name, value in asked.items() if value is not None},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").strip()


@contextmanager
def program(answers: dict[str, tuple[int, str]]) -> Iterator[int]:
    """A program that is not Prefect, at the port: status and text by the path, or for every path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, answers.get("", (404, "")))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


@pytest.mark.parametrize("command", [("run",), ("search",), ("schedule", "--cron", "0 3 * * 1")], ids=lambda c: c[0])
def test_a_program_that_answers_200_to_everything_is_not_taken_for_the_server(
    repository: Repository, home: Path, command: tuple[str, ...]
) -> None:
    with program({"": (200, "<h1>It works!</h1>")}) as port:
        url = f"http://127.0.0.1:{port}/api"
        told = sentence(repository, home, *command, PREFECT_API_URL=url)
    assert told == f"what answers at {url} is no Prefect server: set PREFECT_API_URL to one, or unset it"


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"": (200, "true")}, "is no Prefect server"),
        ({"": (200, "")}, "is no Prefect server"),
        ({"": (200, "{}")}, "is no Prefect server"),
        ({"": (404, "")}, "no Prefect server answers at"),
        ({"/api/health": (200, "true")}, "does not serve this Prefect (Client error '404"),
        ({"/api/health": (200, "true"), "": (401, "")}, "does not serve this Prefect (Client error '401"),
        ({"/api/health": (200, "true"), "/api/admin/version": (200, '"2.20.1"')}, "is version 2.20.1, which does not"),
    ],
    ids=["true", "nothing", "object", "missing", "no version", "unauthorized", "old"],
)
def test_what_is_configured_and_cannot_be_used_is_one_sentence_with_its_address(
    repository: Repository, home: Path, answers: dict[str, tuple[int, str]], told: str
) -> None:
    with program(answers) as port:
        url = f"http://127.0.0.1:{port}/api"
        found = sentence(repository, home, "run", PREFECT_API_URL=url)
    assert told in found
    assert url in found


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/api", "http://127.0.0.1:1/api"])
def test_an_address_where_nothing_answers_is_one_sentence(repository: Repository, home: Path, url: str) -> None:
    assert sentence(repository, home, "run", PREFECT_API_URL=url).startswith(f"no Prefect server answers at {url} (")


def test_a_program_at_the_port_of_a_scheduling_server_is_one_sentence(repository: Repository, home: Path) -> None:
    with program({"": (200, "true")}) as port:
        told = sentence(repository, home, "schedule", "--cron", "0 3 * * 1", PREFECT_SERVER_API_PORT=str(port))
    assert told.startswith(f"no Prefect server can be started at 127.0.0.1:{port} (Address already in use): ")
    assert f"PREFECT_API_URL to http://127.0.0.1:{port}/api" in told


@pytest.mark.parametrize("place", ["file", "file/in", "link"])
def test_a_home_that_cannot_be_written_is_one_sentence_with_its_name(
    repository: Repository, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/proc/nowhere")
    told = sentence(repository, tmp_path / place, "run")
    assert told.startswith(f"Prefect cannot write to its folder {tmp_path / place} (")
    assert told.endswith("set PREFECT_HOME to one that can be written")


def test_a_home_of_the_user_that_cannot_be_written_is_one_sentence(repository: Repository, home: Path) -> None:
    for command in (("run",), ("schedule", "--cron", "0 3 * * 1")):
        told = sentence(repository, home, *command, HOME="/proc/nowhere", PREFECT_HOME=None)
        assert told.startswith("Prefect cannot write to its folder /proc/nowhere/.prefect (")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PREFECT_API_URL": "http://[bad"}, "Invalid IPv6 URL"),
        ({"PREFECT_SERVER_API_PORT": "many"}, "port Input should be a valid integer"),
        ({}, "Invalid initial character"),
    ],
    ids=["address", "port", "profile"],
)
def test_settings_that_prefect_cannot_read_are_one_sentence(
    repository: Repository, home: Path, environment: dict[str, str], told: str
) -> None:
    if not environment:
        (home / "profiles.toml").write_text("[[[")
    found = sentence(repository, home, "run", status=USAGE, **environment)
    assert found.startswith("Prefect's settings (PREFECT_… or its profile) cannot be read: ")
    assert told in found


def test_a_server_that_takes_longer_than_it_may_is_one_sentence(repository: Repository, home: Path) -> None:
    patience = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
    told = sentence(repository, home, "run", **{patience: "1"})  # type: ignore[arg-type]
    assert told.startswith("the Prefect server that this command starts does not answer within 1 s: ")
    assert patience in told


def test_a_server_that_cannot_start_is_one_sentence_with_its_reason(repository: Repository, home: Path) -> None:
    (home / "prefect.db").write_text("this is no database, whatever its name says")
    told = sentence(repository, home, "run")
    assert told.startswith("the Prefect server that this command starts ends at once (")
    assert "file is not a database" in told
    assert str(home) in told


SECOND_TIME = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if Path("begun").exists():
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
Path("begun").touch()
"""


def test_a_server_that_fails_once_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    port = str(free_port())
    leash.end(server.start([sys.executable, "-c", SECOND_TIME, port], f"http://127.0.0.1:{port}"))
    (tmp_path / "begun").unlink()
    with pytest.raises(StageError, match="ends at once"):
        server.start([sys.executable, "-c", "raise SystemExit('no')"], f"http://127.0.0.1:{port}")
