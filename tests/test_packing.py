"""Files that unpack themselves: the same bits after loading, optimized or not, and never a larger file."""

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from codes import recode
from conftest import CLASSES, MASKED, Network, png, write_split
from onnx import TensorProto, helper, numpy_helper
from workspace import BIN

from tasks import reduce
from tasks.core.errors import StageError
from tasks.graphs import graph, packing
from tasks.runtime import session

Networks = Callable[[str], Network]
Codes = npt.NDArray[np.int8]


def few(codes: Codes) -> Codes:
    """Small numbers, of 4 bits."""
    return np.rint(codes / 18).astype(np.int8)


def fewer(codes: Codes) -> Codes:
    """Of 2 bits: -1, 0 and 1."""
    return np.rint(codes / 100).clip(-1, 1).astype(np.int8)


def signs(codes: Codes) -> Codes:
    """Two codes."""
    return np.where(codes < 0, -77, 77).astype(np.int8)


def spread(codes: Codes) -> Codes:
    """Codes far apart, as a codebook leaves them."""
    return (codes // 20 * 20).astype(np.int8)


def sparse(codes: Codes) -> Codes:
    """Mostly zero, with long gaps."""
    return np.where(abs(codes.astype(int)) > 115, codes, 0).astype(np.int8)


def sparse_and_shared(codes: Codes) -> Codes:
    return np.where(abs(codes.astype(int)) > 115, np.sign(codes) * 9, 0).astype(np.int8)


def as_it_is(codes: Codes) -> Codes:
    return codes


KINDS = (as_it_is, few, fewer, signs, spread, sparse, sparse_and_shared)


def logits(model: onnx.ModelProto, images: npt.NDArray[np.float32], optimize: bool) -> bytes:
    opened = session.open_session(model.SerializeToString(), 1, optimize=optimize)
    return session.logits(opened, images).tobytes()


def constants(model: onnx.ModelProto) -> list[tuple[tuple[int, ...], bytes]]:
    return sorted((tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()) for tensor in model.graph.initializer)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, few) for name in MASKED), *(("mobilenetv2_050", kind) for kind in KINDS if kind is not few)],
)
def test_a_packed_network_gives_the_same_bits(networks: Networks, name: str, kind: Callable[[Codes], Codes]) -> None:
    plain = recode(reduce.reduce(networks(name).quantized)[0], kind)
    packed = packing.pack(plain)
    onnx.checker.check_model(packed, full_check=True)
    assert packed.ByteSize() < plain.ByteSize()
    shape = [value.dim_value for value in plain.graph.input[0].type.tensor_type.shape.dim[1:]]
    images = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    for optimize in (True, False):
        answers = logits(plain, images, optimize)
        assert answers[:16] != answers[-16:]  # a network that answers all images alike would show little
        assert logits(packed, images, optimize) == answers
    back = packing.unpack(packed)
    assert constants(back) == constants(plain)
    assert (graph.parameters(back), graph.macs(back)) == (graph.parameters(plain), graph.macs(plain))


