"""Old registries: each bundle in tests/records was made by the code of the commit that it is named after."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"
ROW = re.compile(r"^\| `([0-9a-f]{7})` \|", re.MULTILINE)
REFS = ("refs/heads/*", "refs/tags/*", "refs/weighin/code/*")
CACHE = Path(".dvc/cache/files/md5")
# No setting of the machine changes a byte on the way out of git.
SETTINGS = ("-c", "core.autocrlf=false", "-c", f"core.attributesFile={os.devnull}")

# In the history's order, which is that of the table.
RECORDS: tuple[str, ...] = tuple(
    name for name in ROW.findall((FOLDER / "README.md").read_text()) if (FOLDER / f"{name}.bundle").exists()
)


def open_record(name: str, target: Path) -> Path:
    """The record of that commit as a repository in the new folder `target`, as it was after its last decision.

    `main` with the code of that day is checked out; the stages' outputs are in DVC's cache, and none lies in place.
    """
    return unpack(FOLDER / f"{name}.bundle", target)


def unpack(bundle: Path, target: Path) -> Path:
    """The repository in a bundle; it knows nothing of where the bundle lies."""
    target.mkdir(parents=True)
    git(target, "init", "--quiet", "--initial-branch=main")
    for key, value in (("user.name", "Ada"), ("user.email", "ada@example.org"), ("core.autocrlf", "false")):
        git(target, "config", key, value)
    refs = (f"{ref}:{ref}" for ref in REFS)
    git(target, "fetch", "--quiet", "--update-head-ok", "--no-write-fetch-head", str(bundle.absolute()), *refs)
    git(target, "reset", "--quiet", "--hard")
    _fill_cache(target)
    git(target, "branch", "--quiet", "-D", "cache")
    return target


def _fill_cache(root: Path) -> None:
    """Put the files of the branch `cache` where DVC has its own, which nobody may write to."""
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}
        git(root, "read-tree", "cache", **index)
        git(root, "checkout-index", "--all", f"--prefix={CACHE.as_posix()}/", **index)
    for path in (root / CACHE).rglob("*"):
        if path.is_file():
            path.chmod(0o444)


def git(root: Path, *args: str, **environment: str) -> str:
    """What git says in the repository at `root`, without the last line end."""
    kept = os.environ | {"GIT_ATTR_NOSYSTEM": "1"} | environment
    command = ["git", *SETTINGS, *args]
    return subprocess.run(command, cwd=root, env=kept, check=True, capture_output=True, text=True).stdout.strip()


def newest_fingerprint() -> tuple[str, str]:
    """The newest record, and the fingerprint of the schemas that it was made with."""
    name, digest = (FOLDER / "schema").read_text().split()
    return name, digest


def fingerprint() -> str:
    """One hash of the schemas of all that is recorded today; their descriptions and titles do not count."""
    from flows.registry.decision import Champion, Decision
    from flows.registry.provenance import Statement
    from tasks import gate
    from tasks.core import config

    kinds = (Decision, gate.Verdict, Champion, Statement, config.Params)
    schemas = [_bare(kind.model_json_schema(by_alias=True)) for kind in kinds]
    return hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()


def _bare(schema: Any) -> Any:
    if isinstance(schema, dict):
        words = ("title", "description")
        return {key: _bare(value) for key, value in schema.items() if key not in words or not isinstance(value, str)}
    return [_bare(one) for one in schema] if isinstance(schema, list) else schema
