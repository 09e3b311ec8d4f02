"""The Prefect server that a command talks to: the configured one, or one of its own, which ends with the command."""

import atexit
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from flows import leash
from tasks.core.errors import ParamsError, StageError, first_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

HOST = "127.0.0.1"
URL = "PREFECT_API_URL"
PATIENCE = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
PATIENCE_S = "120"  # Prefect's 20 s are too few on a busy machine
TRIES = 2
POLL_S = 0.2
ONLY_A_DATABASE = ("--no-ui", "--no-scheduler", "--no-late-runs")


@contextmanager
def connect(schedules: bool = False) -> Iterator[str]:
    """The address of a Prefect server that answers: the configured one, or else one of our own.

    The latter ends with this process. For `schedules`, it is at Prefect's usual port, has pages, and starts what is
    due. `StageError` if no server answers, or if it stops answering meanwhile; `ParamsError` if Prefect's settings
    cannot be read.
    """
    import httpx

    url = require_server() or _own(schedules)
    try:
        yield url
    except httpx.HTTPError as error:
        raise StageError(f"the Prefect server at {url} does not answer any more: {first_line(error)}") from None


def require_server() -> str | None:
    """The address of the configured Prefect server, or None; `StageError` if what is there is no Prefect server."""
    load_prefect()
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return None
    with get_client(sync_client=True) as client:
        if problem := client.api_healthcheck():
            raise StageError(f"no Prefect server answers at {url} ({first_line(problem)}): start it, or unset {URL}")
        if client.server_type != ServerType.CLOUD:
            _require_version(url, client)
    return str(url)


def load_prefect() -> None:
    """Import Prefect, which reads its settings; `ParamsError` if they cannot be read."""
    os.environ.setdefault(PATIENCE, PATIENCE_S)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a folder that is not there: `_require_home` knows better
            import prefect.context  # noqa: F401
        print(said.getvalue(), end="", file=sys.stderr)
    except ValueError as error:  # of pydantic or of TOML
        wrong = " ".join(str(error).split(" [type=")[0].split())
        raise ParamsError(f"Prefect's settings (PREFECT_… or its profile) cannot be read: {wrong}") from None
    except RuntimeError as error:  # the user has no home folder
        raise ParamsError(
            f"Prefect has no folder for its files: set PREFECT_HOME to one ({first_line(error)})"
        ) from None


def _require_version(url: str, client: "SyncPrefectClient") -> None:
    import httpx

    own = client.client_version()
    try:
        found = client.api_version()
    except httpx.HTTPStatusError as error:
        raise StageError(f"what answers at {url} does not serve this Prefect ({first_line(error)})") from None
    except ValueError:
        found = ""
    if not isinstance(found, str) or not re.match(r"\d+\.\d", found):
        raise StageError(f"what answers at {url} is no Prefect server: set {URL} to one, or unset it")
    if found.partition(".")[0] != own.partition(".")[0]:
        raise StageError(f"the Prefect server at {url} is version {found}, which does not serve Prefect {own}")


def _own(schedules: bool) -> str:
    """The address of a server of our own, which Prefect talks to from now on, in each of its threads."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_SERVER_API_PORT

    _require_home()
    port = PREFECT_SERVER_API_PORT.value() if schedules else _free_port()
    if schedules:
        _require_free(port)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    url = f"http://{HOST}:{port}/api"
    process = start([*command, *([] if schedules else ONLY_A_DATABASE)], url)
    atexit.register(leash.end, process)  # then Prefect's threads have told it all that they had to tell
    os.environ[URL] = url
    refresh_global_settings_context()
    return url


def start(command: list[str], url: str) -> subprocess.Popen[str]:
    """The running server; `StageError` says why there is none, if it does not answer in time, twice."""
    from prefect.settings import PREFECT_HOME, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    patience = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    for _ in range(TRIES):
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = leash.start(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                if _answers(f"{url}/health", process, time.monotonic() + patience):
                    return process
            except BaseException:  # Ctrl-C too; it goes on rising
                leash.end(process)
                raise
            ended = process.poll() is not None
            leash.end(process)
            log.seek(0)
            lines = log.read().splitlines()
    if ended:
        raise StageError(
            f"the Prefect server that this command starts ends at once ({_last_lines(lines)}): its files are in "
            f"{PREFECT_HOME.value()}, or where PREFECT_HOME says"
        )
    raise StageError(
        f"the Prefect server that this command starts does not answer within {patience} s: set {PATIENCE} to more, or "
        f"start a server and set {URL} to it"
    )


def _answers(health: str, process: subprocess.Popen[str], deadline: float) -> bool:
    """Whether the process is a server that answers by then; what else may answer there is not it."""
    import httpx

    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(health, trust_env=False).is_success:
                return process.poll() is None
        time.sleep(POLL_S)
    return False


def _last_lines(lines: list[str]) -> str:
    """The last error among the lines of a program, or else its last line."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or said or ["without a word"])[-1]


def _require_home() -> None:
    """`StageError` if the server could not keep its database: Prefect itself says so in five hundred lines."""
    from prefect.settings import PREFECT_HOME

    home = PREFECT_HOME.value()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise StageError(
            f"Prefect cannot write to its folder {home} ({error.strerror}): set PREFECT_HOME to one that can be written"
        ) from None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


def _require_free(port: int) -> None:
    try:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no obstacle
            one.bind((HOST, port))
    except OSError as error:
        raise StageError(
            f"no Prefect server can be started at {HOST}:{port} ({error.strerror}): if a Prefect server is there, set "
            f"{URL} to http://{HOST}:{port}/api; else set PREFECT_SERVER_API_PORT to a free port"
        ) from None
