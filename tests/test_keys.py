"""Keys: where the private one comes from, that it stays private, and which are trusted when, as OpenSSH has it."""

import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from flows.registry import keys
from tasks.core.errors import RegistryError

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
# `make test` unpacks Debian's softhsm2 beside the interpreter; it may be installed as well.
TOKENS = next(
    (one for one in (Path(sys.prefix, "softhsm"), Path("/")) if (one / "usr/bin/softhsm2-util").exists()), None
)
SOFTHSM = Path(TOKENS or "/", "usr/lib/softhsm/libsofthsm2.so")


@pytest.fixture(autouse=True)
def _no_key_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, form: PrivateFormat = PrivateFormat.PKCS8) -> str:
    return key.private_bytes(Encoding.PEM, form, NoEncryption()).decode()


def key_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def trusted_file(root: Path, content: str | bytes) -> Path:
    path = root / "deploy/trusted_keys"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sign_key(root: Path, now: datetime = NOW) -> str:
    """The fingerprint of the key that signs now."""
    return keys.fingerprint(keys.current(root, now, say=lambda _: None).public_key)


def refusal(root: Path) -> str:
    with pytest.raises(RegistryError) as caught:
        sign_key(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def openssh_trusts(root: Path, key: Path, at: datetime) -> bool:
    """Whether ssh-keygen takes a signature by the key file at that time; somewhere else on earth than UTC."""
    (root / "message").write_text("hello")
    (root / "message.sig").unlink(missing_ok=True)
    copy = Path(shutil.copy(key, root / "copy"))
    shown = subprocess.run(["ssh-keygen", "-y", "-f", copy], check=True, capture_output=True)
    copy.with_name("copy.pub").write_bytes(shown.stdout)  # ssh-keygen signs with a PEM key only if this is beside it
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", copy, "-n", "git", root / "message"], check=True)
    command = ["ssh-keygen", "-Y", "verify", "-f", root / "deploy/trusted_keys", "-I", "weighin", "-n", "git"]
    command += ["-s", root / "message.sig", f"-Overify-time={at:%Y%m%d%H%M%SZ}"]
    environment = os.environ | {"TZ": "America/New_York"}
    done = subprocess.run(command, input=b"hello", env=environment, capture_output=True, check=False)  # type: ignore[arg-type]
    return done.returncode == 0


def test_first_use_makes_a_key_and_trusts_it(tmp_path: Path, open_umask: None) -> None:
    said: list[str] = []
    key = keys.current(tmp_path, NOW, said.append)
    name = keys.fingerprint(key.public_key)
    assert said == [
        f"made a signing key for this working copy: {tmp_path}/.weighin/signing.pem, {name}",
        "deploy/trusted_keys trusts it now, as the first one: commit that file",
    ]
    assert (tmp_path / ".weighin").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".weighin/signing.pem").stat().st_mode & 0o777 == 0o600
    trusted = keys.trusted_keys(tmp_path)
    assert [(line.fingerprint, line.after, line.before) for line in trusted] == [(name, NOW, None)]
    again = keys.current(tmp_path, NOW + SECOND, said.append)
    assert again.public_key == key.public_key
    assert len(said) == 2
    assert len(keys.trusted_keys(tmp_path)) == 1


def test_a_file_of_comments_has_no_key_and_keeps_them(tmp_path: Path) -> None:
    path = trusted_file(tmp_path, "# ours\n\n  # more, without line end")
    name = sign_key(tmp_path)
    text = path.read_text()
    assert text.startswith("# ours\n\n  # more, without line end\nweighin ")
    assert text.endswith(f" {name}\n")


def test_the_fingerprint_is_the_one_ssh_keygen_prints(tmp_path: Path) -> None:
    name = sign_key(tmp_path)
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / keys.LOCAL], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[:2] == ["256", name]


