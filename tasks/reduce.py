"""reduce: remove from the quantized ONNX what pruning zeroed, and prove that no logit changes by one bit.

Tensors that must keep the same channels (through Add, activations, pooling, depthwise convolutions, Q/DQ) form a
class. A channel of a class goes when everything that produces it makes exact zeros, or when everything that
reads it has zero weights for it; where convolutions make whole vectors of channels, as many stay as fill one. With
integer accumulation the removal is exact; that is then checked on every test image. (With its optimizations turned
off ONNX Runtime computes the same file in float32, and splits a long sum by its place: that is exact, too, where what
goes comes last, as `prune` leaves it. Elsewhere a value may then be rounded otherwise by a step.)
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.graphs import channels, compact, graph, sums
from tasks.images import splits
from tasks.runtime import session

BATCH = 250


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


def prove(before: Path, after: Path, test: Path, threads: int) -> int:
    """Compare the logits of two models bit by bit on every image; returns how many images were compared.

    `StageError` names the first image and logit that differ.
    """
    first, second = (session.open_session(path, threads) for path in (before, after))
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


def main() -> None:
    config.load()
    source, target = paths.onnx("quantize"), paths.onnx("reduce")
    session.open_session(source, threads=1)  # a file that is no model ends here, in one sentence
    model, record = reduce(onnx.load(source))
    with files.replacing(target) as (temporary,):
        temporary.write_bytes(model.SerializeToString())
        images = prove(source, temporary, paths.TEST, threads=1)
    files.write_bytes(paths.PACKED, files.pack(target.read_bytes()))
    sizes = {"size_bytes_before": source.stat().st_size, "size_bytes_after": target.stat().st_size}
    files.write_json(paths.report("reduce"), {"bit_identical_images": images, **sizes, **record})
    print(
        f"reduce: {sizes['size_bytes_before']:,} to {sizes['size_bytes_after']:,} bytes, "
        f"logits bit-identical on {images} test images"
    )


if __name__ == "__main__":
    run(main)
