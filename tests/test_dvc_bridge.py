"""What DVC says of a stage that failed, in one sentence."""

import json
import subprocess
from pathlib import Path

import pytest
from workspace import BIN

from flows import dvc_bridge
from tasks.core.errors import StageError


@pytest.mark.parametrize(
    ("stage", "code", "sentence"),
    [
        (
            "finetune",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "finetune: it was killed, as the kernel does where memory runs out: then lower "
            "finetune.training.batch_size or finetune.image_size in params.yaml",
        ),
        (
            "reduce",
            "raise SystemExit(137)",  # as a shell has it
            "reduce: it was killed, as the kernel does where memory runs out: then lower finetune.image_size in "
            "params.yaml",
        ),
        (
            "finetune",
            "raise SystemExit(9)",
            "finetune: ERROR: failed to reproduce 'finetune': failed to run: python -m tasks.finetune, exited with 9",
        ),
    ],
)
def test_a_stage_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, code: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([BIN / "dvc", "init", "--quiet", "--no-scm"], check=True)
    Path("dvc.yaml").write_text(json.dumps({"stages": {stage: {"cmd": f"python -m tasks.{stage}", "outs": ["made"]}}}))
    Path("tasks").mkdir()
    Path("tasks/__init__.py").touch()
    Path(f"tasks/{stage}.py").write_text(code)
    with pytest.raises(StageError) as caught:
        dvc_bridge.run(stage, lambda _: None)
    assert str(caught.value) == sentence
