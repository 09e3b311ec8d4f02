"""chain: where a model stands after its decisions, and what a decision may not say after those before it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forgery
import pytest
from ledger import Ledger

from flows.registry.chain import Contradiction, Damage, Link, Standing, Step, read_chain, replay, walk
from flows.registry.decision import Champion, Code, Decision
from tasks.core import files
from tasks.core.errors import RegistryError

MODEL = "classifier"
SIGNER = "SHA256:" + "A" * 43
FIRST, REFUSED, SECOND, BACK, THIRD, HELD, APPROVED = range(7)  # the decisions of `history`


def sha256(letter: str) -> str:
    return letter * 64


def link(number: int, outcome: str, version: str | None, replaces: str | None, sha: str, **changes: Any) -> Link:
    """The decision with this number, which is its second and its commit, too."""
    content = {
        "model": MODEL,
        "outcome": outcome,
        "version": version,
        "replaces": replaces,
        "previous": f"{number - 1:040}" if number else None,
        "previous_sha256": sha256("0") if number else None,
        "created": f"2026-01-01T00:00:{number:02}Z",
        "by": "Ada",
        "reason": "said so" if outcome in ("approved", "rolled-back") else None,
        "signer": SIGNER,
        "code": Code(commit=None, dirty=False),
        "model_sha256": sha256(sha),
        "data_sha256": sha256("1"),
        "params_sha256": sha256("2"),
        "code_sha256": sha256("3"),
        "verdict_sha256": sha256("4"),
        "bootstrap": number == 0,
        "traded": False,
        "failed": ("top1",) if outcome == "refused" else (),
    }
    return Link(f"{number:040}", Decision.model_validate(content | changes), None, None, f"files of {sha}")


def champion_of(version: str | None, sha: str | None, *withdrawn: str) -> Champion:
    model = sha256(sha) if sha else None
    return Champion(version=version, model_sha256=model, withdrawn=tuple(map(sha256, withdrawn)), bootstrap=False)


def history() -> list[Link]:
    """A promotion, a refusal, a promotion, a rollback, a promotion, and one that is held first and then approved."""
    return [
        link(0, "promoted", "v0.1.0", None, "a")._replace(champion=champion_of(None, None)),
        link(1, "refused", None, None, "b")._replace(champion=champion_of("v0.1.0", "a")),
        link(2, "promoted", "v0.2.0", "v0.1.0", "c")._replace(champion=champion_of("v0.1.0", "a")),
        link(3, "rolled-back", "v0.1.0", "v0.2.0", "a"),
        link(4, "promoted", "v0.3.0", "v0.1.0", "d")._replace(champion=champion_of("v0.1.0", "a", "c")),
        link(5, "held", None, None, "e")._replace(champion=champion_of("v0.3.0", "d", "c")),
        link(6, "approved", "v0.4.0", "v0.3.0", "e")._replace(champion=champion_of("v0.3.0", "d", "c")),
    ]


def steps(links: list[Link], is_whole: bool = True) -> list[Step]:
    return list(replay(links, is_whole))


def contradictions(links: list[Link]) -> tuple[Contradiction, ...]:
    """The contradictions in the last of the decisions; those before it have none."""
    *earlier, last = steps(links)
    assert [one.contradictions for one in earlier] == [()] * len(earlier)
    return last.contradictions


def change_link(number: int, **changes: Any) -> list[Link]:
    """The history up to a decision, which says something else."""
    links = history()[: number + 1]
    content = links[number].decision.model_dump() | changes
    links[number] = links[number]._replace(decision=Decision.model_validate(content))
    return links


def facing(number: int, champion: Champion | None) -> list[Link]:
    links = history()[: number + 1]
    links[number] = links[number]._replace(champion=champion)
    return links


def test_a_sound_history_has_no_contradiction() -> None:
    assert contradictions(history()) == ()


def test_the_standing_follows_each_decision() -> None:
    links = history()
    found = [one.after for one in steps(links)]
    assert [one.assignments[-1] for one in found] == [
        *("v0.1.0", "v0.1.0", "v0.2.0", "v0.1.0", "v0.3.0", "v0.3.0", "v0.4.0")
    ]
    assert [one.withdrawn for one in found] == [(), (), (), *[(sha256("c"),)] * 4]
    assert [one.latest for one in found] == links
    moved = (FIRST, FIRST, SECOND, BACK, THIRD, THIRD, APPROVED)
    assert [one.moved for one in found] == [links[number] for number in moved]
    stands = (FIRST, FIRST, SECOND, FIRST, THIRD, THIRD, APPROVED)
    assert [one.production for one in found] == [links[number] for number in stands]
    assert [one.held for one in found] == [None] * 5 + [links[HELD], None]
    assert [one.next_version for one in found] == [
        *("v0.2.0", "v0.2.0", "v0.3.0", "v0.3.0", "v0.4.0", "v0.4.0", "v0.5.0")
    ]
    assert [one.before for one in steps(links)] == [Standing(), *found[:-1]]


def test_nothing_decided_stands_nowhere() -> None:
    nothing = Standing()
    assert (nothing.production, nothing.held, nothing.next_version, nothing.tags(MODEL)) == (None, None, "v0.1.0", {})


def test_the_next_version_comes_after_all_of_any_number() -> None:
    versions = {version: history()[FIRST] for version in ("v0.9.0", "v2.3.4", "v0.10.0")}
    assert Standing(promotions=versions).next_version == "v2.4.0"
    del versions["v2.3.4"]
    assert Standing(promotions=versions).next_version == "v0.11.0"


def test_tags_name_versions_and_who_was_in_production_when() -> None:
    links = history()
    commits = [one.commit for one in links]
    assert steps(links)[-1].after.tags(MODEL) == {
        "classifier@v0.1.0": commits[FIRST],
        "classifier@v0.2.0": commits[SECOND],
        "classifier@v0.3.0": commits[THIRD],
        "classifier@v0.4.0": commits[APPROVED],
        "classifier#production#1": commits[FIRST],
        "classifier#production#2": commits[SECOND],
        "classifier#production#3": commits[FIRST],
        "classifier#production#4": commits[THIRD],
        "classifier#production#5": commits[APPROVED],
    }


def test_a_rollback_to_a_version_whose_promotion_is_gone_has_no_tag() -> None:
    links = history()[SECOND : BACK + 1]
    after = steps(links, is_whole=False)[-1].after
    assert (after.assignments, after.production) == (("v0.2.0", "v0.1.0"), None)
    commit = links[0].commit
    assert after.tags(MODEL) == {"classifier@v0.2.0": commit, "classifier#production#1": commit}


def test_a_model_that_is_back_is_not_withdrawn() -> None:
    again = link(4, "rolled-back", "v0.2.0", "v0.1.0", "c")
    assert contradictions([*history()[:THIRD], again]) == ()
    assert steps([*history()[:THIRD], again])[-1].after.withdrawn == (sha256("a"),)
    # By another promotion of the very same model, too.
    again = link(4, "promoted", "v0.3.0", "v0.1.0", "c")
    assert steps([*history()[:THIRD], again])[-1].after.withdrawn == ()


def test_a_rollback_from_a_version_whose_promotion_is_gone_withdraws_nothing_known() -> None:
    links = [history()[FIRST], history()[BACK]]
    assert steps(links, is_whole=False)[-1].after.withdrawn == ()


def test_models_stand_on_their_own_and_share_the_time() -> None:
    links = history()[:SECOND]
    other = link(2, "promoted", "v0.1.0", None, "f", model="other")._replace(champion=champion_of(None, None))
    more = link(3, "promoted", "v0.2.0", "v0.1.0", "c")._replace(champion=champion_of("v0.1.0", "a"))
    assert contradictions([*links, other, more]) == ()
    assert steps([*links, other, more])[2].before == Standing()
    early = other._replace(decision=other.decision.model_copy(update={"created": links[-1].decision.created}))
    assert [one.file for one in contradictions([*links, early])] == ["decision.json"]


@pytest.mark.parametrize("created", ["2026-01-01T00:00:01Z", "2026-01-01T00:00:00Z", "2025-12-31T23:59:59Z"])
def test_time_goes_forward(created: str) -> None:
    (one,) = contradictions(change_link(SECOND, created=created))
    assert one == Contradiction(
        "decision.json", "created after 2026-01-01T00:00:01Z, when the decision before was", f"created {created}"
    )


def test_schemas_go_forward() -> None:
    (one,) = contradictions(change_link(SECOND, schema_version=1))
    assert one == Contradiction(
        "decision.json", "schema_version 2 or higher, as the decision before has", "schema_version 1"
    )
    old = [one._replace(decision=one.decision.model_copy(update={"schema_version": 1})) for one in history()[:SECOND]]
    assert contradictions([*old, history()[SECOND]]) == ()


@pytest.mark.parametrize(
    ("links", "expected", "found"),
    [
        (change_link(FIRST, version="v0.2.0"), "version v0.1.0 in place of None", "version v0.2.0 in place of None"),
        (change_link(FIRST, replaces="v0.1.0"), "version v0.1.0 in place of None", "version v0.1.0 in place of v0.1.0"),
        (
            change_link(SECOND, version="v0.1.0"),
            "version v0.2.0 in place of v0.1.0",
            "version v0.1.0 in place of v0.1.0",
        ),
        (
            change_link(THIRD, replaces="v0.2.0"),
            "version v0.3.0 in place of v0.1.0",
            "version v0.3.0 in place of v0.2.0",
        ),
        (
            change_link(APPROVED, version="v1.0.0"),
            "version v0.4.0 in place of v0.3.0",
            "version v1.0.0 in place of v0.3.0",
        ),
        (change_link(BACK, version="v0.2.0"), "an earlier version in place of v0.2.0", "v0.2.0 in place of v0.2.0"),
        (change_link(BACK, version="v0.9.0"), "an earlier version in place of v0.2.0", "v0.9.0 in place of v0.2.0"),
        (change_link(BACK, replaces="v0.1.0"), "an earlier version in place of v0.2.0", "v0.1.0 in place of v0.1.0"),
    ],
)
def test_versions_follow_what_was_in_production(links: list[Link], expected: str, found: str) -> None:
    assert contradictions(links) == (Contradiction("decision.json", expected, found),)


def test_nothing_can_be_rolled_back_before_the_first_promotion() -> None:
    (one,) = contradictions([link(0, "rolled-back", "v0.1.0", "v0.2.0", "a")])
    assert (one.expected, one.found) == ("an earlier version in place of None", "v0.1.0 in place of v0.2.0")


@pytest.mark.parametrize(
    ("number", "champion", "expected", "found"),
    [
        (FIRST, champion_of("v0.1.0", "a"), "no champion: nothing was in production", "v0.1.0"),
        (SECOND, champion_of(None, None), "v0.1.0, which was in production", "None"),
        (REFUSED, champion_of("v0.2.0", "a"), "v0.1.0, which was in production", "v0.2.0"),
        (SECOND, champion_of("v0.1.0", "b"), "v0.1.0, which was in production", "v0.1.0"),
        (HELD, champion_of("v0.1.0", "a", "c"), "v0.3.0, which was in production", "v0.1.0"),
        (SECOND, champion_of("v0.1.0", "a", "c"), "withdrawn []", f"withdrawn ['{sha256('c')}']"),
        (THIRD, champion_of("v0.1.0", "a"), f"withdrawn ['{sha256('c')}']", "withdrawn []"),
        (THIRD, champion_of("v0.1.0", "a", "b"), f"withdrawn ['{sha256('c')}']", f"withdrawn ['{sha256('b')}']"),
    ],
)
def test_the_champion_is_what_was_in_production(number: int, champion: Champion, expected: str, found: str) -> None:
    assert contradictions(facing(number, champion)) == (Contradiction("champion.json", expected, found),)


def test_without_a_record_of_the_champion_nothing_is_said_of_it() -> None:
    assert contradictions(facing(FIRST, None)) == contradictions(facing(SECOND, None)) == ()


def test_the_order_of_what_was_withdrawn_says_nothing() -> None:
    links = history()[:THIRD]
    links.append(link(4, "promoted", "v0.3.0", "v0.1.0", "d")._replace(champion=champion_of("v0.1.0", "a", "c")))
    links.append(link(5, "rolled-back", "v0.1.0", "v0.3.0", "a"))
    links.append(link(6, "refused", None, None, "e")._replace(champion=champion_of("v0.1.0", "a", "d", "c")))
    assert contradictions(links) == ()


def test_what_is_in_production_already_may_be_refused_once_more() -> None:
    """It faces the champion that it faced at its promotion; nothing else than a refusal may."""
    again = champion_of("v0.1.0", "a")
    assert contradictions([*history()[:BACK], link(3, "refused", None, None, "c")._replace(champion=again)]) == ()
    for outcome in ("held", "refused"):
        champion = again if outcome == "held" else champion_of("v0.1.0", "b")
        (one,) = contradictions([*history()[:BACK], link(3, outcome, None, None, "c")._replace(champion=champion)])
        assert (one.file, one.expected) == ("champion.json", "v0.2.0, which was in production")


def test_only_what_is_held_is_approved() -> None:
    links = history()
    early = link(5, "approved", "v0.4.0", "v0.3.0", "e")._replace(champion=champion_of("v0.3.0", "d", "c"))
    assert contradictions([*links[:HELD], early]) == (
        Contradiction("its files", "those of a decision that holds the model", "others"),
    )
    other = links[APPROVED]._replace(evidence="files of f")
    assert contradictions([*links[:APPROVED], other]) == (
        Contradiction("its files", f"those of classifier hold ({links[HELD].commit[:12]})", "others"),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda back: back._replace(evidence="files of b"),
        lambda back: back._replace(decision=back.decision.model_copy(update={"model_sha256": sha256("b")})),
    ],
    ids=["files", "model"],
)
def test_a_rollback_has_the_files_of_its_target(change: Callable[[Link], Link]) -> None:
    assert contradictions([*history()[:BACK], change(history()[BACK])]) == (
        Contradiction("its files", "those of classifier@v0.1.0", "others"),
    )


def test_a_chain_that_is_not_whole_contradicts_nothing() -> None:
    wrong = [*history()[:BACK], history()[APPROVED], history()[FIRST]]
    assert any(one.contradictions for one in replay(wrong))
    assert not any(one.contradictions for one in steps(wrong, is_whole=False))


# Reading: three promotions, in a repository.


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, own_git: None) -> Ledger:
    made = Ledger.begin(tmp_path_factory.mktemp("chain") / "project", bootstrap=True)
    for number in range(3):
        made.decide(number + 1)
    return made


@pytest.fixture
def ledger(kept: Ledger, tmp_path: Path) -> Ledger:
    return Ledger(Path(shutil.copytree(kept.root, tmp_path / "project", symlinks=True)))


def read(ledger: Ledger) -> list[Link | Damage]:
    """What is read from the newest decision to the first."""
    return list(walk(ledger.root, ledger.git("rev-parse", "registry")))


def faults(ledger: Ledger) -> list[str | None]:
    return [one.fault for one in read(ledger)]


def resign(ledger: Ledger, number: int, change: Callable[[dict[str, Any]], object], headers: Any = None) -> None:
    """A decision that whoever has the key made otherwise, and signed again with all after it."""

    def edit(_: Ledger, contents: forgery.Contents) -> None:
        content = json.loads(contents["decision.json"])
        change(content)
        contents["decision.json"] = files.to_json(content)

    forgery.remake(ledger, {number: edit}, forgery.own(ledger), headers=headers)


def remove_signer(content: dict[str, Any]) -> None:
    """A decision as the first days have them."""
    for name in ("replaces", "previous_sha256", "by", "reason", "signer", "params_sha256", "code_sha256"):
        del content[name]
    for name in ("bootstrap", "traded"):
        del content[name]
    content["schema_version"] = 1


def test_decisions_are_read_from_the_newest_to_the_first(ledger: Ledger) -> None:
    found = read(ledger)
    assert [one.commit for one in found] == ledger.git("rev-list", "registry").split()
    assert [one.decision.version for one in found if isinstance(one, Link)] == ["v0.3.0", "v0.2.0", "v0.1.0"]
    assert faults(ledger) == [None] * 3
    assert list(read_chain(ledger.root, found[0].commit)) == found
    assert list(walk(ledger.root, found[1].commit)) == found[1:]
    assert list(walk(ledger.root, None)) == []


NOBODY = "names another signer than the commit has"
ELSEWHERE = "names another decision before it than the commit has"
SEEN = "its bundle.sig is not the one that the next decision has seen"


@pytest.mark.parametrize(
    ("number", "changes", "place", "said"),
    [
        (0, {"signer": SIGNER}, 2, NOBODY),
        (2, {"signer": SIGNER}, 0, NOBODY),
        (1, {"previous": "f" * 40}, 1, ELSEWHERE),
        (0, {"previous": "f" * 40, "previous_sha256": "0" * 64}, 2, ELSEWHERE),
        (1, {"previous": None}, 1, ELSEWHERE),
        (2, {"previous_sha256": "0" * 64}, 1, SEEN),
    ],
)
def test_a_decision_that_is_not_what_its_commit_is_does_not_hold(
    ledger: Ledger, number: int, changes: dict[str, Any], place: int, said: str
) -> None:
    """And the others do."""
    resign(ledger, number, lambda content: content.update(changes))
    found = faults(ledger)
    assert said in (found.pop(place) or "")
    assert found == [None, None]
    commit = ledger.git("rev-parse", f"registry~{place}")
    newer: list[str] = []
    with pytest.raises(RegistryError, match=rf"^decision {commit[:12]} does not hold: .*{said}; see `weighin audit`$"):
        newer.extend(one.commit for one in read_chain(ledger.root, ledger.git("rev-parse", "registry")))
    assert newer == ledger.git("rev-list", f"{commit}..registry").split()


def test_a_commit_with_two_parents_does_not_hold(ledger: Ledger) -> None:
    first = ledger.git("rev-parse", "registry~2").encode()
    resign(ledger, 2, lambda _: None, lambda data: data.replace(b"\nauthor ", b"\nparent " + first + b"\nauthor ", 1))
    found = faults(ledger)
    assert ELSEWHERE in (found[0] or "")
    assert found[1:] == [None, None]


def test_what_looks_like_a_parent_in_the_message_is_none(ledger: Ledger) -> None:
    resign(ledger, 0, lambda _: None, lambda data: data.rstrip(b"\n") + b"\n\nparent " + b"f" * 40 + b"\n")
    assert faults(ledger) == [None] * 3


def test_an_unsigned_decision_holds_below_a_signed_one_alone(ledger: Ledger) -> None:
    resign(ledger, 0, remove_signer)
    assert faults(ledger) == [None] * 3
    resign(ledger, 2, remove_signer)
    newest, *older = faults(ledger)
    assert NOBODY in (newest or "")
    assert older == [None] * 2


def test_unsigned_decisions_hold_where_no_key_is_trusted(ledger: Ledger) -> None:
    resign(ledger, 2, remove_signer)
    (ledger.root / "deploy/trusted_keys").unlink()
    newest, *older = faults(ledger)
    assert newest is None
    assert all("unknown key" in (one or "") for one in older)


def test_a_decision_whose_signature_does_not_hold_lets_no_unsigned_one_hold(ledger: Ledger) -> None:
    resign(ledger, 1, remove_signer)
    forgery.remake(ledger, {2: lambda *_: None}, None, forgery.unsigned)
    newest, middle, first = faults(ledger)
    assert "not signed" in (newest or "")
    assert NOBODY in (middle or "")
    assert first is None


def test_a_decision_that_cannot_be_read_is_passed_over(ledger: Ledger) -> None:
    edits: dict[int, forgery.Edit] = {1: lambda _, contents: contents.update({"decision.json": b"{"})}
    forgery.remake(ledger, edits, forgery.own(ledger))
    newest, damage, first = read(ledger)
    assert (type(newest), type(damage), type(first)) == (Link, Damage, Link)
    assert (newest.fault, first.fault) == (None, None)
    assert damage.fault == f"{damage.commit}:decision.json is malformed: it is not JSON"
    with pytest.raises(RegistryError, match=f"decision {damage.commit[:12]} does not hold: "):
        list(read_chain(ledger.root, newest.commit))


def test_nothing_is_known_below_a_commit_that_is_gone(ledger: Ledger) -> None:
    commit = ledger.git("rev-parse", "registry~1")
    forgery.loose(ledger, commit).unlink()
    newest, damage = read(ledger)
    assert (type(newest), newest.fault) == (Link, None)
    assert (type(damage), damage.commit) == (Damage, commit)
