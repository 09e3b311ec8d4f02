"""Do the readers end in a sentence, whatever they read? `python tests/bench/fuzz.py [--minutes N] [--only READER]`.

Files that are right are changed at random places (bits, lengths, pieces that move, are repeated or cut off) and given
to the readers: images of every format, IDX files, Parquet, tables, params.yaml, and the description in a model's file.
Each has to take what it gets, or to refuse it with an error that a user can put right. What ends otherwise is kept in
data/reports/bench/fuzz/, named by its reader and the SHA-256 of its bytes, with the traceback beside it. Prints a table
and ends with status 1 if there is any. The seed is printed; the same seed makes the same files.
"""

import argparse
import gzip
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tasks.core import config, files, paths
from tasks.core.errors import WeighinError
from tasks.images.preprocessing import FORMATS, parse_description
from tasks.images.sources import Item, open_source
from tasks.ingest import describe

KEPT = ROOT / paths.REPORTS / "bench" / "fuzz"
CLASSES = ("cat", "dog")
MAX_SIDE = 512
Read = Callable[[bytes, Path], None]


def ingest(path: Path, kind: str, **more: object) -> config.Ingest:
    values = {"kind": kind, "path": str(path), "split": {"val": 0.1, "test": 0.2}, "max_corrupt_fraction": 1, "seed": 0}
    return config.Ingest.model_validate(values | more)


def noise(side: int, *channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, *channels), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def images() -> list[bytes]:
    """One of each format and some that are special."""
    plain = [encode(noise(16, 3), kind) for kind in FORMATS]
    exif = Image.Exif()
    exif[0x0112] = 6
    special = [
        encode(noise(16, 4), "PNG"),
        encode(noise(16, 3).quantize(16), "PNG", transparency=1),
        encode(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 16), "TIFF"),
        encode(noise(16, 3), "JPEG", exif=exif),
        encode(noise(16, 3).convert("CMYK"), "TIFF", compression="tiff_lzw"),
        encode(noise(8, 3), "GIF", save_all=True, append_images=[noise(8, 3)]),
    ]
    return plain + special


def read_image(data: bytes, folder: Path) -> None:
    describe(Item("a", "cat", data), ingest(folder, "folder"), MAX_SIDE)


def idx() -> list[bytes]:
    pixels = bytes(range(64)) * 4
    made = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (4, 8, 8)) + pixels
    return [made, gzip.compress(made)]


def read_idx(data: bytes, folder: Path) -> None:
    name = "train-images-idx3-ubyte" + (".gz" if data[:2] == b"\x1f\x8b" else "")
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 0, 1])
    (folder / name).write_bytes(data)
    other = folder / name.replace("images", "labels").replace("idx3", "idx1")
    other.write_bytes(gzip.compress(labels) if name.endswith(".gz") else labels)
    list(open_source(ingest(folder, "idx"), CLASSES).items())


