"""Golden outputs: what a model answers to fixed inputs, to be met again wherever its file is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from tasks.runtime import session

ODD = (1, 3, 7)  # sizes of batches
RUNS = 3

Arrays = dict[str, npt.NDArray[np.float32]]


def record(ready: ort.InferenceSession, images: session.Images) -> Arrays:
    """Return inputs and the logits that the model gives for them: `<case>.input` and `<case>.output`, float32.

    The cases are the first of the images, float32 (B, C, H, W), in batches of ODD sizes, and inputs far outside what
    images can be.
    """
    noise = np.random.default_rng(0).standard_normal((2, *images.shape[1:]), dtype=np.float32)
    cases = {f"batch-{size}": images[:size] for size in ODD} | {
        "zeros": np.zeros_like(noise),
        "noise": noise,
        "bright": np.full_like(noise, 1e3),
        "dark": np.full_like(noise, -1e3),
        "huge": noise * np.float32(1e37),
        "tiny": noise * np.float32(1e-40),
    }
    outputs = {name: session.logits(ready, inputs) for name, inputs in cases.items()}
    return {f"{name}.input": inputs for name, inputs in cases.items()} | {
        f"{name}.output": output for name, output in outputs.items()
    }


def compare(model: Path, threads: int, golden: Path) -> dict[str, Any]:
    """Run the model on the golden inputs in this process, and return by case how its outputs compare.

    Each case has `difference` (the largest of any logit; None if it is not finite), `same_top1` and `repeatable`.
    """
    ready = session.open_session(model, threads)
    cases: dict[str, object] = {}
    with np.load(golden, allow_pickle=False) as arrays:
        for name in sorted(key.removesuffix(".input") for key in arrays.files if key.endswith(".input")):
            inputs, expected = arrays[f"{name}.input"], arrays[f"{name}.output"]
            outputs = [session.logits(ready, inputs) for _ in range(RUNS)]
            difference = float(np.abs(outputs[0].astype(np.float64) - expected).max())
            cases[name] = {
                "difference": difference if np.isfinite(difference) else None,
                "same_top1": bool((outputs[0].argmax(1) == expected.argmax(1)).all()),
                "repeatable": all(output.tobytes() == outputs[0].tobytes() for output in outputs),
            }
    return cases
