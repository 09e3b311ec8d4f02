"""Programs that end when the process that started them ends, however it ends, `kill -9` included.

Between the two stands this file, run as a script: it starts the program in a process group of its own and reads
standard input, whose other end the starter holds. When that end closes, the group is ended, politely first. It needs
the standard library only, and brings nothing else.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

GRACE_S = 10.0
POLL_S = 0.05


def start(
    command: Sequence[str], first: signal.Signals = signal.SIGTERM, grace_s: float = GRACE_S, **options: Any
) -> subprocess.Popen[str]:
    """Start the command on a leash; the options are those of `subprocess.Popen`, without `stdin`.

    To end it, the `first` signal is sent, and SIGKILL after `grace_s` seconds. What comes back is the leash: it ends
    after the program and whatever that has left running, with its exit status, or 128 and the number of the signal
    that ended it.
    """
    held = [sys.executable, "-I", "-S", __file__, str(int(first)), str(grace_s), *command]
    return subprocess.Popen(held, stdin=subprocess.PIPE, start_new_session=True, text=True, **options)


def end(leash: subprocess.Popen[str]) -> None:
    """End the program with its whole process group, if it has not ended yet; returns when nothing of it is left."""
    if leash.stdin is not None:
        leash.stdin.close()
    leash.wait()


def main(first: int, grace_s: float, command: list[str]) -> int:
    """Run the command until it ends or nobody holds the leash any more; nothing of its process group is left then."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the starter is told, and lets go; ignored, it would stay so in others
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while program.poll() is None and not select.select([sys.stdin], [], [], POLL_S)[0]:
        pass
    _end_group(program, first, grace_s)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def _end_group(leader: subprocess.Popen[bytes], first: int, grace_s: float) -> None:
    """At the first signal, a stage removes its temporary files; what is still there after the grace is killed."""
    with suppress(ProcessLookupError):
        for ending in (first, signal.SIGKILL):
            os.killpg(leader.pid, ending)
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline:
                leader.poll()  # a leader that nobody has waited for would still count as there
                os.killpg(leader.pid, 0)
                time.sleep(POLL_S)
    leader.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
