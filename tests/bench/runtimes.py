"""Where do packed files load? `python tests/bench/runtimes.py [--model FILE] [--folder PATH] [--only NAME]...`.

Gives the model of data/models/reduce, or of a file, other int8 weights for each form that `tasks/graphs/packing.py`
has, and opens each as a plain and as a packed file: in the newest patch of every ONNX Runtime for Python from 1.18 on
that pip offers, and in the newest onnxruntime-node and onnxruntime-web that npm offers, with their optimizations and
without. For each form the table says whether the packed file's logits of 4 seeded random images are the plain one's in
the same runtime, bit by bit, and how many ms plain and packed take to load: medians of loads in turn, on one thread,
the file being in memory already.

Writes data/reports/bench/runtimes.json; what is there for the same files is not measured again. Ends with status 1 if
other bits came out. Each runtime is installed in the folder, which is a temporary one if none is given and takes 4 GB
at most; the ONNX Runtime that is installed here runs as it is. Takes about 10 minutes on two cores.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from codes import Values, recode

from tasks.core import files, paths
from tasks.graphs import packing
from tasks.runtime import session

TARGET = ROOT / paths.REPORTS / "bench" / "runtimes.json"
OLDEST = (1, 18)
NPM = ("node", "web")
BATCH, LOADS = 4, 21
INSTALLING_S, LOADING_S = 1200.0, 300.0
Row = dict[str, dict[str, Any]]  # what came out, by form
# The codes that an int8 weight has in place of its own, and the operator that tells that the form is used.
FORMS: dict[str, tuple[Callable[[Values], Values], str]] = {
    "4 bits": (lambda codes: np.rint(codes / 18), "BitShift"),
    "2 bits": (lambda codes: np.sign(codes) * (abs(codes) > np.median(abs(codes))), "BitShift"),
    "1 bit": (lambda codes: np.where(codes < 0, -77, 77), "BitShift"),
    "codebook": (lambda codes: np.rint(codes / 18) * 17, "BitShift"),
    "sparse": (lambda codes: codes * (abs(codes) > np.quantile(abs(codes), 0.75)), "ScatterElements"),
    "halves only": (lambda codes: codes, "Cast"),
}
MODES = {"all": "on", "disabled": "off"}  # as onnxruntime-node and -web call optimizations, and as the table does
HEADER = f"{'runtime':11} {'opt.':4} " + " ".join(f"{form:>17}" for form in FORMS)

# Both programs take the plain and the packed file, the images, their shape, the optimizations, and how many loads.
PYTHON = """
import json, sys, time, numpy, onnxruntime as ort
*paths, images, shape, mode, loads = sys.argv[1:]
options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
options.intra_op_num_threads, options.log_severity_level = 1, 4
options.graph_optimization_level = levels.ORT_ENABLE_ALL if mode == "all" else levels.ORT_DISABLE_ALL
batch = numpy.fromfile(images, numpy.float32).reshape(json.loads(shape))
models, told = [open(path, "rb").read() for path in paths], [{"ms": []}, {"ms": []}]
load = lambda model: ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
for model, one in zip(models, told):
    try:
        session = load(model)
        one["logits"] = session.run(None, {session.get_inputs()[0].name: batch})[0].tobytes().hex()
    except Exception as error:
        one["error"] = str(error)
for model, one in [*zip(models, told)] * int(loads):
    if "logits" in one:
        began = time.perf_counter()
        session = load(model)
        one["ms"].append(1000 * (time.perf_counter() - began))
