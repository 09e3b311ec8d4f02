"""Quantization-aware training: the network of a QDQ file in PyTorch, trained on its own int8 grid.

Jacob et al. 2018, arXiv:1712.05877, for training with simulated quantization; Bengio et al. 2013, arXiv:1308.3432, for
the gradient that passes the rounding. The scales stay those of the calibration, so what comes out is the same file with
other codes: it runs as fast, and `reduce` finds the same zeros in it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from tasks.core.errors import StageError
from tasks.graphs import codebook, graph, rounding
from tasks.graphs.codebook import LARGEST


class Weight(nn.Module):
    """A weight or bias and the grid it lies on; what is zero stays zero, and weights stay within their codes.

    With few codes the steps of the grid are trained, too, as factors: Esser et al. 2020, arXiv:1902.08153 (LSQ).
    """

    start: Tensor
    kept: Tensor
    shared: Tensor  # the codes it keeps to, in order; empty: all of int8

    def __init__(self, values: Tensor, scale: Tensor, axis: int, largest: int = LARGEST) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())
        self.is_bias = values.ndim == 1
        self.largest = largest
        self.register_buffer("start", scale.reshape([-1 if a == axis else 1 for a in range(values.ndim)]))
        self.factor = nn.Parameter(torch.zeros_like(self.start)) if self.learns_step else None
        self.register_buffer("kept", values != 0)
        self.register_buffer("shared", torch.empty(0))

    @property
    def learns_step(self) -> bool:
        return self.largest < LARGEST and not self.is_bias

    @property
    def scale(self) -> Tensor:
        """The step of the grid, as a factor to the one that it began with: so that each is trained alike."""
        return self.start if self.factor is None else self.start * self.factor.exp()

    @torch.no_grad()
    def share(self, levels: int) -> None:
        """Keep to so many codes from now on; a bias keeps to none."""
        if not self.is_bias:
            codes = codebook.cluster(self.codes().numpy().astype(np.int8), levels)
            self.shared = torch.from_numpy(np.unique(codes[codes != 0]).astype(np.float32))

    @torch.no_grad()
    def hold_step(self) -> None:
        """Make a trained step one that float16 holds; one that training has lost is what it began with."""
        if self.factor is not None:
            scale = torch.where(self.scale.isfinite() & (self.scale > 0), self.scale, self.start)
            self.start.copy_(torch.from_numpy(rounding.half_above(scale.numpy())))
            self.factor.zero_()

    def codes(self) -> Tensor:
        """On the integer grid, float32."""
        # float16 holds the biases of the file, see `rounding.round_to_halves`
        halves = self.values.half().float() if self.is_bias else self.values
        exact = torch.where(halves.isfinite(), halves, self.values) * self.kept / self.scale
        if len(self.shared):
            borders = (self.shared[1:] + self.shared[:-1]) / 2
            return self.shared[torch.bucketize(exact, borders)] * self.kept
        return exact.round() if self.is_bias else exact.round().clamp(-self.largest, self.largest)

    def forward(self) -> Tensor:
        exact = self.values * self.kept
        if self.learns_step:
            codes = (exact / self.scale).clamp(-self.largest, self.largest)
            return (codes + (codes.round() - codes).detach()) * self.scale
        inside = exact if self.is_bias else exact.clamp(-LARGEST * self.scale, LARGEST * self.scale)
        return inside + (self.codes() * self.scale - inside).detach()


class Network(nn.Module):
    """The network of a QDQ file: from images, float32 (B, C, H, W), to logits, float32 (B, classes), as int8 has them.

    `floats` are the weights before quantization, by name; where `bits` has fewer than 8 for one, its codes are as
    `rounding.coarsen` makes them, and its steps are trained. `StageError` if the file has an operator that is not known
    here.
    """

    def __init__(self, quantized: onnx.ModelProto, floats: Mapping[str, graph.Array], bits: Mapping[str, int]) -> None:
        super().__init__()
        constants = graph.Constants(quantized)
        self.nodes = [node for node in quantized.graph.node if node.output[0] not in constants.dequantized]
        unknown = {node.op_type for node in self.nodes} - OPERATORS.keys()
        if unknown:
            raise StageError(
                f"quantize.grid.qat cannot train a network with {min(unknown)}: choose kind int8 without qat"
            )
        self.image, self.result = (ends[0].name for ends in (quantized.graph.input, quantized.graph.output))
        self.weights = nn.ModuleDict()
        self.keys: dict[str, str] = {}  # by the name of a tensor, that of its weight or buffer; dots are not allowed
        for name, tensor in constants.tensors.items():
            self._fix(name, numpy_helper.to_array(tensor))
        for name, node in constants.dequantized.items():
            original = floats.get(rounding.float_name(node))
            if original is None:
                self._fix(name, graph.meaning(node, constants))
                continue
            axis = int(graph.attribute(node, "axis", 1)) % original.ndim
            scale = torch.tensor(numpy_helper.to_array(constants.tensors[node.input[1]]))
            largest = rounding.largest_code(bits.get(rounding.float_name(node), 8))
            self.keys[name] = f"weight{len(self.keys)}"
            self.weights[self.keys[name]] = Weight(torch.tensor(original), scale, axis, largest)

    def _fix(self, name: str, values: graph.Array) -> None:
        self.keys[name] = f"constant{len(self.keys)}"
        self.register_buffer(self.keys[name], torch.tensor(values), persistent=False)

    def share_codes(self, levels: int) -> None:
        """Keep each weight tensor to so many nonzero codes from now on, those that come closest to what it has."""
        for weight in self.weights.values():
            weight.share(levels)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        tensors = {self.image: images}
        for name, key in self.keys.items():
            tensors[name] = self.weights[key]() if key in self.weights else self.get_buffer(key)
        for node in self.nodes:
            inputs = [tensors[name] for name in node.input if name]
            tensors[node.output[0]] = OPERATORS[node.op_type](node, *inputs)
        return tensors[self.result]

    @torch.no_grad()
    def write(self, quantized: onnx.ModelProto) -> None:
        """Put the codes into the file, in place, and the steps that were trained, as float16 holds them."""
        tensors = graph.initializers(quantized)
        floats: dict[str, graph.Array] = {}
        grids = []
        for name, node in graph.Constants(quantized).dequantized.items():
            if self.keys[name] not in self.weights:
                continue
            weight = cast(Weight, self.weights[self.keys[name]])
            if weight.is_bias:
                exact = (weight.values * weight.kept).nan_to_num()  # training that fails is told by its top-1
                most = weight.scale * 2.0**30
                floats[rounding.float_name(node)] = exact.clamp(-most, most).numpy()
                continue
            weight.hold_step()
            step = weight.scale.numpy().reshape(tuple(tensors[node.input[1]].dims))
            grids.append(rounding.Grid(node, weight.codes().nan_to_num().numpy().astype(np.int8), step))
        rounding.put_halves(quantized, floats, grids)


def _pads(node: onnx.NodeProto, image: Tensor, value: float) -> Tensor:
    pads = graph.attribute(node, "pads", None)
    if not pads or not any(pads):
        return image
    top, left, bottom, right = pads
    return functional.pad(image, (left, right, top, bottom), value=value)


def _conv(node: onnx.NodeProto, image: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stride, dilation = (graph.attribute(node, name, [1, 1]) for name in ("strides", "dilations"))
    groups = int(graph.attribute(node, "group", 1))
    top, left, bottom, right = graph.attribute(node, "pads", None) or (0, 0, 0, 0)
    padding = [top, left]
    if (top, left) != (bottom, right):
        image, padding = _pads(node, image, 0.0), [0, 0]  # which makes a copy
    return functional.conv2d(image, weight, bias, list(stride), padding, list(dilation), groups)


def _gemm(node: onnx.NodeProto, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(rows, weight if graph.attribute(node, "transB", 0) else weight.T, bias)


def _max_pool(node: onnx.NodeProto, image: Tensor) -> Tensor:
    size = list(graph.attribute(node, "kernel_shape", []))
    stride = list(graph.attribute(node, "strides", [1, 1]))
    return functional.max_pool2d(_pads(node, image, -math.inf), size, stride)


def _average_pool(node: onnx.NodeProto, image: Tensor) -> Tensor:
    size = list(graph.attribute(node, "kernel_shape", []))
    stride = list(graph.attribute(node, "strides", [1, 1]))
    return functional.avg_pool2d(image, size, stride)


class Quantized(torch.autograd.Function):
    """What `torch.fake_quantize_per_tensor_affine` computes for uint8, in a third of the time on a CPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float, zero: int) -> Tensor:
        codes = (values * (1 / scale)).round_().add_(zero)
        ctx.save_for_backward((codes >= 0) & (codes <= 255))
        return codes.clamp_(0, 255).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def _quantize(_node: onnx.NodeProto, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    found: Tensor = Quantized.apply(values, float(scale), int(zero))
    return found


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "AveragePool": _average_pool,
    "Clip": lambda _, x, low, high: x.clamp(float(low), float(high)),
    "Conv": _conv,
    "DequantizeLinear": lambda _, x, *_scale: x,  # the one before has done it
    "Flatten": lambda _, x: x.flatten(1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "Identity": lambda _, x: x,
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": _max_pool,
    "QuantizeLinear": _quantize,
    "Relu": lambda _, x: x.relu(),
}
