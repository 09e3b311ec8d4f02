"""Processes that are killed on the way: at every git call, before every file that they write, or at some time.

A `Case` is a folder with a project in miniature (see ledger), and with its remotes if it has some. Whatever changes it
runs in a process of its own, which leads its own process group; the whole group is killed, as a power cut would do.
"""

import contextlib
import importlib
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ledger import MODEL, Ledger, call, opened
from ledger import look as look_at
from workspace import OWN_GIT

from flows.registry import keys
from flows.registry.audit import ALL, audit
from flows.registry.git import MOVER
from flows.registry.refs import BRANCH as BRANCH
from tasks.core import quiet
from tasks.core.errors import RegistryError

T = TypeVar("T")
WAIT_S = 120.0
GIT = shutil.which("git") or "git"
SHIM = f"""\
#!/bin/sh
n=$(( $(cat "$CRASH/calls") + 1 ))
echo $n > "$CRASH/calls"
echo "$*" | tr '\\n' ' ' >> "$CRASH/said"; echo >> "$CRASH/said"
[ "$n $CRASH_HOW" = "$CRASH_AT before" ] && kill -9 0
if [ "$n $CRASH_HOW" = "$CRASH_AT within" ]; then (sleep "$CRASH_S"; kill -9 0) & fi
{GIT} "$@"
status=$?
[ "$n $CRASH_HOW" = "$CRASH_AT after" ] && kill -9 0
exit $status
"""
USED = (
    *("dvc.api", "dvc.repo", "dvc.data_cloud", "dvc.cachemgr", "dvc.repo.plots", "dvc.repo.stage", "dvc.stage.cache"),
    *("dvc_data.hashfile.hash_info", "dvc_data.hashfile.status", "dvc_objects.fs.local", "gto", "pandas", "onnx"),
    *("model_signing._signing.sign_ec_key", "model_signing._signing.signing", "model_signing.manifest"),
    *("cryptography.hazmat.primitives.serialization", "scipy.special"),
)
MOVING = re.compile(" (update-ref|push|fetch) ")
WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}


class Kill(NamedTuple):
    """Where to kill: `before`, `after` or `seconds` `within` git call number `at`; before file change number `at`
    (`write`); or after so many seconds (`time`)."""

    how: str
    at: int = 0
    seconds: float = 0.0


class Ran(NamedTuple):
    """How a process ended: killed, or with what it returned or the error that it raised; and how far it came."""

    killed: bool
    returned: Any
    error: str | None
    calls: tuple[str, ...]  # the arguments of each git call
    writes: int
    seconds: float


class Case(NamedTuple):
    """A folder with `project` and, if it is shared, `bare.git` and `store`."""

    folder: Path
    shared: bool

    @property
    def root(self) -> Path:
        return self.folder / "project"

    @property
    def remote(self) -> str | None:
        return "origin" if self.shared else None

    def copy(self, target: Path) -> "Case":
        shutil.copytree(self.folder, target, symlinks=True)
        return Case(target, self.shared)


class State(NamedTuple):
    """What a registry says, but for times and signatures: two runs of the same decisions have the same."""

    decisions: tuple[tuple[str, str | None, str | None, str, tuple[str, ...]], ...]
    tags: tuple[tuple[str, int], ...]  # and the number of the decision that they are on
    production: str | None
    keys: tuple[bool, ...]  # whether each trusted key holds from now on
    signer: int | None  # the number of the local key among them


class Look(NamedTuple):
    """What reading finds: the state, the audit's findings and what git's fsck says."""

    state: State
    findings: tuple[str, ...]
    fsck: str


