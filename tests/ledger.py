"""A project in miniature for the registry: real git, real DVC cache, a real ONNX model and the real gate, no training.

Outputs are laid where the stages would leave them, in DVC's cache and in dvc.lock, as a run of the stages does.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import png, write_split
from onnx import TensorProto, helper, numpy_helper
from ruamel.yaml import YAML

from flows.registry import materials
from flows.registry.chain import Link
from flows.registry.decision import Champion, Decision
from flows.registry.record import Registry, open_registry
from flows.registry.view import View, read_view
from tasks import benchmark, gate
from tasks.core import config, files, paths
from tasks.images import ledger as splits_ledger
from tasks.runtime import probe

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CLASSES = ("cat", "dog", "owl", "fox")
MODEL = "classifier"
DOCS = paths.DATA_DOCS / "index.html"
FILES = (
    *(paths.TRAIN, paths.VAL, paths.TEST, paths.MANIFEST, paths.SOURCES, paths.LEDGER, paths.report("validate")),
    *(paths.weights("finetune"), paths.spec("finetune"), paths.onnx("finetune"), paths.onnx("reduce")),
    *(paths.report("benchmark"), paths.GOLDEN, paths.PREDICTIONS, paths.report("gate"), paths.PACKED),
)
OUTS = (*FILES, paths.DATA_DOCS)
GATE: dict[str, Any] = {"cmd": "true", "deps": ["tasks/stage.py"]}  # what judges
IMAGES = 200


def call(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def opened(root: Path, model: str = MODEL, say: Callable[[str], None] = lambda _: None) -> Registry:
    """The registry of a project; what it says is not shown."""
    return open_registry(root, model, say)


def look(root: Path, model: str = MODEL) -> View:
    """What lies here of the registry; `RegistryError` if something in it does not hold."""
    view = read_view(root, model, None)
    view.require_sound()
    return view


def decision_of(link: Link | None) -> Decision | None:
    return link.decision if link else None


def latest(root: Path, model: str = MODEL) -> Decision | None:
    return decision_of(look(root, model).standing.latest)


def production(root: Path, model: str = MODEL) -> Decision | None:
    return decision_of(look(root, model).standing.production)


class Ledger:
    """A repository with a registry; `lay` a model and `decide` on it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def begin(cls, root: Path, **gate_limits: Any) -> "Ledger":
        """A committed project with data, and nothing decided yet."""
        made = cls(root)
        root.mkdir(parents=True, exist_ok=True)
        call(root, "git", "init", "--quiet", "--initial-branch=main")
        call(root, "git", "config", "user.name", "Ada")
        call(root, "git", "config", "user.email", "ada@example.org")
        call(root, str(BIN / "dvc"), "init", "--quiet")
        made.params(**gate_limits)
        outs = [path.as_posix() for path in OUTS]
        made.write("dvc.yaml", json.dumps({"stages": {"build": {"cmd": "true", "outs": outs}, "gate": GATE}}).encode())
        made.write("tasks/stage.py", b"print('code')\n")
        made.write(paths.DEVICE, b'{"latency_ms": []}\n')
        made.write(
            ".gitignore", b"/data/prepared\n/data/models\n/data/reports\n/data/champion\n/data/splits\n.weighin/\n"
        )
        for index in range(3):
            made.write(f"data/raw/cat/{index}.png", png(index, 8))
        made.prepare()
        made.commit("Begin")
        return made

    def params(self, remote: str | None = None, name: str = MODEL, **limits: Any) -> None:
        """The shipped parameters for this project, with some of the gate's limits changed."""
        yaml = YAML(typ="safe")
        content = yaml.load(ROOT / "params.yaml") | {"model": name, "classes": list(CLASSES)}
        content["ingest"] |= {"kind": "folder", "path": "data/raw"}
        content["registry"] = {"remote": remote}
        slices = {"label": {"min_count": 20, "min_top1": 0.5}}
        content["gate"] |= {"champion": {"margin": 0.2}, "min_top1": 0.6, "slices": slices} | limits
        with (self.root / "params.yaml").open("w") as file:
            yaml.dump(content, file)

    def commit(self, message: str) -> None:
        call(self.root, "git", "add", ".")
        call(self.root, "git", "commit", "--quiet", "--message", message)

    def write(self, path: str | Path, data: bytes) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    def prepare(self) -> None:
        """The outputs of ingest and validate."""
        for number, path in enumerate((paths.TRAIN, paths.VAL, paths.TEST)):
            write_split(self.root / path, [png(100 * number + seed, 8) for seed in range(8)], CLASSES)
        sources = {path.as_posix(): files.sha256(self.root / path) for path in self.raw()}
        self.write(paths.SOURCES, json.dumps(sources).encode())
        rows = [
            {
                "path": path.relative_to("data/raw").as_posix(),
                "sha256": sources[path.as_posix()],
                "pixels_sha256": sources[path.as_posix()],
                "split": "train",
            }
            for path in self.raw()
        ]
        pq.write_table(pa.Table.from_pylist(rows), self.root / paths.MANIFEST)
        self.know()
        self.write(paths.report("validate"), b'{"passed": true}\n')
        self.write(DOCS, b"<html>fine</html>\n")

    def know(self, **splits: str) -> None:
        """Write the ledger of splits that ingest would leave: pixels and the split that they are in."""
        rows = [
            {"pixels_sha256": pixels, "split": split, "group": None, "generation": 1}
            for pixels, split in splits.items()
        ]
        splits_ledger.write(self.root / paths.LEDGER, pa.Table.from_pylist(rows, splits_ledger.SCHEMA))

    def raw(self) -> list[Path]:
        found = sorted(path for path in (self.root / "data/raw").rglob("*.png"))
        return [path.relative_to(self.root) for path in found]

    def lay(
        self,
        seed: int,
        wrong: int = 10,
        weights: dict[str, str] | None = None,
        padding: int = 0,
        name: str = MODEL,
        golden: int | None = None,
    ) -> None:
        """A challenger that has so many of the test images wrong, judged by the real gate against the champion.

        `padding` makes the fine-tuned weights that many bytes long; `golden` is the seed of the model that the golden
        outputs are of, if not of this one.
        """
        self.write(paths.onnx("reduce"), model(seed))
        self.write(paths.PACKED, files.pack(model(seed)))
        self.write(paths.onnx("finetune"), model(seed, note="fp32"))
        self.write(paths.weights("finetune"), np.random.default_rng(seed).bytes(padding or 64))
        self.write(paths.spec("finetune"), json.dumps({"weights": weights or {"source": "none"}}).encode())
        champion = opened(self.root, name).lay_champion(files.sha256(self.root / paths.onnx("reduce")), False)
        self.judge(seed, wrong, champion, golden)

    def judge(self, seed: int, wrong: int, champion: Champion, golden: int | None = None) -> None:
        """What benchmark and gate leave behind."""
        reference = self.write(".weighin/golden.onnx", model(seed if golden is None else golden))
        with (self.root / paths.GOLDEN).open("wb") as file:
            arrays = benchmark.golden_of(reference, self.root / paths.TEST, 1)
            np.savez_compressed(file, allow_pickle=False, **arrays)
        self.write(paths.PREDICTIONS, predictions(seed, wrong, champion))
        report = self.report(seed, wrong, champion)
        self.write(paths.report("benchmark"), json.dumps(report).encode())
        params = config.load(self.root / paths.PARAMS)
        names = (paths.onnx("reduce"), paths.TEST, paths.PARAMS)
        model_sha256, data_sha256, params_sha256 = (files.sha256(self.root / path) for path in names)
        code = files.digest(gate.judging_code(self.root))
        evidence = gate.Evidence(
            report=report,
            predictions=(self.root / paths.PREDICTIONS).read_bytes(),
            champion=json.loads((self.root / paths.CHAMPION_RECORD).read_bytes()),
            golden_sha256=files.sha256(self.root / paths.GOLDEN),
            packed_sha256=files.sha256(self.root / paths.PACKED),
            infra={"batch-1": {"difference": 0.0, "same_top1": True, "repeatable": True}},
            subject=gate.Subject(model_sha256, data_sha256, params_sha256, code),
        )
        verdict = gate.gate(evidence, params.gate, CLASSES)
        self.write(paths.report("gate"), (json.dumps(verdict.to_json(), indent=2) + "\n").encode())
        self.lock()

    def report(self, seed: int, wrong: int, champion: Champion) -> dict[str, Any]:
        numbers = {"top1": (IMAGES - wrong) / IMAGES, "size_bytes": 1000, "latency_p50_ms": 0.1}
        reduced = numbers | {"sha256": files.sha256(self.root / paths.onnx("reduce"))}
        return {
            "data_sha256": files.sha256(self.root / paths.TEST),
            "champion": numbers | {"sha256": champion.model_sha256} if champion.version else None,
            "stages": {"finetune": numbers | {"latency_p50_ms": 1.0}, "reduce": reduced},
            "predictions_sha256": files.sha256(self.root / paths.PREDICTIONS),
            "golden_sha256": files.sha256(self.root / paths.GOLDEN),
            "packed_sha256": files.sha256(self.root / paths.PACKED),
        }

    def lock(self) -> None:
        """Put the outputs into DVC's cache and dvc.lock."""
        outs = [self.stored(path) for path in FILES if path != paths.LEDGER or (self.root / path).exists()]
        page = self.stored(DOCS)
        listing = json.dumps([{"md5": page["md5"], "relpath": DOCS.name}]).encode()
        folder = {"path": paths.DATA_DOCS.as_posix(), "hash": "md5", "md5": f"{md5(listing)}.dir", "nfiles": 1}
        self.cached(folder["md5"]).parent.mkdir(parents=True, exist_ok=True)  # type: ignore[arg-type]
        if not self.cached(folder["md5"]).exists():  # type: ignore[arg-type]
            self.cached(folder["md5"]).write_bytes(listing)  # type: ignore[arg-type]
        table = {"path": str(paths.DEVICE), "hash": "md5", "md5": materials.hashes(self.root / paths.DEVICE)[0]}
        stage = {"cmd": "true", "deps": [table], "outs": sorted([*outs, folder], key=lambda out: str(out["path"]))}
        judging = [{"path": path, "hash": "md5", "md5": materials.hashes(self.root / path)[0]} for path in GATE["deps"]]
        with (self.root / "dvc.lock").open("w") as file:
            YAML().dump({"schema": "2.0", "stages": {"build": stage, "gate": GATE | {"deps": judging}}}, file)

    def stored(self, path: Path) -> dict[str, Any]:
        found, _, size = materials.hashes(self.root / path)
        target = self.cached(found)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / path, target)
        return {"path": path.as_posix(), "hash": "md5", "md5": found, "size": size}

    def cached(self, md5: str) -> Path:
        return self.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]

    def decide(self, seed: int, wrong: int = 10, **more: Any) -> Decision:
        """Lay a challenger and record what the gate says of it."""
        self.lay(seed, wrong, **more)
        decision, new = opened(self.root, more.get("name", MODEL)).record()
        assert new
        return decision

    def git(self, *args: str) -> str:
        return call(self.root, "git", *args)

    def weighin(self, *args: str, status: int = 0) -> str:
        """What the command line prints."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(BIN / "weighin"), *args], cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def share(self, bare: Path, store: Path) -> None:
        """Give the project a git remote `origin`, where the registry lives, and a DVC remote."""
        call(self.root, "git", "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
        self.git("remote", "add", "origin", str(bare))
        call(self.root, str(BIN / "dvc"), "remote", "add", "--quiet", "--default", "store", str(store))
        yaml = YAML(typ="safe")
        content = yaml.load(self.root / "params.yaml")
        content["registry"] = {"remote": "origin"}
        with (self.root / "params.yaml").open("w") as file:
            yaml.dump(content, file)
        self.commit("Share")
        self.git("push", "--quiet", "origin", "main")

    def clone(self, target: Path) -> "Ledger":
        """A clone of the project by somebody else, with the prepared data and the signing key."""
        call(self.root, "git", "clone", "--quiet", self.git("remote", "get-url", "origin"), str(target))
        made = Ledger(target)
        for name, value in (("user.name", "Grace"), ("user.email", "grace@example.org")):
            made.git("config", name, value)
        made.prepare()
        if (self.root / ".weighin").exists():
            shutil.copytree(self.root / ".weighin", target / ".weighin")
        return made


def model(seed: int, note: str = "") -> bytes:
    """A small classifier of 8x8 images as ONNX, with Weighin's metadata."""
    weight = np.random.default_rng(seed).standard_normal((3 * 64, len(CLASSES))).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])],
        [numpy_helper.from_array(weight * np.float32(1e-3), "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, doc_string=note)
    preprocessing = {"size": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    helper.set_model_props(made, {"weighin": json.dumps(preprocessing | {"classes": list(CLASSES)})})
    return bytes(made.SerializeToString())


def predictions(seed: int, wrong: int, champion: Champion) -> bytes:
    """So many wrong answers of the challenger, ten of the champion, at places that depend on the seed."""
    rng = np.random.default_rng(seed)
    ours, theirs = (set(rng.choice(IMAGES, count, replace=False).tolist()) for count in (wrong, 10))
    lines = ["actual,predicted,champion"]
    for index in range(IMAGES):
        actual, other = CLASSES[index % 4], CLASSES[(index + 1) % 4]
        answer = "" if champion.version is None else other if index in theirs else actual
        lines.append(f"{actual},{other if index in ours else actual},{answer}")
    return ("\n".join(lines) + "\n").encode()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def infra(ledger: Ledger) -> dict[str, Any]:
    """How the model that lies there meets its golden outputs in a fresh process."""
    return probe.meet(ledger.root / paths.GOLDEN, ledger.root / paths.onnx("reduce"), 1, None)
