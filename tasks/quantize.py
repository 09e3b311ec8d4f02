"""quantize: int8 by calibration on training images, or by training on its grid; leaves a QDQ ONNX.

All convolutions run in integers, but for those that the plan leaves in float32 because the device is faster so.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    qdq_loss_debug,
    quantize_static,
)
from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX, QUANT_INPUT_SUFFIX

from tasks import reduce
from tasks.core import codebook, config, dataset, files, graph, paths, rounding, session
from tasks.core.dataset import Preprocessing
from tasks.core.errors import StageError, run
from tasks.core.graph import Array

BATCH = 32
SEEN = 8  # images whose tensors are looked at, all at once
QUANTIZED = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration images batch by batch; `set_range` lets the histograms be built piece by piece."""

    def __init__(self, images: list[bytes], preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.set_range(0, len(images) // BATCH)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def set_range(self, start_index: int, end_index: int) -> None:
        self.pending = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        batch = next(self.pending, None)
        if batch is None:
            return None
        part = self.images[batch * BATCH : (batch + 1) * BATCH]
        return {"image": np.stack([dataset.tensor(image, self.preprocessing) for image in part])}


def calibration_images(train: Path, classes: tuple[str, ...], count: int) -> list[bytes]:
    """`count` images spread evenly over the train split, rounded down to whole batches; in the order of the split."""
    images, _ = dataset.read(train, classes)
    count = min(count, len(images)) // BATCH * BATCH
    if count == 0:
        raise StageError(f"{train} has {len(images)} images: calibration needs at least {BATCH}")
    return [images[index] for index in np.linspace(0, len(images) - 1, count).astype(int)]


def quantize(
    model: Path,
    images: list[bytes],
    preprocessing: Preprocessing,
    params: config.Quantize,
    float32: Collection[str] = (),
) -> onnx.ModelProto:
    """int8 QDQ: signed weights per channel, unsigned activations per tensor, ranges by percentile.

    The layers in `float32` stay as they are. With `params.factor` the weights are rounded by it instead. Krishnamoorthi
    2018, arXiv:1806.08342, for the scheme. `StageError` if a range is missing or not finite.
    """
    quantized = calibrated(model, images, preprocessing, params, float32)
    original = onnx.load(model)
    properties = {entry.key: entry.value for entry in original.metadata_props}
    graph.strip(quantized)
    onnx.helper.set_model_props(quantized, properties)
    check_scales(quantized)
    if params.factor is not None:
        rounding.apply(quantized, original, params.factor)
    return quantized


def calibrated(
    model: Path, images: list[bytes], preprocessing: Preprocessing, params: config.Quantize, float32: Collection[str]
) -> onnx.ModelProto:
    """As ONNX Runtime quantizes it, and idle sums with the scale of what they pass on; `StageError` if it cannot."""
    scales: dict[str, list[dict[str, Array]]] = {}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, quiet():
        target, ranges = (Path(scratch) / name for name in ("quantized.onnx", "ranges.json"))

        def attempt() -> onnx.ModelProto:
            quantize_static(
                model,
                target,
                Reader(images, preprocessing),
                calibration_cache_path=ranges,  # so that another round takes a second
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=[node.name for node in onnx.load(model).graph.node if layer(node) in float32],
                per_channel=True,
                reduce_range=params.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile,
                extra_options={
                    "CalibPercentile": params.percentile,
                    "CalibStridedMinMax": 1,
                    "TensorQuantOverrides": scales,
                },
            )
            return onnx.load(target)

        try:
            quantized = attempt()
            for _ in range(len(quantized.graph.node)):  # behind a sum there may be one that passes on its result
                if not (unlike := passed_on(quantized)):
                    break
                scales |= unlike
                quantized = attempt()
        except ValueError as error:
            raise StageError(f"{model} cannot be calibrated on these images: {error}") from None
    return quantized


def passed_on(quantized: onnx.ModelProto) -> dict[str, list[dict[str, Array]]]:
    """Of sums that add nothing, by tensor, the scale of what they pass on, where they have another one.

    A percentile is another one behind a max pooling, whose own scale is that of its input; `reduce` would then have to
    leave the sum, and all that makes the zeros that it adds. Where the zero points differ, it does.
    """
    constants, found = graph.Constants(quantized), {}
    sums = {quantizer.output[0]: (origin, quantizer) for _, origin, quantizer in reduce.idle_sums(quantized, constants)}
    for origin, quantizer in sums.values():
        (scale, zero), (own, own_zero) = ([constants.read(name) for name in n.input[1:3]] for n in (origin, quantizer))
        if scale is not None and zero is not None and scale != own and zero == own_zero:
            found[quantizer.input[0].removesuffix(QUANT_INPUT_SUFFIX)] = [{"scale": scale, "zero_point": zero}]
    return found


def layer(node: onnx.NodeProto) -> str:
    """The name of the layer in PyTorch whose weights the node reads, or an empty one."""
    weight = node.input[1] if node.op_type in graph.WEIGHTED else ""
    return str(weight.removesuffix(DEQUANT_OUTPUT_SUFFIX).removesuffix(".weight"))


def check_scales(model: onnx.ModelProto) -> None:
    """`StageError` names the first tensor whose scale is not a finite number above zero."""
    constants = graph.initializers(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = numpy_helper.to_array(constants[node.input[1]])
            if not (np.isfinite(scale) & (scale > 0)).all():
                raise StageError(f"the range of {node.input[0]} is not finite: calibration cannot set its scale")


def float_layers(model: Path) -> list[str]:
    """Convolutions and matrix products that the graph optimized by ONNX Runtime still computes in float, in order."""
    heavy = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
    return [
        f"{node.op_type} of {node.input[1]}" for node in session.optimized(model).graph.node if node.op_type in heavy
    ]


def sensitivities(
    model: Path, quantized: onnx.ModelProto, images: list[bytes], preprocessing: Preprocessing
) -> list[dict[str, Any]]:
    """By layer, the noisiest output first, what int8 does to it: signal to quantization noise in decibels.

    `weights_db` is of the layer's weights; `output_db` of its output on SEEN images, with all layers before it in int8
    too. Layers that stay in float, or that have no weights left, are not listed; codes that are shared later are not
    looked at.
    """
    inputs = {"image": np.stack([dataset.tensor(image, preprocessing) for image in images[:SEEN]])}
    found = []
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, quiet():
        coded, watched = (Path(scratch) / name for name in ("coded.onnx", "watched.onnx"))
        onnx.save(quantized, coded)
        pairs = qdq_loss_debug.create_weight_matching(str(model), str(coded))
        for path in (coded, model):
            qdq_loss_debug.modify_model_output_intermediate_tensors(path, watched)
            found.append(qdq_loss_debug.collect_activations(str(watched), iter([inputs])))
    outputs = qdq_loss_debug.compute_activation_error(qdq_loss_debug.create_activation_matching(*found))
    weights = qdq_loss_debug.compute_weight_error({name: one for name, one in pairs.items() if one["float"].any()})
    rows = [
        {"layer": name, "weights_db": round(weights[weight], 1), "output_db": round(outputs[result]["xmodel_err"], 1)}
        for node in quantized.graph.node
        if (name := layer(node))
        and (weight := f"{name}.weight") in weights
        and (result := node.output[0].removesuffix(QUANT_INPUT_SUFFIX)) in outputs
    ]
    return sorted(rows, key=lambda row: float(row["output_db"]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the advice, the warnings and the prints of onnxruntime.quantization."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(previous)


def shared(quantized: onnx.ModelProto, levels: int | None) -> onnx.ModelProto:
    """The model with so many nonzero codes in each weight tensor, or as it is."""
    if levels is None:
        return quantized
    model = copy.deepcopy(quantized)
    codebook.apply(model, levels)
    return model


def trained(quantized: onnx.ModelProto, params: config.Qat, levels: int | None) -> list[dict[str, float]]:
    """Train the quantized network in place, with the pruned one as its teacher; returns the history."""
    from tasks.core import backbone, qat, training  # torch, which nothing else here needs

    teacher, spec = backbone.load(paths.weights("prune"), paths.spec("prune"))
    training.make_deterministic(params.training.seed)
    begun = files.sha256_of(quantized.SerializeToString(deterministic=True))[:16]  # its scales are kept, too
    inputs = (paths.TRAIN, paths.VAL, paths.weights("prune"))
    checkpoint = training.checkpoint_path(f"quantize-{levels}-{begun}", *inputs, params=params, spec=spec)
    images, held_out = (training.Images(split, spec.preprocessing, spec.classes) for split in (paths.TRAIN, paths.VAL))
    floats = graph.initializers(onnx.load(paths.onnx("prune")))
    return qat.train(quantized, floats, teacher, params, images, held_out, checkpoint, levels)


def settled(
    quantized: onnx.ModelProto,
    original: onnx.ModelProto,
    params: config.Quantize,
    val_top1: Callable[[onnx.ModelProto], float],
) -> tuple[onnx.ModelProto, list[dict[str, float]]]:
    """The calibrated model, or the trained one where calibration costs too much and training helps; and its history."""
    if params.qat is None:
        return quantized, []
    before, after = val_top1(original), val_top1(shared(quantized, params.codebook))
    print(f"val top-1 {before:.2%}, calibrated {after:.2%}", flush=True)
    if round(before - after, 9) <= params.qat.max_top1_drop:  # 0.91 - 0.90 is not over 0.01
        return quantized, []
    candidate = copy.deepcopy(quantized)
    history = trained(candidate, params.qat, params.codebook)
    if val_top1(shared(candidate, params.codebook)) >= after:
        return candidate, history
    print("training on the int8 grid has made it worse: the calibrated model stays", flush=True)
    return quantized, history


def write(quantized: onnx.ModelProto, target: Path, in_float: int) -> list[str]:
    """Write the model; returns the matrix products that stay in float though they are not the first `in_float` layers.

    `StageError` if a convolution does.
    """
    with files.replacing(target) as (temporary,):
        temporary.write_bytes(quantized.SerializeToString())
        left = float_layers(temporary)[in_float:]
        convolutions = [name for name in left if "Conv" in name]
        if convolutions:
            raise StageError(f"{target} still computes in float: {', '.join(convolutions)}")
    return left


def main() -> None:
    params = config.load().quantize
    source = paths.onnx("prune")
    preprocessing, classes = session.description(session.open_session(source, threads=1))

    def val_top1(model: onnx.ModelProto) -> float:
        ready = session.open_session(model.SerializeToString(), threads=1)
        return session.top1(ready, dataset.batches(paths.VAL, preprocessing, classes, BATCH))

    images = calibration_images(paths.TRAIN, classes, params.calibration_images)
    print(f"calibrating on {len(images)} images", flush=True)
    float32 = files.read_json(paths.PLAN)["float32"]
    if float32:
        print(f"faster in float32 on the device, and left so: {', '.join(float32)}")
    original = onnx.load(source)
    calibrated = quantize(source, images, preprocessing, params, float32)
    lost: dict[str, int | float] = {}
    if params.factor is not None:
        lost = rounding.lost(calibrated, original, params.factor)
        print(
            f"factor {params.factor:g}: of {lost['rounded_weights']:,} weights {lost['clipped_weights']:,} are clipped "
            f"and {lost['zeroed_weights']:,} become 0 ({lost['zeroed_share']:.1%})"
        )
    quantized, history = settled(calibrated, original, params, val_top1)
    final = shared(quantized, params.codebook)
    left = write(final, paths.onnx("quantize"), len(float32))
    if left:
        print(f"matrix products that stay in float: {', '.join(left)}")
    metrics: dict[str, Any] = {
        "val_top1": val_top1(final),
        "calibration_images": len(images),
        "float32": float32,
        "float_layers": len(left),
        "qat": history,
        "sensitivities": sensitivities(source, quantized, images, preprocessing),
        **lost,
    }
    files.write_json(paths.report("quantize"), metrics)
    files.forget("quantize")
    print(f"quantize: val top-1 {metrics['val_top1']:.2%}, calibrated on {len(images)} training images")


if __name__ == "__main__":
    run(main)
