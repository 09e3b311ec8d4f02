"""precision: bits go first from where the answers change least for each bit that is saved, and only as many as must."""

from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import onnx
import pytest
from conftest import MASKED, Network

from tasks.graphs import graph, precision, rounding
from tasks.runtime import session

Networks = Callable[[str], Network]


def images_of(network: Network, count: int = 40) -> graph.Array:
    return np.random.default_rng(0).standard_normal((count, *network.preprocessing.shape), np.float32)


def sizes_of(model: onnx.ModelProto, floats: Mapping[str, graph.Array]) -> dict[str, int]:
    return {rounding.float_name(node): exact.size for node, exact in rounding.round_weights(model, floats)}


@pytest.mark.parametrize(
    ("name", "mean_bits"), [*((name, 3) for name in MASKED), *(("lenet-5", bits) for bits in (2, 4.5, 8))]
)
def test_no_more_bits_than_asked_and_none_that_need_not_go(name: str, mean_bits: float, networks: Networks) -> None:
    network = networks(name)
    floats = graph.arrays(onnx.load(network.path))
    sizes = sizes_of(network.quantized, floats)
    *others, _last = sizes
    bits = precision.choose_bits(network.quantized, floats, images_of(network, 8), mean_bits)
    assert list(bits) == others
    assert set(bits.values()) <= {8, 4, 2}
    limit = mean_bits * sum(sizes[one] for one in others)
    spent = sum(sizes[one] * bits[one] for one in others)
    assert spent <= limit
    if mean_bits == 8:
        assert set(bits.values()) == {8}
    if mean_bits == 2:
        assert set(bits.values()) == {2}
    largest = max(sizes[one] * (8 - bits[one]) for one in others)  # the last one that gave bits may have given too many
    assert spent + largest >= limit


def divergence(model: onnx.ModelProto, other: onnx.ModelProto, images: graph.Array) -> float:
    """The mean Kullback-Leibler divergence, written out."""
    found = []
    for one in (model, other):
        answers = session.logits(session.open_session(one.SerializeToString(), 1), images).astype(np.float64)
        shares = np.exp(answers - answers.max(1, keepdims=True))
        found.append(shares / shares.sum(1, keepdims=True))
    return float(np.mean((found[0] * np.log(found[0] / found[1])).sum(1)))


def test_of_all_ways_it_takes_the_one_with_the_least_change(networks: Networks) -> None:
    """On three layers all 27 ways can be tried; the greedy one is the best of those with as few bits."""
    network = networks("lenet-5")
    floats, images = graph.arrays(onnx.load(network.path)), images_of(network)
    *names, _last = sizes_of(network.quantized, floats)
    sizes = sizes_of(network.quantized, floats)
    change: dict[tuple[str, int], float] = {}
    for name, bits in product(names, (8, 4, 2)):
        coarse = onnx.ModelProto()
        coarse.CopyFrom(network.quantized)
        rounding.coarsen(coarse, floats, {name: bits})
        change[name, bits] = divergence(network.quantized, coarse, images)

    def spent(ways: Mapping[str, int]) -> int:
        return sum(sizes[name] * bits for name, bits in ways.items())

    def total(ways: Mapping[str, int]) -> float:
        return sum(change[way] for way in ways.items())

    every = [dict(zip(names, ways, strict=True)) for ways in product((8, 4, 2), repeat=len(names))]
    seen = set()
    for mean_bits in (7.99, 7.9, 6, 4.1, 3.99, 3.9, 3, 2.01):
        found = precision.choose_bits(network.quantized, floats, images, mean_bits)
        seen.add(tuple(found.values()))
        assert total(found) <= min(total(ways) for ways in every if spent(ways) <= spent(found)) + 1e-12
    assert len(seen) > 3
