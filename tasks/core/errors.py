"""The one exception family, and how a stage's process ends when something is wrong."""

import sys
from collections.abc import Callable


class WeighinError(Exception):
    """Something the user can put right. The message is one sentence: file, value, and what would be right."""


class ParamsError(WeighinError):
    """The parameter file is not usable; no stage has run."""


class StageError(WeighinError):
    """A stage ended without its result."""


class RegistryError(WeighinError):
    """A decision could not be read or recorded."""


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`; end the process with status 1 and one line `error: …` on stderr if it cannot go on.

    Errors of the operating system (no space, no permission) are told the same way, with the file they name.
    Anything else is a bug in Weighin and keeps its traceback.
    """
    try:
        main()
    except WeighinError as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"{error.filename or 'input or output'}: {error.strerror or error}"
    except MemoryError:
        sentence = "out of memory: lower the batch size or the image size in params.yaml"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(1)
