"""Approval: somebody puts their name to a model that passed the gate and was held, and it goes into production."""

from collections.abc import Callable
from pathlib import Path

from flows.rollback import repeat, verified
from tasks.core import config, paths, registry
from tasks.core.errors import RegistryError
from tasks.core.git import Overtaken
from tasks.core.registry import Decision


def approve(root: Path, model: str, why: str, say: Callable[[str], None] = print) -> Decision:
    """Promote the model that the latest decision holds; says the decision that records it.

    It is audited and run in a fresh process here first, as for a rollback. `RegistryError` if nothing is held, or if
    that fails. Then no ref has moved.
    """
    remote = config.load(root / paths.PARAMS).registry.remote
    while True:
        refs = registry.look(root, remote)
        stands = registry.mended(root, refs, model, remote)
        held = stands.latest
        if held is None or held.decision.outcome != "held":
            raise RegistryError(f"the latest decision on {model} holds nothing, so there is nothing to approve")
        change = {
            "outcome": "approved",
            "reason": why,
            "version": registry.next_version(stands.promotions),
            "replaces": stands.production.decision.version if stands.production else None,
        }
        name = f"{model} held in {held.commit[:12]}"
        try:
            with verified(root, model, held.commit, name, remote) as (contents, shipped, infra):
                return repeat(root, contents, change, shipped, infra, refs, stands, remote, say)
        except Overtaken:
            say("another decision reached the registry first: looking at it again")
