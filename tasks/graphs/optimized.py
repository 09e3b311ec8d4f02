"""The graph that ONNX Runtime really runs, after its optimizations, and what of it is still computed in float."""

import tempfile
from pathlib import Path

import onnx

from tasks.runtime import session

HEAVY = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def optimize(model: Path) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime makes of the file."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch:
        target = Path(scratch) / "optimized.onnx"
        session.open_session(model, threads=1, optimized=target)
        return onnx.load(target)


def float_layers(model: Path) -> list[str]:
    """Return the convolutions and matrix products that ONNX Runtime still computes in float, in order."""
    return [f"{node.op_type} of {node.input[1]}" for node in optimize(model).graph.node if node.op_type in HEAVY]
