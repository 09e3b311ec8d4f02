"""Progress: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tasks.core import machine

T = TypeVar("T")
LOG_EVERY_S = 5.0


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` unchanged, showing how far they are. `total` may be unknown."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, description, total=total, console=Console(stderr=True), transient=True)
        return
    started = last = time.monotonic()
    cores = machine.Cores()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            of = f"/{total}" if total else ""
            print(f"{description}: {count}{of} in {now - started:.0f} s{cores.crowd()}", file=sys.stderr, flush=True)
            last = now
        yield item
