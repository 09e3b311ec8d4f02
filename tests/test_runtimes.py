"""bench/runtimes.py with the ONNX Runtime that is installed, which needs no network."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime as ort
import pytest
from conftest import Network, load_bench

from tasks import reduce

SCRIPT = Path(__file__).parent / "bench/runtimes.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_bench("runtimes")


@pytest.fixture(scope="module")
def model(networks: Callable[[str], Network], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtimes") / "model.onnx"
    onnx.save(reduce.reduce(networks("lenet-5").quantized)[0], path)
    return path


def run(model: Path, report: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--only", ort.__version__, "--model", str(model), "--report", str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_form_gives_the_same_bits_and_is_measured_once(bench: ModuleType, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "runtimes.json"
    done = run(model, report)
    assert (done.returncode, done.stderr) == (0, "")
    head, sizes, *rows = done.stdout.splitlines()
    assert head == bench.HEADER
    assert len({len(line) for line in (head, sizes, *rows)}) == 1
    assert [row.split()[:2] for row in rows] == [[ort.__version__, "on"], [ort.__version__, "off"]]
    told = json.loads(report.read_text())
    for mode in bench.MODES:
        for form, one in told["rows"][ort.__version__][mode].items():
            plain, packed = told["bytes"][form]
            assert packed < plain
            assert (one["bits"], one["errors"]) == ("same", [None, None])
            assert min(one["ms"]) > 0
    told["rows"][ort.__version__]["all"]["sparse"]["bits"] = "other"
    report.write_text(json.dumps(told))
    again = run(model, report)
    assert again.returncode == 1
    assert again.stdout.splitlines()[:2] == [head, sizes]
    assert again.stdout.count("other") == 1


def test_what_goes_wrong_is_told(bench: ModuleType, model: Path, tmp_path: Path) -> None:
    cases = bench.lay(model, tmp_path)
    (tmp_path / "text.onnx").write_text("no model")
    _, command = bench.install(ort.__version__, tmp_path)
    case, text = cases["4 bits"], tmp_path / "text.onnx"
    found = {
        name: bench.measure(command, changed, "all")
        for name, changed in {
            "other": case._replace(packed=cases["codebook"].packed),
            "fail": case._replace(packed=text),
            "alone": case._replace(plain=text),
        }.items()
    }
    assert {name: one["bits"] for name, one in found.items()} == {name: name for name in found}
    assert found["fail"]["ms"][1] is found["alone"]["ms"][0] is None
    ended = bench.measure([sys.executable, "-c", "import os; os.abort()"], case, "all")
    assert ended == {"bits": "fail", "ms": [None, None], "errors": ["status -6"] * 2}
    lines = bench.line("1.0.0", "all", found | {"ended": ended}).splitlines()
    assert lines[0].split()[:3] == ["1.0.0", "on", "other"]
    assert lines[1].startswith("  fail, alone: ")
    assert lines[2:] == ["  ended: status -6"]


def test_the_newest_patch_of_each_version_counts(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "onnxruntime (1.20.1)\nAvailable versions: 1.20.1, 1.20.0, 1.19.10, 1.19.9, 1.18.1, 1.17.3\n  LATEST: 1.21.0\n"
    )
    monkeypatch.setattr(bench, "call", lambda *_: said)
    assert list(bench.versions()) == ["1.18.1", "1.19.10", "1.20.1"]