def test_a_key_that_is_not_among_the_trusted_ones_is_refused_with_its_line(tmp_path: Path) -> None:
    path = trusted_file(tmp_path, keys.trusted_line(new_key().public_key(), NOW) + "\n")
    words = refusal(tmp_path)
    name, line = words.split()[1], words.partition("reviewed: ")[2]
    assert words.startswith(f"key {name} is not in deploy/trusted_keys: add this line and have it reviewed: weighin ")
    assert len(keys.trusted_keys(tmp_path)) == 1
    path.write_text(path.read_text() + line + "\n")
    assert sign_key(tmp_path) == name
    with pytest.raises(RegistryError, match=r"is in deploy/trusted_keys, but is not valid at 20260301115959Z"):
        sign_key(tmp_path, NOW - SECOND)


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_the_environment_gives_a_path_or_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: PrivateFormat
) -> None:
    key = new_key()
    name = keys.fingerprint(key.public_key())
    key_file(tmp_path / "given.pem", pem(key, form))
    trusted_file(tmp_path, keys.trusted_line(key.public_key(), NOW) + "\n")
    for value in ("given.pem", str(tmp_path / "given.pem"), pem(key, form)):
        monkeypatch.setenv(keys.VARIABLE, value)
        assert sign_key(tmp_path) == name
    assert not (tmp_path / ".weighin").exists()


def test_a_key_of_the_environment_is_never_trusted_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    monkeypatch.setenv(keys.VARIABLE, pem(key))
    assert keys.trusted_line(key.public_key(), NOW) in refusal(tmp_path)
    assert not (tmp_path / "deploy").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_key_file_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    sign_key(tmp_path)
    (tmp_path / keys.LOCAL).chmod(mode)
    expected = f"{tmp_path / keys.LOCAL} has mode {mode:04o}, so others could read the private key: `chmod 600` it"
    assert refusal(tmp_path) == expected
    monkeypatch.setenv(keys.VARIABLE, str(tmp_path / keys.LOCAL))
    assert refusal(tmp_path) == expected


def test_keys_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path / "key", "")
    monkeypatch.setenv(keys.VARIABLE, "key")
    locked = BestAvailableEncryption(b"swordfish")
    for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        path.write_bytes(new_key().private_bytes(Encoding.PEM, form, locked))
        assert refusal(tmp_path) == f"{path} is protected by a passphrase: give a private key without one"
    path.write_text(pem(ec.generate_private_key(ec.SECP384R1())))
    assert refusal(tmp_path) == f"{path} is a key on the curve secp384r1: P-256 is wanted"
    path.write_text(pem(ed25519.Ed25519PrivateKey.generate()))
    assert refusal(tmp_path) == f"{path} is not an elliptic curve key: P-256 is wanted"
    for text in ("", pem(new_key(), PrivateFormat.OpenSSH), pem(new_key())[:90]):
        path.write_text(text)
        assert refusal(tmp_path).startswith(f"{path} is not a PEM private key on the curve P-256: `openssl genpkey ")


@pytest.mark.parametrize("damage", ["cut", "body", "one line", "locked"])
def test_no_message_has_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    key = new_key()
    lines = pem(key).splitlines()
    secret = lines[1]
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"swordfish")).decode()
    value = {
        "cut": "\n".join(lines[:2]),
        "body": "\n".join(lines[1:-1]),
        "one line": "".join(lines[1:-1]),
        "locked": locked,
    }[damage]
    monkeypatch.setenv(keys.VARIABLE, value)
    with pytest.raises(RegistryError) as caught:
        sign_key(tmp_path)
    told = "".join(traceback.format_exception(caught.value))
    assert keys.VARIABLE in str(caught.value)
    assert secret not in told
    assert locked.splitlines()[1] not in told


def test_an_empty_variable_and_a_missing_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "")
    assert refusal(tmp_path) == "WEIGHIN_SIGNING_KEY is empty: give a key, or unset it to sign with the local one"
    monkeypatch.setenv(keys.VARIABLE, "no/such.pem")
    assert (
        refusal(tmp_path) == "WEIGHIN_SIGNING_KEY names no file that can be read: No such file or directory"
    )  # the value may be a secret
    assert list(tmp_path.iterdir()) == []