def dense(codes: Codes, scale: npt.NDArray[np.float32] | None = None) -> onnx.ModelProto:
    """One matrix product in int8, images (B, n) to (B, m)."""
    step = np.float32(0.02)
    fixed = {
        "codes": codes,
        "step": np.full(codes.shape[1], 0.5, np.float32) if scale is None else scale,
        "scale": np.float32(step),
        "zero": np.uint8(0),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "step"], ["weight"], axis=1),
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["image2"]),
        helper.make_node("MatMul", ["image2", "weight"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("image", codes.shape[0]), ("logits", codes.shape[1]))
    ]
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in fixed.items()]
    made = helper.make_graph(nodes, "dense", ends[:1], ends[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("levels", "bits"),
    [((-77, 77), 1), ((-2, 1), 2), ((-100, 0, 3, 9), 2), (tuple(range(-8, 8)), 4), (tuple(range(0, 120, 8)), 4)],
)
@pytest.mark.parametrize("size", [1000, 1001, 1003, 1006])
def test_so_many_codes_take_so_many_bits(levels: Iterable[int], bits: int, size: int) -> None:
    rng = np.random.default_rng(size)
    codes = rng.choice(np.array(list(levels), np.int8), (size, 7))
    plain = dense(codes)
    packed = packing.pack(plain)
    assert packed.ByteSize() < codes.size * bits / 8 + 1100
    assert constants(packing.unpack(packed)) == constants(plain)


@pytest.mark.parametrize(
    "places", [[0], [999], [0, 255, 511, 999], [254], [255], [256], [510], [511], list(range(40)), [700, 701]]
)
def test_every_gap_is_bridged(places: Iterable[int]) -> None:
    codes = np.zeros((20000, 1), np.int8)
    codes[list(places), 0] = range(1, len(list(places)) + 1)
    packed = packing.pack(dense(codes))
    assert "ScatterElements" in {node.op_type for node in packed.graph.node}
    assert packed.ByteSize() < 1500
    assert constants(packing.unpack(packed)) == constants(dense(codes))


def test_what_would_not_be_smaller_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    plain = dense(rng.integers(-127, 128, (40, 10)).astype(np.int8), rng.random(10).astype(np.float32))
    assert constants(packing.pack(plain)) == constants(plain)
    small = dense(np.ones((8, 4), np.int8))
    assert constants(packing.pack(small)) == constants(small)


def test_steps_that_float16_does_not_hold_stay_float32() -> None:
    steps = np.float32(1) + np.arange(200, dtype=np.float32) * np.float32(2**-20)
    codes = np.random.default_rng(0).integers(-127, 128, (3, 200)).astype(np.int8)
    packed = packing.pack(dense(codes, steps))
    assert steps.tobytes() in {numpy_helper.to_array(tensor).tobytes() for tensor in packed.graph.initializer}
    rounded = packing.pack(dense(codes, steps.astype(np.float16).astype(np.float32)))
    assert rounded.ByteSize() < packed.ByteSize() - 300


def test_nothing_but_operators_of_every_runtime(networks: Networks) -> None:
    plain = reduce.reduce(networks("mobilenetv2_050").quantized)[0]
    used: set[str] = set()
    for kind in KINDS:
        used |= {node.op_type for node in packing.pack(recode(plain, kind)).graph.node}
    own = {node.op_type for node in plain.graph.node}
    portable = {"BitShift", "BitwiseAnd", "Cast", "Concat", "ConstantOfShape", "CumSum", "Gather", "Reshape"}
    assert used - own <= portable | {"ScatterElements", "Split", "Sub"}


@pytest.mark.parametrize("optimize", [True, False])
def test_a_wrong_unpacking_is_caught_by_the_proof(networks: Networks, tmp_path: Path, optimize: bool) -> None:
    network = networks("lenet-5")
    plain = recode(reduce.reduce(network.quantized)[0], spread)
    packed = packing.pack(plain)
    tensor = next(one for one in packed.graph.initializer if one.data_type == TensorProto.UINT8 and len(one.dims))
    values: Any = numpy_helper.to_array(tensor).copy()
    values[::7] ^= 1
    before, after, test = (tmp_path / name for name in ("before.onnx", "after.onnx", "test.parquet"))
    write_split(test, [png(seed, 28) for seed in range(40)], CLASSES)
    before.write_bytes(plain.SerializeToString())
    after.write_bytes(packed.SerializeToString())
    assert reduce.prove(before, after, test, 1, optimize) == 40
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    after.write_bytes(packed.SerializeToString())
    with pytest.raises(StageError, match="is not bit-identical to"):
        reduce.prove(before, after, test, 1, optimize)


def weighin(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "weighin"), "reduce", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_a_file_of_ones_own_is_reduced_and_keeps_its_metadata(
    networks: Networks, tmp_path: Path, options: list[str]
) -> None:
    own = onnx.ModelProto()
    own.CopyFrom(networks("lenet-5").quantized)
    helper.set_model_props(own, {"labels": "cat,dog,owl,fox"})
    source = tmp_path / "mine.onnx"
    onnx.save(own, source)
    done = weighin(source, *options)
    assert done.returncode == 0, done.stderr
    target = tmp_path / "mine.reduced.onnx"
    assert done.stdout == f"reduce: {source.stat().st_size:,} to {target.stat().st_size:,} bytes, in {target}\n"
    assert target.stat().st_size < source.stat().st_size / 2
    made = onnx.load(target)
    assert {entry.key: entry.value for entry in made.metadata_props} == {"labels": "cat,dog,owl,fox"}
    images = np.random.default_rng(1).standard_normal((5, 1, 28, 28)).astype(np.float32)
    assert logits(made, images, True) == logits(own, images, True)


def test_what_cannot_be_reduced_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    two = dense(np.ones((4, 4), np.int8))
    two.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    two.graph.node.append(helper.make_node("Identity", ["other"], ["copy"]))
    two.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, [1]))
    onnx.save(two, tmp_path / "two.onnx")
    for name, says in (
        ("text.onnx", "text.onnx does not load in ONNX Runtime"),
        ("gone.onnx", "gone.onnx is no file: name a quantized ONNX file"),
        (".", " is no file: name a quantized ONNX file"),
        ("two.onnx", "two.onnx does not take one batch of float32 images of a fixed size"),
    ):
        done = weighin(tmp_path / name)
        assert done.returncode == 1
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.onnx", "two.onnx"]


def test_tensors_in_a_file_beside_it_count(networks: Networks, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(networks("lenet-5").quantized)
    source = tmp_path / "source.onnx"
    onnx.save_model(model, source, save_as_external_data=True, location="source.data", size_threshold=0)
    assert weighin(source).returncode == 0
    record = reduce.reduce_file(source, tmp_path / "again.onnx")
    assert record["size_bytes_before"] == source.stat().st_size + (tmp_path / "source.data").stat().st_size
    assert record["size_bytes_after"] == (tmp_path / "again.onnx").stat().st_size
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "source.reduced.onnx").read_bytes()
