"""Where `make run` spends its time: `python tests/bench/profile_run.py [--params FILE]`, in a fresh clone.

py-spy samples every process of `weighin run`, 50 times a second, where it computes and does not wait. Prints for each
process the seconds of its work by kind, and what takes longest in each, and writes data/reports/bench/profile.json.
A stage's threads inside of PyTorch and ONNX Runtime count once, with the line that called them.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import files, machine, paths
from tasks.core.errors import StageError, run

REPORT = paths.REPORTS / "bench" / "profile.json"
RATE = 50  # samples a second
# The first that a stack has says what the time was for; each by a part of a frame, as py-spy writes it.
KINDS = (
    ("imports", ("<frozen importlib",)),
    ("teacher", ("answers (tasks/nets/distillation.py",)),
    ("importance", ("tasks/nets/importance.py",)),
    ("evaluation", ("evaluate (tasks/nets/training.py", "top1 (tasks/runtime/session.py")),
    ("backward", ("_engine_run_backward",)),
    ("optimizer", ("step (torch/optim", "wrapper (torch/optim", "zero_grad (")),
    ("images", ("_next_data (", "preprocess (tasks/images", "fit (tasks/images")),
    ("forward", ("_epoch (tasks/nets/training.py",)),
    ("ONNX Runtime", ("(onnxruntime/",)),
    ("server", ("uvicorn", "(prefect/server")),
)
OTHER = "other"
STAGE = re.compile(r"-m tasks\.(\w+)")
LIBRARY = re.compile(r"\(\S*(?:site-packages|python3\.\d+)/")


def sample(command: list[str]) -> str:
    """The stacks of a command and of the processes that it starts, one a line, with how often each was seen."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        target = Path(scratch) / "stacks"
        spy = [
            str(Path(sys.executable).parent / "py-spy"),
            "record",
            "--subprocesses",
            "--nonblocking",
            "--full-filenames",
        ]
        options = ["--rate", str(RATE), "--format", "raw", "--output", str(target)]
        status = subprocess.run([*spy, *options, "--", *command], check=False).returncode
        if not target.exists():
            raise StageError(f"py-spy could not sample {' '.join(command)}: it ended with status {status}")
        return target.read_text()


def name_of(process: str) -> str:
    """What a process is, by its command line."""
    stage = STAGE.search(process)
    if stage:
        return stage[1]
    for part, name in (("prefect server", "Prefect's server"), ("-m dvc", "DVC"), ("weighin", "weighin")):
        if part in process:
            return name
    return "the rest"


def kind_of(frames: list[str]) -> str:
    return next((kind for kind, parts in KINDS if any(part in frame for part in parts for frame in frames)), OTHER)


def count(stacks: str) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Samples by process and kind, and by kind and the innermost line of ours or of a library's public code."""
    by_process, by_line = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in stacks.splitlines():
        stack, _, number = row.rpartition(" ")
        parts = stack.split(";")
        process = next(part for part in reversed(parts) if part.startswith("process "))  # the one of its ancestors
        frames = parts[parts.index(process) + 1 :]
        frames = [LIBRARY.sub("(", frame).replace(f"({ROOT}/", "(") for frame in frames]
        kind = kind_of(frames)
        by_process[name_of(process), kind] += int(number)
        if frames:
            by_line[kind, frames[-1]] += int(number)
    return by_process, by_line


def tell(by_process: Counter[tuple[str, str]], by_line: Counter[tuple[str, str]]) -> str:
    """The tables, in seconds."""
    kinds = [kind for kind, _ in KINDS] + [OTHER]
    processes = dict.fromkeys(name for name, _ in by_process)
    lines = [f"{'seconds':18}" + "".join(f"{kind:>14}" for kind in [*kinds, "all"])]
    for name in processes:
        values = [by_process[name, kind] / RATE for kind in kinds]
        lines.append(f"{name:18}" + "".join(f"{value:14.1f}" for value in [*values, sum(values)]))
    values = [sum(by_process[name, kind] for name in processes) / RATE for kind in kinds]
    lines.append(f"{'all':18}" + "".join(f"{value:14.1f}" for value in [*values, sum(values)]))
    for kind in kinds:
        longest = Counter({line: number for (other, line), number in by_line.items() if other == kind}).most_common(3)
        lines += [f"{kind:14} {number / RATE:6.1f} s  {line}" for line, number in longest]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--params", default=str(paths.PARAMS), help="the recipe")
    arguments = parser.parse_args()
    weighin = str(Path(sys.executable).parent / "weighin")
    by_process, by_line = count(sample([weighin, "run", "--params", arguments.params]))
    rows = [{"process": process, "kind": kind, "seconds": n / RATE} for (process, kind), n in by_process.items()]
    files.write_json(REPORT, {"processor": machine.processor(), "cores": machine.usable_cores(), "rows": rows})
    print(tell(by_process, by_line))


if __name__ == "__main__":
    run(main)
