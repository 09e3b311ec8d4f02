"""What pruning decides: which residual blocks, channels and single weights go, and zeros that stay zero.

A slim copy has the blocks and channels physically removed. It is what recovery trains, since it computes the
same function in less time; `scatter` writes its weights back into the full shape, zeros everywhere else. There the
kept channels of a group come first: ONNX Runtime splits a long float32 sum by its place, so that it is rounded alike
with the zeros and without them.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tasks.budget.plan import Channels, Group
from tasks.core import config
from tasks.core.errors import StageError, first_line

Removed = Channels  # module -> "out" and "in" -> channels that are zero in the full shape


class BlockEffect(NamedTuple):
    """A residual block and the val loss without it."""

    name: str
    val_loss: float


@torch.no_grad()
def hold_zeros(net: nn.Module, head: str) -> Callable[[], None]:
    """A function that sets back to zero whatever is exactly zero now; the head's bias is free."""
    held = [
        (parameter, parameter != 0)
        for name, parameter in net.named_parameters()
        if name != f"{head}.bias" and not bool((parameter != 0).all())
    ]

    @torch.no_grad()
    def hold() -> None:
        for parameter, mask in held:
            parameter.mul_(mask)

    return hold


@torch.no_grad()
def residual_blocks(net: nn.Module, images: Tensor) -> list[str]:
    """Modules that compute x + f(x): those that pass these images' features on unchanged when f's weights are zero."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in net.named_modules():
        if name and any(module.children()) and not isinstance(module, nn.Sequential):

            def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    seen[name] = inputs[0].detach()

            hooks.append(module.register_forward_hook(note))
    net.eval()(images)
    for hook in hooks:
        hook.remove()
    found = [name for name, features in seen.items() if _is_residual(net.get_submodule(name), features)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]  # the innermost


def _is_residual(module: nn.Module, features: Tensor) -> bool:
    emptied = copy.deepcopy(module)
    parameters = list(emptied.parameters())
    for parameter in parameters:
        parameter.zero_()
    return sum(p.ndim > 1 for p in parameters) > 1 and torch.equal(emptied(features), features)


def block_effects(net: nn.Module, names: list[str], val_loss: Callable[[], float]) -> Iterator[BlockEffect]:
    """The val loss with each block passed by, one after the other."""
    for name in names:
        hook = net.get_submodule(name).register_forward_hook(lambda _module, inputs, _output: inputs[0])
        yield BlockEffect(name, val_loss())
        hook.remove()


@torch.no_grad()
def block_scores(net: nn.Module, names: list[str]) -> dict[str, float]:
    """By residual block: mean |w| over all its convolutions and linear layers, divided by the largest such mean.

    The largest score is 1, or 0 where every weight of every block is zero.
    """
    means = {}
    for name in names:
        weights = [p for p in net.get_submodule(name).parameters() if p.ndim > 1]
        means[name] = float(torch.cat([weight.abs().flatten() for weight in weights]).mean())
    largest = max(means.values(), default=0.0) or 1.0
    return {name: mean / largest for name, mean in means.items()}


def cut_blocks(net: nn.Module, names: list[str]) -> None:
    """Put an identity in the place of each block."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())


def count_kept(channels: int, ratio: float, multiple: int) -> int:
    """How many of a group's channels stay: a multiple of `multiple`, at least one of them, at most all."""
    return min(channels, max(multiple, round(channels * (1 - ratio) / multiple) * multiple))


class Cut(NamedTuple):
    """What is zero then, by module; and by group its name, `channels`, how many are `kept`, and which are `removed`.

    These are numbered as they were before; what is zero lies behind what is kept.
    """

    removed: Removed
    groups: list[Group]


def cut_channels(net: nn.Module, params: config.Channels, example: Tensor, head: str) -> Cut:
    """Remove the least important channels of each DepGraph group, in place.

    Groups: Fang et al. 2023, DepGraph, arXiv:2301.12900. Importance: L2 norm over the whole group. Groups with
    grouped convolutions that are not depthwise stay as they are. `StageError` if the network cannot be cut so.
    """
    with known_structure():
        graph, groups = channel_groups(net, example, head)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        scores = [importance(group) for group in groups]
        done = cut(net, graph, groups, scores, [count_kept(len(one), params.ratio, params.multiple) for one in scores])
        net(example)
    return done


