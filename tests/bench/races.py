"""Two who decide at once: `python tests/bench/races.py`.

50 rounds of two promoters in two work trees of one repository, 50 in two clones of one bare remote, and 10 of a
promoter against a rollback; all start at a barrier, some seeded milliseconds apart. Each round one wins, and the other
is superseded and judged again against the winner. Prints a table, writes data/reports/bench/races.json, and ends with
status 1 if that does not hold, or if the registry afterwards is not one chain that an audit finds sound.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import crash
import rivals
from ledger import Ledger
from workspace import own_git

from tasks.core import files, paths

TARGET = ROOT / paths.REPORTS / "bench" / "races.json"
SEED = 1
ROUNDS, ROLLBACKS = 50, 10
JITTER_S = 0.05
HEADER = f"{'rivals':26} {'rounds':>6} {'first won':>9} {'second won':>10} {'superseded':>10} {'overtaken':>9} wrong"
LATE_S = 2.0  # a rollback runs the model first, so that promotions that start with it would always come before it


def promotions(folder: Path, shared: bool) -> dict[str, Any]:
    """One line of the table: two promoters."""
    pair = rivals.clones(folder) if shared else rivals.work_trees(folder)
    rounds = rivals.run(pair, ROUNDS, (rivals.promoter, rivals.promoter), (JITTER_S, JITTER_S), SEED)
    won = [sum(one.told[place].superseded == 0 for one in rounds) for place in (0, 1)]
    wrong = rivals.unfair(rounds) + rivals.find_broken(pair, 1 + 2 * ROUNDS)
    return line("two clones of one remote" if shared else "two work trees", rounds, won, wrong)


def rollbacks(folder: Path) -> dict[str, Any]:
    """One line of the table: a promoter against a rollback."""
    pair = rivals.work_trees(folder)
    Ledger(pair.places[0]).decide(2)
    rounds = rivals.run(pair, ROLLBACKS, (rivals.promoter, rivals.roller), (LATE_S, 0.0), SEED)
    won = [sum(one.told[1].decision is None for one in rounds), sum(one.told[1].decision is not None for one in rounds)]
    wrong = rivals.find_undecided(rounds) + rivals.find_broken(pair, 2 + ROLLBACKS + won[1])
    return line("a promoter and a rollback", rounds, won, wrong)


def line(name: str, rounds: list[rivals.Round], won: list[int], wrong: list[str]) -> dict[str, Any]:
    """A line of the table."""
    told = [one for each in rounds for one in each.told]
    return {
        "rivals": name,
        "rounds": len(rounds),
        "won": won,
        "superseded": sum(one.superseded for one in told),
        "overtaken": sum(one.overtaken for one in told),
        "wrong": wrong,
    }


def main() -> None:
    started, rows = time.monotonic(), []
    crash.warm()
    with tempfile.TemporaryDirectory(prefix="weighin-") as scratch, own_git():
        rows.append(promotions(Path(scratch) / "trees", shared=False))
        print(rows[-1], flush=True)
        rows.append(promotions(Path(scratch) / "clones", shared=True))
        print(rows[-1], flush=True)
        rows.append(rollbacks(Path(scratch) / "rollbacks"))
    print(f"{'rivals':26} {'rounds':>6} {'first won':>9} {'second won':>10} {'superseded':>10} {'overtaken':>9} wrong")
    for row in rows:
        first, second = row["won"]
        counts = f"{row['rounds']:6} {first:9} {second:10} {row['superseded']:10} {row['overtaken']:9}"
        print(f"{row['rivals']:26} {counts} {len(row['wrong']):5}")
    for text in (text for row in rows for text in row["wrong"]):
        print(f"WRONG {text}")
    print(f"overtaken: the refs had moved between reading and writing, {time.monotonic() - started:.0f} s in all")
    files.write_json(TARGET, {"seed": SEED, "rows": rows})
    sys.exit(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    main()
