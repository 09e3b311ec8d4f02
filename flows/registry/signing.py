"""Signatures: of git commits, as git's own by SSH, and of folders, as OpenSSF model-signing has them.

Both are made and verified in this process. A commit's is an SSHSIG (PROTOCOL.sshsig of OpenSSH) that `git
verify-commit` takes; a folder's is a Sigstore bundle with an in-toto statement that `model_signing verify key` takes.
What does not verify is a `RegistryError`.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.registry import keys
from tasks.core import files
from tasks.core.errors import RegistryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from model_signing.hashing import Config

MAGIC = b"SSHSIG"
VERSION = (1).to_bytes(4, "big")
NAMESPACE = b"git"
HASHES = (b"sha512", b"sha256")  # the first is what ssh-keygen takes by default
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"


@dataclass(frozen=True, repr=False)
class Signer:
    """What signs the registry's decisions."""

    _key: keys.PrivateKey

    @property
    def public_key(self) -> "EllipticCurvePublicKey":
        return self._key.public_key

    @property
    def fingerprint(self) -> str:
        return keys.fingerprint(self.public_key)

    def sign_commit(self, payload: bytes) -> str:
        """The armored SSH signature of a commit object that has none yet; ends with a line end."""
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        pair = decode_dss_signature(self._key.sign(_signed_blob(payload, HASHES[0])))
        inner = _pack(keys.KIND.encode(), _pack(*(_mpint(number) for number in pair)))
        blob = MAGIC + VERSION + _pack(keys.blob(self.public_key), NAMESPACE, b"", HASHES[0], inner)
        return "\n".join([BEGIN, *re.findall(".{1,70}", base64.b64encode(blob).decode()), END, ""])

    def sign_folder(self, folder: Path, signature: Path) -> None:
        """Write the signature of every file in the folder, but of itself; `RegistryError` if it has a link."""
        config = self._key.folder_signing().set_hashing_config(_hashing(signature))
        with files.replacing(signature) as (temporary,):
            try:
                config.sign(folder.resolve(), temporary)
            except ValueError as error:
                raise RegistryError(f"{folder} cannot be signed: {error}") from None


def signer(root: Path, now: datetime, say: Callable[[str], None] = print, first: bool = True) -> Signer:
    """The signer of the repository at `root`: see `keys.current`, which finds its key or makes it."""
    return Signer(keys.current(root, now, say, first))


def verify_commit(payload: bytes, signature: str | None, trusted: Iterable[keys.TrustedKey], at: datetime) -> str:
    """The fingerprint of the trusted key that signed the commit, made at that time.

    `RegistryError` if it is not signed, if the key is unknown or was not valid then, or if the signature does not
    fit the content.
    """
    if signature is None:
        raise RegistryError("the commit is not signed")
    blob, algorithm, numbers = _parse_signature(signature)
    name = keys.blob_fingerprint(blob)
    known = tuple(key for key in trusted if key.fingerprint == name)
    if not known:
        raise RegistryError(f"the commit is signed by the unknown key {name}: it is not in {keys.TRUSTED}")
    if not _fits(known[0].public_key, _signed_blob(payload, algorithm), numbers):
        raise RegistryError(f"the signature by key {name} does not fit the commit's content")
    if not keys.is_trusted(known, known[0].public_key, at):
        raise RegistryError(f"the commit is signed by key {name}, which was not valid at {at:%Y-%m-%dT%H:%M:%S%z}")
    return name


def split_commit(raw: bytes) -> tuple[bytes, str | None]:
    """A commit object's payload, that is without signature, and the signature if it has one.

    `RegistryError` if it has more than one: git would check one of them only.
    """
    head, gap, message = raw.partition(b"\n\n")
    kept: list[bytes] = []
    found: list[list[bytes]] = []
    signing = False
    for line in head.split(b"\n"):
        if line.startswith(b"gpgsig"):
            found.append([line.partition(b" ")[2]])
            if not line.startswith(b"gpgsig "):
                raise RegistryError("the commit has a signature of a kind that is not known here")
        elif signing and line.startswith(b" "):
            found[-1].append(line[1:])
            continue
        else:
            kept.append(line)
        signing = line.startswith(b"gpgsig")
    if len(found) > 1:
        raise RegistryError("the commit has more than one signature")
    text = "".join(line.decode("utf-8", "surrogateescape") + "\n" for lines in found for line in lines)
    return b"\n".join(kept) + gap + message, text or None


def join_commit(payload: bytes, signature: str) -> bytes:
    """The commit object with the signature as last header, where git puts it: `split_commit` undone."""
    head, gap, message = payload.partition(b"\n\n")
    lines = signature.removesuffix("\n").encode("utf-8", "surrogateescape").replace(b"\n", b"\n ")
    return head + b"\ngpgsig " + lines + gap + message