@contextlib.contextmanager
def known_structure() -> Iterator[None]:
    """Turns what Torch-Pruning says of a network that it cannot cut into a `StageError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StageError(f"prune.channels does not know this backbone's structure: {first_line(error)}") from None


def channel_groups(net: nn.Module, example: Tensor, head: str) -> tuple[tp.DependencyGraph, list[tp.dependency.Group]]:
    """The network's DepGraph, and its groups of channels that can be cut; the head's outputs are in none."""
    graph = tp.DependencyGraph().build_dependency(net.eval(), example)
    groups = graph.get_all_groups(ignored_layers=[net.get_submodule(head)], root_module_types=[nn.Conv2d, nn.Linear])
    return graph, [group for group in groups if not any(_is_grouped(dep.target.module) for dep, _ in group)]


def cut(
    net: nn.Module,
    graph: tp.DependencyGraph,
    groups: list[tp.dependency.Group],
    scores: list[Tensor],
    widths: list[int],
) -> Cut:
    """Keep the best-scored channels of each group, as many as its width, in place."""
    names = {module: name for name, module in net.named_modules()}
    done = Cut(find_zeroed_channels(net, groups, widths), [])
    for group, score, width in zip(groups, scores, widths, strict=True):
        module, handler = group[0].dep.target.module, group[0].dep.handler
        gone = sorted(torch.argsort(score, stable=True)[: len(score) - width].tolist())
        done.groups.append(Group(name=names[module], channels=len(score), kept=width, removed=gone))
        if gone:
            graph.get_pruning_group(module, handler, gone).prune()
    return done


def find_zeroed_channels(net: nn.Module, groups: list[tp.dependency.Group], widths: list[int]) -> Removed:
    """The channels behind each group's width, by module."""
    names = {module: name for name, module in net.named_modules()}
    removed: Removed = {}
    for group, width in zip(groups, widths, strict=True):
        for item in group:
            module = item.dep.target.module
            channels = {index for index, root in zip(item.idxs, item.root_idxs, strict=True) if root >= width}
            if channels and module in names and list(module.parameters(recurse=False)):
                sides = removed.setdefault(names[module], {})
                side = side_of(item.dep)
                sides[side] = sorted(channels.union(sides.get(side, [])))
    return removed


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups != module.out_channels


def side_of(dep: tp.dependency.Dependency) -> str:
    """Whether a group cuts the module's inputs ("in") or its outputs ("out", which a depthwise one's are, too)."""
    takes_inputs = dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
    return "in" if takes_inputs and not is_depthwise(dep.target.module) else "out"


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


@torch.no_grad()
def zero_weights(net: nn.Module, params: config.SingleWeights) -> dict[str, int]:
    """Zero single weights of convolutions and linear layers, in place; returns how many went, by tensor.

    `threshold`: w goes where (|w| - min |w|) / (max |w| - min |w|) is under it, min and max taken over w's layer.
    `sparsity`: the smallest |w| of the whole model go until that share is zero. `StageError` if a layer
    would be left without any weight.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    if params.threshold is not None:
        small = {name: _under(weight.abs(), params.threshold) for name, weight in weights.items()}
    else:
        every = torch.cat([weight.abs().flatten() for weight in weights.values()])
        limit = float(every.kthvalue(max(1, round((params.sparsity or 0) * every.numel()))).values)
        small = {name: weight.abs() <= limit for name, weight in weights.items()}
    for name, gone in small.items():
        if bool(gone.all()):
            raise StageError(f"prune.weights leaves nothing of {name}: lower the threshold or sparsity in params.yaml")
        weights[name][gone] = 0
    return {name: int(gone.sum()) for name, gone in small.items()}


def _under(sizes: Tensor, threshold: float) -> Tensor:
    low, high = sizes.min(), sizes.max()
    return sizes - low < threshold * (high - low)  # no division: sizes that are all alike stay


@torch.no_grad()
def scatter(slim: nn.Module, full: nn.Module, removed: Removed) -> None:
    """Write the slim copy's weights into the full network, in place; everything that was removed becomes zero.

    Running variances become one where a channel is gone, so that normalisation stays finite. `StageError` if what
    was removed does not account for the slim copy's shapes.
    """
    source = slim.state_dict()
    for name, tensor in full.state_dict().items():
        module, _, _ = name.rpartition(".")
        if name.endswith("num_batches_tracked"):
            continue
        tensor.fill_(1.0 if name.endswith("running_var") else 0.0)
        if name not in source:
            continue
        gone = removed.get(module, {})
        index = [_remaining(tensor.shape[0], gone.get("out", []))]
        if tensor.ndim > 1:
            index.append(_remaining(tensor.shape[1], gone.get("in", [])))
        if source[name].shape[: len(index)] != tuple(map(len, index)):
            raise StageError(f"prune.channels does not know this backbone's structure: {name} cannot be masked")
        tensor[torch.meshgrid(*index, indexing="ij")] = source[name]


def _remaining(size: int, gone: list[int]) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[gone] = False
    return mask.nonzero().flatten()
