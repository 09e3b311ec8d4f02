"""quantize: int8 by calibration on training images, or by training on its grid; leaves a QDQ ONNX.

All convolutions run in integers, but for those that the plan leaves in float32 because the device is faster so.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from tasks.budget.plan import read_plan
from tasks.core import config, files, paths, shares
from tasks.core.errors import StageError, run
from tasks.graphs import calibration, channels, codebook, compact, graph, precision, rounding
from tasks.graphs.optimized import float_layers
from tasks.images import splits
from tasks.images.preprocessing import Preprocessing, preprocess
from tasks.runtime import session

if TYPE_CHECKING:
    import torch

    from tasks.nets import qat

BATCH = 32
SENSITIVITY_IMAGES = 128  # by which layers are compared
MAX_QAT_GAP = 0.05  # of the spread of the logits: more, and PyTorch has another network than ONNX Runtime runs


def calibration_images(train: Path, classes: tuple[str, ...], count: int) -> list[bytes]:
    """`count` images spread evenly over the train split, rounded down to whole batches; in the order of the split."""
    images, _ = splits.read(train, classes)
    count = min(count, len(images)) // BATCH * BATCH
    if count == 0:
        raise StageError(f"{train} has {len(images)} images: calibration needs at least {BATCH}")
    return [images[index] for index in np.linspace(0, len(images) - 1, count).astype(int)]


def with_codebook(quantized: onnx.ModelProto, grid: config.Grid) -> onnx.ModelProto:
    """The model with so many nonzero codes in each weight tensor as the grid's codebook has, or as it is."""
    if grid.codebook is None:
        return quantized
    model = copy.deepcopy(quantized)
    codebook.apply(model, grid.codebook)
    return model


class Slim(NamedTuple):
    """A quantized network without its dead channels, which is faster to run and to train."""

    network: onnx.ModelProto
    floats: dict[str, graph.Array]  # its weights before quantization, by their names
    places: channels.Places  # where its constants are in the whole


def slim_down(quantized: onnx.ModelProto, original: onnx.ModelProto) -> Slim:
    """The network without what no answer depends on."""
    slim, places = channels.cut(quantized)
    floats = {
        name: values[places.get(f"{name}{TENSOR_NAME_QUANT_SUFFIX}", ...)]
        for name, values in graph.arrays(original).items()
    }
    return Slim(slim, floats, places)


def choose_bits(
    quantized: onnx.ModelProto,
    original: onnx.ModelProto,
    grid: config.Grid,
    images: list[bytes],
    preprocessing: Preprocessing,
) -> dict[str, int]:
    """How many bits the grid gives each layer's weights, by their names; empty if all have 8."""
    if not isinstance(grid, config.Mixed):
        return {}
    slim = slim_down(quantized, original)
    shown = np.stack([preprocess(image, preprocessing) for image in images[:SENSITIVITY_IMAGES]])
    chosen = precision.choose_bits(slim.network, slim.floats, shown, grid.mean_bits)
    told = ", ".join(f"{bits} bits in {list(chosen.values()).count(bits)}" for bits in sorted(set(chosen.values())))
    print(f"layers by what fewer bits do to answers: {told}", flush=True)
    return chosen


def trainable(
    quantized: onnx.ModelProto, floats: Mapping[str, graph.Array], images: "torch.Tensor", bits: Mapping[str, int]
) -> "qat.Network":
    """Return the quantized network in PyTorch; `floats` are its weights before quantization, by name, as are `bits`.

    `StageError` if PyTorch does not come to the logits that ONNX Runtime has for these images, float32 (B, C, H, W).
    """
    import torch

    from tasks.nets import qat

    net = qat.Network(quantized, floats, bits)
    with torch.inference_mode():
        found = net(images).numpy()
    expected = session.logits(session.open_session(quantized.SerializeToString(), threads=1), images.numpy())
    if not np.abs(found - expected).mean() <= MAX_QAT_GAP * expected.std():
        raise StageError("quantize.grid.qat cannot train this network: PyTorch runs it otherwise than ONNX Runtime")
    return net