print(json.dumps(told))
"""
JAVASCRIPT = """
const { readFileSync } = require("fs");
const main = async (name, plain, packed, images, shape, mode, loads) => {
  const ort = require(name), read = (path) => Uint8Array.from(readFileSync(path));
  const executionProviders = [name === "onnxruntime-web" ? "wasm" : "cpu"];
  const options = { executionProviders, graphOptimizationLevel: mode, intraOpNumThreads: 1, logSeverityLevel: 4 };
  if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  const batch = new ort.Tensor("float32", new Float32Array(read(images).buffer), JSON.parse(shape));
  const models = [read(plain), read(packed)], told = [{ ms: [] }, { ms: [] }];
  for (let load = 0; load <= Number(loads); load++) // the first is for the logits, and is not timed
    for (const [index, one] of told.entries())
      if (!one.error)
        try {
          const began = performance.now();
          const session = await ort.InferenceSession.create(models[index], options);
          if (load) one.ms.push(performance.now() - began);
          else {
            const { data } = (await session.run({ [session.inputNames[0]]: batch }))[session.outputNames[0]];
            one.logits = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("hex");
          }
          await session.release();
        } catch (error) { one.error = String(error.message ?? error); }
  console.log(JSON.stringify(told));
};
main(...process.argv.slice(2)).then(() => process.exit(0), (error) => (console.error(String(error)), process.exit(1)));
"""


class Refused(Exception):
    """A runtime that is not to be had, or that ends on a file."""


class Case(NamedTuple):
    """One form: the plain and the packed file, and the images that both get."""

    plain: Path
    packed: Path
    images: Path
    shape: tuple[int, ...]


def call(command: list[str], seconds: float) -> str:
    """What a command says; `Refused` with its last line on stderr if it fails."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        return str(subprocess.run(command, timeout=seconds, check=True, **options).stdout)
    except subprocess.CalledProcessError as error:
        raise Refused((error.stderr.strip() or f"status {error.returncode}").splitlines()[-1]) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(str(error)) from None


def lay(model: Path, folder: Path) -> dict[str, Case]:
    """Write the files of each form; ends where a form would show nothing."""
    plain, cases = packing.unpack(onnx.load(model)), dict[str, Case]()
    shape = (BATCH, *(size.dim_value for size in plain.graph.input[0].type.tensor_type.shape.dim[1:]))
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    images.tofile(folder / "images.f32")
    for form, (change, operator) in FORMS.items():
        name = form.replace(" ", "-")
        case = Case(folder / f"{name}.plain.onnx", folder / f"{name}.packed.onnx", folder / "images.f32", shape)
        made = recode(plain, change)
        packed = packing.pack(made)
        if operator not in {node.op_type for node in packed.graph.node}:
            sys.exit(f"error: {model} is not smaller in the form {form!r}")
        case.plain.write_bytes(made.SerializeToString())
        case.packed.write_bytes(packed.SerializeToString())
        if len(np.unique(session.logits(session.open_session(case.plain, 1), images), axis=0)) == 1:
            sys.exit(f"error: {model} has the same logits for all images in the form {form!r}")
        cases[form] = case
    return cases


def versions() -> Iterator[str]:
    """The newest patch of each ONNX Runtime that pip offers for this Python, the oldest first."""
    said = call([sys.executable, "-m", "pip", "index", "versions", "onnxruntime"], INSTALLING_S)
    offered = re.findall(r"\b(\d+)\.(\d+)\.(\d+)\b", said.partition("Available versions:")[2].partition("\n")[0])
    newest = {(major, minor): patch for major, minor, patch in sorted(tuple(map(int, one)) for one in offered)}
    return (f"{major}.{minor}.{patch}" for (major, minor), patch in newest.items() if (major, minor) >= OLDEST)


def install(name: str, folder: Path) -> tuple[str, list[str]]:
    """The full name of a runtime, and the command that runs one of the programs in it."""
    if name in NPM:
        home, package = folder / name, f"onnxruntime-{name}"
        options = ("--ignore-scripts", "--no-audit", "--no-fund")  # onnxruntime-node's script gets CUDA
        call(["npm", "install", "--prefix", str(home), *options, package], INSTALLING_S)
        (home / "load.js").write_text(JAVASCRIPT)
        version = files.read_json(home / "node_modules" / package / "package.json")["version"]
        return f"{name} {version}", ["node", str(home / "load.js"), package]
    python = Path(sys.executable)
    if name != ort.__version__:
        python = folder / f"python-{name}" / "bin" / "python"
        call([sys.executable, "-m", "venv", "--without-pip", str(python.parents[1])], INSTALLING_S)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        is_old = re.match(r"1\.1[0-8]\.", name)
        call([*pip, f"onnxruntime=={name}", "numpy<2" if is_old else "numpy"], INSTALLING_S)
    return name, [str(python), "-I", "-c", PYTHON]