def test_processes_that_begin_at_once_use_one_key(tmp_path: Path) -> None:
    script = (
        "import sys; from datetime import *; from pathlib import Path; from flows.registry import keys\n"
        "from cryptography.hazmat.primitives.asymmetric import ec; from cryptography.hazmat.primitives import hashes\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "key = keys.current(Path(sys.argv[1]), datetime(2026, 3, 1, tzinfo=UTC), lambda _: None)\n"
        "key.public_key.verify(key.sign(b'x'), b'x', ec.ECDSA(hashes.SHA256()))\n"
        "print(keys.fingerprint(key.public_key))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, tmp_path],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = {process.communicate()[0].strip() for process in started}
    assert printed == {key.fingerprint for key in keys.trusted_keys(tmp_path)}
    assert len(keys.trusted_keys(tmp_path)) == 1
    assert [path.name for path in (tmp_path / ".weighin").iterdir()] == ["signing.pem"]


GOOD = keys.openssh(new_key().public_key()).split()[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("rubbish", "is wanted"),
        (f"weighin {GOOD}", "is wanted"),
        (f"weighin ssh-ed25519 {GOOD}", "is wanted"),
        (f"weighin namespaces=git ecdsa-sha2-nistp256 {GOOD}", "is wanted"),
        (f'weighin namespaces="file" ecdsa-sha2-nistp256 {GOOD}', "is wanted"),
        (f'weighin cert-authority,namespaces="git" ecdsa-sha2-nistp256 {GOOD}', "is wanted"),
        (f'weighin valid-after="20260101000000" ecdsa-sha2-nistp256 {GOOD}', "is wanted"),
        (f'weighin valid-after="20261301000000Z" ecdsa-sha2-nistp256 {GOOD}', "is no time"),
        (f'weighin valid-after="20260101Z",valid-after="20270101Z" ecdsa-sha2-nistp256 {GOOD}', "twice"),
        (f'weighin valid-after="20260101Z",valid-before="20260101Z" ecdsa-sha2-nistp256 {GOOD}', "not after"),
        (f"weighin ecdsa-sha2-nistp256 {GOOD[:-4]}", "damaged"),
        (f"weighin ecdsa-sha2-nistp256 {'B' + GOOD[1:]}", "damaged"),
        (f"!weighin ecdsa-sha2-nistp256 {GOOD}", "is wanted"),
        (f"* ecdsa-sha2-nistp256 {GOOD}", "is wanted"),
    ],
)
def test_a_malformed_line_is_told_with_its_number(tmp_path: Path, line: str, reason: str) -> None:
    before = f"# first\n{line}\n"
    path = trusted_file(tmp_path, before)
    with pytest.raises(RegistryError, match=rf"^deploy/trusted_keys, line 2, is malformed: .*{reason}"):
        keys.trusted_keys(tmp_path)
    with pytest.raises(RegistryError, match="line 2"):
        sign_key(tmp_path)
    assert path.read_text() == before


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    "intervals",
    [
        [""],
        ['namespaces="git",valid-after="20260301120000Z"'],
        ['valid-before="20260301120000Z",namespaces="git"'],
        ['valid-after="202603011200Z",valid-before="20260301120100Z"'],
        ['valid-before="20260301120000Z"', 'valid-after="20260301120100Z"'],
        ['valid-after="20260301Z",valid-before="20260302Z"'],
    ],
)
@pytest.mark.usefixtures("far_from_utc")
def test_trust_over_time_is_as_openssh_has_it(tmp_path: Path, intervals: list[str]) -> None:
    key = new_key()
    path = key_file(tmp_path / "key", pem(key))
    blob = keys.openssh(key.public_key()).split()[1]
    trusted_file(tmp_path, "".join(f" weighin\t{options} ecdsa-sha2-nistp256 {blob}\n" for options in intervals))
    trusted = keys.trusted_keys(tmp_path)
    for offset in (-43201, -1, 0, 1, 59, 60, 61, 43200, 43201):
        at = NOW + offset * SECOND
        expected = openssh_trusts(tmp_path, path, at)
        assert keys.is_trusted(trusted, key.public_key(), at) == expected, at
        assert keys.is_trusted(trusted, key.public_key(), at + timedelta(microseconds=999_999)) == expected, at
    assert not keys.is_trusted(trusted, new_key().public_key(), NOW)


