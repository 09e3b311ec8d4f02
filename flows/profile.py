"""The device's table: what each int8 layer that the backbone could be cut to takes on this machine, and whole networks.

A network is cut to a limit of milliseconds, between those of the whole and of the least that can be left of it, and
runs in ONNX Runtime as the pipeline would leave it. It was never trained, but has weights of which no other is zero.
"""

import copy
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from tasks import benchmark, prune, reduce
from tasks.budget import allocation, costs
from tasks.budget.plan import Plan
from tasks.core import config, machine
from tasks.core.errors import StageError, first_line
from tasks.core.progress import track
from tasks.graphs import calibration
from tasks.images.preprocessing import Preprocessing
from tasks.nets import backbone, importance, masks
from tasks.nets.export import export
from tasks.runtime import session

ROUNDS = 5  # what disturbs the machine for a few seconds is in one of them
NETWORKS = 10
COPIES = 8
RUNS = 60
IMAGES = 32
MAX_SIZE_ERROR = 0.1  # of the planned bytes: what differs by more is not a matter of names and constants


def profile(params: config.Params, path: Path) -> dict[str, Any]:
    """Measure what the backbone in the parameters needs, and write it to `path`; returns what the table is about.

    `StageError` if a network that was cut does not run, or has other bytes than were planned.
    """
    threads = params.benchmark.threads
    wanted = sorted(allocation.points_to_measure(network(params)))
    rounds = [measure(*point, threads) for point in track(wanted * ROUNDS, "measuring layers")]
    layers = {point: statistics.median(rounds[place :: len(wanted)]) for place, point in enumerate(wanted)}
    whole = networks(params, layers)
    about = {"processor": machine.processor(), "threads": threads, "onnxruntime": ort.__version__}
    costs.write(path, layers | whole, about)
    return about | {"layers": len(layers), "networks": len(whole)}


def network(params: config.Params) -> allocation.Network:
    """The backbone as `allocation` sees it, with nothing known of what is missed."""
    net, spec, effects = make_untrained(params)
    return survey_structure(net, effects, spec)[-1]


def networks(params: config.Params, table: costs.Table) -> costs.Table:
    """Rows of what whole networks take beside their layers, by the bytes of these."""
    net, spec, effects = make_untrained(params)
    look = functools.partial(survey_structure, spec=spec)
    *_, whole = look(net, effects)
    least, most = (allocation.allocate(whole, end, table).cost for end in (allocation.MINIMAL, allocation.UNLIMITED))
    images = list(noise(spec.preprocessing))
    planned: dict[str, costs.Cost] = {}
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        # as milliseconds are what the rows are read for: a network of as many bytes, cut to them, has another shape
        latencies = np.geomspace(least.latency_ms, most.latency_ms, NETWORKS).tolist()
        for latency in track(latencies, "cutting networks"):
            slim = copy.deepcopy(net)
            plan = prune.prune_to_limits(slim, allocation.Limits(None, latency), whole, effects, table, look)
            name = f"{plan.size_bytes:.0f}"
            if name not in planned:
                write_network(net, slim, spec, images, params.quantize, plan, Path(scratch) / name)
                planned[name] = costs.Cost(plan.size_bytes, plan.latency_ms)
        models = {name: Path(scratch) / name for name in planned}
        rounds = [benchmark.latencies(models, params.benchmark) for _ in range(ROUNDS)]
    times = {name: statistics.median(float(np.median(found[name])) for found in rounds) for name in planned}
    return {(costs.NETWORK, int(name), int(name)): times[name] - cost.latency_ms for name, cost in planned.items()}


# Seven parameters: a network in its two shapes, and what the stages from masking to the file need.
def write_network(
    net: nn.Module,
    slim: nn.Module,
    spec: backbone.Spec,
    images: list[bytes],
    params: config.Quantize,
    plan: Plan,
    path: Path,
) -> None:
    """Write the slim network as the pipeline would, which masks `net`, quantizes it, and removes what is zero.

    `StageError` if it cannot, or if the bytes were not foretold.
    """
    left = f"{spec.backbone} cut to {plan.size_bytes:,.0f} bytes"
    try:
        masked = prune.build_masked(net, slim, plan.channels, torch.zeros(2, *spec.preprocessing.shape))
        export(masked, spec, path)
        plain = params.model_copy(update={"factor": None})
        quantized = calibration.quantize(path, images, spec.preprocessing, plain, plan.float32)
        onnx.save(reduce.reduce(quantized)[0], path)
    except Exception as error:
        # what fails in a network that nobody has tried before has no common base but Exception
        raise StageError(f"{left} cannot be made, so budgets cannot be planned for it: {first_line(error)}") from None
    size, planned = path.stat().st_size, plan.size_bytes
    if abs(size / planned - 1) > MAX_SIZE_ERROR:
        why = ": `reduce` cannot remove all that is cut" if size > planned else ""
        raise StageError(f"{left} has {size:,} in its file, so budgets cannot be planned for it{why}")


