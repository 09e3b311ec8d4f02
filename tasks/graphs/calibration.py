"""int8 by calibration: ranges of activations from training images, and what int8 then does to each layer."""

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Collection, Iterator
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

from tasks.core import config
from tasks.core.errors import StageError
from tasks.graphs import graph, rounding, sums
from tasks.graphs.graph import Array
from tasks.images.preprocessing import Preprocessing, preprocess

BATCH = 32
SENSITIVITY_IMAGES = 8  # images whose tensors are looked at, all at once, unless they are large
ACTIVATIONS_BYTES = 192 * 2**20  # of all layers for the images that are looked at at once; training holds more


QUANTIZED = ("Conv", "Gemm", "MatMul", "Add", "Clip", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration images batch by batch; `set_range` lets the histograms be built piece by piece."""

    def __init__(self, images: list[bytes], preprocessing: Preprocessing, batch: int = BATCH) -> None:
        self.images, self.preprocessing, self.batch = images, preprocessing, batch
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def set_range(self, start_index: int, end_index: int) -> None:
        self.pending = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        batch = next(self.pending, None)
        if batch is None:
            return None
        part = self.images[batch * self.batch : (batch + 1) * self.batch]
        return {"image": np.stack([preprocess(image, self.preprocessing) for image in part])}


def images_at_once(model: Path, most: int) -> int:
    """How many images go through a model of which every activation is kept: a power of two, `most` at most.

    It depends on the model alone, since other batches make other histograms.
    """
    network = onnx.load(model)
    known = graph.shapes(network)
    each = 4 * sum(math.prod(known.get(name, ())) for node in network.graph.node for name in node.output)
    return min(most, 1 << int(math.log2(max(ACTIVATIONS_BYTES / max(each, 1), 1))))


def quantize(
    model: Path,
    images: list[bytes],
    preprocessing: Preprocessing,
    params: config.Quantize,
    float32: Collection[str] = (),
) -> onnx.ModelProto:
    """int8 QDQ: signed weights per channel, unsigned activations per tensor, ranges by percentile.

    The steps of weights, the biases and the layers in `float32`, which are not quantized, have values that float16
    holds. By a factor, the weights are rounded by it instead. Krishnamoorthi 2018, arXiv:1806.08342, for the
    scheme. `StageError` if a range is missing or not finite.
    """
    quantized = calibrate(model, images, preprocessing, params, float32)
    original = onnx.load(model)
    properties = {entry.key: entry.value for entry in original.metadata_props}
    graph.strip(quantized)
    onnx.helper.set_model_props(quantized, properties)
    check_scales(quantized)
    if not isinstance(params.grid, config.ByFactor):
        rounding.round_to_halves(quantized, graph.arrays(original))
    else:
        rounding.apply(quantized, graph.arrays(original), params.grid.factor)
    return quantized


def calibrate(
    model: Path, images: list[bytes], preprocessing: Preprocessing, params: config.Quantize, float32: Collection[str]
) -> onnx.ModelProto:
    """As ONNX Runtime quantizes it, and idle sums with the scale of what they pass on; `StageError` if it cannot."""
    scales: dict[str, list[dict[str, Array]]] = {}
    batch = images_at_once(model, BATCH)
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, quiet():
        target, ranges = (Path(scratch) / name for name in ("quantized.onnx", "ranges.json"))

        def attempt() -> onnx.ModelProto:
            quantize_static(
                model,
                target,
                Reader(images, preprocessing, batch),
                calibration_cache_path=ranges,  # so that another round takes a second
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=[node.name for node in onnx.load(model).graph.node if layer(node) in float32],
                per_channel=True,
                reduce_range=isinstance(params.grid, config.Int7),
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
                if not (unlike := identity_add_scales(quantized)):
                    break
                scales |= unlike
                quantized = attempt()
        except ValueError as error:
            raise StageError(f"{model} cannot be calibrated on these images: {error}") from None
    return quantized


def identity_add_scales(quantized: onnx.ModelProto) -> dict[str, list[dict[str, Array]]]:
    """Of sums that add nothing, by tensor, the scale of what they pass on, where they have another one.

    A percentile is another one behind a max pooling, whose own scale is that of its input; `reduce` would then have to
    leave the sum, and all that makes the zeros that it adds. Where the zero points differ, it does.
    """
    constants, found = graph.Constants(quantized), {}
    idle = {quantizer.output[0]: (origin, quantizer) for _, origin, quantizer in sums.idle_sums(quantized, constants)}
    for origin, quantizer in idle.values():
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


def sensitivities(
    model: Path, quantized: onnx.ModelProto, images: list[bytes], preprocessing: Preprocessing
) -> list[dict[str, Any]]:
    """By layer, the noisiest output first, what int8 does to it: signal to quantization noise in decibels.

    `weights_db` is of the layer's weights; `output_db` of its output on up to SENSITIVITY_IMAGES images, with all
    layers before it in int8 too. Layers that stay in float, or that have no weights left, are not listed; codes that
    are shared later are not looked at.
    """
    count = images_at_once(model, SENSITIVITY_IMAGES)
    inputs = {"image": np.stack([preprocess(image, preprocessing) for image in images[:count]])}
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
