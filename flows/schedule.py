"""Serving the pipeline on a schedule."""

import asyncio
import difflib
import os
import signal
import sys
import zoneinfo
from datetime import datetime
from pathlib import Path

from flows import leash
from flows.server import connect, load_prefect
from tasks.core.errors import MENDABLE, ParamsError, describe

GRACE_S = 60.0  # in which a run puts back the last good results
SHOWN = 3
SUCH_AS = "such as Europe/Berlin"


def serve(cron: str, timezone: str | None, params: Path) -> None:
    """Serve `retrain` until interrupted; a schedule keeps its runs when this process ends and comes back.

    Runs are started by a process on a leash: they end when this one does. `ParamsError` if the cron expression or the
    time zone is not one; `StageError` if the server cannot be reached.
    """
    load_prefect()
    zone = choose_zone(timezone)
    times = ", ".join(f"{time:%a %Y-%m-%d %H:%M %Z}" for time in next_times(cron, zone, datetime.now(zone)))
    chosen = "" if timezone else ", this machine's time zone"
    print(f"next runs: {times} ({zone.key}{chosen})", flush=True)
    with connect(schedules=True) as url:
        print(f"Prefect server and its pages at {url.removesuffix('/api')}", flush=True)
        serving = leash.start(
            [sys.executable, "-m", "flows.schedule", cron, zone.key, str(params)], signal.SIGINT, GRACE_S
        )
        try:
            status = serving.wait()
        finally:
            leash.end(serving)
    sys.exit(status)


def next_times(cron: str, zone: zoneinfo.ZoneInfo, now: datetime) -> list[datetime]:
    """When the runs after `now` start, by Prefect's own reckoning; `ParamsError` if it is not a cron expression."""
    from prefect.server.schemas.schedules import CronSchedule

    try:
        schedule = CronSchedule(cron=cron, timezone=zone.key)
    except ValueError:
        raise ParamsError(f"{cron!r} is not a cron expression: five fields such as '0 3 * * 1'") from None
    try:
        times = asyncio.run(schedule.get_dates(SHOWN, now))
    except ValueError:
        raise ParamsError(f"{cron!r} is on no day of any year") from None
    return [time.astimezone(zone) for time in times]


def choose_zone(name: str | None) -> zoneinfo.ZoneInfo:
    """The time zone of that name, or this machine's: as the variable TZ has it, or else as the system is set.

    `ParamsError` if it is unknown, with the names that are close.
    """
    origin = "--timezone"
    if name is None:
        name, origin = _own_zone(), "TZ"
    known = zoneinfo.available_timezones()
    if name not in known:
        close = close_zones(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it is a name {SUCH_AS}"
        raise ParamsError(f"{origin} {name!r} is not a time zone: {hint}")
    return zoneinfo.ZoneInfo(name)


def _own_zone() -> str:
    import tzlocal

    variable = os.environ.get("TZ", "/").removeprefix(":")
    if not Path(variable).is_absolute():
        return variable or "UTC"
    try:
        name: str | None = tzlocal.get_localzone_name()
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"this machine's time zone is not clear, so give --timezone, {SUCH_AS}: {reason}") from None
    if name in (None, "local"):
        raise ParamsError(f"this machine does not say in which time zone it is: give --timezone, {SUCH_AS}")
    return str(name)


def close_zones(name: str, known: set[str]) -> list[str]:
    """The zones that may be meant: those of a city or a region spelt so or nearly so, whatever the case."""
    wanted = name.replace(" ", "_").casefold()
    spelt = {one.casefold(): one for one in sorted(known)}
    cities = {one.rpartition("/")[2]: one for one in spelt}
    close = difflib.get_close_matches(wanted, spelt, cutoff=0.75)
    close += [cities[city] for city in difflib.get_close_matches(wanted.rpartition("/")[2], cities, cutoff=0.75)]
    return [spelt[one] for one in dict.fromkeys(close)][:SHOWN]


def main(cron: str, zone: str, params: str) -> None:
    """Serve until SIGINT; on SIGTERM, Prefect 3.8 forgets to await the end of its runs."""
    with connect():
        from prefect.schedules import Cron

        from flows.retrain import retrain

        schedule = Cron(cron, timezone=zone)
        retrain.serve(
            name="weighin", schedule=schedule, parameters={"params": params}, pause_on_shutdown=False, limit=1
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except MENDABLE as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(1)