def make_untrained(params: config.Params, images: int = IMAGES) -> tuple[nn.Module, backbone.Spec, dict[str, float]]:
    """The backbone, and its residual blocks, all missed alike; with weights of which `reduce` removes none.

    Some backbones start with zeros where a branch ends; and without statistics of its own a layer may saturate.
    """
    name = params.finetune.backbone
    preprocessing = backbone.preprocessing(name, params.finetune.image_size)
    torch.manual_seed(0)
    net = backbone.create(name, len(config.class_names(params)), preprocessing)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None  # statistics are those of what it sees now
            module.reset_running_stats()
    example = torch.randn(images, *preprocessing.shape)
    with torch.no_grad():
        net.train()(example)
    return net, describe(params, preprocessing), dict.fromkeys(masks.residual_blocks(net.eval(), example[:2]), 1.0)


def describe(params: config.Params, preprocessing: Preprocessing) -> backbone.Spec:
    """What the untrained backbone is."""
    name = params.finetune.backbone
    return backbone.Spec(
        backbone=name, classes=config.class_names(params), preprocessing=preprocessing, weights={"source": "random"}
    )


def survey_structure(net: nn.Module, effects: dict[str, float], spec: backbone.Spec) -> prune.Survey:
    """What `prune.survey_channels` finds where all channels are missed alike."""
    example = torch.zeros(2, *spec.preprocessing.shape)
    with masks.known_structure():
        graph, groups = masks.channel_groups(net, example, backbone.head(net))
    scores = [torch.ones(len(group[0].idxs)) for group in groups]
    return graph, groups, scores, importance.network(net, groups, scores, effects, example)


def pictures(preprocessing: Preprocessing) -> Tensor:
    """Two images, as a network reads them."""
    return torch.randn(2, *preprocessing.shape)


