"""What a network could lose, and how much each part of it is missed: what `allocation` chooses from."""

from collections.abc import Callable, Iterable

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from tasks.budget.allocation import Layer, Network
from tasks.budget.costs import Kind, Operator
from tasks.core.errors import StageError
from tasks.core.progress import track
from tasks.nets import masks

LEAST_EFFECT = 1e-6  # of a block on the loss: what does harm goes first, and a square would hide that it does

Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, C, H, W) float32, class numbers (B,) int64


def taylor(net: nn.Module, groups: list[tp.dependency.Group], batches: Batches) -> list[Tensor]:
    """By group, the score of each channel: the squared first-order change of the loss without it, mean over batches.

    Molchanov et al. 2019, arXiv:1906.10771, section 3.2: over scale and shift where the group is normalised, else over
    the weights and biases that make the channel.
    """
    net.eval()
    scores = [torch.zeros(len(group[0].idxs)) for group in groups]
    count = 0
    for images, labels in batches:
        net.zero_grad()
        functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        for score, group in zip(scores, groups, strict=True):
            score += _change(group, len(score)) ** 2
        count += 1
    net.zero_grad(set_to_none=True)
    return [score / max(count, 1) for score in scores]


@torch.no_grad()
def _change(group: tp.dependency.Group, channels: int) -> Tensor:
    makers = [(dep.target.module, indices) for dep, indices in group if masks.side_of(dep) == "out"]
    normalised = [pair for pair in makers if isinstance(pair[0], nn.BatchNorm2d)]
    change = torch.zeros(channels)
    for module, indices in normalised or makers:
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:
                change += (parameter * parameter.grad).reshape(len(parameter), -1).sum(1)[indices]
    return change


def blocks(net: nn.Module, example: Tensor, val_loss: Callable[[], float]) -> dict[str, float]:
    """By residual block, the rise of the val loss without it, as measured; a block may do harm."""
    names, before = masks.residual_blocks(net, example), val_loss()
    effects = track(masks.block_effects(net, names, val_loss), "trying blocks", len(names))
    return {effect.name: effect.val_loss - before for effect in effects}


def network(
    net: nn.Module, groups: list[tp.dependency.Group], scores: list[Tensor], effects: dict[str, float], example: Tensor
) -> Network:
    """The network as `allocation` sees it; a block's score is the square of its effect, as a channel's is."""
    reads, writes = _ties(groups)
    shapes = _input_shapes(net, example)
    names = {module: name for name, module in net.named_modules()}
    channels, height, width = example.shape[1:]
    layers = [Layer("input", Operator("frame", 1, 1, height, width), None, None, channels, channels)]
    for module, shape in shapes.items():
        name = names[module]
        block = next((one for one in effects if name.startswith(f"{one}.")), None)
        operator, inputs, outputs = _operator(module, shape)
        layers.append(Layer(name, operator, reads.get(module), writes.get(module), inputs, outputs, block))
    layers += _float_stem(layers)
    for block in effects:
        mine = [module for module in shapes if names[module].startswith(f"{block}.")]
        ends, group, shape = mine[-1], writes.get(mine[-1]), shapes[mine[0]]
        made = _operator(ends, shapes[ends])[2]
        layers.append(Layer(f"{block} sum", Operator("add", 1, 1, shape[2], shape[3]), group, group, made, made, block))
    squares = {name: max(effect, LEAST_EFFECT) ** 2 for name, effect in effects.items()}
    return Network(layers, [score.double().numpy() for score in scores], squares)


def _float_stem(layers: list[Layer]) -> list[Layer]:
    """What may be left in float32, named by its last layer: what reads the image, and the depthwise layer behind it."""
    stem, *others = layers[1:3]
    if stem.operator.kind != "conv":
        return []
    behind = [one for one in others if one.operator._replace(height=0, width=0) == Operator("depthwise", 3, 1, 0, 0)]
    kind: Kind = "front depthwise" if behind else "front"
    last = (behind or [stem])[0]
    return [stem._replace(name=last.name, block=last.block, operator=stem.operator._replace(kind=kind))]


def _ties(groups: list[tp.dependency.Group]) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """The number of the group that each layer reads, and of the one it writes."""
    reads: dict[nn.Module, int] = {}
    writes: dict[nn.Module, int] = {}
    for number, group in enumerate(groups):
        for dep, _ in group:
            module = dep.target.module
            if masks.side_of(dep) == "in" or masks.is_depthwise(module):
                reads[module] = number
            if masks.side_of(dep) == "out":
                writes[module] = number
    return reads, writes


@torch.no_grad()
def _input_shapes(net: nn.Module, example: Tensor) -> dict[nn.Module, tuple[int, ...]]:
    """The shape that each convolution and linear layer reads, in the order in which they run."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        shapes[module] = tuple(inputs[0].shape)

    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    net.eval()(example)
    for hook in hooks:
        hook.remove()
    return shapes


def _operator(module: nn.Module, shape: tuple[int, ...]) -> tuple[Operator, int, int]:
    """The operator, its inputs and its outputs; `StageError` if it reads neither pictures nor vectors."""
    if len(shape) != (4 if isinstance(module, nn.Conv2d) else 2):
        raise StageError(f"compress knows layers that read pictures or vectors, not {list(shape[1:])}: set it to null")
    if isinstance(module, nn.Conv2d):
        kind: Kind = "depthwise" if masks.is_depthwise(module) else "conv"
        kernel, stride = max(module.kernel_size), max(int(step) for step in module.stride)
        return Operator(kind, kernel, stride, shape[2], shape[3]), module.in_channels, module.out_channels
    return Operator("linear", 1, 1, 1, 1), int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
