"""Which image goes to which split: what the ledger knows stays where it is, and only the rest is drawn.

It works in SQLite, in table `image(id, label, pixels, part, own, split, reason)`: `pixels` is the SHA-256 of an image's
pixels, null where it cannot be used; `part` is its group, and `own` the split that the source has for it.

1. An image that the ledger knows keeps its split, whatever its file, its label and `ingest.split` say today.
2. A part is a group of images, with all groups that share an image with it, or an image with its copies. All of it goes
   where the ledger has some of it. Where that is in several splits, because groups turned out to be one, the part
   belongs to the split that learned most of it (train, then val, then test), and what the ledger has elsewhere is set
   aside: it can be neither trained on nor judged on any more.
3. An image whose own split contradicts that is set aside; what is train of its own may have been drawn for another.
4. Otherwise an image with an own split keeps it, and the rest of its part follows. Of a part with several, the one
   counts that learns most, and images with another are set aside.
5. What is left is drawn. Within a class, parts are ordered by SHA-256 of seed and name, and cut where the shares of
   distinct images are what `ingest.split` says, counting those that are known. A part with several classes is drawn
   with the rarest of them, since that one can least do without its share (as in Sechidis et al., "On the Stratification
   of Multi-Label Data", ECML 2011). Splits that some images have of their own are not drawn for others. What is train
   of its own is drawn from only if all images have splits of their own, for those that the source lacks.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator

import pyarrow as pa

from tasks.core import config
from tasks.images import ledger
from tasks.images.sources import SPLITS

ON_REQUEST = "it is erased on request"
RANK = "CASE {} WHEN 'train' THEN 0 WHEN 'val' THEN 1 WHEN 'test' THEN 2 END"
NAME = "CASE {} WHEN 0 THEN 'train' WHEN 1 THEN 'val' WHEN 2 THEN 'test' END"
USABLE = "pixels IS NOT NULL AND reason IS NULL"


class Assignment:
    """The images of a source in a database, `known` from the ledger; `add` all of them, `assign`, and read."""

    def __init__(self, database: sqlite3.Connection, known: pa.Table, erased: Iterable[str] = ()) -> None:
        self.database = database
        database.execute(
            "CREATE TABLE image (id INTEGER PRIMARY KEY, label TEXT, pixels TEXT, part TEXT, own TEXT, split TEXT, "
            "reason TEXT, name TEXT)"
        )
        database.execute("CREATE TABLE ledger (pixels TEXT PRIMARY KEY, split TEXT, generation INTEGER)")
        database.execute("CREATE TABLE link (pixels TEXT, part TEXT, PRIMARY KEY (pixels, part)) WITHOUT ROWID")
        rows = list(zip(*(known[name].to_pylist() for name in ledger.SCHEMA.names), strict=True))
        database.execute("BEGIN")
        database.executemany(
            "INSERT OR IGNORE INTO ledger VALUES (?, ?, ?)", ((pixels, split, age) for pixels, split, _, age in rows)
        )
        database.executemany(
            "INSERT INTO link VALUES (?, ?)", ((pixels, group) for pixels, _, group, _ in rows if group is not None)
        )
        for pixels in erased:
            database.execute(
                f"INSERT INTO ledger VALUES (?, '{ledger.ERASED}', 0) "  # noqa: S608
                f"ON CONFLICT (pixels) DO UPDATE SET split = '{ledger.ERASED}'",
                (pixels,),
            )
            database.execute("DELETE FROM link WHERE pixels = ?", (pixels,))
        database.execute("COMMIT")

    def add(self, index: int, label: str | None, pixels: str | None, group: str | None, own: str | None) -> None:
        """Add an image; one without `pixels` cannot be used."""
        self.database.execute(
            "INSERT INTO image VALUES (?, ?, ?, ?, ?, NULL, NULL, ?)",
            (index, label, pixels, group if pixels else None, own, group),
        )

    def assign(self, split: config.Split, seed: int) -> None:
        """Give every image its split, or the reason to set it aside, and add the new ones to the ledger."""
        _join_parts(self.database)
        own = {row[0] for row in self.database.execute("SELECT DISTINCT own FROM image WHERE pixels IS NOT NULL")}
        drawn = "own IS NULL" if None in own else "own = 'train'"
        _keep_known(self.database)
        _keep_own(self.database, drawn, follow=None in own)
        shares = (0.0 if "test" in own else split.test, 0.0 if "val" in own else split.val)
        _draw(self.database, drawn, seed, *shares)
        _grow(self.database)

    def rows(self) -> Iterator[tuple[str | None, str | None, bool]]:
        """For each image in order its split, the reason why it has none, and whether it came with the last growth."""
        newest = self.count("SELECT MAX(generation) FROM ledger")
        rows = self.database.execute(
            "SELECT image.split, reason, generation FROM image LEFT JOIN ledger USING (pixels) ORDER BY id"
        )
        yield from ((split, reason, newest > 1 and generation == newest) for split, reason, generation in rows)

    def labels(self) -> list[str]:
        """The labels of the images that are in a split, sorted."""
        query = "SELECT DISTINCT label FROM image WHERE split IS NOT NULL"
        return sorted(label for (label,) in self.database.execute(query))

    def summary(self) -> dict[str, int]:
        """How many images keep which kind of split, came with the last growth, or are set aside.

        It is the same once more for the same images, whatever of them was known before.
        """
        used = "SELECT COUNT(*) FROM image JOIN ledger USING (pixels) WHERE image.split IS NOT NULL AND generation"
        newest = "(SELECT MAX(generation) FROM ledger)"
        return {
            "with_a_split_of_their_own": self.count("SELECT COUNT(*) FROM image WHERE own = split"),
            "drawn_from_train": self.count("SELECT COUNT(*) FROM image WHERE own <> split"),
            "of_before": self.count(f"{used} < {newest}"),
            "of_the_newest_data": self.count(f"{used} = {newest}"),
            "erased": self.count(f"SELECT COUNT(*) FROM image WHERE reason = '{ON_REQUEST}'"),  # noqa: S608
            "set_aside_by_the_ledger": len(self.contradictions()),
        }

    def contradictions(self) -> list[str]:
        """The reasons for which images are set aside that nobody asked to erase."""
        query = f"SELECT reason FROM image WHERE reason <> '{ON_REQUEST}' ORDER BY id"  # noqa: S608
        return [reason for (reason,) in self.database.execute(query)]

    def count(self, query: str) -> int:
        """The number that a query comes to; 0 where it is null."""
        return int(self.database.execute(query).fetchone()[0] or 0)

    def ledger(self) -> pa.Table:
        """The ledger with the images of this source."""
        rows = self.database.execute(
            "SELECT pixels, split, part, generation FROM ledger LEFT JOIN link USING (pixels) ORDER BY pixels, part"
        ).fetchall()
        columns = zip(*rows, strict=True) if rows else [()] * len(ledger.SCHEMA)
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, ledger.SCHEMA, strict=True)],
                        schema=ledger.SCHEMA)  # fmt: skip


def _join_parts(database: sqlite3.Connection) -> None:
    """Name the part of each image: its group, with all groups that share pixels with it, or its pixels."""
    parents: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while parents.setdefault(root, root) != root:
            root = parents[root]
        while parents[name] != root:
            parents[name], name = root, parents[name]
        return root

    pairs = (
        "SELECT pixels, part FROM image WHERE part IS NOT NULL AND pixels IS NOT NULL "
        "UNION SELECT pixels, part FROM link ORDER BY 1, 2"
    )
    last: tuple[str, str] | None = None
    for pixels, part in database.execute(pairs):
        if last and last[0] == pixels:
            parents[find(part)] = find(last[1])
        else:
            find(part)
            last = (pixels, part)
    database.execute("CREATE INDEX by_pixels ON image(pixels)")
    database.execute("CREATE TABLE joined (pixels TEXT PRIMARY KEY, part TEXT) WITHOUT ROWID")
    groups = database.execute(pairs)
    database.executemany(
        "INSERT OR IGNORE INTO joined VALUES (?, ?)", ((pixels, f"group {find(part)}") for pixels, part in groups)
    )
    database.execute(
        "UPDATE image SET part = COALESCE((SELECT part FROM joined WHERE joined.pixels = image.pixels), pixels)"
    )
    database.execute("CREATE INDEX by_part ON image(part)")


def _keep_known(database: sqlite3.Connection) -> None:
    """Rules 1 to 3: all that the ledger has a word in."""
    database.execute("CREATE TABLE held (part TEXT PRIMARY KEY, rank INTEGER) WITHOUT ROWID")
    database.execute(
        f"""
        INSERT INTO held SELECT COALESCE(joined.part, pixels), MIN({RANK.format("split")})
        FROM ledger LEFT JOIN joined USING (pixels) WHERE split IN {SPLITS} GROUP BY 1
        """  # noqa: S608
    )
    known = "(SELECT ledger.split FROM ledger WHERE ledger.pixels = image.pixels)"
    part = "(SELECT rank FROM held WHERE held.part = image.part)"
    database.execute(
        f"""
        UPDATE image SET reason = CASE
            WHEN {known} = '{ledger.ERASED}' THEN '{ON_REQUEST}'
            WHEN {known} = '{ledger.EXCLUDED}' THEN 'models that it was used for had it in different splits'
            WHEN {RANK.format(known)} <> {part}
                THEN 'it was in ' || {known} || ', and others of its group were in ' || {NAME.format(part)}
            WHEN own NOT IN ('train', {NAME.format(part)})
                THEN 'its own split is ' || own || ', and it, a copy or its group is in ' || {NAME.format(part)}
            END
        WHERE pixels IS NOT NULL
        """  # noqa: S608
    )
    database.execute(f"UPDATE image SET split = {NAME.format(part)} WHERE {USABLE}")  # noqa: S608


def _keep_own(database: sqlite3.Connection, drawn: str, *, follow: bool) -> None:
    """Rule 4: splits of the source's own, and with `follow` what has none and is of the same part."""
    database.execute("CREATE TABLE owned (part TEXT PRIMARY KEY, rank INTEGER) WITHOUT ROWID")
    database.execute(
        f"""
        INSERT INTO owned SELECT part, MIN({RANK.format("own")}) FROM image
        WHERE {USABLE} AND split IS NULL AND own IS NOT NULL GROUP BY part
        """  # noqa: S608
    )
    part = "(SELECT rank FROM owned WHERE owned.part = image.part)"
    database.execute(
        f"""
        UPDATE image SET
            reason = 'its own split is ' || own || ', and it, a copy or its group is in ' || {NAME.format(part)}
        WHERE {USABLE} AND split IS NULL AND {RANK.format("own")} <> {part}
        """  # noqa: S608
    )
    kept = USABLE if follow else f"{USABLE} AND NOT ({drawn})"
    database.execute(f"UPDATE image SET split = {NAME.format(part)} WHERE {kept} AND split IS NULL")  # noqa: S608