def noise(preprocessing: Preprocessing) -> Iterator[bytes]:
    """Encoded images to calibrate on."""
    random = np.random.default_rng(0)
    side, channels = preprocessing.size, preprocessing.channels
    for _ in range(IMAGES):
        stream = io.BytesIO()
        pixels = random.integers(0, 256, (side, side, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(stream, "PNG")
        yield stream.getvalue()


def measure(operator: costs.Operator, inputs: int, outputs: int, threads: int) -> float:
    """Milliseconds of one int8 layer at batch 1: the median of what COPIES more of it add to a run.

    Of a frame: the median of a whole run. Of a front: what float32 adds to the run, or takes from it.
    """
    if operator.kind == "frame":
        return _times([session.open_session(_fixed_overhead_model(operator, inputs), threads)])[0]
    if operator.kind in costs.FLOAT_STEMS:
        both = [
            session.open_session(_float_stem_model(operator, inputs, outputs, in_float), threads)
            for in_float in (False, True)
        ]
        in_int8, in_float = _times(both)
        return in_float - in_int8
    pair = [session.open_session(_layers(operator, inputs, outputs, copies), threads) for copies in (1, 1 + COPIES)]
    one, more = _times(pair)
    return max(0.0, more - one) / COPIES


def _times(sessions: list[ort.InferenceSession]) -> list[float]:
    """Median milliseconds of a run of each; they take turns."""
    random = np.random.default_rng(0)
    feeds = []
    for ready in sessions:
        entry = ready.get_inputs()[0]
        image = random.integers(0, 255, entry.shape)
        feeds.append({entry.name: image.astype(np.float32 if "float" in entry.type else np.uint8)})
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(RUNS):
        for place, (ready, feed) in enumerate(zip(sessions, feeds, strict=True)):
            started = time.perf_counter()
            ready.run(None, feed)
            times[place].append((time.perf_counter() - started) * 1e3)
    return [float(np.median(one)) for one in times]


def _fixed_overhead_model(operator: costs.Operator, channels: int) -> bytes:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node(
            "QLinearGlobalAveragePool", ["t", "s", "z", "s", "z"], ["p"], domain="com.microsoft", channels_last=1
        ),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y0"]),
    ]
    return _model(nodes, {}, [1, channels, operator.height, operator.width], TensorProto.FLOAT, 1)


def _float_stem_model(operator: costs.Operator, inputs: int, outputs: int, in_float: bool) -> bytes:
    """The front between the image and an int8 layer, as QDQ or with its own layers in float32."""
    random = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    constants: dict[str, object] = {
        "low": np.float32(0),
        "high": np.float32(6),
        "ws": np.full(outputs, 0.01, np.float32),
    }

    def add(kind: str, names: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, names, [f"t{len(nodes)}"], **attributes))
        return f"t{len(nodes) - 1}"

    def quantized(source: str) -> str:
        return add("DequantizeLinear", [add("QuantizeLinear", [source, "s", "z"]), "s", "z"])

    layers = [("front", operator.kernel, operator.stride, 1), ("depthwise", 3, 1, outputs), ("next", 1, 1, 1)]
    if operator.kind == "front":
        del layers[1]
    picture = [1, inputs, operator.height, operator.width]
    source = "x"
    for name, kernel, stride, groups in layers:
        plain = in_float and name != "next"
        codes = random.integers(-127, 127, (outputs, inputs // groups, kernel, kernel), np.int8)
        constants |= {name: codes * np.float32(0.01) if plain else codes, f"{name} bias": np.zeros(outputs, np.float32)}
        weight = name if plain else add("DequantizeLinear", [name, "ws"], axis=0)
        before, after = (kernel - 1) // 2, kernel // 2
        place = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [before, before, after, after]}
        source = add("Conv", [source if plain else quantized(source), weight, f"{name} bias"], group=groups, **place)
        if plain:
            source = add("Clip", [source, "low", "high"])
        inputs = outputs
    nodes.append(helper.make_node("Identity", [quantized(add("GlobalAveragePool", [quantized(source)]))], ["y0"]))
    return _model(nodes, constants, picture, TensorProto.FLOAT, 1)


def _layers(operator: costs.Operator, inputs: int, outputs: int, copies: int) -> bytes:
    """A model of so many equal layers beside each other, in the form that ONNX Runtime brings int8 layers to."""
    random = np.random.default_rng(0)
    groups = outputs if operator.kind == "depthwise" else 1
    shape = (inputs, outputs) if operator.kind == "linear" else (outputs, inputs // groups, *[operator.kernel] * 2)
    constants = {
        "w": random.integers(-127, 127, shape, np.int8),
        "ws": np.full(outputs, 0.01, np.float32),
        "wz": np.zeros(outputs, np.int8),
        "b": np.zeros(outputs, np.int32),
    }
    before, after = (operator.kernel - 1) // 2, operator.kernel // 2
    nodes = []
    for number in range(copies):
        target = [f"y{number}"]
        if operator.kind == "add":
            names = ["x", "s", "z", "x", "s", "z", "s", "z"]
            node = helper.make_node("QLinearAdd", names, target, domain="com.microsoft")
        elif operator.kind == "linear":
            names = ["x", "s", "z", "w", "ws", "wz", "b", "s", "z"]
            node = helper.make_node("QGemm", names, target, domain="com.microsoft")
        else:
            node = helper.make_node(
                "QLinearConv",
                ["x", "s", "z", "w", "ws", "wz", "s", "z", "b"],
                target,
                domain="com.microsoft",
                kernel_shape=[operator.kernel] * 2,
                strides=[operator.stride] * 2,
                pads=[before, before, after, after],
                group=groups,
                channels_last=1,
            )
        nodes.append(node)
    picture = [1, inputs] if operator.kind == "linear" else [1, operator.height, operator.width, inputs]
    return _model(nodes, constants, picture, TensorProto.UINT8, copies)


def _model(nodes: list[NodeProto], constants: dict[str, Any], shape: list[int], kind: int, outputs: int) -> bytes:
    used = {name for node in nodes for name in node.input}
    constants = {"s": np.float32(0.02), "z": np.uint8(128)} | constants
    made = TensorProto.FLOAT if kind == TensorProto.FLOAT else TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(f"y{place}", made, None) for place in range(outputs)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
