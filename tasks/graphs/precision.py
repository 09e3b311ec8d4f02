"""How many bits the weights of each layer have: few where the answers change least for it.

Each layer alone is put on fewer bits, and what that does to the answers is their Kullback-Leibler divergence from those
before (the sensitivity of Cai et al. 2020, ZeroQ, arXiv:2001.00281).
"""

import copy
from collections.abc import Mapping

import numpy as np
import onnx

from tasks.core.progress import track
from tasks.graphs import rounding
from tasks.graphs.graph import Array
from tasks.runtime import session

BATCH = 32
WHOLE = 8
FEWER = (4, 2)  # which `packing` has forms for


def choose_bits(
    quantized: onnx.ModelProto, floats: Mapping[str, Array], images: Array, mean_bits: float
) -> dict[str, int]:
    """Return the bits of each layer's weights by their name in float: 8, 4 or 2, and `mean_bits` on average or fewer.

    The last layer keeps 8 and does not count. `floats` are the weights before quantization, `images` float32 (B, C, H,
    W). The layers give bits in the order of what they add to the divergence for each bit that it saves in the file.
    """
    layers = [(rounding.float_name(node), exact.size) for node, exact in rounding.round_weights(quantized, floats)[:-1]]
    before = _log_shares(quantized, images)
    divergence: dict[tuple[str, int], float] = {(name, WHOLE): 0.0 for name, _ in layers}
    for name, _ in track(layers, "sensitivity", len(layers)):
        for bits in FEWER:
            coarse = copy.deepcopy(quantized)
            rounding.coarsen(coarse, floats, {name: bits})
            divergence[name, bits] = _divergence(before, _log_shares(coarse, images))
    chosen = {name: WHOLE for name, _ in layers}
    sizes = dict(layers)
    while sum(sizes[name] * bits for name, bits in chosen.items()) > mean_bits * sum(sizes.values()):
        steps = [(name, fewer) for name, bits in chosen.items() for fewer in FEWER if fewer < bits]

        def price(step: tuple[str, int]) -> float:
            name, fewer = step
            return (divergence[step] - divergence[name, chosen[name]]) / (sizes[name] * (chosen[name] - fewer))

        name, fewer = min(steps, key=price)
        chosen[name] = fewer
    return chosen


def _log_shares(model: onnx.ModelProto, images: Array) -> Array:
    """The logarithm of the share that each class has in the answers, float64 (images, classes)."""
    ready = session.open_session(model.SerializeToString(), threads=1)
    parts = [session.logits(ready, images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    logits = np.concatenate(parts).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    found: Array = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return found


def _divergence(before: Array, after: Array) -> float:
    return float((np.exp(before) * (before - after)).sum(1).mean())