def measure(command: list[str], case: Case, mode: str) -> dict[str, Any]:
    """What comes out of a form, in a process of its own: the packed file's bits, both times, and errors.

    The bits are the same or other, "alone" if the plain file does not load, "fail" if the packed one does not.
    """
    *paths, shape = case
    try:
        said = call([*command, *map(str, paths), json.dumps(shape), mode, str(LOADS)], LOADING_S)
        told = json.loads(said.splitlines()[-1])
    except Refused as error:
        told = [{"ms": [], "error": str(error)}] * 2
    plain, packed = (one.get("logits") for one in told)
    bits = "fail" if packed is None else "alone" if plain is None else "same" if plain == packed else "other"
    ms = [statistics.median(one["ms"]) if one["ms"] else None for one in told]
    return {"bits": bits, "ms": ms, "errors": [one.get("error") for one in told]}


def line(name: str, mode: str, row: Row) -> str:
    """The row as text under HEADER, and a line for each thing that went wrong."""
    cells, errors = [], dict[str, list[str]]()
    for form, one in row.items():
        cells.append(f"{one['bits']:>5} " + " ".join("    -" if ms is None else f"{ms:5.1f}" for ms in one["ms"]))
        for error in sorted({error.splitlines()[0] for error in one["errors"] if error}):
            errors.setdefault(error, []).append(form)
    told = (f"\n  {', '.join(forms)}: {error}" for error, forms in errors.items())
    return f"{name:11} {MODES[mode]:4} " + " ".join(cells) + "".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / paths.onnx("reduce"), help="what the forms are made of")
    parser.add_argument("--folder", type=Path, help="where the runtimes are installed, and stay")
    parser.add_argument("--only", action="append", metavar="NAME", help="a version, node or web; may be repeated")
    parser.add_argument("--report", type=Path, default=TARGET, help="the file of results")
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        sys.exit(f"error: {arguments.model} is missing: run `weighin run`, or name another by --model")
    ort.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True) as scratch:
        cases, folder = lay(arguments.model, Path(scratch)), (arguments.folder or Path(scratch)).resolve()
        made = {path.name: files.sha256(path) for path in Path(scratch).iterdir() if path.is_file()}
        sizes = {form: [path.stat().st_size for path in case[:2]] for form, case in cases.items()}
        report: dict[str, Any] = {"model": files.sha256(arguments.model), "files": files.digest(made), "bytes": sizes}
        known = files.read_json(arguments.report) if arguments.report.exists() else {}
        report["rows"] = known["rows"] if report.items() <= known.items() else {}
        print(HEADER)
        print(f"{'bytes':16} " + " ".join(f"{plain:>9,} {packed:>7,}" for plain, packed in sizes.values()), flush=True)
        for name in arguments.only or [*versions(), *NPM]:
            try:
                if name not in report["rows"]:
                    full, command = install(name, folder)
                    row = {mode: {form: measure(command, case, mode) for form, case in cases.items()} for mode in MODES}
                    report["rows"][name] = {"name": full} | row
                    files.write_json(arguments.report, report)
                for mode in MODES:
                    print(line(report["rows"][name]["name"], mode, report["rows"][name][mode]), flush=True)
            except Refused as error:
                print(f"{name:11} was not installed: {error}", flush=True)
    found = (one for row in report["rows"].values() for mode in MODES for one in row[mode].values())
    sys.exit(any(one["bits"] == "other" for one in found))


if __name__ == "__main__":
    main()
