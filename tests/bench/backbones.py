"""Which of timm's networks suit: `python tests/bench/backbones.py [--only MODULE]`.

For the smallest network of each of timm's modules the plan is tried as a run tries it before it trains: half of all
channels are removed and the network is written as ONNX, at 224 pixels, with two minutes' time. One whose channels
cannot be removed is tried once more with `prune.channels: null`, which leaves fine-tuning, int8 and the export. Every
refusal has to be the one sentence that `weighin run` would end with. Prints a row for each network and appends it to
data/reports/bench/backbones.jsonl, so that an interrupted call goes on where it was; ends with status 1 at a refusal
that is not such a sentence. About forty minutes on two quiet cores.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from flows import rehearsal
from tasks.core import config, paths
from tasks.core.errors import StageError

TARGET = ROOT / paths.REPORTS / "bench" / "backbones.jsonl"
RECIPE = ROOT / "params.yaml"
SIZE = 224
PLANS: dict[str, dict[str, Any]] = {
    "with half of its channels": {"blocks": None, "channels": {"ratio": 0.5, "multiple": 8}},
    "with all its channels": {"blocks": None, "channels": None},
}
UNSUITABLE = "it does not suit"
HEADER = f"{'module':26} {'network':38} {'parameters':>12} {'seconds':>8}  suits"


def find_smallest(module: str) -> tuple[str, int]:
    """The network of a module of timm with the fewest parameters, and how many those are."""
    import timm
    import torch

    sizes = []
    for name in timm.list_models(module=module):
        with torch.device("meta"), contextlib.suppress(Exception):  # some are made on real memory only
            sizes.append((sum(one.numel() for one in timm.create_model(name).parameters()), name))
    if not sizes:
        return timm.list_models(module=module)[0], 0
    count, name = min(sizes)
    return name, count


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in the folder, with the code of this repository."""
    before, path = Path.cwd(), os.environ.get("PYTHONPATH")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def try_plan(name: str, prune: dict[str, Any], folder: Path) -> str | None:
    """The sentence that refuses the plan for the network; None if it suits."""
    yaml = YAML(typ="safe")
    content = yaml.load(RECIPE)
    content |= {"compress": None, "prune": content["prune"] | prune}
    content["finetune"] |= {"backbone": name, "image_size": SIZE}
    yaml.dump(content, folder / "params.yaml")
    try:
        with inside(folder), rehearsal.rehearse(config.load(Path("params.yaml")), lambda _: None, budget=False):
            pass
    except StageError as error:
        return str(error)
    return None


def examine(module: str) -> dict[str, Any]:
    """The row of a module."""
    from timm import __version__ as version

    name, parameters = find_smallest(module)
    began, refusals = time.monotonic(), {}
    suits = UNSUITABLE
    with tempfile.TemporaryDirectory(prefix="weighin-") as folder:
        for plan, prune in PLANS.items():
            refusal = try_plan(name, prune, Path(folder))
            if refusal is None:
                suits = plan
                break
            refusals[plan] = refusal
    return {
        "module": module,
        "network": name,
        "parameters": parameters,
        "seconds": round(time.monotonic() - began, 1),
        "suits": suits,
        "refusals": refusals,
        "timm": version,
    }


def is_clear(refusal: str, name: str) -> bool:
    """Whether a refusal is one line, with a reason at its end, that names the parameter and the network."""
    begun = refusal.startswith(("finetune.backbone", "finetune.image_size"))
    return begun and name in refusal and refusal.isprintable() and not refusal.rstrip().endswith(":")


def line(row: dict[str, Any]) -> str:
    """The row as text under HEADER."""
    return f"{row['module']:26} {row['network']:38} {row['parameters']:12,} {row['seconds']:8.1f}  {row['suits']}"


def load_rows(report: Path) -> dict[str, dict[str, Any]]:
    """By module the rows of earlier calls with this version of timm."""
    from timm import __version__ as version

    rows = [json.loads(text) for text in report.read_text().splitlines()] if report.exists() else []
    return {row["module"]: row for row in rows if row["timm"] == version}


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="MODULE", help="this module of timm; may be repeated")
    parser.add_argument("--report", type=Path, default=TARGET, help="the file of results")
    arguments = parser.parse_args()
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    done, unclear = load_rows(arguments.report), 0
    print(HEADER, flush=True)
    names = [module for module in timm.list_modules() if timm.list_models(module=module)]
    rows = []
    for module in arguments.only or names:
        row = done.get(module) or examine(module)
        if module not in done:
            with arguments.report.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(line(row), flush=True)
        for refusal in row["refusals"].values():
            clear = is_clear(refusal, row["network"])
            unclear += not clear
            print(f"    {'' if clear else 'UNCLEAR: '}{refusal}", flush=True)
    counts = Counter(row["suits"] for row in rows)
    print(f"{len(rows)} networks: " + ", ".join(f"{counts[one]} {one}" for one in (*PLANS, UNSUITABLE)))
    sys.exit(unclear > 0)


if __name__ == "__main__":
    main()
