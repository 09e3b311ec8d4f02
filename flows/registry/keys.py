"""Signing keys: where the private one comes from, and which public ones the repository trusts, and when.

All keys are ECDSA on the curve P-256, the one kind that git (by OpenSSH) and model-signing (OpenSSF) share. The
trusted ones are lines of `deploy/trusted_keys`, a file under review in OpenSSH's allowed_signers format (see ALLOWED
SIGNERS in ssh-keygen(1)), which git reads as well: `gpg.ssh.allowedSignersFile`. Private keys and PINs never get
into a message. What goes wrong is a `RegistryError`.
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core import files
from tasks.core.errors import RegistryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from model_signing.signing import Config

VARIABLE = "WEIGHIN_SIGNING_KEY"
FOLDER = Path(".weighin")
LOCAL = FOLDER / "signing.pem"
PENDING = FOLDER / "next.pem"  # a rotation's new key, until the trusted keys name it
TRUSTED = Path("deploy/trusted_keys")
HEADER = b"# Keys that may sign the registry, in OpenSSH's allowed_signers format. Every change here is reviewed.\n"

KIND = "ecdsa-sha2-nistp256"
OPTION = r'(?:namespaces="git"|valid-(?:after|before)="(?:\d{8}|\d{12}|\d{14})Z")'
LINE = re.compile(
    rf"[ \t]*[\w.@+-]+[ \t]+(?:(?P<options>{OPTION}(?:,{OPTION})*)[ \t]+)?"
    rf"(?P<kind>{KIND})[ \t]+(?P<key>[A-Za-z0-9+/]+=*)(?:[ \t].*)?\r?",
    re.ASCII,
)


class TrustedKey(NamedTuple):
    """One line of the trusted keys: it holds from `after` to `before`, both included, as OpenSSH has it."""

    fingerprint: str
    public_key: "EllipticCurvePublicKey"
    after: datetime | None
    before: datetime | None


@dataclass(frozen=True, repr=False)
class PrivateKey:
    """A key that can sign, wherever it lies.

    `sign` makes the ECDSA signature (DER) of the SHA-256 of some bytes; `folder_signing` is model-signing's
    configuration that signs folders with the key.
    """

    public_key: "EllipticCurvePublicKey"
    sign: Callable[[bytes], bytes]
    folder_signing: "Callable[[], Config]"


def openssh(public_key: "EllipticCurvePublicKey") -> str:
    """The public key as OpenSSH writes it: its kind and, in base64, the blob that SSH sends (RFC 5656)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public_key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def blob(public_key: "EllipticCurvePublicKey") -> bytes:
    """The public key as SSH sends it (RFC 5656, section 3.1)."""
    return base64.b64decode(openssh(public_key).split()[1])


def fingerprint(public_key: "EllipticCurvePublicKey") -> str:
    """`SHA256:…`, as `ssh-keygen -l` prints it."""
    return blob_fingerprint(blob(public_key))


def blob_fingerprint(blob: bytes) -> str:
    """The fingerprint of a public key of any kind, given as SSH sends it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def trusted_keys(root: Path) -> tuple[TrustedKey, ...]:
    """The keys that the repository trusts; none if it has no such file."""
    return parse(_trusted_bytes(root))


def parse(data: bytes) -> tuple[TrustedKey, ...]:
    """The keys of a trusted keys file; `RegistryError` with the line's number if a line is malformed."""
    numbered = enumerate(_text(data).split("\n"), start=1)
    return tuple(
        _parse_line(number, line) for number, line in numbered if line.strip() and not line.strip().startswith("#")
    )


def is_trusted(trusted: Iterable[TrustedKey], public_key: "EllipticCurvePublicKey", at: datetime) -> bool:
    """Whether a line names the key and holds at that time. Parts of a second do not count, as commits have none."""
    moment = at.replace(microsecond=0)
    return any(
        (key.after is None or key.after <= moment) and (key.before is None or moment <= key.before)
        for key in trusted
        if key.public_key == public_key
    )


