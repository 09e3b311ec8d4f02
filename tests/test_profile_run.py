"""bench/profile_run.py: py-spy on a small program, and what its stacks are counted as."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_bench

BUSY = """
import subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "-m tasks.prune"])
ends = time.monotonic() + 0.5
while time.monotonic() < ends:
    sum(range(1000))
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("profile_run")


def test_processes_are_sampled_while_they_compute(bench: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(BUSY)
    by_process, by_line = bench.count(bench.sample([sys.executable, str(program)]))
    assert all(by_process[name, "other"] > 0 for name in ("the rest", "prune"))
    assert any("program.py" in line for _, line in by_line)
    table = bench.tell(by_process, by_line)
    *processes, last = [line.split()[0] for line in table.splitlines()[1:4]]
    assert (set(processes), last) == ({"the", "prune"}, "all")  # in the order in which they were seen


def test_the_kind_is_that_of_the_whole_stack(bench: ModuleType) -> None:
    loop = "_epoch (tasks/nets/training.py:230)"
    stacks = "\n".join(
        f'process 1:"weighin run";process 2:"python -m tasks.finetune";{";".join(frames)} {number}'
        for number, frames in (
            (50, ["main (tasks/finetune.py:1)", loop, "forward (torch/nn/functional.py:1)"]),
            (100, ["main (tasks/finetune.py:1)", loop, "_engine_run_backward (torch/autograd/graph.py:1)"]),
            (10, [loop, "step (/home/ada/.venv/lib/python3.11/site-packages/torch/optim/adamw.py:1)"]),
            (25, [loop, "_next_data (torch/utils/data/dataloader.py:1)", "fit (tasks/images/preprocessing.py:1)"]),
            (75, ["<module> (tasks/finetune.py:1)", "_find_and_load (<frozen importlib._bootstrap>:1)"]),
        )
    )
    by_process, by_line = bench.count(stacks)
    assert by_line["optimizer", "step (torch/optim/adamw.py:1)"] == 10
    assert {kind: n for (name, kind), n in by_process.items() if name == "finetune"} == {
        "forward": 50,
        "backward": 100,
        "optimizer": 10,
        "images": 25,
        "imports": 75,
    }
