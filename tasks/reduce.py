"""reduce: remove from the quantized ONNX what pruning zeroed, and prove that no logit changes by one bit.

Tensors that must keep the same channels (through Add, activations, pooling, depthwise convolutions, Q/DQ) form a
class. A channel of a class goes when everything that produces it makes exact zeros, or when everything that
reads it has zero weights for it; where convolutions make whole vectors of channels, as many stay as fill one. With
integer accumulation the removal is exact; that is then checked on every test image. (With its optimizations turned
off ONNX Runtime computes the same file in float32, and splits a long sum by its place: that is exact, too, where what
goes comes last, as `prune` leaves it. Elsewhere a value may then be rounded otherwise by a step.)
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.progress import track
from tasks.graphs import channels, compact, graph, packing, sums
from tasks.images import splits
from tasks.runtime import session

BATCH = 250
TRIED = 200  # random inputs


def reduce(quantized: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The same function without what is dead, and the record of what went; the argument stays as it is."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    nodes, before = len(model.graph.node), _weight_shapes(model)
    graph.drop_dead(model)
    removed = sums.remove_blocks(model)
    while channels.remove_channels(model):
        removed += sums.remove_blocks(model)  # a layer may have read nothing but channels that are gone
    cut = [
        {"layer": name, "weight_before": before[name], "weight_after": after}
        for name, after in _weight_shapes(model).items()
        if before[name] != after
    ]
    nodes -= len(model.graph.node)
    compact.drop_implied_constants(model)
    graph.strip(model)
    compact.merge_equal_constants(model)
    compact.rename(model)
    onnx.helper.set_model_props(model, {key: value for key, value in properties.items() if key == "weighin"})
    onnx.checker.check_model(model, full_check=True)
    record = {"residual_sums_removed": removed, "layers": cut, "nodes_removed": nodes}
    return model, record


def _weight_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {layer.target: list(layer.weight.shape) for layer in channels.layers(model, graph.Constants(model))}


def prove(before: Path, after: Path, test: Path, threads: int, optimize: bool = True) -> int:
    """Compare the logits of two models bit by bit on every image; returns how many images were compared.

    With ONNX Runtime's optimizations, or without. `StageError` names the first image and logit that differ.
    """
    first, second = (session.open_session(path, threads, optimize=optimize) for path in (before, after))
    preprocessing, names = session.description(first)
    count = 0
    for images, _ in splits.batches(test, preprocessing, names, BATCH):
        expected, found = session.logits(first, images), session.logits(second, images)
        different = np.argwhere(expected.view(np.uint32) != found.view(np.uint32))
        if len(different):
            row, column = different[0]
            raise StageError(
                f"{after} is not bit-identical to {before}: image {count + row} of {test}, logit {column} "
                f"({names[column]}) is {found[row, column]!r}, not {expected[row, column]!r}"
            )
        count += len(images)
    if count == 0:
        raise StageError(f"{test} has no images: they are what the proof is made on")
    return count


def reduce_file(source: Path, target: Path, pack: bool = True) -> dict[str, Any]:
    """Write the reduced form of any quantized ONNX file that takes images, and return the record of what went.

    It is compared bit by bit on TRIED random inputs, with ONNX Runtime's optimizations. `StageError` if the file is no
    model with one input of float32, or if a bit differs; then nothing is written.
    """
    if not source.is_file():
        raise StageError(f"{source} is no file: name a quantized ONNX file")
    first, size = session.open_session(source, threads=1), _size_on_disk(source)
    inputs = _random_inputs(source, first)
    original = packing.unpack(onnx.load(source))
    if any(one.HasField("g") or one.graphs for node in original.graph.node for one in node.attribute):
        raise StageError(f"{source} has graphs inside of nodes, such as If: it cannot be reduced")
    model, record = reduce(original)
    model = packing.pack(model) if pack else model
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in original.metadata_props})
    second = session.open_session(model.SerializeToString(), threads=1)
    for number, images in enumerate(track(inputs, "comparing")):
        pairs = zip(*(one.run(None, {one.get_inputs()[0].name: images}) for one in (first, second)), strict=True)
        if any(before.tobytes() != after.tobytes() for before, after in pairs):
            raise StageError(f"{source} cannot be reduced: an output differs on random input {number}")
    files.write_bytes(target, model.SerializeToString())
    sizes = {"size_bytes_before": size, "size_bytes_after": target.stat().st_size}
    return {"bit_identical_inputs": len(inputs), **sizes, **record}


def _size_on_disk(source: Path) -> int:
    """Bytes of an ONNX file, with those of the files beside it that hold its tensors."""
    tensors = onnx.load(source, load_external_data=False).graph.initializer
    entries = [entry for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    return sum(path.stat().st_size for path in {source, *(source.parent / entry.value for entry in entries)})


def _random_inputs(source: Path, opened: ort.InferenceSession) -> list[session.Images]:
    """Zeros, normal and large values in the shape of the model's input."""
    taken = opened.get_inputs()
    shape = taken[0].shape if len(taken) == 1 else []
    if not shape or taken[0].type != "tensor(float)" or not all(isinstance(size, int) for size in shape[1:]):
        raise StageError(f"{source} does not take one batch of float32 images of a fixed size")
    size = [shape[0] if isinstance(shape[0], int) else 1, *shape[1:]]
    rng = np.random.default_rng(0)
    scales = [0.0, *np.logspace(-2, 3, TRIED - 1)]
    return [(rng.standard_normal(size) * scale).astype(np.float32) for scale in scales]


def main() -> None:
    params = config.load().reduce
    source, target = paths.onnx("quantize"), paths.onnx("reduce")
    session.open_session(source, threads=1)  # a file that is no model ends here, in one sentence
    model, record = reduce(onnx.load(source))
    packed = packing.pack(model) if params.pack == "auto" else model
    with files.replacing(target) as (temporary,):
        temporary.write_bytes(packed.SerializeToString())
        images = prove(source, temporary, paths.TEST, threads=1)
        with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
            plain = Path(scratch) / "plain.onnx"
            plain.write_bytes(model.SerializeToString())
            prove(plain, temporary, paths.TEST, threads=1, optimize=False)
    files.write_bytes(paths.PACKED, files.pack(target.read_bytes()))
    sizes = {
        "size_bytes_before": source.stat().st_size,
        "size_bytes_plain": model.ByteSize(),
        "size_bytes_after": target.stat().st_size,
    }
    files.write_json(paths.report("reduce"), {"bit_identical_images": images, **sizes, **record})
    print(
        f"reduce: {sizes['size_bytes_before']:,} to {sizes['size_bytes_after']:,} bytes, "
        f"logits bit-identical on {images} test images"
    )


if __name__ == "__main__":
    run(main)
