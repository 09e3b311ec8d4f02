"""What a challenger has to face: the champion, and what it is laid in for `benchmark` and `gate`."""

import shutil
from pathlib import Path

from flows import dvc_bridge
from flows.registry.chain import Standing
from flows.registry.decision import MODEL, Champion, parse_document
from flows.registry.git import Objects
from tasks.core import files, paths
from tasks.core.errors import RegistryError

SCHEMA_VERSION = 2


def choose_champion(root: Path, standing: Standing, challenger_sha256: str, bootstrap: bool) -> Champion:
    """The champion of a challenger: the version in production, or none.

    Where the challenger is in production itself, it is the one that it faced before.
    """
    production = standing.production
    if production is None:
        return Champion(
            schema_version=SCHEMA_VERSION, version=None, model_sha256=None, withdrawn=(), bootstrap=bootstrap
        )
    if production.decision.model_sha256 == challenger_sha256:
        if production.decision.schema_version == 0:  # in the first days it faced none
            return Champion(version=None, model_sha256=None, withdrawn=(), bootstrap=True)
        name = f"{production.commit}:champion.json"
        with Objects(root) as objects:
            return parse_document(Champion, objects.read(name), name)
    return Champion(
        schema_version=SCHEMA_VERSION,
        version=production.decision.version,
        model_sha256=production.decision.model_sha256,
        withdrawn=standing.withdrawn,
        bootstrap=False,
    )


def lay_champion(root: Path, model: str, standing: Standing, champion: Champion) -> None:
    """Write the champion to data/champion for `benchmark` and `gate`: its record and, if there is one, its model.

    `RegistryError` if the champion's file cannot be brought or is not what was recorded.
    """
    target = root / paths.CHAMPION_MODEL
    present = files.sha256(target) if target.exists() else None
    record = serialize_champion(champion)
    if present == champion.model_sha256 and _has_content(root / paths.CHAMPION_RECORD, record):
        return
    with files.replacing(root / paths.CHAMPION) as (folder,):
        folder.mkdir()
        if champion.version and champion.model_sha256 == present:
            shutil.copy(target, folder / target.name)
        elif champion.version:
            name = f"{model}@{champion.version}"
            dvc_bridge.copy_output(
                root, standing.promotions[champion.version].commit, MODEL, folder / target.name, name
            )
            if files.sha256(folder / target.name) != champion.model_sha256:
                raise RegistryError(f"{MODEL} of {name} is not what was recorded: `weighin audit`")
        (folder / paths.CHAMPION_RECORD.name).write_text(record)


def serialize_champion(champion: Champion) -> str:
    """`champion.json`, as it was or will be written: that of schema 1 had no version in it."""
    excluded = {"schema_version"} if champion.schema_version == 1 else set()
    return champion.model_dump_json(indent=2, exclude=excluded) + "\n"


def lay_start(root: Path, model: str, standing: Standing, weights: Path) -> str:
    """Write `weights` of the production version to data/start for `finetune`, and return which version that is.

    `RegistryError` if nothing is in production, if the file cannot be brought, or if what was brought is not what was
    recorded; then data/start is as it was.
    """
    found = standing.production
    if found is None or found.decision.version is None:
        raise RegistryError(f"{model} has no version in production: promote one first")
    version = found.decision.version
    with files.replacing(root / paths.START.parent) as (folder,):
        folder.mkdir()
        dvc_bridge.copy_output(root, found.commit, weights, folder / paths.START.name, f"{model}@{version}")
        (folder / paths.START_VERSION.name).write_text(version)
    return version


def _has_content(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text
