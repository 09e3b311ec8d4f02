"""When a schedule runs: in which time zone, and what daylight saving makes of it."""

import re
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from flows import schedule
from tasks.core.errors import ParamsError

BERLIN = ZoneInfo("Europe/Berlin")


def times(cron: str, zone: str, start: str) -> list[str]:
    """The next three times, as the clock on the wall there has them."""
    own = ZoneInfo(zone)
    found = schedule.next_times(cron, own, datetime.fromisoformat(start).replace(tzinfo=own))
    return [f"{time:%a %d %H:%M %z}" for time in found]


@pytest.mark.parametrize(
    ("zone", "start", "expected"),
    [
        ("Europe/Berlin", "2027-03-22T04:00", ["Mon 29 03:00 +0200", "Mon 05 03:00 +0200", "Mon 12 03:00 +0200"]),
        ("Europe/Berlin", "2027-10-24T04:00", ["Mon 25 03:00 +0200", "Mon 01 03:00 +0100", "Mon 08 03:00 +0100"]),
        ("America/New_York", "2027-03-07T04:00", ["Mon 08 03:00 -0500", "Mon 15 03:00 -0400", "Mon 22 03:00 -0400"]),
        ("Asia/Kolkata", "2027-03-22T04:00", ["Mon 29 03:00 +0530", "Mon 05 03:00 +0530", "Mon 12 03:00 +0530"]),
        ("UTC", "2027-03-22T04:00", ["Mon 29 03:00 +0000", "Mon 05 03:00 +0000", "Mon 12 03:00 +0000"]),
    ],
)
def test_mondays_at_three_are_so_by_the_clock_on_the_wall_all_year(zone: str, start: str, expected: list[str]) -> None:
    assert times("0 3 * * 1", zone, start) == expected


@pytest.mark.parametrize(
    ("zone", "eve"),
    [("Europe/Berlin", "2027-03-27"), ("America/New_York", "2027-03-13"), ("Europe/Berlin", "2028-03-25")],
)
def test_a_time_that_spring_leaves_out_is_kept_within_the_hour_beside_it(zone: str, eve: str) -> None:
    before, skipped, after = times("30 2 * * *", zone, f"{eve}T00:00")
    assert (before[7:12], after[7:12]) == ("02:30", "02:30")
    assert skipped[7:12] in ("01:30", "03:30")


@pytest.mark.parametrize(
    ("zone", "eve"),
    [("Europe/Berlin", "2027-10-30"), ("America/New_York", "2027-11-06"), ("Europe/London", "2027-10-30")],
)
def test_a_time_that_autumn_brings_twice_is_kept_once(zone: str, eve: str) -> None:
    cron = "30 1 * * *" if zone != "Europe/Berlin" else "30 2 * * *"
    found = times(cron, zone, f"{eve}T00:00")
    assert len({day[:6] for day in found}) == 3
    assert len({day[7:12] for day in found}) == 1


@pytest.mark.parametrize("cron", ["now and then", "* * * *", "61 * * * *", "0 3 * * Moonday", ""])
def test_what_is_not_cron_is_one_sentence(cron: str) -> None:
    with pytest.raises(ParamsError, match=f"^{re.escape(repr(cron))} is not a cron expression"):
        schedule.next_times(cron, BERLIN, datetime.now(BERLIN))


@pytest.mark.parametrize("cron", ["0 3 30 2 *", "0 3 31 4 *"])
def test_a_day_that_never_comes_is_one_sentence(cron: str) -> None:
    with pytest.raises(ParamsError, match="is on no day of any year"):
        schedule.next_times(cron, BERLIN, datetime.now(BERLIN))


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("Europe/Berln", "Europe/Berlin"),
        ("berlin", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("europe/paris", "Europe/Paris"),
        ("Calcuta", "Asia/Calcutta"),
        ("Mars/Phobos", "a name such as Europe/Berlin"),
        ("", "a name such as Europe/Berlin"),
        ("../../etc/passwd", "a name such as Europe/Berlin"),
    ],
)
def test_an_unknown_zone_is_one_sentence_with_those_that_may_be_meant(name: str, close: str) -> None:
    with pytest.raises(ParamsError, match=f"^--timezone '{re.escape(name)}' is not a time zone: .*{close}") as told:
        schedule.choose_zone(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("variable", "zone"),
    [("Europe/Berlin", "Europe/Berlin"), (":Asia/Tokyo", "Asia/Tokyo"), ("", "UTC")],
)
def test_the_variable_tz_names_this_machine_s_zone(monkeypatch: pytest.MonkeyPatch, variable: str, zone: str) -> None:
    monkeypatch.setenv("TZ", variable)
    assert schedule.choose_zone(None).key == zone
    assert schedule.choose_zone("Europe/Paris").key == "Europe/Paris"


@pytest.mark.parametrize("variable", ["CET-1CEST,M3.5.0,M10.5.0/3", "Nowhere", "Europe/Berln"])
def test_a_variable_tz_that_names_no_zone_is_one_sentence(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("TZ", variable)
    with pytest.raises(ParamsError, match=f"^TZ '{re.escape(variable)}' is not a time zone: "):
        schedule.choose_zone(None)


def test_without_the_variable_the_system_says_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TZ", raising=False)
    link = Path("/etc/localtime")
    expected = str(link.resolve()).partition("zoneinfo/")[2] if link.is_symlink() else schedule.choose_zone(None).key
    assert schedule.choose_zone(None).utcoffset(datetime(2027, 7, 1)) == ZoneInfo(expected).utcoffset(
        datetime(2027, 7, 1)
    )