def train_qat(
    quantized: onnx.ModelProto, params: config.Qat, levels: int | None, bits: Mapping[str, int]
) -> list[dict[str, float]]:
    """Train the quantized network in place, with the pruned one as its teacher; returns the history.

    Both are without their dead channels, whose places stay as they are. With `levels` each weight tensor keeps
    to so many nonzero codes; where `bits` has fewer than 8 for it, to those that they hold.
    """
    import torch

    from tasks.nets import distillation, qat, training  # torch, which nothing else here needs

    source = paths.onnx("prune")
    preprocessing, classes = session.description(session.open_session(source, threads=1))
    training.make_deterministic(params.training.seed, params.training.threads)
    begun = files.sha256_of(quantized.SerializeToString(deterministic=True))[:16]  # its scales are kept, too
    inputs = (paths.TRAIN, paths.VAL, source)
    checkpoint = training.checkpoint_path(f"quantize-{levels}-{begun}", *inputs, described_by=(params,))
    images, held_out = (training.Images(split, preprocessing, classes) for split in (paths.TRAIN, paths.VAL))
    original = onnx.load(source)
    slim = slim_down(quantized, original)
    teacher = qat.Network(channels.cut(original)[0], {}, {})
    example = torch.stack([held_out[index][0] for index in range(min(len(held_out), 32))])
    net = trainable(slim.network, slim.floats, example, bits)
    if levels:
        net.share_codes(levels)
    history = distillation.distill(net, teacher, params, images, held_out, checkpoint=checkpoint)
    net.write(slim.network)
    channels.paste(quantized, slim.network, slim.places)
    return history


def choose_model(
    quantized: onnx.ModelProto,
    original: onnx.ModelProto,
    grid: config.Grid,
    bits: Mapping[str, int],
    val_top1: Callable[[onnx.ModelProto], float],
) -> tuple[onnx.ModelProto, list[dict[str, float]]]:
    """The calibrated model, or the trained one where calibration costs too much and training helps; and its history."""
    if grid.qat is None:
        return quantized, []
    if bits:
        quantized = copy.deepcopy(quantized)
        rounding.coarsen(quantized, graph.arrays(original), bits)
    before, after = val_top1(original), val_top1(with_codebook(quantized, grid))
    print(f"val top-1 {before:.2%}, calibrated {after:.2%}", flush=True)
    if shares.subtract(before, after) <= grid.qat.max_top1_drop:
        return quantized, []
    candidate = copy.deepcopy(quantized)
    history = train_qat(candidate, grid.qat, grid.codebook, bits)
    if val_top1(with_codebook(candidate, grid)) >= after:
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


def count_lost(calibrated: onnx.ModelProto, original: onnx.ModelProto, grid: config.Grid) -> dict[str, int | float]:
    """What rounding with one factor for all weights does to them, for the report; nothing on other grids."""
    if not isinstance(grid, config.ByFactor):
        return {}
    lost = rounding.lost(calibrated, graph.arrays(original), grid.factor)
    print(
        f"factor {grid.factor:g}: of {lost['rounded_weights']:,} weights {lost['clipped_weights']:,} are clipped "
        f"and {lost['zeroed_weights']:,} become 0 ({lost['zeroed_share']:.1%})"
    )
    return lost


def main() -> None:
    params = config.load().quantize
    if params.grid.qat:
        from tasks.nets import processes  # torch, which nothing but training needs here

        if processes.run_together(main, params.grid.qat.training.devices):
            return
    source = paths.onnx("prune")
    preprocessing, classes = session.description(session.open_session(source, threads=1))

    def val_top1(model: onnx.ModelProto) -> float:
        ready = session.open_session(model.SerializeToString(), threads=1)
        return session.top1(ready, splits.batches(paths.VAL, preprocessing, classes, BATCH))

    images = calibration_images(paths.TRAIN, classes, params.calibration_images)
    print(f"calibrating on {len(images)} images", flush=True)
    float32 = read_plan(paths.PLAN).float32
    if float32:
        print(f"faster in float32 on the device, and left so: {', '.join(float32)}")
    original = onnx.load(source)
    calibrated = calibration.quantize(source, images, preprocessing, params, float32)
    lost = count_lost(calibrated, original, params.grid)
    bits = choose_bits(calibrated, original, params.grid, images, preprocessing)
    quantized, history = choose_model(calibrated, original, params.grid, bits, val_top1)
    if params.grid.qat:
        processes.end_helpers()
    final = with_codebook(quantized, params.grid)
    compact.round_biases(final)
    left = write(final, paths.onnx("quantize"), len(float32))
    if left:
        print(f"matrix products that stay in float: {', '.join(left)}")
    metrics: dict[str, object] = {
        "val_top1": val_top1(final),
        "calibration_images": len(images),
        "float32": float32,
        "float_layers": len(left),
        "bits": bits,
        "qat": history,
        "sensitivities": calibration.sensitivities(source, quantized, images, preprocessing),
        **lost,
    }
    files.write_json(paths.report("quantize"), metrics)
    files.forget("quantize")
    print(f"quantize: val top-1 {metrics['val_top1']:.2%}, calibrated on {len(images)} training images")


if __name__ == "__main__":
    run(main)
