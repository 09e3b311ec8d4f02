"""From a PyTorch network to the ONNX file that a device would load."""

import copy
import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from tasks.core import files
from tasks.core.errors import StageError, first_line, root_cause
from tasks.graphs import graph
from tasks.images.preprocessing import description
from tasks.nets.backbone import Spec

OPSET = 20


class Clamp(nn.Module):
    """ReLU6 as ONNX has it. What PyTorch has is taken apart by its exporter, for longer than all the rest takes."""

    def forward(self, features: Tensor) -> Tensor:
        return features.clamp(0, 6)


def export(net: nn.Module, spec: Spec, path: Path) -> None:
    """Write the network as ONNX: input `image` float32 (batch, C, H, W), output `logits` float32 (batch, classes).

    BatchNorm is folded and paddings are part of their convolutions, both by PyTorch's exporter; classes and
    preprocessing are in the file's metadata under the key `weighin`. `StageError` where PyTorch cannot export it.
    """
    net = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format).eval()  # channels_last exports as gathers
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, Clamp())
    example = torch.zeros(2, *spec.preprocessing.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                net,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = first_line(root_cause(error))
            raise StageError(f"torch.onnx cannot export {spec.backbone}: {reason}") from None
    model: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
    graph.pool_means(model)
    graph.flatten_reshapes(model)
    graph.strip(model)
    describe(model, {"classes": spec.classes, **description(spec.preprocessing)})
    onnx.checker.check_model(model, full_check=True)
    files.write_bytes(path, model.SerializeToString())


def describe(model: onnx.ModelProto, content: dict[str, object]) -> None:
    """Put what a device needs to know into the metadata."""
    onnx.helper.set_model_props(model, {"weighin": json.dumps(content)})
