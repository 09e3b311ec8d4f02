"""Serving the pipeline on a schedule."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.core.errors import ParamsError, StageError

SERVER_START_S = 60


def serve(cron: str, params: Path) -> None:
    """Serve `retrain` until interrupted; a schedule keeps its runs when this process ends and comes back.

    `ParamsError` if the cron expression is not one; `StageError` if the server cannot be reached.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron)
    except ValidationError:
        raise ParamsError(f"{cron!r} is not a cron expression: five fields such as '0 3 * * 1'") from None
    with _server():
        from flows.retrain import retrain

        retrain.serve(name="weighin", cron=cron, parameters={"params": str(params)}, pause_on_shutdown=False, limit=1)


def require_server() -> None:
    """`StageError` if a Prefect server is configured but does not answer; without one there is nothing to require."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if url := PREFECT_API_URL.value():
        with get_client(sync_client=True) as client:
            if problem := client.api_healthcheck():
                raise StageError(f"no Prefect server answers at {url} ({problem}): start it, or unset PREFECT_API_URL")


@contextmanager
def _server() -> Iterator[None]:
    """The configured Prefect server, or else one of our own: the ephemeral one runs no schedules."""
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_API_PORT, temporary_settings

    if PREFECT_API_URL.value():
        require_server()
        yield
        return
    url = f"http://127.0.0.1:{PREFECT_SERVER_API_PORT.value()}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(f"{url}/api/health", server)
        print(f"Prefect server and its pages at {url}", flush=True)
        with temporary_settings({PREFECT_API_URL: f"{url}/api"}):
            yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _await(health: str, server: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(health).is_success:
                return
        time.sleep(0.5)
    raise StageError(f"no Prefect server answers at {health}: start one and set PREFECT_API_URL to it")
