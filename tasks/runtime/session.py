"""ONNX Runtime sessions as the device would open them: importing this brings numpy and ONNX Runtime only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tasks.core.errors import StageError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from tasks.images.preprocessing import Preprocessing

Labels = npt.NDArray[np.int64]
Images = npt.NDArray[np.float32]
Logits = npt.NDArray[np.float32]


def open_session(
    model: Path | bytes, threads: int, optimized: Path | None = None, optimize: bool = True
) -> ort.InferenceSession:
    """A CPU session with so many intra-op threads; `optimized` receives the graph that is really run.

    Without `optimize` that is the one in the file.

    The model is a file or its content. `StageError` if ONNX Runtime does not load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads of other sessions must not disturb
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime's own errors have no common base but Exception
        name = model if isinstance(model, Path) else "the model"
        raise StageError(f"{name} does not load in ONNX Runtime: {first_line(error)}") from None


def logits(session: ort.InferenceSession, images: Images) -> Logits:
    """float32 (B, classes) from float32 (B, C, H, W); `StageError` if ONNX Runtime cannot compute them."""
    try:
        result: Logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
        # as above
        raise StageError(f"the model does not run in ONNX Runtime: {first_line(error)}") from None
    return result


def top1(session: ort.InferenceSession, batches: Iterable[tuple[Images, Labels]]) -> float:
    """The share of images whose largest logit is the right one."""
    right = [logits(session, images).argmax(1) == labels for images, labels in batches]
    return float(np.concatenate(right).mean())


def description(session: ort.InferenceSession) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return the preprocessing and the class names in the file's metadata; `StageError` if it has none."""
    from tasks.images.preprocessing import parse_description  # brings Pillow, which timing a model does without

    text = session.get_modelmeta().custom_metadata_map.get("weighin")
    if text is None:
        raise StageError("the ONNX file has no preprocessing in its metadata: run the stage that wrote it again")
    return parse_description(text)
