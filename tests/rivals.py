"""Two processes that decide at once, round after round: in two work trees of one repository, or two of its clones."""

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

from ledger import MODEL, Ledger, opened, production

from flows.registry import git
from flows.registry.audit import ALL, audit
from flows.registry.chain import Link
from flows.registry.decision import Champion, Decision
from flows.registry.record import Superseded
from flows.registry.refs import BRANCH
from tasks.core.errors import RegistryError

WAIT_S = 120.0
FORK = multiprocessing.get_context("fork")


class Told(NamedTuple):
    """What one of the two was told."""

    decision: Decision | None
    superseded: int  # how often it had to judge again
    overtaken: int  # how often its refs did not move because the other's had
    error: str | None


class Round(NamedTuple):
    """What the two were told, and how late each started, in seconds."""

    told: tuple[Told, Told]
    late: tuple[float, float]


Rival = Callable[[Path, int, Callable[[], None]], Told]  # calls the last one when it is ready, and then goes on


class Rivals(NamedTuple):
    """Two places with the same registry, and whether they meet at a remote."""

    places: tuple[Path, Path]
    remote: str | None


def work_trees(folder: Path) -> Rivals:
    """A repository with one promotion, and a second work tree of it that shares DVC's cache."""
    ledger, other = Ledger.begin(folder / "first", bootstrap=True), folder / "second"
    ledger.decide(1)
    ledger.commit("Trust the key")
    ledger.git("worktree", "add", "--quiet", "--detach", str(other))
    for name in (".weighin", "data"):
        shutil.copytree(ledger.root / name, other / name, dirs_exist_ok=True)
    (other / ".dvc/cache").symlink_to(ledger.root / ".dvc/cache")
    return Rivals((ledger.root, other), None)


def clones(folder: Path) -> Rivals:
    """Two clones of a bare repository with one promotion, each with a cache of its own, and one DVC remote."""
    ledger = Ledger.begin(folder / "first", bootstrap=True)
    ledger.share(folder / "bare.git", folder / "store")
    ledger.decide(1)
    ledger.commit("Trust the key")
    ledger.git("push", "--quiet", "origin", "main")
    return Rivals((ledger.root, ledger.clone(folder / "second").root), "origin")


def promoter(root: Path, seed: int, ready: Callable[[], None]) -> Told:
    """Lay a challenger and record it; whoever is superseded judges it again, as `weighin run` does."""
    said: list[str] = []
    Ledger(root).lay(seed)
    ready()
    superseded = 0
    while True:
        try:
            decision, _ = opened(root, say=said.append).record()
        except Superseded:
            superseded += 1
            Ledger(root).lay(seed)
        else:
            return Told(decision, superseded, _count_overtaken(said), None)


def roller(root: Path, seed: int, ready: Callable[[], None]) -> Told:
    """Roll back to the version before."""
    said: list[str] = []
    before = production(root)
    target = before.replaces if before else None
    ready()
    try:
        return Told(
            opened(root, say=said.append).roll_back(target, f"wrong at night {seed}"), 0, _count_overtaken(said), None
        )
    except RegistryError as error:
        return Told(None, 0, _count_overtaken(said), str(error))


def _count_overtaken(said: list[str]) -> int:
    return sum("another decision reached the registry first" in line for line in said)


def race(rivals: Rivals, number: int, kinds: tuple[Rival, Rival], late: tuple[float, float]) -> Round:
    """One round: both get ready, and start at once but for how late each is."""
    barrier = FORK.Barrier(2)
    running = [
        _started(kind, place, 10 * number + index, barrier, seconds)
        for index, (kind, place, seconds) in enumerate(zip(kinds, rivals.places, late, strict=True))
    ]
    told = [_answer(process, answers) for process, answers in running]
    return Round((told[0], told[1]), late)


