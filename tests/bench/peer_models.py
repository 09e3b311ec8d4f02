"""What one peer makes of a model, in the peers' own environment: `python peer_models.py PEER FOLDER`.

FOLDER holds finetune.onnx (fp32), quantize.onnx (Weighin's masked int8) and calibration.npy, float32 (batches, B, C, H,
W); PEER.onnx is left there. It imports nothing of Weighin, which is not installed there. `peers.py` runs it.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]


def feeds(folder: Path) -> Iterator[dict[str, Images]]:
    """The calibration images as the model takes them, batch by batch."""
    return ({"image": batch} for batch in np.load(folder / "calibration.npy"))


def reader(folder: Path) -> Any:
    """The calibration images as ONNX Runtime's quantizer reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pending = feeds(folder)

        def get_next(self) -> dict[str, Images] | None:
            return next(self.pending, None)

    return Reader()


def ort_default(folder: Path, target: Path) -> None:
    """ONNX Runtime's `quantize_static` as it comes."""
    from onnxruntime.quantization import quantize_static

    quantize_static(folder / "finetune.onnx", target, reader(folder))


def ort_u8s8(folder: Path, target: Path) -> None:
    """ONNX Runtime's `quantize_static` as its documentation advises for x86: pre-processed, U8S8, per channel."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "preprocessed.onnx"
    quant_pre_process(folder / "finetune.onnx", ready)
    quantize_static(
        ready,
        target,
        reader(folder),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def olive(folder: Path, target: Path) -> None:
    """Olive's pass OnnxStaticQuantization as it comes."""
    from olive import run
    from olive.data.registry import Registry

    class Calibration:
        def __init__(self, **_: Any) -> None:
            self.images = np.concatenate(np.load(folder / "calibration.npy"))

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[dict[str, Images], int]:
            return {"image": self.images[index]}, 0

    Registry.register_dataset("calibration")(Calibration)
    size = np.load(folder / "calibration.npy", mmap_mode="r").shape[1]
    data = {
        "name": "calibration",
        "load_dataset_config": {"type": "calibration"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"batch_size": size},
    }
    output = run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(folder / "finetune.onnx")},
            "data_configs": [data],
            "passes": {"quantization": {"type": "OnnxStaticQuantization", "data_config": "calibration"}},
            "cache_dir": str(folder / "olive-cache"),
            "output_dir": str(folder / "olive"),
        }
    )
    Path(output.get_best_candidate().model_path).replace(target)


def nncf(folder: Path, target: Path) -> None:
    """NNCF's post-training quantization as it comes."""
    import nncf
    import onnx

    quantized = nncf.quantize(onnx.load(folder / "finetune.onnx"), nncf.Dataset(list(feeds(folder))))
    onnx.save(quantized, target)


def onnxsim(folder: Path, target: Path) -> None:
    """onnxsim's structured pruning of QDQ graphs, then its simplification.

    It takes one share of the weakest channels from every layer it can cut: here the largest that changes no logit.
    """
    import onnx
    from onnxsim import apply_structured_pruning_qdq, simplify

    model = onnx.load(folder / "quantize.onnx")
    images = next(feeds(folder))
    expected = logits(model, images)
    for percent in range(99, -1, -1):
        pruned = apply_structured_pruning_qdq(model, sparsity=percent / 100)
        if np.array_equal(logits(pruned, images), expected):
            break
    onnx.save(simplify(pruned)[0], target)


def logits(model: Any, feed: dict[str, Images]) -> Images:
    """What the model answers, float32 (B, classes)."""
    from onnxruntime import InferenceSession

    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: Images = session.run(None, feed)[0]
    return answer


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "ort-default": ort_default,
    "ort-u8s8": ort_u8s8,
    "olive": olive,
    "nncf": nncf,
    "onnxsim": onnxsim,
}


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        PEERS[peer](folder, folder / f"{peer}.onnx")


if __name__ == "__main__":
    main()
