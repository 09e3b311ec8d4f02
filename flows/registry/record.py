"""The registry: every decision (promotion, refusal, hold, approval, rollback) is a signed commit on branch `registry`.

The branch has a history of its own; each commit has the previous decision as parent and holds the record, the evidence
behind it, the code and the DVC files that bring the decided model back. A version is tagged `<model>@v<version>`, what
is in production `<model>#production#<n>`, which is GTO's format. What goes wrong is a `RegistryError`, but for an
unusable `params.yaml`, which is a `ParamsError`.
"""

import importlib.machinery
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flows.registry import champion, git, keys, materials, refs, rollback
from flows.registry.bom import bill_of_materials
from flows.registry.card import model_card
from flows.registry.chain import Link
from flows.registry.decision import (
    COPIED_FILES,
    DECISION,
    MODEL,
    Benchmark,
    Champion,
    Code,
    Decision,
    Outcome,
    Verdict,
    parse_document,
)
from flows.registry.environment import describe_environment
from flows.registry.git import Overtaken
from flows.registry.parameters import read_place, read_recorded
from flows.registry.provenance import provenance
from flows.registry.publish import (
    Bundle,
    chain_fields,
    dated_identity,
    describe,
    publish,
    push_outputs,
    push_refs,
)
from flows.registry.view import View, read_view
from tasks.core import config, files, paths
from tasks.core.errors import RegistryError
from tasks.gate import SCHEMA_VERSION, judging_code

T = TypeVar("T")
PACKAGES = (materials.CODE.as_posix(), "flows")  # the code of this project


class Superseded(RegistryError):
    """The verdict compared with a champion that is no longer the one in production: it has to be judged again."""