def _draw(database: sqlite3.Connection, drawn: str, seed: int, test: float, val: float) -> None:
    """Rule 5, for what has no split yet."""

    def rank(part: str) -> str:
        return hashlib.sha256(f"{seed}:{part}".encode()).hexdigest()

    database.create_function("rank_of", 1, rank, deterministic=True)
    database.execute("CREATE TABLE cut (part TEXT PRIMARY KEY, share REAL, test REAL, val REAL) WITHOUT ROWID")
    database.execute(
        f"""
        WITH rarity AS (
            SELECT label, ROW_NUMBER() OVER (ORDER BY COUNT(DISTINCT pixels), label) AS place
            FROM image WHERE {USABLE} GROUP BY label
        ), undrawn AS (
            SELECT part, MIN(place) AS place, COUNT(DISTINCT pixels) AS size
            FROM image JOIN rarity USING (label) WHERE {USABLE} AND split IS NULL GROUP BY part
        ), fresh AS (
            SELECT part, label, size FROM undrawn JOIN rarity USING (place)
        ), placed AS (
            SELECT label, COUNT(DISTINCT pixels) AS size,
                   COUNT(DISTINCT CASE split WHEN 'test' THEN pixels END) AS test,
                   COUNT(DISTINCT CASE split WHEN 'val' THEN pixels END) AS val
            FROM image WHERE {USABLE} AND split IS NOT NULL AND {drawn} AND part IN (SELECT part FROM held)
            GROUP BY label
        ), ranked AS (
            SELECT part, label, SUM(size) OVER (PARTITION BY label ORDER BY rank_of(part)) - size / 2.0 AS middle,
                   SUM(size) OVER (PARTITION BY label) AS size
            FROM fresh
        )
        INSERT INTO cut SELECT part, middle / (ranked.size + COALESCE(placed.size, 0)),
            COALESCE(placed.test, 0) * 1.0 / (ranked.size + COALESCE(placed.size, 0)),
            COALESCE(placed.val, 0) * 1.0 / (ranked.size + COALESCE(placed.size, 0))
        FROM ranked LEFT JOIN placed USING (label)
        """  # noqa: S608
    )
    database.execute(
        f"""
        UPDATE image SET split = (
            SELECT CASE WHEN share < MAX(0, ? - test) THEN 'test'
                        WHEN share < MAX(0, ? - test) + MAX(0, ? - val) THEN 'val' ELSE 'train' END
            FROM cut WHERE cut.part = image.part)
        WHERE {USABLE} AND split IS NULL
        """,  # noqa: S608
        (test, test, val),
    )


def _grow(database: sqlite3.Connection) -> None:
    """Add what is new to the ledger, as one generation; a copy in several splits counts where it is learned from."""
    database.execute(
        f"""
        INSERT INTO ledger
        SELECT pixels, {NAME.format(f"MIN({RANK.format('split')})")},
               1 + (SELECT COALESCE(MAX(generation), 0) FROM ledger)
        FROM image WHERE {USABLE} AND pixels NOT IN (SELECT pixels FROM ledger) GROUP BY pixels
        """  # noqa: S608
    )
    database.execute(
        f"""
        INSERT OR IGNORE INTO link SELECT pixels, name FROM image JOIN ledger USING (pixels)
        WHERE name IS NOT NULL AND ledger.split IN {SPLITS}
        """  # noqa: S608
    )
