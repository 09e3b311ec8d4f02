"""The device's table: what each int8 layer that the backbone could be cut to takes on this machine, and whole networks.

A network is cut to shares of its bytes, and runs in ONNX Runtime as the pipeline would leave it: with random weights,
since neither bytes nor milliseconds depend on them.
"""

import copy
import functools
import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image
from torch import nn

from tasks import benchmark, prune, quantize, reduce
from tasks.core import allocation, backbone, config, costs, dataset, files, importance, masks
from tasks.core.export import export
from tasks.core.progress import track

ROUNDS = 5  # what disturbs the machine for a few seconds is in one of them
SHARES = tuple(0.5**power for power in range(8))  # of the bytes of the whole network
IMAGES = 32


def profile(params: config.Params, path: Path) -> dict[str, Any]:
    """Measure what the backbone in the parameters needs, and write it to `path`; returns what the table is about.

    Layers of other backbones stay, if they were measured on the same machine, with as many threads and this runtime;
    their networks do not.
    """
    threads = params.benchmark.threads
    about = {"processor": benchmark.processor(), "threads": threads, "onnxruntime": ort.__version__}
    known: costs.Table = {}
    if path.exists() and {key: files.read_json(path).get(key) for key in about} == about:
        known = {point: latency for point, latency in costs.read(path).items() if point[0] != costs.NETWORK}
    wanted = sorted(allocation.needed(network(params)))
    rounds = [costs.measure(*point, threads) for point in track(wanted * ROUNDS, "measuring layers")]
    measured = {point: statistics.median(rounds[place :: len(wanted)]) for place, point in enumerate(wanted)}
    whole = networks(params, measured)
    costs.write(path, known | measured | whole, about)
    return about | {"layers": len(measured), "networks": len(whole), "kept": len(known.keys() - measured.keys())}


def network(params: config.Params) -> allocation.Network:
    """The backbone as `allocation` sees it, with nothing known of what is missed."""
    net, spec, effects = untrained(params)
    return survey(net, effects, spec)[-1]


def networks(params: config.Params, table: costs.Table) -> costs.Table:
    """Rows of what whole networks take beside their layers, by the bytes of these."""
    net, spec, effects = untrained(params)
    look = functools.partial(survey, spec=spec)
    *_, whole = look(net, effects)
    size = allocation.allocate(whole, allocation.ANYTHING, table).cost.size_bytes
    images = list(noise(spec.preprocessing))
    planned: list[costs.Cost] = []
    models: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        for share in track(SHARES, "cutting networks"):
            slim, path = copy.deepcopy(net), Path(scratch) / f"{share}.onnx"
            limits = allocation.Limits(size * share, None)
            plan = prune.within(slim, limits, whole, table, look)
            export(slim, spec, path)
            quantized = quantize.quantize(path, images, spec.preprocessing, params.quantize, plan["float32"])
            onnx.save(reduce.reduce(quantized)[0], path)
            planned.append(costs.Cost(plan["size_bytes"], plan["latency_ms"]))
            models[path.stem] = path
        rounds = [benchmark.latencies(models, params.benchmark) for _ in range(ROUNDS)]
    times = [statistics.median(float(np.median(found[name])) for found in rounds) for name in models]
    return {
        (costs.NETWORK, round(cost.size_bytes), round(cost.size_bytes)): latency - cost.latency_ms
        for cost, latency in zip(planned, times, strict=True)
    }


def untrained(params: config.Params) -> tuple[nn.Module, backbone.Spec, dict[str, float]]:
    """The backbone with random weights, and its residual blocks, all missed alike."""
    name = params.finetune.backbone
    preprocessing = backbone.preprocessing(name, params.finetune.image_size)
    torch.manual_seed(0)
    net = backbone.create(name, len(params.classes), preprocessing).eval()
    spec = backbone.Spec(
        backbone=name, classes=params.classes, preprocessing=preprocessing, weights={"source": "random"}
    )
    return net, spec, dict.fromkeys(masks.residual_blocks(net, torch.randn(2, *preprocessing.shape)), 1.0)


def survey(net: nn.Module, effects: dict[str, float], spec: backbone.Spec) -> prune.Survey:
    """What `prune.survey` finds where all channels are missed alike."""
    example = torch.zeros(2, *spec.preprocessing.shape)
    with masks.known_structure():
        graph, groups = masks.channel_groups(net, example, backbone.head(net))
    scores = [torch.ones(len(group[0].idxs)) for group in groups]
    return graph, groups, scores, importance.network(net, groups, scores, effects, example)


def noise(preprocessing: dataset.Preprocessing) -> Iterator[bytes]:
    """Encoded images to calibrate on."""
    random = np.random.default_rng(0)
    side, channels = preprocessing.size, preprocessing.channels
    for _ in range(IMAGES):
        stream = io.BytesIO()
        pixels = random.integers(0, 256, (side, side, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(stream, "PNG")
        yield stream.getvalue()
