"""files: whole or not there, also when the device is full; and how a stage's process tells it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tasks.core import files
from tasks.core.errors import WeighinError

ROOT = Path(__file__).parents[1]


def listing(root: Path) -> dict[str, bytes]:
    """Every file under `root`, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with files.replacing(tmp_path / "a", tmp_path / "deep/under/b") as (a, b):
        assert a.parent == tmp_path  # else the last step would not be a rename
        a.write_text("new a")
        b.write_text("new b")
        assert (tmp_path / "a").read_text() == "old"
    assert listing(tmp_path) == {"a": b"new a", "deep/under/b": b"new b"}


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/gone").write_text("old")
    with files.replacing(tmp_path / "docs") as (docs,):
        (docs / "deep").mkdir(parents=True)
        (docs / "deep/new").write_text("new")
    assert listing(tmp_path) == {"docs/deep/new": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error), files.replacing(tmp_path / "file", tmp_path / "docs") as (file, docs):
        file.write_text("new")
        docs.mkdir()
        (docs / "page").write_text("new")
        raise error
    assert listing(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "docs"}


def test_a_file_that_was_not_written_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "a", tmp_path / "b") as (a, _):
        a.write_text("new")
    assert listing(tmp_path) == {"a": b"old"}


def test_json_there_and_back(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"top1": 0.5, "names": ["ä"]})
    assert files.read_json(tmp_path / "a.json") == {"top1": 0.5, "names": ["ä"]}
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_numbers_that_are_not_finite(tmp_path: Path, number: float) -> None:
    files.write_json(tmp_path / "a.json", {"top1": 0.5})
    with pytest.raises(WeighinError, match=r"a\.json: a number is not finite, so it cannot be written as JSON$"):
        files.write_json(tmp_path / "a.json", {"deep": [{"top1": number}]})
    assert listing(tmp_path) == {"a.json": (json.dumps({"top1": 0.5}, indent=2) + "\n").encode()}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_what_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(WeighinError, match=r"a\.json is not JSON \(.*\); run the stage that writes it again$"):
        files.read_json(tmp_path / "a.json")


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(WeighinError, match=r"a\.json is missing: run `weighin run`, or `dvc checkout`"):
        files.read_json(tmp_path / "a.json")


def test_the_digest_of_a_listing_is_that_of_what_sha256sum_prints(tmp_path: Path) -> None:
    for name in ("b/ä.py", "a.py", "b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = ["a.py", "b.py", "b/ä.py"]
    printed = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    listing = {name: files.sha256(tmp_path / name) for name in reversed(names)}
    assert files.digest(listing) == files.sha256_of(printed) == hashlib.sha256(printed).hexdigest()
    assert files.digest(listing | {"a.py": "0" * 64}) != files.digest(listing)
    assert files.digest({}) == hashlib.sha256(b"").hexdigest()


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    files.write_bytes(tmp_path / "a", data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def full_device(root: Path, body: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Run `body` as a stage in `root`, where no file can grow over `limit` bytes."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"from pathlib import Path\nfrom tasks.core import errors, files\n{body}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def test_a_full_device_is_told_in_one_sentence_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"old")
    done = full_device(tmp_path, "errors.run(lambda: files.write_bytes(Path('model.bin'), bytes(9000)))", limit=4096)
    assert (done.returncode, done.stderr) == (1, "error: model.bin: File too large\n")
    assert listing(tmp_path) == {"model.bin": b"old"}


def test_a_full_device_under_a_writer_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"old")
    body = """
import os, pyarrow as pa, pyarrow.parquet as pq
def main():
    with files.replacing(Path("rows.parquet"), Path("more.parquet")) as (rows, _):
        pq.write_table(pa.table({"image": [os.urandom(9000)]}), rows)
errors.run(main)"""
    done = full_device(tmp_path, body, limit=4096)
    assert (done.returncode, done.stderr) == (1, "error: rows.parquet: File too large\n")
    assert listing(tmp_path) == {"rows.parquet": b"old"}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file where the folder should be")
    done = full_device(tmp_path, "errors.run(lambda: files.write_json(Path('reports/a.json'), {}))", limit=4096)
    assert done.returncode == 1
    assert done.stderr == "error: reports: File exists\n"


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("errors.StageError('a sentence')", "error: a sentence\n"),
        ("errors.ParamsError('a sentence')", "error: a sentence\n"),
        ("PermissionError(13, 'Permission denied', 'a/b')", "error: a/b: Permission denied\n"),
        ("OSError('no number')", "error: input or output: no number\n"),
        ("MemoryError()", "error: out of memory: lower finetune.image_size in params.yaml\n"),
    ],
)
def test_how_a_stage_ends(tmp_path: Path, raised: str, says: str) -> None:
    done = full_device(tmp_path, f"def main(): raise {raised}\nerrors.run(main)", limit=4096)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", says)


