"""The one exception family, and how a stage's process ends when something is wrong."""

import atexit
import gc
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tasks.core.paths import PARAMS


class WeighinError(Exception):
    """Something the user can put right. The message is one sentence: file, value, and what would be right.

    It is one line, whatever line ends a name or a value in it has.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class ParamsError(WeighinError):
    """The parameter file is not usable; no stage has run."""


class StageError(WeighinError):
    """A stage ended without its result."""


class RegistryError(WeighinError):
    """A decision could not be read or recorded."""


# What libraries say in exceptions of their own when memory runs out: PyTorch, CUDA, ONNX Runtime, C++.
NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "bad allocation")
# What helps a stage that runs out of memory.
SMALLER = {
    "ingest": "validate.max_side",
    "finetune": "finetune.training.batch_size or finetune.image_size",
    "prune": "prune.recovery.training.batch_size or finetune.image_size",
    "quantize": "quantize.grid.qat.training.batch_size, if there is one, or finetune.image_size",
}

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MENDABLE = (WeighinError, OSError, MemoryError)  # what a user can put right, and is told in a sentence


def describe(error: BaseException) -> str:
    """The sentence that tells a user what is wrong."""
    if is_out_of_memory(error):
        stage = Path(sys.argv[0]).stem
        return f"out of memory: lower {SMALLER.get(stage, 'finetune.image_size')} in {PARAMS}"
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return str(error) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, whatever the library throws."""
    told = not isinstance(error, WeighinError | OSError) and any(one in str(error).lower() for one in NO_MEMORY)
    return isinstance(error, MemoryError) or told


def first_line(error: BaseException) -> str:
    """What an exception of others says, in one line without a terminal's codes; its name if it says nothing."""
    lines = (COLOUR.sub("", line).strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def root_cause(error: BaseException) -> BaseException:
    """The exception that all others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; end the process with status 1 and one line `error: …` on stderr if it cannot go on.

    If params.yaml changes meanwhile, that is an error too: DVC would record the new values for results of the old.
    SIGTERM unwinds the stack, so that temporary files go. Errors of the operating system (no space, no permission)
    are told the same way, with the file they name. Anything else is a bug in Weighin and keeps its traceback.
    """
    atexit.register(gc.freeze)  # at its end, Python would look through all objects of PyTorch, for two seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        before = _params()
        main()
        if _params() != before:
            raise StageError(f"{PARAMS} changed while the stage was at work: run again")
    except Exception as error:
        if not isinstance(error, MENDABLE) and not is_out_of_memory(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _params() -> bytes:
    return PARAMS.read_bytes() if PARAMS.exists() else b""
