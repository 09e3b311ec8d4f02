"""The device's table: what each int8 layer that the backbone could be cut to takes on this machine, and whole networks.

A network is cut to a limit of milliseconds, between those of the whole and of the least that can be left of it, and
runs in ONNX Runtime as the pipeline would leave it. It was never trained, but has weights of which no other is zero.
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
from tasks.core import allocation, backbone, config, costs, dataset, importance, masks
from tasks.core.errors import StageError, first_line
from tasks.core.export import export
from tasks.core.progress import track

ROUNDS = 5  # what disturbs the machine for a few seconds is in one of them
NETWORKS = 10
IMAGES = 32
FORETOLD = 0.1  # of the planned bytes: what differs by more is not a matter of names and constants


def profile(params: config.Params, path: Path) -> dict[str, Any]:
    """Measure what the backbone in the parameters needs, and write it to `path`; returns what the table is about.

    `StageError` if a network that was cut does not run, or has other bytes than were planned.
    """
    threads = params.benchmark.threads
    wanted = sorted(allocation.needed(network(params)))
    rounds = [costs.measure(*point, threads) for point in track(wanted * ROUNDS, "measuring layers")]
    layers = {point: statistics.median(rounds[place :: len(wanted)]) for place, point in enumerate(wanted)}
    whole = networks(params, layers)
    about = {"processor": benchmark.processor(), "threads": threads, "onnxruntime": ort.__version__}
    costs.write(path, layers | whole, about)
    return about | {"layers": len(layers), "networks": len(whole)}


def network(params: config.Params) -> allocation.Network:
    """The backbone as `allocation` sees it, with nothing known of what is missed."""
    net, spec, effects = untrained(params)
    return survey(net, effects, spec)[-1]


def networks(params: config.Params, table: costs.Table) -> costs.Table:
    """Rows of what whole networks take beside their layers, by the bytes of these."""
    net, spec, effects = untrained(params)
    look = functools.partial(survey, spec=spec)
    *_, whole = look(net, effects)
    least, most = (allocation.allocate(whole, end, table).cost for end in (allocation.NOTHING, allocation.ANYTHING))
    images = list(noise(spec.preprocessing))
    planned: dict[str, costs.Cost] = {}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        # as milliseconds are what the rows are read for: a network of as many bytes, cut to them, has another shape
        latencies = np.geomspace(least.latency_ms, most.latency_ms, NETWORKS).tolist()
        for latency in track(latencies, "cutting networks"):
            slim = copy.deepcopy(net)
            plan = prune.within(slim, allocation.Limits(None, latency), whole, effects, table, look)
            name = f"{plan['size_bytes']:.0f}"
            if name not in planned:
                written(net, slim, spec, images, params.quantize, plan, Path(scratch) / name)
                planned[name] = costs.Cost(plan["size_bytes"], plan["latency_ms"])
        models = {name: Path(scratch) / name for name in planned}
        rounds = [benchmark.latencies(models, params.benchmark) for _ in range(ROUNDS)]
    times = {name: statistics.median(float(np.median(found[name])) for found in rounds) for name in planned}
    return {(costs.NETWORK, int(name), int(name)): times[name] - cost.latency_ms for name, cost in planned.items()}


def written(
    net: nn.Module,
    slim: nn.Module,
    spec: backbone.Spec,
    images: list[bytes],
    params: config.Quantize,
    plan: dict[str, Any],
    path: Path,
) -> None:
    """Write the slim network as the pipeline would, which masks `net`, quantizes it, and removes what is zero.

    `StageError` if it cannot, or if the bytes were not foretold.
    """
    left = f"{spec.backbone} cut to {plan['size_bytes']:,.0f} bytes"
    try:
        masked = prune.masked(net, slim, plan["channels"], torch.zeros(2, *spec.preprocessing.shape))
        export(masked, spec, path)
        plain = params.model_copy(update={"factor": None})
        quantized = quantize.quantize(path, images, spec.preprocessing, plain, plan["float32"])
        onnx.save(reduce.reduce(quantized)[0], path)
    except Exception as error:
        # what fails in a network that nobody has tried before has no common base but Exception
        raise StageError(f"{left} cannot be made, so budgets cannot be planned for it: {first_line(error)}") from None
    size, planned = path.stat().st_size, plan["size_bytes"]
    if abs(size / planned - 1) > FORETOLD:
        why = ": `reduce` cannot remove all that is cut" if size > planned else ""
        raise StageError(f"{left} has {size:,} in its file, so budgets cannot be planned for it{why}")


def untrained(params: config.Params) -> tuple[nn.Module, backbone.Spec, dict[str, float]]:
    """The backbone, and its residual blocks, all missed alike; with weights of which `reduce` removes none.

    Some backbones start with zeros where a branch ends; and without statistics of its own a layer may saturate.
    """
    name = params.finetune.backbone
    preprocessing = backbone.preprocessing(name, params.finetune.image_size)
    torch.manual_seed(0)
    net = backbone.create(name, len(params.classes), preprocessing)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None  # statistics are those of what it sees now
            module.reset_running_stats()
    example = torch.randn(IMAGES, *preprocessing.shape)
    with torch.no_grad():
        net.train()(example)
    spec = backbone.Spec(
        backbone=name, classes=params.classes, preprocessing=preprocessing, weights={"source": "random"}
    )
    return net, spec, dict.fromkeys(masks.residual_blocks(net.eval(), example[:2]), 1.0)


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