def test_rotation_ends_the_old_key_and_begins_the_new(tmp_path: Path) -> None:
    old = sign_key(tmp_path, NOW - 60 * SECOND)
    kept = shutil.copy(tmp_path / keys.LOCAL, tmp_path / "old")
    assert keys.rotate(tmp_path, NOW) == (old, sign_key(tmp_path))
    new = sign_key(tmp_path)
    assert new != old
    assert [(key.fingerprint, key.after, key.before) for key in keys.trusted_keys(tmp_path)] == [
        (old, NOW - 60 * SECOND, NOW),
        (new, NOW, None),
    ]
    assert [path.name for path in (tmp_path / ".weighin").iterdir()] == ["signing.pem"]
    assert (tmp_path / keys.LOCAL).stat().st_mode & 0o777 == 0o600
    for key, at, trusted in (
        (kept, NOW - 61 * SECOND, False),
        (kept, NOW, True),
        (kept, NOW + SECOND, False),
        (tmp_path / keys.LOCAL, NOW - SECOND, False),
        (tmp_path / keys.LOCAL, NOW, True),
    ):
        assert openssh_trusts(tmp_path, Path(key), at) == trusted


def test_rotation_keeps_every_other_byte(tmp_path: Path) -> None:
    sign_key(tmp_path)
    mine = keys.openssh(keys.trusted_keys(tmp_path)[0].public_key).split()[1]
    other = keys.trusted_line(new_key().public_key(), NOW)
    lines = [
        "# caf\u00e9".encode("latin-1"),
        other.encode() + b'  valid-before="x" \xff\r',
        f"weighin\t {{}}ecdsa-sha2-nistp256  {mine} a  comment".encode(),
        f'a@b valid-before="20270101Z",namespaces="git"{{}} ecdsa-sha2-nistp256 {mine}'.encode(),
        f'a@b valid-before="20200101Z" ecdsa-sha2-nistp256 {mine}'.encode(),
        b"",
        b"# no line end",
    ]
    path = trusted_file(tmp_path, b"\n".join(lines).replace(b"{}", b""))
    _, new = keys.rotate(tmp_path, NOW)
    end = b'valid-before="20260301120000Z"'
    lines[2] = lines[2].replace(b"{}", end + b" ")
    lines[3] = lines[3].replace(b"{}", b"," + end).replace(b'valid-before="20270101Z",', b"")
    *kept, added, last = path.read_bytes().split(b"\n")
    assert kept == lines
    assert (added.split()[-1], last) == (new.encode(), b"")


def test_rotations_in_one_second_leave_a_file_that_openssh_reads(tmp_path: Path) -> None:
    names = [sign_key(tmp_path), *(keys.rotate(tmp_path, NOW)[1] for _ in range(3))]
    assert [key.fingerprint for key in keys.trusted_keys(tmp_path)] == names
    assert len(set(names)) == 4
    assert sign_key(tmp_path) == names[-1]
    assert openssh_trusts(tmp_path, tmp_path / keys.LOCAL, NOW)


def test_an_expired_key_can_be_rotated(tmp_path: Path) -> None:
    sign_key(tmp_path)
    path = tmp_path / keys.TRUSTED
    path.write_text(path.read_text().replace(" ecdsa", ',valid-before="20260301120100Z" ecdsa'))
    later = NOW + 90 * SECOND
    with pytest.raises(RegistryError, match="not valid at 20260301120130Z"):
        sign_key(tmp_path, later)
    _, new = keys.rotate(tmp_path, later)
    assert sign_key(tmp_path, later) == new
    assert keys.trusted_keys(tmp_path)[0].before == NOW + 60 * SECOND