class Registry:
    """The decisions on one model, in the repository at `root` and, if there is one, at a git remote.

    `say` is told what a person should know meanwhile.
    """

    def __init__(self, root: Path, model: str, remote: str | None = None, say: Callable[[str], None] = print) -> None:
        self.root, self.model, self.remote, self.say = root, model, remote, say

    def look(self) -> View:
        """Fetch what is new, and read every decision; `RegistryError` if one does not hold or contradicts another."""
        view = read_view(self.root, self.model, self.remote)
        view.require_sound()
        return view

    def record(self) -> tuple[Decision, bool]:
        """Record the gate's verdict on the model that lies here; return the decision, and whether it is new.

        The model is promoted (or held, where promotions need an approval) if the verdict and every check in it passed,
        and refused otherwise. Nothing new is recorded for a verdict that is the model's latest decision already, nor
        for one that passes what is in production already.
        `Superseded` if another version has come into production since the verdict; `RegistryError` if a file is
        missing or damaged, if the verdict judged other files than those that lie there now, or if dvc.lock does not
        name them. Then no ref has moved.
        """
        contents = {name: _read(self.root / path) for name, path in COPIED_FILES.items()}
        verdict = parse_document(Verdict, contents["verdict.json"], paths.report("gate"))
        parse_document(Benchmark, contents["metrics.json"], paths.report("benchmark"))
        _require_judged(self.root, verdict, contents["params.yaml"])
        _require_locked(self.root, contents["dvc.lock"])

        def attempt() -> tuple[Decision, bool]:
            view = self.look()
            repair_tags(view, self.model)
            known = self._find_known(view, verdict, files.sha256_of(contents["verdict.json"]))
            return (known, False) if known else (self._record(view, contents, verdict), True)

        return self._until_first(attempt)

    def roll_back(self, version: str | None, reason: str) -> Decision:
        """Put `version`, or else the one before, into production again; return the decision that records it.

        It is what the next challenger has to face, and the model that it replaces is refused until it is put back by
        name. Damage of the registry in decisions before that version is told and does not stop it. `RegistryError` if
        there is no such version, if the chain from there on or the version itself does not hold, if its file does not
        meet its golden outputs in a fresh process here, or if another version comes into production meanwhile. Then no
        ref has moved.
        """
        begun: list[Decision] = []  # what was in production when this began

        def attempt() -> Decision:
            view = self._look_past_damage()
            begun.extend([view.standing.production.decision] if view.standing.production and not begun else [])
            target = rollback.choose_version(self.model, view.standing, version, begun)
            change = {"outcome": "rolled-back", "reason": reason, "replaces": view.standing.assignments[-1]}
            return self._repeat(view, view.standing.promotions[target], f"{self.model}@{target}", change)

        return self._until_first(attempt)

    def approve(self, reason: str) -> Decision:
        """Promote the model that the latest decision holds; return the decision that records it.

        It is audited and run in a fresh process here first, as for a rollback. `RegistryError` if nothing is held, or
        if that fails. Then no ref has moved.
        """

        def attempt() -> Decision:
            view = self._look_past_damage()
            held, production = view.standing.held, view.standing.production
            if held is None:
                raise RegistryError(
                    f"the latest decision on {self.model} holds nothing, so there is nothing to approve"
                )
            change = {
                "outcome": "approved",
                "reason": reason,
                "version": view.standing.next_version,
                "replaces": production.decision.version if production else None,
            }
            return self._repeat(view, held, f"{self.model} held in {held.commit[:12]}", change)

        return self._until_first(attempt)

    def lay_champion(self, challenger_sha256: str, bootstrap: bool) -> Champion:
        """Write the champion that this challenger has to face to data/champion, for `benchmark` and `gate`."""
        standing = self.look().standing
        chosen = champion.choose_champion(self.root, standing, challenger_sha256, bootstrap)
        champion.lay_champion(self.root, self.model, standing, chosen)
        return chosen

    def lay_splits(self, other: str | None, *, is_current: bool) -> bool:
        """Write which image is in which split to data/splits for `ingest`; return whether something was written.

        That is what the runs of this model and of the `other`, which training starts with, have recorded. If ingest
        `is_current` and knows all of it, nothing is written.
        """
        from flows.registry import splits  # brings pandas

        models = dict.fromkeys((self.model, *([other] if other else [])))
        return splits.lay_splits(self.root, self.look().links, models, is_current=is_current)

    def lay_start(self, weights: Path) -> str:
        """Write `weights` of the production version to data/start, for `finetune`; return which version that is."""
        return champion.lay_start(self.root, self.model, self.look().standing, weights)

    def _until_first(self, attempt: Callable[[], T]) -> T:
        """Try again for as long as other decisions come first."""
        while True:
            try:
                return attempt()
            except Overtaken:
                self.say("another decision reached the registry first: looking at it again")

    def _look_past_damage(self) -> View:
        """Look as `look` does, but go on where something does not hold: an emergency needs what does."""
        view = read_view(self.root, self.model, self.remote)
        moved = view.standing.moved
        view.require_sound(since=moved.commit if moved else None)  # what is in production must be known
        repair_tags(view, self.model, strict=False)
        return view

    def _repeat(self, view: View, link: Link, name: str, change: dict[str, Any]) -> Decision:
        """Record a decision on the evidence of an earlier one, with what has changed, once that one is verified."""
        view.require_sound(since=link.commit)
        with rollback.verify(view, self.model, link, name, self.say) as target:
            fields, signer = chain_fields(view, self.say)
            decision = Decision.model_validate(link.decision.model_dump() | target.upgrade | change | fields)
            publish(view, decision, rollback.repeat_bundle(self.root, decision, target), signer)
            return decision

    def _find_known(self, view: View, verdict: Verdict, verdict_sha256: str) -> Decision | None:
        """The decision that this verdict needs no new one for; `Superseded` if it is about another champion."""
        standing = view.standing
        last, production = (link and link.decision for link in (standing.latest, standing.production))
        if last and (last.verdict_sha256, last.model_sha256) == (verdict_sha256, verdict.model_sha256):
            return last
        if verdict.is_pass and production and production.model_sha256 == verdict.model_sha256:
            return production
        faced = verdict.champion
        bootstrap = faced is not None and faced.bootstrap
        now = champion.choose_champion(self.root, standing, verdict.model_sha256, bootstrap)
        if now != faced:
            raise Superseded(
                f"the verdict compared with {(faced and faced.version) or 'no champion'}, but {self.model} "
                f"{now.version or 'nothing'} is in production now: judge again"
            )
        return None

    def _record(self, view: View, contents: dict[str, bytes], verdict: Verdict) -> Decision:
        from flows.registry import splits  # brings pandas

        params, standing = config.load(self.root / paths.PARAMS), view.standing
        outcome: Outcome = "refused" if not verdict.is_pass else "held" if params.gate.approval else "promoted"
        promoted, production = outcome == "promoted", standing.production
        code = _code(self.root, Path(params.ingest.path))
        if self.remote:
            _require_pushed(self.root, self.remote, code)
        fields, signer = chain_fields(view, self.say)
        decision = Decision(
            model=self.model,
            outcome=outcome,
            version=standing.next_version if promoted else None,
            replaces=production.decision.version if promoted and production else None,
            reason=None,
            code=code,
            model_sha256=verdict.model_sha256,
            data_sha256=verdict.data_sha256,
            params_sha256=verdict.params_sha256,
            code_sha256=verdict.code_sha256,
            verdict_sha256=files.sha256_of(contents["verdict.json"]),
            bootstrap=verdict.bootstrap,
            traded=verdict.traded,
            failed=verdict.failed,
            **fields,
        )
        made_of = materials.read(self.root, contents["dvc.lock"])
        for model in dict.fromkeys((self.model, params.finetune.weights.model or self.model)):
            splits.require_grown(self.root, view.links, model, made_of.outputs)
        bundle = _bundle(self.root, decision, contents, verdict, made_of)
        if self.remote:
            push_outputs(view, made_of.outputs)
        publish(view, decision, bundle, signer)
        return decision


