"""Torch-Pruning alone, in Weighin's own environment: `python peer_torch_pruning.py FOLDER` leaves torch-pruning.onnx.

The fine-tuned network is pruned once by global group magnitude, trained again by plain cross-entropy with the recipe's
recovery training, and exported in fp32. `peers.py` runs it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch
import torch_pruning as tp
from torch import nn

from tasks.core import config, paths
from tasks.core.errors import StageError, run
from tasks.nets import backbone, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export

RATIO = 0.5
MULTIPLE = 16  # the kept counts that Weighin's recipe asks for, too: kernels are fastest so


def prune(net: nn.Module, spec: Spec) -> None:
    """Remove the channels of least magnitude over the whole network, in place.

    Groups: Fang et al. 2023, DepGraph, arXiv:2301.12900.
    """
    example = torch.zeros(2, *spec.preprocessing.shape)
    pruner = tp.pruner.MagnitudePruner(
        net.eval(),
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=RATIO,
        round_to=MULTIPLE,
        ignored_layers=[net.get_submodule(backbone.head(net))],
    )
    pruner.step()


def recover(net: nn.Module, spec: Spec, params: config.Training, checkpoint: Path) -> None:
    """Train the pruned network, in place, on the labels alone."""
    train = training.Images(ROOT / paths.TRAIN, spec.preprocessing, spec.classes, params.augment)
    val = training.Images(ROOT / paths.VAL, spec.preprocessing, spec.classes)
    loss = training.cross_entropy(params.label_smoothing)
    training.fit(net.to(training.device()), train, val, loss, params, checkpoint=checkpoint)


def main() -> None:
    folder = Path(sys.argv[1])
    chosen = config.load(ROOT / paths.PARAMS).prune
    if chosen.recovery is None:
        raise StageError("params.yaml has no prune.recovery: it says how the pruned network is trained")
    params = chosen.recovery.training
    training.make_deterministic(params.seed)
    net, spec = backbone.load(ROOT / paths.weights("finetune"), ROOT / paths.spec("finetune"))
    prune(net, spec)
    recover(net, spec, params, folder / "torch-pruning.pt")
    export(net, spec, folder / "torch-pruning.onnx")


if __name__ == "__main__":
    run(main)