def test_a_rotation_that_fails_before_the_trusted_keys_are_written_changes_nothing(tmp_path: Path) -> None:
    old = sign_key(tmp_path)
    before = (tmp_path / keys.TRUSTED).read_bytes()
    (tmp_path / f"deploy/.trusted_keys.{os.getpid()}.tmp").mkdir()  # in the way of the temporary file
    with pytest.raises(IsADirectoryError):
        keys.rotate(tmp_path, NOW + SECOND)
    assert (tmp_path / keys.TRUSTED).read_bytes() == before
    assert sign_key(tmp_path, NOW + 2 * SECOND) == old
    assert keys.rotate(tmp_path, NOW + 3 * SECOND)[0] == old
    assert len(keys.trusted_keys(tmp_path)) == 2
    assert sign_key(tmp_path, NOW + 3 * SECOND) != old


@pytest.mark.parametrize("then", ["sign", "rotate"])
def test_a_rotation_cut_off_after_the_trusted_keys_were_written_is_finished(tmp_path: Path, then: str) -> None:
    old = sign_key(tmp_path)
    kept = (tmp_path / keys.LOCAL).read_text()
    new = keys.rotate(tmp_path, NOW + SECOND)[1]
    (tmp_path / keys.LOCAL).rename(tmp_path / keys.PENDING)
    key_file(tmp_path / keys.LOCAL, kept)
    if then == "rotate":
        assert keys.rotate(tmp_path, NOW + 5 * SECOND) == (old, new)
    assert sign_key(tmp_path, NOW + 5 * SECOND) == new
    assert len(keys.trusted_keys(tmp_path)) == 2
    assert not (tmp_path / keys.PENDING).exists()


def test_what_cannot_be_rotated_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match=r"signing\.pem does not exist, so there is no key to rotate"):
        keys.rotate(tmp_path, NOW)
    sign_key(tmp_path)
    trusted_file(tmp_path, keys.trusted_line(new_key().public_key(), NOW))
    with pytest.raises(RegistryError, match=r"is not in deploy/trusted_keys: add this line"):
        keys.rotate(tmp_path, NOW)
    assert not (tmp_path / keys.PENDING).exists()
    monkeypatch.setenv(keys.VARIABLE, "key.pem")
    with pytest.raises(RegistryError, match=r"the key comes from WEIGHIN_SIGNING_KEY"):
        keys.rotate(tmp_path, NOW)


def test_a_pkcs11_uri_is_never_told_with_its_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "pkcs11:token=none;object=none?module-path=/no/such.so&pin-value=swordfish")
    with pytest.raises(RegistryError, match="WEIGHIN_SIGNING_KEY") as caught:
        sign_key(tmp_path)
    assert "swordfish" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.skipif(TOKENS is None, reason="no softhsm2: `make test` found no Debian packages to take it from")
def test_a_key_on_a_token_signs_both(tmp_path: Path) -> None:
    key = new_key()
    key_file(tmp_path / "key", pem(key))
    trusted_file(tmp_path, keys.trusted_line(key.public_key(), NOW) + "\n")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path}/tokens\n")
    (tmp_path / "pin").write_text("1234")
    uri = f"pkcs11:token=weighin;object=signing?module-path={SOFTHSM}&pin-source={tmp_path}/pin"
    environment = os.environ | {"SOFTHSM2_CONF": str(tmp_path / "conf"), keys.VARIABLE: uri}
    for arguments in (
        ["--init-token", "--free", "--label", "weighin", "--so-pin", "1234"],
        ["--import", str(tmp_path / "key"), "--token", "weighin", "--label", "signing", "--id", "01"],
    ):
        command = [
            str(Path(TOKENS or "/", "usr/bin/softhsm2-util")),
            "--module",
            str(SOFTHSM),
            *arguments,
            "--pin",
            "1234",
        ]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    script = (
        "import sys; from datetime import *; from pathlib import Path; from flows.registry import keys, signing\n"
        "root, now = Path(sys.argv[1]), datetime(2026, 3, 1, 12, tzinfo=UTC)\n"
        "signer = [signing.signer(root, now) for _ in range(2)][1]\n"
        "name = signing.verify_commit(b'x', signer.sign_commit(b'x'), keys.trusted_keys(root), now)\n"
        "signer.sign_folder(root / 'deploy', root / 'signature')\n"
        "signing.verify_folder(root / 'deploy', root / 'signature', signer.public_key)\n"
        "print(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (keys.fingerprint(key.public_key()), "")