def open_registry(root: Path, model: str | None = None, say: Callable[[str], None] = print) -> Registry:
    """The registry that params.yaml names, of its model or of another one."""
    place = read_place(root)
    return Registry(root, model or place.model, place.registry.remote, say)


def repair_tags(view: View, model: str, strict: bool = True) -> None:
    """Make the tags of the newest move, if it was cut off before it had them.

    `RegistryError` if a tag is elsewhere than where the decisions have it, or one of an earlier move is missing; unless
    it is `strict`, those are left as they are.
    """
    root, standing = view.root, view.standing
    expected, tags = standing.tags(model), view.refs.tags
    wrong = sorted(tag for tag, commit in expected.items() if tags.get(tag, commit) != commit)
    if wrong and strict:
        raise RegistryError(f"the tag {wrong[0]} is not where the registry's decisions have it: `weighin audit`")
    missing = [tag for tag in expected if tag not in tags]
    moved = standing.moved and standing.moved.decision
    newest = {f"{model}@{moved.version}", f"{model}#{refs.STAGE}#{len(standing.assignments)}"} if moved else set()
    if set(missing) - newest and strict:
        raise RegistryError(
            f"the tag {missing[0]} of a recorded decision is missing: fetch the tags, or `weighin audit`"
        )
    missing = [tag for tag in missing if tag in newest]
    if missing and moved:
        # The tag objects are those that were or would have been made with the decision.
        message, who = describe(moved), dated_identity(root, moved)
        moves = {f"refs/tags/{tag}": git.tag(root, tag, expected[tag], message, who) for tag in missing}
        if view.remote:
            push_refs(view, moves)
            refs.look(root, view.remote)
        else:
            git.move(root, [f"create {ref} {new}" for ref, new in moves.items()], "finish a decision", {})