def _started(kind: Rival, root: Path, seed: int, barrier: Barrier, late: float) -> tuple[ForkProcess, Any]:
    answers, ours = FORK.Pipe(duplex=False)

    def ready() -> None:
        barrier.wait(WAIT_S)
        time.sleep(late)

    process = FORK.Process(target=lambda: ours.send(kind(root, seed, ready)))
    process.start()
    ours.close()
    return process, answers


def _answer(process: ForkProcess, answers: Any) -> Told:
    if not answers.poll(WAIT_S):
        process.kill()
        raise AssertionError(f"a rival did not answer in {WAIT_S} s")
    told: Told = answers.recv()
    process.join()
    return told


def run(rivals: Rivals, rounds: int, kinds: tuple[Rival, Rival], spread: tuple[float, float], seed: int) -> list[Round]:
    """So many rounds; `spread` is how late each may be at most, in seconds."""
    drawn = random.Random(seed)
    lates = [(drawn.uniform(0, spread[0]), drawn.uniform(0, spread[1])) for _ in range(rounds)]
    return [race(rivals, number, kinds, late) for number, late in enumerate(lates, start=1)]


def unfair(rounds: list[Round]) -> list[str]:
    """What is wrong with rounds of two promoters: one wins at once, the other is superseded and faces the winner."""
    wrong = []
    for number, one in enumerate(rounds, start=1):
        first, second = sorted(one.told, key=lambda told: told.superseded)
        if (first.superseded, second.superseded) != (0, 1):
            wrong.append(f"round {number}: superseded {first.superseded} and {second.superseded} times")
        elif first.decision is None or second.decision is None:
            wrong.append(f"round {number}: no decision")
        elif second.decision.replaces != first.decision.version or second.decision.outcome != "promoted":
            wrong.append(f"round {number}: {second.decision.version} replaces {second.decision.replaces}")
    return wrong


def find_undecided(rounds: list[Round]) -> list[str]:
    """What is wrong with rounds of a promoter against a rollback: whoever comes second is told of the first."""
    wrong = []
    for number, (told, _) in enumerate(rounds, start=1):
        challenger, back = told
        if challenger.decision is None or challenger.decision.outcome != "promoted":
            wrong.append(f"round {number}: {challenger}")
        elif back.decision and challenger.decision.replaces != back.decision.version:
            wrong.append(f"round {number}: {challenger.decision.version} does not face {back.decision.version}")
        elif not back.decision and "came into production meanwhile" not in (back.error or ""):
            wrong.append(f"round {number}: {back.error}")
        elif challenger.superseded != int(back.decision is not None):
            wrong.append(f"round {number}: superseded {challenger.superseded} times")
    return wrong


def find_broken(rivals: Rivals, decisions: int) -> list[str]:
    """What is wrong with the registry afterwards: one chain of so many, without gaps, the same in both places."""
    wrong: list[str] = []
    for place in rivals.places:
        links = list(opened(place).look().links)
        wrong += _chain(place, links)
        if len(links) != decisions:
            wrong.append(f"{len(links)} decisions, not {decisions}")
        report = audit(place, MODEL, ALL, remote=rivals.remote)
        wrong += [f"{one.decision}: {one.file}: {one.found}" for one in report.findings]
    first, second = (git.git(place, "for-each-ref", BRANCH, "refs/tags") for place in rivals.places)
    return wrong if first == second else [*wrong, "the two places do not agree"]


def _chain(place: Path, links: list[Link]) -> Iterator[str]:
    production: str | None = None
    count = 0
    for link in links:
        decision = link.decision
        if decision.replaces != production:
            yield f"{link.commit} replaces {decision.replaces}, but {production} was in production"
        if decision.outcome == "promoted":
            count += 1
            if decision.version != f"v0.{count}.0":
                yield f"{decision.version} is the {count}th"
            champion = Champion.model_validate_json(git.git(place, "show", f"{link.commit}:champion.json"))
            if champion.version != production:
                yield f"{decision.version} was compared with {champion.version}, not with {production}"
        production = decision.version or production