def trusted_line(public_key: "EllipticCurvePublicKey", after: datetime) -> str:
    """The line that trusts a key from some time on, without line end; its comment is the fingerprint."""
    options = f'namespaces="git",valid-after="{_stamp(after)}"'
    return f"weighin {options} {openssh(public_key)} {fingerprint(public_key)}"


def current(root: Path, now: datetime, say: Callable[[str], None] = print, first: bool = True) -> PrivateKey:
    """The key to sign with: WEIGHIN_SIGNING_KEY's, else the repository's local one, made if there is none.

    WEIGHIN_SIGNING_KEY is a path to a PEM file (from the repository's root), the PEM text, or a `pkcs11:` URI. A local
    key is trusted right away if no key is yet and this is the `first` signature of all; `say` tells of both.
    `RegistryError` if the key cannot be used, if others can read its file, or if it is not trusted now; the message
    then has the line to add.
    """
    value = os.environ.get(VARIABLE)
    if value is not None:
        key = _from_environment(root, value)
        _require_trusted(trusted_keys(root), key.public_key, now)
        return key
    with _key_lock(root):
        trusted = trusted_keys(root)
        _finish_rotation(root, trusted)
        if not (root / LOCAL).exists():
            made = _make(root / LOCAL)
            say(f"made a signing key for this working copy: {root / LOCAL}, {fingerprint(made)}")
        key = _in_memory(_read(root / LOCAL))
        if not trusted and first:
            _append(root, key.public_key, now)
            say(f"{TRUSTED} trusts it now, as the first one: commit that file")
        _require_trusted(trusted_keys(root), key.public_key, now)
        return key


def rotate(root: Path, now: datetime) -> tuple[str, str]:
    """Make a new local key, trusted from now on, and trust the old one until now; say the old and new fingerprint.

    The old private key is deleted: its signatures stay verifiable without it. A rotation that was cut off once the
    trusted keys had the new one is finished and not begun again. `RegistryError` if there is no local key, if it is
    not among the trusted ones, or if the key comes from WEIGHIN_SIGNING_KEY.
    """
    if VARIABLE in os.environ:
        raise RegistryError(f"the key comes from {VARIABLE}: change it there, and the old key's line in {TRUSTED}")
    with _key_lock(root):
        if not (root / LOCAL).exists():
            raise RegistryError(f"{root / LOCAL} does not exist, so there is no key to rotate: signing makes it")
        old = _read(root / LOCAL).public_key()
        trusted = trusted_keys(root)
        if not _finish_rotation(root, trusted):
            _require_known(trusted, old, now)
            new = _make(root / PENDING)
            # Until these lines are there, the old key signs; from then on, whoever comes next takes the new one.
            closed = _close_lines(_trusted_bytes(root), old, now)
            files.write_bytes(root / TRUSTED, _with_line(closed, trusted_line(new, now)))
            _finish_rotation(root, trusted_keys(root))
        return fingerprint(old), fingerprint(_read(root / LOCAL).public_key())


@contextlib.contextmanager
def as_path(data: bytes) -> Iterator[Path]:
    """A path from which the bytes (under 4 KiB) can be read once, by this process: they touch no disk."""
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        yield Path(f"/dev/fd/{reading}")
    finally:
        os.close(reading)


@contextlib.contextmanager
def _key_lock(root: Path) -> Iterator[None]:
    folder = root / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(path: Path) -> "EllipticCurvePublicKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    with files.replacing(path) as (temporary,):
        temporary.touch(mode=0o600)
        temporary.write_bytes(_pem(key))
    return key.public_key()