def verify_folder(folder: Path, signature: Path, public_key: "EllipticCurvePublicKey") -> None:
    """Verify that the key signed exactly the files that the folder has now, the signature itself left out.

    `RegistryError` if not, naming the files that differ, are missing or are extra.
    """
    try:
        found = _hashing(signature).hash(folder.resolve()).resource_descriptors()
    except ValueError as error:
        raise RegistryError(f"{folder} cannot be verified: {error}") from None
    verify_manifest(signature, {item.identifier: item.digest.digest_hex for item in found}, public_key)


def verify_manifest(signature: Path, digests: dict[str, str], public_key: "EllipticCurvePublicKey") -> None:
    """Verify that the key signed exactly these files: SHA-256 (hexadecimal) by path in the folder, with slashes.

    No file but the signature is read. `RegistryError` as in `verify_folder`.
    """
    name = keys.fingerprint(public_key)
    signed = {item.identifier: item.digest for item in _signed_manifest(signature, public_key).resource_descriptors()}
    differing = (
        path
        for path in signed.keys() & digests.keys()
        if (signed[path].algorithm, signed[path].digest_hex) != ("sha256", digests[path])
    )
    wrong = {
        "differ": sorted(differing),
        "missing": sorted(signed.keys() - digests.keys()),
        "extra": sorted(digests.keys() - signed.keys()),
    }
    if any(wrong.values()):
        words = "; ".join(f"{kind}: {', '.join(paths)}" for kind, paths in wrong.items() if paths)
        raise RegistryError(f"the files are not those that key {name} signed in {signature}: {words}")


def _signed_manifest(signature: Path, public_key: "EllipticCurvePublicKey") -> Any:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from model_signing._signing import sign_ec_key, sign_sigstore_pb

    name = keys.fingerprint(public_key)
    try:
        with keys.as_path(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)) as path:
            verifier = sign_ec_key.Verifier(path)
        return verifier.verify(sign_sigstore_pb.Signature.read(signature))
    except FileNotFoundError:
        raise RegistryError(f"{signature} is missing, so its files are not signed") from None
    except InvalidSignature:
        raise RegistryError(f"the signature by key {name} in {signature} does not fit its content") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # The bundle may be anything at all; model-signing stumbles over it in these ways.
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise RegistryError(f"{signature} is no signature of files by key {name}: {words.strip()}") from None


def _hashing(signature: Path) -> "Config":
    """How model-signing hashes the files of a folder: all but the signature."""
    from model_signing.hashing import Config

    # By default model-signing would leave out .gitignore, .github and the like, which then could be changed.
    beside = signature.parent.resolve() / signature.name
    config = Config()  # type: ignore[no-untyped-call]
    return config.set_ignored_paths(paths=[beside], ignore_git_paths=False)


def _signed_blob(payload: bytes, algorithm: bytes) -> bytes:
    digest = hashlib.new(algorithm.decode(), payload).digest()
    return MAGIC + _pack(NAMESPACE, b"", algorithm, digest)


def _parse_signature(signature: str) -> tuple[bytes, bytes, bytes]:
    """The public key, the hash's name and the key's own signature in an SSH signature."""
    lines = signature.removesuffix("\n").split("\n")
    text = "".join(lines[1:-1])
    try:
        blob = base64.b64decode(text, validate=True)
        if (lines[0], lines[-1]) != (BEGIN, END) or base64.b64encode(blob).decode() != text:
            raise ValueError("armor")
        if not blob.startswith(MAGIC + VERSION):
            raise ValueError("preamble")
        public, namespace, reserved, algorithm, inner = _unpack(blob[len(MAGIC + VERSION) :])
        if reserved or algorithm not in HASHES:
            raise ValueError("fields")
    except ValueError:
        raise RegistryError("the commit's signature is not an SSH signature, or is damaged") from None
    if namespace != NAMESPACE:
        raise RegistryError("the commit's signature was made for another use than git")
    return public, algorithm, inner


def _fits(public_key: "EllipticCurvePublicKey", data: bytes, inner: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        _, pair = _unpack(inner)
        r, s = (int.from_bytes(part, "big") for part in _unpack(pair))
        if inner != _pack(keys.KIND.encode(), _pack(_mpint(r), _mpint(s))):
            return False
        public_key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _pack(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _unpack(data: bytes) -> list[bytes]:
    parts = []
    while data:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 + length:
            raise ValueError("cut off")
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


def _mpint(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "big")