HUNGRY = {
    "torch": "import torch; limit(); torch.zeros(10**10)",
    "torch in a network": "import torch; net = torch.nn.Conv2d(3, 64, 3); limit(); [net(torch.zeros(64, 3, 224, 224)) "
    "for _ in range(9)]",
    "onnxruntime": "from tasks.runtime import session; ready = session.open_session(Path('net.onnx'), 1); limit(); "
    "session.logits(ready, np.zeros((600, 3, 224, 224), np.float32))",
    "numpy": "limit(); np.zeros(10**10)",
    "pyarrow": "import pyarrow; limit(); pyarrow.allocate_buffer(10**10)",
    "Pillow": "from PIL import Image; limit(); Image.new('RGB', (30000, 30000))",
    "pandas": "import pandas; limit(); one = pandas.DataFrame({'a': np.zeros(10**6)}); one.merge(one, how='cross')",
}


@pytest.mark.parametrize("library", HUNGRY)
def test_running_out_of_memory_is_one_sentence_whatever_the_library_throws(tmp_path: Path, library: str) -> None:
    convolution = helper.make_node("Conv", ["image", "weight"], ["logits"], pads=[1] * 4)
    body = helper.make_graph(
        [convolution],
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ("batch", 3, 224, 224))],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((64, 3, 3, 3), np.float32), "weight")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=10), tmp_path / "net.onnx")
    (tmp_path / "prune.py").write_text(f"""
import resource
from pathlib import Path
import numpy as np
from tasks.core import errors
def limit():
    used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**29,) * 2)
def main():
    {HUNGRY[library]}
errors.run(main)
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "prune.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1] == (
        "error: out of memory: lower prune.recovery.training.batch_size or finetune.image_size in params.yaml"
    )
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    done = full_device(tmp_path, "def main(): {}['key']\nerrors.run(main)", limit=4096)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'key'\n")


def test_parameters_that_change_while_a_stage_runs_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: 1")
    script = """
from pathlib import Path
from tasks.core import errors
errors.run(lambda: Path("params.yaml").write_text("a: 2"))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: params.yaml changed while the stage was at work: run again\n"


def test_a_stage_told_to_end_takes_its_temporary_files_along(tmp_path: Path) -> None:
    script = """
import time
from pathlib import Path
from tasks.core import errors, files
def main():
    with files.replacing(Path("model.bin")) as (temporary,):
        temporary.write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
errors.run(main)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.terminate()
    assert process.wait(30) == 128 + 15
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, alive = (tmp_path / f".a.json.{process}.tmp" for process in (ended.pid, os.getppid()))
    left.write_text("half")
    alive.write_text("somebody is at it")
    files.write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "a.json"])


def test_what_was_packed_comes_back_and_nothing_may_lie_behind_it(tmp_path: Path) -> None:
    path, data = tmp_path / "model.onnx.zst", b"model" * 100
    files.write_bytes(path, files.pack(data))
    assert len(files.pack(data)) < len(data)
    assert files.unpack(path) == data
    for more in (files.pack(b"another frame"), b"junk"):
        path.write_bytes(files.pack(data) + more)
        with pytest.raises(WeighinError, match="does not unpack as Zstandard"):
            files.unpack(path)
