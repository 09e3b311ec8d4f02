"""The plan tried on the untrained backbone, before hours are spent on its training.

It is about what depends on the architecture alone: whether channels can be told apart and masked, whether the device's
table has the layers, whether the network can be exported. It is tried in a process of its own, since Torch-Pruning
comes to no end with some networks.
"""

import contextlib
import copy
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from flows import leash
from flows.dvc_bridge import ENVIRONMENT, reason
from tasks.core import config, files, paths
from tasks.core.errors import StageError, first_line, is_out_of_memory, root_cause, run

LIMIT_S = 120.0  # a hundred times what good networks take
KNOWN = Path(".dvc/tmp/weighin.rehearsed")
CODE = Path("tasks/nets")
OWN = ("mlp", "lenet-300-100", "lenet-5")  # which go by construction
LIBRARIES = ("timm", "torch", "torch-pruning", "onnx")
# What is tried, in words, and what helps besides another backbone.
STEPS = {
    "making": ("it cannot be made", ""),
    "channels": ("its channels cannot be removed", "set prune.channels to null, or "),
    "budget": ("it cannot be cut to a budget", "set compress to null, or "),
    "export": ("it cannot be written as ONNX", ""),
}


@contextlib.contextmanager
def rehearse(params: config.Params, say: Callable[[str], None], budget: bool) -> Iterator[None]:
    """Try what comes after `finetune`, in a process beside the body of the `with`; with a budget, what `compress` does.

    What has gone well is not tried again as long as nothing that it depends on changes. After the body,
    `StageError` if it does not go, or comes to no end.
    """
    own = params.finetune.backbone in OWN and not budget
    identity = "" if own else _identity(params, budget)
    if own or (KNOWN.exists() and KNOWN.read_text() == identity):
        yield
        return
    say(f"trying the plan on an untrained {params.finetune.backbone}")
    command = [sys.executable, "-m", "flows.rehearsal", *(["budget"] if budget else [])]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = leash.start(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
        ends = time.monotonic() + LIMIT_S
        try:
            yield
            late = not _is_over(process, ends)
        finally:
            leash.end(process)
        log.seek(0)
        lines = log.read().splitlines()
    begun = [line for line in lines if line in STEPS]
    if late:
        why = f"it comes to no end within {LIMIT_S:.0f} s"
        raise StageError(_sentence(params.finetune.backbone, begun[-1] if begun else "making", why))
    if process.returncode:
        raise StageError(reason(lines))
    KNOWN.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(KNOWN, identity.encode())


def _is_over(process: subprocess.Popen[str], ends: float) -> bool:
    """Whether the process ends by then."""
    try:
        process.wait(max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _identity(params: config.Params, budget: bool) -> str:
    tried = {
        "backbone": params.finetune.backbone,
        "image size": str(params.finetune.image_size),
        "classes": str(len(config.class_names(params))),
        "prune": repr((params.prune.blocks, params.prune.channels)),
        "table": files.sha256(paths.DEVICE) if budget and paths.DEVICE.exists() else "",
    }
    code = {str(path): files.sha256(path) for path in (*CODE.glob("*.py"), Path("tasks/prune.py")) if path.exists()}
    return files.digest(tried | code | {name: version(name) for name in LIBRARIES} | {"budget": str(budget)})


def _sentence(backbone: str, step: str, why: str) -> str:
    what, else_ = STEPS[step]
    return f"finetune.backbone {backbone!r} does not suit, as {what} ({why}): {else_}choose another backbone"


def main(budget: bool) -> None:
    """Try each step; the parameters are those of params.yaml."""
    from flows import profile
    from tasks import prune
    from tasks.budget import allocation, costs
    from tasks.nets import backbone, masks
    from tasks.nets.export import export

    params = config.load()
    name, blocks, channels = params.finetune.backbone, params.prune.blocks, params.prune.channels
    preprocessing = backbone.preprocessing(name, params.finetune.image_size)
    with _step(name, "making"):
        net = backbone.create(name, len(config.class_names(params)), preprocessing)
    backbone.check_size(net, profile.describe(params, preprocessing))
    with _step(name, "making"):
        net, spec, effects = profile.make_untrained(params, images=2)
    if blocks and (blocks.remove or 0) > len(effects):
        raise StageError(f"prune.blocks.remove is {blocks.remove}, but {name} has {len(effects)} residual blocks")
    slim, example = copy.deepcopy(net), profile.pictures(preprocessing)
    if budget:
        with _step(name, "budget"):
            *_, whole = profile.survey_structure(copy.deepcopy(net), effects, spec)
        table = costs.read(paths.DEVICE, params.benchmark.threads)
        most = allocation.allocate(whole, allocation.UNLIMITED, table).cost  # what the table lacks, it says itself
        with _step(name, "budget"):
            look = functools.partial(profile.survey_structure, spec=spec)
            limits = allocation.Limits(None, most.latency_ms / 2)
            removed = prune.prune_to_limits(slim, limits, whole, effects, table, look).channels
            prune.build_masked(net, slim, removed, example)
    elif channels:
        with _step(name, "channels"):
            masks.cut_blocks(slim, list(effects)[: (blocks and blocks.remove) or 0])
            removed = masks.cut_channels(slim, channels, example, backbone.head(net)).removed
            prune.build_masked(net, slim, removed, example)
    with _step(name, "export"), tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        export(net, spec, Path(scratch) / "model.onnx")


@contextlib.contextmanager
def _step(backbone: str, step: str) -> Iterator[None]:
    print(step, flush=True)
    try:
        yield
    except StageError as error:
        raise StageError(_sentence(backbone, step, str(error))) from None
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        # what fails in a network that nobody has tried before has no common base but Exception
        cause = root_cause(error)
        raise StageError(_sentence(backbone, step, f"{type(cause).__name__}: {first_line(cause)}")) from None


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:] == ["budget"]))
