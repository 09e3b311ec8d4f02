"""Two who decide at once: one wins, the other faces the winner. tests/bench/races.py runs many more rounds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import rivals
from ledger import Ledger
from rivals import Rivals

ROUNDS = 4
SEED = 3


pytestmark = pytest.mark.usefixtures("own_git")


@pytest.mark.parametrize("meet", [rivals.work_trees, rivals.clones])
def test_of_two_promoters_one_wins_and_the_other_is_judged_again(
    meet: Callable[[Path], Rivals], tmp_path: Path
) -> None:
    pair = meet(tmp_path)
    rounds = rivals.run(pair, ROUNDS, (rivals.promoter, rivals.promoter), (0.02, 0.02), SEED)
    assert rivals.unfair(rounds) == []
    assert rivals.find_broken(pair, 1 + 2 * ROUNDS) == []


def test_a_promotion_that_comes_while_a_rollback_is_at_work_stops_it(tmp_path: Path) -> None:
    pair = rivals.work_trees(tmp_path)
    Ledger(pair.places[0]).decide(2)
    rounds = rivals.run(pair, 1, (rivals.promoter, rivals.roller), (0.0, 0.0), SEED)
    assert rivals.find_undecided(rounds) == []
    back = sum(one.told[1].decision is not None for one in rounds)
    assert rivals.find_broken(pair, 3 + back) == []
