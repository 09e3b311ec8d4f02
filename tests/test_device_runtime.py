"""The device's part of the code in an environment of its own, which has NumPy, Pillow and ONNX Runtime and no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import write_model

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "pillow", "onnxruntime")
CLASSIFY = """
import sys
from pathlib import Path
from tasks.images.preprocessing import preprocess
from tasks.runtime import session

ready = session.open_session(Path(sys.argv[1]), threads=1)
preprocessing, classes = session.description(ready)
for path in sys.argv[2:]:
    image = preprocess(Path(path).read_bytes(), preprocessing)
    print(classes[session.logits(ready, image[None]).argmax()])
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "pydantic", "pyarrow", "prefect", "dvc"}))
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    install = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), *PACKAGES]
    subprocess.run([str(python), *install], check=True, capture_output=True)
    return python


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_gets_its_label(device: Path, tmp_path: Path, channels: int) -> None:
    images = write_model(tmp_path / "model.onnx", channels)
    command = [str(device), "-c", CLASSIFY, str(tmp_path / "model.onnx"), *map(str, images)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["dark", "bright", "[]"]
