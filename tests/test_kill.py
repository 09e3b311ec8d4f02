"""Decisions that are killed on the way: the next run ends as an undisturbed one; bench/kill_matrix.py has more."""

from pathlib import Path

import crash
import pytest
from crash import Kill, Scenario

SEED = 7
SPECIAL = [
    (name, shared, spoil)
    for (name, shared), spoils in crash.SPECIAL.items()
    for spoil in spoils
    if (name, shared) in crash.QUICK
]


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, bool], Scenario]:
    return {}


@pytest.fixture
def scenario(
    request: pytest.FixtureRequest, made: dict[tuple[str, bool], Scenario], tmp_path_factory: pytest.TempPathFactory
) -> Scenario:
    if request.param not in made:
        made[request.param] = crash.prepare(tmp_path_factory.mktemp("scenario"), *request.param)
    return made[request.param]


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}{', shared' if value[1] else ''}"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("scenario", crash.QUICK, indirect=True, ids=name_of)
def test_killed_at_any_step_it_is_finished_by_the_next_run(scenario: Scenario, tmp_path: Path) -> None:
    calls, writes = crash.QUICK[scenario.kind]
    kills = [*crash.at_steps(scenario, calls, writes), *crash.inside(scenario, SEED, 1)]
    assert kills
    for number, kill in enumerate(kills):
        assert crash.survive(scenario, tmp_path / str(number), kill).wrong == (), kill


@pytest.mark.parametrize(
    ("scenario", "spoil"),
    [((name, shared), spoil) for name, shared, spoil in SPECIAL],
    indirect=["scenario"],
    ids=name_of,
)
def test_what_a_kill_within_git_leaves_is_mended(scenario: Scenario, spoil: crash.Spoil, tmp_path: Path) -> None:
    assert crash.recover(scenario, tmp_path / "case", spoil).wrong == ()


@pytest.mark.parametrize("scenario", [("promotion", True)], indirect=True, ids=name_of)
def test_a_kill_between_push_and_fetch_leaves_the_new_state_there_and_so_here(
    scenario: Scenario, tmp_path: Path
) -> None:
    push = next(number for number, call in enumerate(scenario.ran.calls, 1) if " push " in call)
    outcome = crash.survive(scenario, tmp_path / "case", Kill("after", push))
    assert (outcome.killed, outcome.moved, outcome.wrong) == (True, True, ())
