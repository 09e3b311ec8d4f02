"""One Prefect task for one DVC stage."""

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows import dvc_bridge


def stage(name: str) -> Callable[[], Any]:
    """The Prefect task that brings a DVC stage up to date; its state is named Skipped if there was nothing to do."""

    @task(name=name, task_run_name=name)
    def reproduce() -> State[None]:
        say = get_run_logger().info
        if dvc_bridge.is_current(name, say):
            return Completed(name="Skipped", message="nothing changed")
        if dvc_bridge.run(name, say):
            return Completed(name="Skipped", message="brought back from DVC's cache")
        return Completed(message="ran")

    return reproduce