def apart(folder: Path, action: Callable[[], T], kill: Kill | None = None, check: bool = True) -> Ran:
    """Run the action in a process of its own, and kill it there; with `check`, an error that it raises is raised."""
    for name in ("bin", "tmp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in {"bin/git": SHIM, "calls": "0", "said": "", "writes": "0"}.items():
        (folder / name).write_text(content)
    (folder / "bin/git").chmod(0o755)
    (folder / "answer").unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_apart(folder, action, kill)
    if kill and kill.how == "time":
        time.sleep(kill.seconds)
        os.killpg(child, signal.SIGKILL)
    status = _wait(child)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has left running
    seconds = time.monotonic() - started
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    returned, error = (None, None) if killed else pickle.loads((folder / "answer").read_bytes())  # noqa: S301
    if check and error:
        raise AssertionError(error)
    calls = tuple((folder / "said").read_text().splitlines())
    writes = int((folder / "writes").read_text() or 0)
    for name in ("bin", "tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return Ran(killed, returned, error, calls, writes, seconds)


def _wait(child: int) -> int:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"it did not end in {WAIT_S} s")


def _be_apart(folder: Path, action: Callable[[], Any], kill: Kill | None) -> None:
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        how = kill or Kill("never")
        given = {"CRASH": folder, "CRASH_HOW": how.how, "CRASH_AT": how.at, "CRASH_S": how.seconds}
        settings = OWN_GIT | quiet.SETTINGS
        os.environ |= {name: str(value) for name, value in given.items()} | settings
        os.environ |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder / "tmp")}
        import tempfile

        tempfile.tempdir = None
        if kill is None or kill.how == "write":
            sys.addaudithook(_counter(folder, how.at if kill else 0))
        try:
            answer = action(), None
        except RegistryError as error:
            answer = None, str(error)  # type: ignore[assignment]
        (folder / "answer").write_bytes(pickle.dumps(answer))
        os._exit(0)
    except BaseException:
        (folder / "answer").write_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)


