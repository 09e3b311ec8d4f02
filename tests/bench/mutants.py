"""Do the tests notice? `python tests/bench/mutants.py [--module NAME] [--only N]`.

Each mutant of the gate, of the bound and of the chain differs from the module at one place: another comparison, `and`
for `or`, a number that is one more or less, a sign or a `not` that is gone, another operation, None instead of what a
function returns, a `raise` or a `yield` that is dropped. The fast tests of the module are run against it in a copy of
the project, and the slow ones against what survives them. Results are kept in data/reports/bench/mutants.jsonl, one
line each, and a second call goes on from there: what was killed counts as long as the module stays as it is, what
survived as long as the tests do, too. Mutants that no test can tell from the module are listed in
mutants_equivalent.json, with the reasons. Prints a summary and the survivors, and ends with status 1 if one of them is
not listed. One that is killed takes 2 to 10 s on a busy core, one that survives as long as all of its tests.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutation import KILLED, SURVIVED, TIMED_OUT, Lab, Mutant, Round, mutants

from tasks.core import paths

REPORT = ROOT / paths.REPORTS / "bench" / "mutants.jsonl"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
SEED = 1
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # one each, before NumPy starts: a fork keeps no others
STAGE = ("repository",)  # the fixture of the tests that run the stage as a process


class Target(NamedTuple):
    """A module, and the tests of it: those of the second round are run against survivors of the first, and so on."""

    module: str
    rounds: tuple[Round, ...]


GATE = "tests/test_gate.py"
TARGETS = {
    "gate": Target("tasks/gate.py", (Round((GATE,), without=STAGE), Round((GATE,), only=STAGE))),
    "noninferiority": Target("tasks/core/noninferiority.py", (Round(("tests/test_comparison.py",)),)),
    "chain": Target(
        "flows/registry/chain.py",
        (
            Round(("tests/test_chain.py",)),
            Round(("tests/test_approval.py", "tests/test_rollback.py", "tests/test_registry.py")),
            Round(("tests/test_records.py", "tests/test_tamper.py")),
        ),
    ),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_tests(rounds: tuple[Round, ...]) -> str:
    """One hash of all tests, of what they share, and of which of them are run."""
    found = [f"{path.name} {sha256(path)}" for path in sorted((ROOT / "tests").glob("*.py"))]
    return hashlib.sha256(json.dumps([found, rounds]).encode()).hexdigest()


def load_results(report: Path, module_sha256: str, tests_sha256: str) -> dict[int, dict[str, Any]]:
    """By number the results of earlier calls that still hold."""
    lines = report.read_text().splitlines() if report.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["module_sha256"] == module_sha256]
    return {row["mutant"]: row for row in rows if row["result"] != SURVIVED or row["tests_sha256"] == tests_sha256}


def judge(lab: Lab, mutant: Mutant, rounds: tuple[Round, ...]) -> dict[str, Any]:
    """What the tests say of a mutant, round after round until one of them notices."""
    result, seconds, failed = SURVIVED, 0.0, None
    for chosen in rounds:
        if chosen not in lab.learned:
            lab.learn(chosen)
        result, outcome = lab.judge(mutant.source, chosen)
        seconds, failed = seconds + outcome.seconds, outcome.failed
        if result != SURVIVED:
            break
    about = {"mutant": mutant.number, "line": mutant.line, "text": mutant.text, "change": mutant.change}
    return about | {"result": result, "by": failed, "seconds": round(seconds, 2)}


def examine(target: Target, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of a module's mutants, those of earlier calls among them."""
    path = ROOT / target.module
    rounds = tuple(one._replace(keyword=arguments.keyword) for one in target.rounds[: arguments.rounds])
    keys = {"module": target.module, "module_sha256": sha256(path), "tests_sha256": of_tests(rounds)}
    chosen = mutants(path.read_text())
    random.Random(SEED).shuffle(chosen)
    chosen = [one for one in chosen if not arguments.mutant or one.number in arguments.mutant][: arguments.only]
    done = load_results(arguments.report, keys["module_sha256"], keys["tests_sha256"])
    waiting = [one for one in chosen if one.number not in done]
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="weighin-", ignore_cleanup_errors=True) as folder:
        lab = Lab(Path(folder), target.module) if waiting else None
        for number, one in enumerate(waiting, 1):
            if lab is None or time.monotonic() > ends:
                break
            row = done[one.number] = keys | judge(lab, one, rounds)
            with arguments.report.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{number:4}/{len(waiting)} {describe(row)}: {row['result']} in {row['seconds']} s", flush=True)
    return [done[one.number] for one in chosen if one.number in done]


def describe(row: dict[str, Any]) -> str:
    return f"{row['module']}:{row['line']}  {row['change']}"


def reasons() -> dict[tuple[str, str, str], str]:
    """Why a mutant is equivalent, by module, line and change."""
    listed = json.loads(EQUIVALENT.read_text())
    return {
        (module, one["line"], change): one["reason"]
        for module, entries in listed.items()
        for one in entries
        for change in one["changes"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--module", choices=TARGETS, help="this module alone")
    parser.add_argument("--only", type=int, metavar="N", help="the first N of each module, in a seeded order")
    parser.add_argument("--mutant", type=int, action="append", metavar="NUMBER", help="this mutant; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, for each module")
    parser.add_argument("--rounds", type=int, metavar="N", help="the first N rounds of tests, the fastest, alone")
    parser.add_argument("--keyword", default="", help="tests that match, as with pytest -k")
    parser.add_argument("--report", type=Path, default=REPORT, help="the file of results")
    arguments = parser.parse_args()
    equivalent, missed = reasons(), 0
    for name in [arguments.module] if arguments.module else TARGETS:
        rows = examine(TARGETS[name], arguments)
        counts = Counter(row["result"] for row in rows)
        survivors = [row for row in rows if row["result"] == SURVIVED]
        listed = [row for row in survivors if (row["module"], row["text"], row["change"]) in equivalent]
        print(
            f"{name}: {len(rows)} mutants, "
            + ", ".join(f"{counts[one]} {one}" for one in (KILLED, TIMED_OUT, SURVIVED))
        )
        print(f"{name}: {len(listed)} of the survivors are listed as equivalent")
        for row in (row for row in survivors if row not in listed):
            print(f"SURVIVED {describe(row)}    {row['text']}")
        missed += len(survivors) - len(listed)
    sys.exit(missed > 0)


if __name__ == "__main__":
    if any(os.environ.get(name) != "1" for name in THREADS):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(THREADS, "1"))  # noqa: S606
    main()