def _bundle(
    root: Path, decision: Decision, contents: dict[str, bytes], verdict: Verdict, made_of: materials.Materials
) -> Bundle:
    """Every file of the decision: what it carries of the working copy, the code, and what is written for it."""
    params = config.load(root / paths.PARAMS)
    recorded = read_recorded(contents["params.yaml"], str(paths.PARAMS))
    benchmark = parse_document(Benchmark, contents["metrics.json"], "metrics.json")
    environment = describe_environment()
    written = {
        DECISION: files.to_json(decision.model_dump(mode="json")),
        "environment.json": files.to_json(environment),
        "trusted_keys": (root / keys.TRUSTED).read_bytes(),
        "bom.cdx.json": files.to_json(bill_of_materials(decision, recorded, benchmark, environment)),
        "provenance.json": files.to_json(provenance(decision, params, made_of, environment)),
        "README.md": model_card(decision, verdict.checks, benchmark, recorded).encode(),
    }
    return Bundle(contents | written | {path: (root / path).read_bytes() for path in made_of.code}, root / MODEL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RegistryError(f"{path} is missing, so there is nothing to decide on: run the pipeline first") from None


def _require_judged(root: Path, verdict: Verdict, params: bytes) -> None:
    if verdict.schema_version != SCHEMA_VERSION:
        raise RegistryError(
            f"{paths.report('gate')} is a verdict of schema {verdict.schema_version}, not {SCHEMA_VERSION}: run the "
            "pipeline again"
        )
    for path, sha256, other in (
        (MODEL, verdict.model_sha256, "another model"),
        (paths.TEST, verdict.data_sha256, "other data"),
    ):
        if not (root / path).is_file():
            raise RegistryError(f"{root / path} is missing: `dvc checkout` brings it back")
        if files.sha256(root / path) != sha256:
            raise RegistryError(f"the verdict judged {other} than {path} is now: run the pipeline again")
    if files.sha256_of(params) != verdict.params_sha256:
        raise RegistryError(f"the verdict judged other parameters than {paths.PARAMS} has now: run the pipeline again")
    if files.digest(judging_code(root)) != verdict.code_sha256:
        raise RegistryError(f"the verdict judged by other code than {materials.CODE} has now: run the pipeline again")


def _require_locked(root: Path, lock: bytes) -> None:
    # The lock is how the decided files are brought back, so it must name these very files, and the code that made them.
    parts = (*materials.read_lock(lock, "deps"), *materials.read_lock(lock))
    recorded = {part["path"]: part["md5"] for _, part in parts}
    code = [Path(path) for path in recorded if path.endswith(".py")]
    for path in (MODEL, paths.TEST, paths.report("benchmark"), paths.report("gate"), paths.DEVICE, *code):
        present = files.md5(root / path) if (root / path).is_file() else None
        if recorded.get(path.as_posix()) != present:
            raise RegistryError(f"dvc.lock does not name {path} as it is now: run the pipeline again, or `dvc commit`")


def _require_pushed(root: Path, remote: str, code: Code) -> None:
    # Others could neither read nor run a revision that only this machine has.
    where = f"refs/remotes/{remote}"
    if not git.git(root, "for-each-ref", "--count=1", f"--contains={code.commit}", "--format=%(refname)", where):
        raise RegistryError(f"commit {code.commit} is not at {remote}: push it, so that others can audit the decision")


def _code(root: Path, source: Path) -> Code:
    """The commit, and whether the code that ran may differ from it: that is what "dirty" says.

    It may if a file of the commit was changed or removed, whatever it is, or if there is a new file that Python could
    import from here: beside the pipeline's, among the code, or in a package. Not so with what the decision carries
    itself, with the images at `source`, and with other new files, such as images or recipes.
    """
    try:
        commit = git.git(root, "rev-parse", "--verify", "HEAD^{commit}")
    except RegistryError:
        raise RegistryError(f"{root} has no commit yet: commit the project, so that decisions can name it") from None
    apart = [path.as_posix() for path in (*COPIED_FILES.values(), keys.TRUSTED)]
    here, images = root.resolve(), (root / source).resolve()
    if images.is_relative_to(here) and not any((here / code).is_relative_to(images) for code in PACKAGES):
        apart.append(images.relative_to(here).as_posix())
    chosen = ("--", ".", *(f":(exclude,literal){path}" for path in apart))
    # Without the optional lock, git does not refresh the user's index.
    status = ("--no-optional-locks", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    top = Path(git.git(root, "rev-parse", "--show-toplevel"))
    entries = [entry for entry in git.git(root, *status, *chosen).split("\0") if entry]
    names = {entry: os.path.relpath(top / entry[3:], here) for entry in entries}  # git names them from its top
    new = "\0".join(names[entry] for entry in entries if entry[0] in "?A")
    changed = [entry for entry in entries if entry[0] not in "?A"]
    # What git ignores among the code is carried all the same, so no commit has it.
    new += "\0" + git.git(root, "ls-files", "--others", "-z", "--", *PACKAGES)
    return Code(commit=commit, dirty=bool(changed) or any(_is_importable(root, Path(name)) for name in new.split("\0")))


def _is_importable(root: Path, path: Path) -> bool:
    """Whether Python could import the file in a process that works in the root."""
    if not path.name.endswith(tuple(importlib.machinery.all_suffixes())) or "__pycache__" in path.parts:
        return False
    top = path.parts[0]
    return len(path.parts) == 1 or top in PACKAGES or (root / top / "__init__.py").exists()