def _counter(folder: Path, at: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Counts what changes files in the folder, and ends the process group before number `at`."""
    count, inside, own = (
        0,
        f"{folder}/",
        tuple(str(folder / name) for name in ("writes", "calls", "said", "answer", "log")),
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & WRITING):
                return
        elif event not in CHANGES:
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        if not path.startswith(inside) or path in own:
            return
        count += 1
        if count == at:
            os.killpg(0, signal.SIGKILL)
        if not at:
            descriptor = os.open(own[0], os.O_WRONLY | os.O_TRUNC)
            os.write(descriptor, str(count).encode())
            os.close(descriptor)

    return hook


def look(case: Case) -> Look:
    """What a reader finds, without changing anything."""
    found: Look = apart(case.folder, lambda: _look(case)).returned
    return found


def _look(case: Case) -> Look:
    root = case.root
    view = look_at(root)
    refs, links = view.refs, view.links
    numbers = {link.commit: number for number, link in enumerate(links)}
    decisions = (link.decision for link in links)
    production = view.standing.production
    trusted = keys.trusted_keys(root)
    state = State(
        tuple((one.outcome, one.version, one.replaces, one.model_sha256, one.failed) for one in decisions),
        tuple(sorted((tag, numbers.get(commit, -1)) for tag, commit in refs.tags.items())),
        production.decision.version if production else None,
        tuple(one.before is None for one in trusted),
        _own(root, trusted),
    )
    findings = audit(root, MODEL, ALL, case.remote).findings if refs.tip else []
    places = [root, *([case.folder / "bare.git"] if case.shared else [])]
    checked = [
        subprocess.run(
            [GIT, "-C", str(place), "fsck", "--strict", "--no-dangling", "--no-progress"],
            capture_output=True,
            text=True,
            check=False,
        )
        for place in places
    ]
    said = "".join(one.stdout + one.stderr for one in checked if one.returncode)
    return Look(state, tuple(f"{one.decision}: {one.file}: {one.found}" for one in findings), said)


def _own(root: Path, trusted: tuple[keys.TrustedKey, ...]) -> int | None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not (root / keys.LOCAL).exists():
        return None
    name = keys.fingerprint(load_pem_private_key((root / keys.LOCAL).read_bytes(), None).public_key())  # type: ignore[arg-type]
    return next((number for number, one in enumerate(trusted) if one.fingerprint == name), -1)


def litter(case: Case) -> list[str]:
    """What a killed process has left behind beside the files that it meant to write."""
    found = (path for path in case.folder.rglob("*") if path.suffix in (".tmp", ".lock") and path.is_file())
    ours = (path.relative_to(case.folder).as_posix() for path in found if ".dvc" not in path.parts)
    left = [path for path in ours if not path.startswith(("store/", "project/dvc.lock", "tmp/"))]
    return left + [str(path) for path in [case.root / keys.PENDING] if path.exists()]


def silent(_: str) -> None:
    """What is said is not kept."""


# What is killed: each is done again, by a user who does not know how far it came.


def record(case: Case) -> None:
    """Record the verdict that lies there."""
    opened(case.root).record()


def go_back(case: Case) -> None:
    """Roll back to v0.1.0, if that has not been done; what it was cut off from, the next decision finishes."""
    try:
        opened(case.root).roll_back("v0.1.0", "wrong at night")
    except RegistryError as error:
        if "is in production already" not in str(error):
            raise


def rotate(case: Case) -> None:
    """Rotate the key, if the first one has not been rotated away."""
    trusted = keys.trusted_keys(case.root)
    if len(trusted) < 2 or (case.root / keys.PENDING).exists():
        keys.rotate(case.root, datetime.now(UTC))


class Scenario(NamedTuple):
    """A prepared case, what is done to it, and what an undisturbed run makes of it."""

    name: str
    kind: tuple[str, bool]
    case: Case
    done: Case
    action: Callable[[Case], None]
    before: State
    after: State
    ran: Ran


ACTIONS: dict[str, Callable[[Case], None]] = {
    "first": record,
    "promotion": record,
    "refusal": record,
    "rollback": go_back,
    "rotation": rotate,
}


def warm() -> None:
    """Import what the processes use, so that they do not have to, each of them."""
    for module in USED:
        importlib.import_module(module)


def prepare(folder: Path, name: str, shared: bool) -> Scenario:
    """Make the case for an action of that name, and run the action undisturbed in a copy of it."""
    warm()
    case = Case(folder / "case", shared)
    apart(case.folder, lambda: _prepare(case, name))
    before = look(case).state
    action, copy = ACTIONS[name], case.copy(folder / "undisturbed")
    ran = apart(copy.folder, lambda: action(copy))
    found = look(copy)
    assert not (found.findings or found.fsck or litter(copy)), (found, litter(copy))
    return Scenario(f"{name}, shared" if shared else name, (name, shared), case, copy, action, before, found.state, ran)


def _prepare(case: Case, name: str) -> None:
    ledger = Ledger.begin(case.root, bootstrap=True)
    if case.shared:
        ledger.share(Path("../bare.git"), Path("../store"))
    if name != "first":
        ledger.decide(1)
        ledger.commit("Trust the key")
        if case.shared:
            ledger.git("push", "--quiet", "origin", "main")
    if name == "rollback":
        ledger.decide(2)
    elif name != "rotation":
        ledger.lay(3, wrong=90 if name == "refusal" else 10)


class Outcome(NamedTuple):
    """What a kill came to: whether it hit, the state right after, and what is wrong, right then or after a next run."""

    killed: bool
    moved: bool  # the branch had the decision already
    healing: tuple[str, ...]  # what the audit found right after the kill, and no more after the next run
    wrong: tuple[str, ...]


def survive(scenario: Scenario, folder: Path, kill: Kill) -> Outcome:
    """Kill the scenario's action there, look, run it again, and say what is not as after an undisturbed run."""
    case = scenario.case.copy(folder)
    ran = apart(case.folder, lambda: scenario.action(case), kill, check=kill.how != "time")
    return judge(scenario, case, ran.killed)


def judge(scenario: Scenario, case: Case, killed: bool = True) -> Outcome:
    """What is wrong with a case as a kill left it, and after the next run; the case is removed if nothing is."""
    wrong, torn = [], look(case)
    state = torn.state
    if state.production not in (scenario.before.production, scenario.after.production):
        wrong.append(f"right after, {state.production} is in production")
    if state.decisions not in (scenario.before.decisions, scenario.after.decisions):
        wrong.append("right after, there is a decision that is neither old nor new")
    if torn.fsck:
        wrong.append(f"right after, git fsck: {torn.fsck}")
    wrong += [f"right after: {one}" for one in torn.findings if "refs/" not in one]
    again = apart(case.folder, lambda: scenario.action(case), check=False)
    found = look(case)
    wrong += [again.error] if again.error else []
    if found.state != scenario.after:
        wrong.append(f"{found.state} is not {scenario.after}")
    wrong += [*found.findings, *([found.fsck] if found.fsck else []), *(f"{one} is left" for one in litter(case))]
    if not wrong:
        shutil.rmtree(case.folder)
    return Outcome(killed, state.decisions != scenario.before.decisions, torn.findings, tuple(wrong))


def seeded(scenario: Scenario, seed: int, times: int) -> list[Kill]:
    """Kills at times drawn evenly over an undisturbed run."""
    drawn = random.Random(f"{scenario.name} {seed}")
    return [Kill("time", seconds=drawn.uniform(0.0, scenario.ran.seconds)) for _ in range(times)]


def inside(scenario: Scenario, seed: int, times: int) -> list[Kill]:
    """Kills some milliseconds into the git calls that move refs."""
    drawn = random.Random(f"{scenario.name} {seed} inside")
    moving = [n for n, call in enumerate(scenario.ran.calls, 1) if MOVING.search(call)]
    return [Kill("within", drawn.choice(moving), drawn.uniform(0.001, 0.03)) for _ in range(times if moving else 0)]


def at_steps(scenario: Scenario, calls: int, writes: int) -> list[Kill]:
    """Kills after each `calls`-th git call, from the last one on, and before each `writes`-th change of a file."""
    after = [Kill("after", number) for number in range(len(scenario.ran.calls), 0, -calls)]
    return after + [Kill("write", number) for number in range(scenario.ran.writes, 0, -writes)]


# States that a kill within git leaves, made by hand, as they last microseconds: each changes a copy of the done case.


def rewind(git_folder: Path, before: Path) -> None:
    """Put the refs and their logs back to where they were; the objects stay, as git leaves them."""
    for name in ("refs", "logs"):
        shutil.rmtree(git_folder / name, ignore_errors=True)
        if (before / name).exists():
            shutil.copytree(before / name, git_folder / name)
    (git_folder / "packed-refs").unlink(missing_ok=True)
    if (before / "packed-refs").exists():
        shutil.copy(before / "packed-refs", git_folder / "packed-refs")


def _here(scenario: Scenario, case: Case) -> None:
    rewind(case.root / ".git", scenario.case.root / ".git")


def _there(scenario: Scenario, case: Case) -> None:
    rewind(case.folder / "bare.git", scenario.case.folder / "bare.git")


def new_refs(scenario: Scenario) -> list[str]:
    """The tags that the action makes, as refs."""
    return [f"refs/tags/{tag}" for tag, _ in scenario.after.tags if tag not in dict(scenario.before.tags)]


def no_tags(scenario: Scenario, case: Case) -> None:
    """The branch has moved, and no tag."""
    for ref in new_refs(scenario):
        call(case.root, GIT, "update-ref", "-d", ref)


def one_tag(scenario: Scenario, case: Case) -> None:
    """The branch has moved, and all tags but one."""
    call(case.root, GIT, "update-ref", "-d", new_refs(scenario)[0])


def no_tags_there(scenario: Scenario, case: Case) -> None:
    """The branch has moved at the remote, and no tag; here nothing has moved."""
    _here(scenario, case)
    for ref in new_refs(scenario):
        call(case.folder / "bare.git", GIT, "update-ref", "-d", ref)


def nothing_fetched(scenario: Scenario, case: Case) -> None:
    """The push is done, the fetch is not."""
    _here(scenario, case)


def half_fetched(scenario: Scenario, case: Case) -> None:
    """The push is done; the fetch has brought the branch as the remote has it, and one tag."""
    _fetch(scenario, case, new_refs(scenario)[:1])


def all_but_branch_fetched(scenario: Scenario, case: Case) -> None:
    """The push and git's fetch are done; the branch here has not followed."""
    _fetch(scenario, case, new_refs(scenario))


def _fetch(scenario: Scenario, case: Case, tags: list[str]) -> None:
    refs = ["refs/remotes/origin/registry", *tags]
    found = {ref: call(case.root, GIT, "rev-parse", ref) for ref in refs}
    _here(scenario, case)
    for ref, name in found.items():
        call(case.root, GIT, "update-ref", ref, name)


def locks(scenario: Scenario, case: Case) -> None:
    """git has taken the locks of the refs here, and nothing more."""
    _here(scenario, case)
    _die(case.root / ".git")
    for ref in ("refs/heads/registry", *new_refs(scenario)):
        _lock(case.root / ".git" / ref)
    if case.shared:
        _there(scenario, case)


def locks_there(scenario: Scenario, case: Case) -> None:
    """git has taken the locks of the refs at the remote, and nothing more."""
    _here(scenario, case)
    _there(scenario, case)
    _die(case.root / ".git")
    for ref in ("refs/heads/registry", *new_refs(scenario)):
        _lock(case.folder / "bare.git" / ref)


def _die(git_folder: Path) -> None:
    """A git of ours was moving refs in this repository, and was killed."""
    (git_folder / MOVER).write_text('{"moving": true}')


def _lock(ref: Path) -> None:
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.with_name(f"{ref.name}.lock").write_text(f"{'1' * 40}\n")


def branch_and_locks(scenario: Scenario, case: Case) -> None:
    """git has moved the branch here, and holds the locks of the tags."""
    no_tags(scenario, case)
    _die(case.root / ".git")
    for ref in new_refs(scenario):
        _lock(case.root / ".git" / ref)


def leave_log_only(scenario: Scenario, case: Case) -> None:
    """git has written the branch's log, which it does first, and not moved the branch."""
    log = (case.root / ".git/logs/refs/heads/registry").read_bytes()
    _here(scenario, case)
    (case.root / ".git/logs/refs/heads/registry").parent.mkdir(parents=True, exist_ok=True)
    (case.root / ".git/logs/refs/heads/registry").write_bytes(log)


def key_only(scenario: Scenario, case: Case) -> None:
    """The first key is there, and trusted by nobody."""
    _here(scenario, case)
    (case.root / keys.TRUSTED).unlink()


def half_key(scenario: Scenario, case: Case) -> None:
    """The first key is half written, beside its place."""
    key_only(scenario, case)
    data = (case.root / keys.LOCAL).read_bytes()
    (case.root / keys.LOCAL).unlink()
    beside(case.root / keys.LOCAL).write_bytes(data[:100])


def half_trusted(scenario: Scenario, case: Case) -> None:
    """The first key is there, and the line that trusts it half written."""
    data = (case.root / keys.TRUSTED).read_bytes()
    key_only(scenario, case)
    beside(case.root / keys.TRUSTED).write_bytes(data[:150])


def beside(target: Path) -> Path:
    """Where a process that is gone would have written the file."""
    with subprocess.Popen(["true"]) as gone:
        return target.with_name(f".{target.name}.{gone.pid}.tmp")


def next_key_only(scenario: Scenario, case: Case) -> None:
    """A rotation has made the next key, and nobody trusts it."""
    (case.root / keys.LOCAL).rename(case.root / keys.PENDING)
    shutil.copy(scenario.case.root / keys.LOCAL, case.root / keys.LOCAL)
    shutil.copy(scenario.case.root / keys.TRUSTED, case.root / keys.TRUSTED)


def next_key_trusted(scenario: Scenario, case: Case) -> None:
    """A rotation has made the next key, which is trusted, and not put it in its place."""
    (case.root / keys.LOCAL).rename(case.root / keys.PENDING)
    shutil.copy(scenario.case.root / keys.LOCAL, case.root / keys.LOCAL)


Spoil = Callable[[Scenario, Case], None]
SPECIAL: dict[tuple[str, bool], tuple[Spoil, ...]] = {
    ("first", False): (no_tags, one_tag, locks, branch_and_locks, leave_log_only, key_only, half_key, half_trusted),
    ("promotion", False): (no_tags, one_tag, locks, branch_and_locks, leave_log_only),
    ("refusal", False): (locks, leave_log_only),
    ("rollback", False): (no_tags, locks, branch_and_locks, leave_log_only),
    ("rotation", False): (next_key_only, next_key_trusted),
    ("first", True): (no_tags_there, nothing_fetched, half_fetched, all_but_branch_fetched, locks, locks_there),
    ("promotion", True): (no_tags_there, nothing_fetched, half_fetched, all_but_branch_fetched, locks, locks_there),
    ("refusal", True): (nothing_fetched, all_but_branch_fetched, locks, locks_there),
    ("rollback", True): (no_tags_there, nothing_fetched, half_fetched, locks, locks_there),
}


# What a quick look takes: each so many git calls and changes of files.
QUICK = {
    ("first", False): (7, 40),
    ("promotion", True): (12, 90),
    ("rotation", False): (1, 4),
    ("rollback", False): (25, 99),
}


def recover(scenario: Scenario, folder: Path, spoil: Spoil) -> Outcome:
    """As `survive`, from a state that a kill leaves."""
    case = scenario.done.copy(folder)
    spoil(scenario, case)
    return judge(scenario, case)