def _pem(key: "EllipticCurvePrivateKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    # PKCS #8: model-signing does not take OpenSSH's own format, while OpenSSH takes this one.
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read(path: Path) -> "EllipticCurvePrivateKey":
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise RegistryError(f"{path} has mode {mode:04o}, so others could read the private key: `chmod 600` it")
        return _load_key(file.read(), str(path))


def _load_key(data: bytes, name: str) -> "EllipticCurvePrivateKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(data, None)
    except TypeError:
        raise RegistryError(f"{name} is protected by a passphrase: give a private key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        how = "`openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256` makes one"
        raise RegistryError(f"{name} is not a PEM private key on the curve P-256: {how}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RegistryError(f"{name} is not an elliptic curve key: P-256 is wanted")
    if not isinstance(key.curve, ec.SECP256R1):
        raise RegistryError(f"{name} is a key on the curve {key.curve.name}: P-256 is wanted")
    return key


def _in_memory(key: "EllipticCurvePrivateKey") -> PrivateKey:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    def folder_signing() -> "Config":
        from model_signing.signing import Config

        with as_path(_pem(key)) as path:
            return Config().use_elliptic_key_signer(private_key=path)  # type: ignore[no-untyped-call]

    return PrivateKey(key.public_key(), lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())), folder_signing)


def _from_environment(root: Path, value: str) -> PrivateKey:
    # The value may be a secret put in the wrong form, so no message repeats it unless it names a file.
    if not value.strip():
        raise RegistryError(f"{VARIABLE} is empty: give a key, or unset it to sign with the local one")
    if value.startswith("pkcs11:"):
        return _on_token(value)
    if "-----BEGIN" in value:
        return _in_memory(_load_key(value.encode(), f"the text in {VARIABLE}"))
    try:
        return _in_memory(_read(root / value))
    except OSError as error:
        raise RegistryError(f"{VARIABLE} names no file that can be read: {error.strerror}") from None


@functools.cache  # a process can log into a token once
def _on_token(uri: str) -> PrivateKey:
    try:
        import PyKCS11
        from model_signing.signing import Config
    except ImportError:
        raise RegistryError(f"{VARIABLE} has a pkcs11: URI: `pip install 'model-signing[pkcs11]'` first") from None
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        config = Config().use_pkcs11_signer(pkcs11_uri=uri)  # type: ignore[no-untyped-call]
        signer: Any = config._signer  # its session signs commits, too
        identity, label = signer.pkcs11_uri.get_keyid_and_label()
        handle = signer.find_object(PyKCS11.CKO_PRIVATE_KEY, label=label, id=identity)
    except PyKCS11.PyKCS11Error as error:
        raise RegistryError(f"the token that {VARIABLE} names cannot be used: {error}") from None
    except (ValueError, TypeError, OSError):  # with words that may hold the PIN
        form = "pkcs11:token=NAME;object=LABEL?module-path=FILE&pin-source=FILE"
        raise RegistryError(f"{VARIABLE} names no key that can be opened: {form} is wanted") from None
    if signer.public_key().curve.name != "secp256r1":
        raise RegistryError(f"{VARIABLE} names a key on the curve {signer.public_key().curve.name}: P-256 is wanted")

    def sign(data: bytes) -> bytes:
        mechanism = PyKCS11.Mechanism(PyKCS11.CKM_ECDSA, None)
        pair = bytes(signer.session.sign(handle, hashlib.sha256(data).digest(), mecha=mechanism))
        return encode_dss_signature(int.from_bytes(pair[:32], "big"), int.from_bytes(pair[32:], "big"))

    return PrivateKey(signer.public_key(), sign, lambda: config)


def _finish_rotation(root: Path, trusted: Iterable[TrustedKey]) -> bool:
    """Put the pending key in the local one's place if the trusted keys name it; say whether that was so."""
    if not (root / PENDING).exists():
        return False
    new = _read(root / PENDING).public_key()
    if all(key.public_key != new for key in trusted):
        return False
    (root / PENDING).replace(root / LOCAL)
    return True


def _require_known(trusted: Iterable[TrustedKey], public_key: "EllipticCurvePublicKey", now: datetime) -> None:
    if all(key.public_key != public_key for key in trusted):
        line = trusted_line(public_key, now)
        raise RegistryError(
            f"key {fingerprint(public_key)} is not in {TRUSTED}: add this line and have it reviewed: {line}"
        )


def _require_trusted(trusted: tuple[TrustedKey, ...], public_key: "EllipticCurvePublicKey", now: datetime) -> None:
    _require_known(trusted, public_key, now)
    if not is_trusted(trusted, public_key, now):
        raise RegistryError(f"key {fingerprint(public_key)} is in {TRUSTED}, but is not valid at {_stamp(now)}")


def _trusted_bytes(root: Path) -> bytes:
    try:
        return (root / TRUSTED).read_bytes()
    except FileNotFoundError:
        return b""


def _append(root: Path, public_key: "EllipticCurvePublicKey", now: datetime) -> None:
    before = _trusted_bytes(root)
    parse(before)
    files.write_bytes(root / TRUSTED, _with_line(before or HEADER, trusted_line(public_key, now)))


def _with_line(data: bytes, line: str) -> bytes:
    return data + (b"" if data.endswith(b"\n") or not data else b"\n") + line.encode() + b"\n"


def _text(data: bytes) -> str:
    # Comments may be in any encoding, and must come out as they went in.
    return data.decode("utf-8", "surrogateescape")


def _parse_line(number: int, line: str) -> TrustedKey:
    match = LINE.fullmatch(line)
    if not match:
        raise _malformed_line(number, f'NAME namespaces="git",valid-after="YYYYMMDDHHMMSSZ" {KIND} KEY is wanted')
    options = (match["options"] or "").split(",")
    values = dict(option.split("=", 1) for option in options if option)
    if len(values) != len(options) and match["options"]:
        raise _malformed_line(number, "an option is there twice")
    after, before = (_time(number, values.get(name)) for name in ("valid-after", "valid-before"))
    if after and before and before <= after:
        raise _malformed_line(number, "valid-before is not after valid-after")
    public_key = _public_key(number, match["key"])
    return TrustedKey(fingerprint(public_key), public_key, after, before)


def _malformed_line(number: int, reason: str) -> RegistryError:
    return RegistryError(f"{TRUSTED}, line {number}, is malformed: {reason}")


def _time(number: int, quoted: str | None) -> datetime | None:
    if quoted is None:
        return None
    digits = quoted.strip('"Z')
    try:
        return datetime.strptime(digits, "%Y%m%d%H%M%S"[: len(digits) - 2]).replace(tzinfo=UTC)
    except ValueError:
        raise _malformed_line(number, f"{quoted} is no time") from None


def _public_key(number: int, text: str) -> "EllipticCurvePublicKey":
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(f"{KIND} {text}".encode())
    except (ValueError, NotImplementedError):  # the latter for a point in a form that OpenSSH does not write
        raise _malformed_line(number, "its key is damaged") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or openssh(key) != f"{KIND} {text}":
        raise _malformed_line(number, "its key is damaged")
    return key


def _close_lines(data: bytes, old: "EllipticCurvePublicKey", now: datetime) -> bytes:
    """The file with the key's lines that hold now or later ended now, and all else as it was, byte for byte."""
    lines = _text(data).split("\n")
    for index, line in enumerate(lines):
        match = LINE.fullmatch(line)
        key = _parse_line(index + 1, line) if match else None
        if match and key and key.public_key == old and (key.before is None or key.before > now):
            lines[index] = _end_line(line, match, key, now)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _end_line(line: str, match: re.Match[str], key: TrustedKey, now: datetime) -> str:
    # OpenSSH refuses an interval that does not last a second.
    end = max(now, key.after + timedelta(seconds=1)) if key.after else now
    kept = [
        option for option in (match["options"] or "").split(",") if option and not option.startswith("valid-before")
    ]
    options = ",".join([*kept, f'valid-before="{_stamp(end)}"'])
    if match["options"]:
        return line[: match.start("options")] + options + line[match.end("options") :]
    return line[: match.start("kind")] + options + " " + line[match.start("kind") :]


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y%m%d%H%M%SZ")