def parquet() -> list[bytes]:
    about = {"huggingface": json.dumps({"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}})}
    image = [encode(noise(4), "PNG")] * 4
    made = []
    for table in (
        pa.table({"image": image, "label": ["cat", "dog", None, "cat"], "site": ["a", "", None, "b"]}),
        pa.table({"image": [{"bytes": one, "path": "x"} for one in image], "label": [0, 1, -1, 0], "site": ["a"] * 4}),
    ):
        stream = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(about), stream)
        made.append(stream.getvalue())
    return made


def read_parquet(data: bytes, folder: Path) -> None:
    (folder / "a.parquet").write_bytes(data)
    list(open_source(ingest(folder, "parquet", columns=["site"]), CLASSES).items())


def tables() -> list[bytes]:
    rows = [{"file_name": f"cat/{index}.png", "label": "cat", "fold": "train", "site": index} for index in range(3)]
    lines = ["file_name,label,fold,site", *(",".join(map(str, row.values())) for row in rows)]
    return ["\n".join(lines).encode(), "\n".join(map(json.dumps, rows)).encode()]


def read_table(data: bytes, folder: Path) -> None:
    name = "metadata.jsonl" if data.lstrip()[:1] == b"{" else "metadata.csv"
    for index in range(3):
        (folder / "cat").mkdir(exist_ok=True)
        (folder / f"cat/{index}.png").write_bytes(b"")
    (folder / name).write_bytes(data)
    columns = {"label_column": "label", "split_column": "fold", "columns": ["site"], "max_unmatched_fraction": 1}
    list(open_source(ingest(folder, "folder", **columns), CLASSES).items())


def recipes() -> list[bytes]:
    return [path.read_bytes() for path in (ROOT / "params.yaml", *sorted((ROOT / "data/recipes").glob("*.yaml")))]


def read_recipe(data: bytes, _: Path) -> None:
    config.read(data, paths.PARAMS)


def descriptions() -> list[bytes]:
    content = {"classes": CLASSES, "size": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    return [json.dumps(content | more).encode() for more in ({}, {"background": [1, 2, 3], "white_level": 4095})]


def read_description(data: bytes, _: Path) -> None:
    parse_description(data.decode(errors="replace"))


READERS: dict[str, tuple[Callable[[], list[bytes]], Read]] = {
    "image": (images, read_image),
    "idx": (idx, read_idx),
    "parquet": (parquet, read_parquet),
    "table": (tables, read_table),
    "recipe": (recipes, read_recipe),
    "description": (descriptions, read_description),
}


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to eight changes at random places."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        start, length = chance.randrange(len(content) + 1), chance.choice((1, 2, 4, 8, 64))
        piece = bytes(content[start : start + length])
        match chance.randrange(7):
            case 0:
                content[start : start + 1] = bytes([content[start] ^ (1 << chance.randrange(8))]) if piece else b""
            case 1:
                del content[start : start + length]
            case 2:
                content[start:start] = piece * chance.choice((1, 2, 100))
            case 3:
                content[start : start + length] = chance.randbytes(len(piece))
            case 4:
                content[start : start + length] = (
                    chance.choice((b"\0", b"\xff", b"\x7f", b'"', b"-", b"9", b"\n")) * length
                )
            case 5:
                content = content[:start]
            case _:
                place = chance.randrange(len(content) + 1)
                content[place : place + length] = piece
    return bytes(content)


def attempt(name: str, data: bytes) -> str:
    """What a reader makes of the bytes: taken, refused, or the name of another exception, which is kept."""
    with tempfile.TemporaryDirectory(prefix="weighin-") as folder:
        try:
            READERS[name][1](data, Path(folder))
        except WeighinError as error:
            if "\n" not in str(error):
                return "refused"
            wrong: Exception = error
        except Exception as error:
            wrong = error
        else:
            return "taken"
    kept = KEPT / f"{name}-{files.sha256_of(data)[:16]}"
    files.write_bytes(kept, data)
    files.write_bytes(kept.with_suffix(".txt"), "".join(traceback.format_exception(wrong)).encode())
    return type(wrong).__name__


def rounds(names: list[str], seed: int, until: Callable[[int], bool]) -> Iterator[tuple[str, str]]:
    """What becomes of each file, reader by reader in turns."""
    chance = random.Random(seed)
    originals = {name: READERS[name][0]() for name in names}
    count = 0
    while not until(count):
        for name in names:
            yield name, attempt(name, mutate(chance.choice(originals[name]), chance))
        count += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, help="so many for each reader, in place of minutes")
    parser.add_argument("--only", choices=READERS, action="append", help="this reader; may be repeated")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    warnings.simplefilter("ignore")  # Pillow's, of files that it doubts
    print(f"seed {arguments.seed}", flush=True)

    def until(count: int) -> bool:
        return bool(count >= arguments.rounds) if arguments.rounds else time.monotonic() > ends

    found: Counter[tuple[str, str]] = Counter(rounds(arguments.only or list(READERS), arguments.seed, until))
    wrong = 0
    for (name, outcome), count in sorted(found.items()):
        print(f"{name:12} {outcome:24} {count:8,}")
        wrong += count if outcome not in ("taken", "refused") else 0
    sys.exit(f"{wrong} files ended otherwise: see {KEPT.relative_to(ROOT)}" if wrong else 0)


if __name__ == "__main__":
    main()
