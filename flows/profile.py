"""The device's table: what each int8 layer that the backbone could be cut to takes on this machine."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from tasks.benchmark import processor
from tasks.core import allocation, backbone, config, costs, files, importance, masks
from tasks.core.progress import track


def profile(params: config.Params, path: Path) -> dict[str, Any]:
    """Measure what the backbone in the parameters needs, and write it to `path`; returns what the table is about.

    Measurements of other backbones stay, if they are of the same machine, threads and runtime.
    """
    about = {"processor": processor(), "threads": params.benchmark.threads, "onnxruntime": ort.__version__}
    known: costs.Table = {}
    if path.exists() and {key: files.read_json(path).get(key) for key in about} == about:
        known = costs.read(path)
    wanted = sorted(allocation.needed(network(params)))
    measured = {point: costs.measure(*point, params.benchmark.threads) for point in track(wanted, "measuring")}
    costs.write(path, known | measured, about)
    return about | {"measured": len(measured), "kept": len(known.keys() - measured.keys())}


def network(params: config.Params) -> allocation.Network:
    """The backbone as `allocation` sees it, with nothing known of what is missed."""
    name, size = params.finetune.backbone, params.finetune.image_size
    preprocessing = backbone.preprocessing(name, size)
    net = backbone.create(name, len(params.classes), preprocessing).eval()
    example = torch.zeros(2, *preprocessing.shape)
    effects = dict.fromkeys(masks.residual_blocks(net, torch.randn_like(example)), 1.0)
    with masks.known_structure():
        _, groups = masks.channel_groups(net, example, backbone.head(net))
    scores = [torch.ones(len(group[0].idxs)) for group in groups]
    return importance.network(net, groups, scores, effects, example)
