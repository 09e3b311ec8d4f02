"""Signatures against real git, OpenSSH and model-signing: what they take, what they made, and every changed byte."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from flows.registry import keys, signing
from tasks.core import files
from tasks.core.errors import RegistryError

AT = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture(autouse=True)
def _far_away(own_git: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    monkeypatch.delenv(keys.VARIABLE, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A git repository that trusts its first key from AT on."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "gpg.ssh.allowedSignersFile", "deploy/trusted_keys")
    signer(tmp_path)
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    """A folder of three files, signed: the signature lies among them."""
    made = root / "decision"
    (made / "deep").mkdir(parents=True)
    (made / "card.md").write_text("card")
    (made / "deep/model.onnx").write_bytes(b"model")
    (made / ".gitignore").write_text("none")
    signer(root).sign_folder(made, made / "signature.json")
    return made


def git(root: Path, *args: str, data: bytes | None = None) -> bytes:
    return subprocess.run(["git", *args], cwd=root, input=data, check=True, capture_output=True).stdout


def signer(root: Path, now: datetime = AT) -> signing.Signer:
    return signing.signer(root, now, say=lambda _: None)


def payload(root: Path, at: datetime = AT, message: str = "Promote\n\nbecause it is good\n") -> bytes:
    tree = git(root, "hash-object", "-t", "tree", "-w", "--stdin", data=b"").decode().strip()
    who = f"Ada <ada@example.org> {int(at.timestamp())} +0530"
    return f"tree {tree}\nauthor {who}\ncommitter {who}\n\n{message}".encode()


def write(root: Path, raw: bytes) -> str:
    return git(root, "hash-object", "-t", "commit", "-w", "--stdin", data=raw).decode().strip()


def git_verifies(root: Path, raw: bytes) -> bool:
    command = ["git", "verify-commit", write(root, raw)]
    return subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0


def verify(root: Path, raw: bytes, at: datetime = AT) -> str:
    content, signature = signing.split_commit(raw)
    return signing.verify_commit(content, signature, keys.trusted_keys(root), at)


def with_public_key(path: Path) -> Path:
    """The private key with the public one beside it, without which ssh-keygen does not sign with a PEM key."""
    shown = subprocess.run(["ssh-keygen", "-y", "-f", path], check=True, capture_output=True)
    Path(f"{path}.pub").write_bytes(shown.stdout)
    return path


def by_ssh_keygen(root: Path, key: Path, *options: str, data: bytes) -> str:
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", key, *options]
    return subprocess.run(command, cwd=root, input=data, check=True, capture_output=True).stdout.decode()  # type: ignore[arg-type]


def flips(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        yield data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def armor(begin: str, blob: bytes, end: str) -> str:
    return "\n".join([begin, base64.b64encode(blob).decode(), end, ""])


def digests(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "signature.json")
    return {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}


def test_git_takes_the_signature_of_a_commit(root: Path) -> None:
    made = signer(root)
    content = payload(root)
    raw = signing.join_commit(content, made.sign_commit(content))
    assert git_verifies(root, raw)
    assert verify(root, raw) == made.fingerprint
    shown = git(root, "log", "--show-signature", write(root, raw)).decode()
    assert f'Good "git" signature for weighin with ECDSA key {made.fingerprint}' in shown


def test_signatures_of_git_are_taken(root: Path) -> None:
    key = with_public_key(root / keys.LOCAL)
    for settings, message in (
        ([], "short"),
        (["-c", "i18n.commitEncoding=latin1"], "two\n\nparagraphs\n\n gpgsig and more"),
    ):
        ssh = ["-c", "gpg.format=ssh", "-c", f"user.signingKey={key}", "-c", "user.name=A", "-c", "user.email=a@b"]
        git(root, *ssh, *settings, "commit", "-S", "--quiet", "--allow-empty", "-m", message)
        raw = git(root, "cat-file", "commit", "HEAD")
        content, signature = signing.split_commit(raw)
        assert signature is not None
        assert verify(root, raw) == signer(root).fingerprint
        assert signing.join_commit(content, signature) == raw
        assert git_verifies(root, signing.join_commit(content, signer(root).sign_commit(content)))


def test_both_hashes_of_openssh_are_taken(root: Path) -> None:
    key = with_public_key(root / keys.LOCAL)
    for algorithm in ("sha256", "sha512"):
        signature = by_ssh_keygen(root, key, "-n", "git", "-O", f"hashalg={algorithm}", data=payload(root))
        assert verify(root, signing.join_commit(payload(root), signature)) == signer(root).fingerprint


@pytest.mark.parametrize("message", ["", "x", "a\n\nb\n", "\n\n", " gpgsig\ngpgsig -\n"])
def test_splitting_undoes_joining(root: Path, message: str) -> None:
    content = payload(root, message=message)
    signature = signer(root).sign_commit(content)
    assert signing.split_commit(content) == (content, None)
    assert signing.split_commit(signing.join_commit(content, signature)) == (content, signature)


def test_every_changed_byte_is_found(root: Path) -> None:
    content = payload(root)
    signature = signer(root).sign_commit(content)
    trusted = keys.trusted_keys(root)
    for changed in flips(content):
        with pytest.raises(RegistryError, match="does not fit the commit's content"):
            signing.verify_commit(changed, signature, trusted, AT)
    for changed in flips(signature.encode()):
        with pytest.raises(RegistryError):
            signing.verify_commit(content, changed.decode(), trusted, AT)
    assert not git_verifies(root, signing.join_commit(content.replace(b"good", b"food"), signature))


def test_every_changed_byte_under_the_armor_is_found(root: Path) -> None:
    content = payload(root)
    begin, *lines, end, _ = signer(root).sign_commit(content).split("\n")
    trusted = keys.trusted_keys(root)
    blob = base64.b64decode("".join(lines))
    assert signing.verify_commit(content, armor(begin, blob, end), trusted, AT)
    for changed in (*flips(blob), blob + b"\0", blob + bytes(4), blob[:-1], blob[:20], blob[:10], b""):
        with pytest.raises(RegistryError):
            signing.verify_commit(content, armor(begin, changed, end), trusted, AT)


def test_bits_that_base64_passes_over_are_found(root: Path) -> None:
    content = payload(root)
    signature = next(text for text in (signer(root).sign_commit(content) for _ in range(999)) if "=\n---" in text)
    last = signature[signature.index("=") - 1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature.replace(f"{last}=", f"{alphabet[alphabet.index(last) + 1]}=")
    with pytest.raises(RegistryError, match="is damaged"):
        signing.verify_commit(content, other, keys.trusted_keys(root), AT)


def test_a_changed_trusted_key_is_found(root: Path) -> None:
    content = payload(root)
    signature = signer(root).sign_commit(content)
    path = root / keys.TRUSTED
    lines = path.read_bytes()
    start = lines.index(b"AAAA")
    for index, changed in enumerate(flips(lines)):
        if start <= index < start + 139:  # the key's characters but the padding
            path.write_bytes(changed)
            with pytest.raises(RegistryError):
                signing.verify_commit(content, signature, keys.trusted_keys(root), AT)


def test_what_is_wrong_with_a_commit_is_told(root: Path) -> None:
    content = payload(root)
    with pytest.raises(RegistryError, match=r"^the commit is not signed$"):
        verify(root, content)
    for kind in ("ecdsa", "ed25519"):
        other = root / kind
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", other], check=True)
        shown = subprocess.run(["ssh-keygen", "-lf", other], check=True, capture_output=True, text=True)
        name = shown.stdout.split()[1].replace("+", r"\+")
        raw = signing.join_commit(content, by_ssh_keygen(root, other, "-n", "git", data=content))
        with pytest.raises(RegistryError, match=rf"^the commit is signed by the unknown key {name}: it is not in"):
            verify(root, raw)
    for_files = by_ssh_keygen(root, with_public_key(root / keys.LOCAL), "-n", "file", data=content)
    with pytest.raises(RegistryError, match=r"made for another use than git"):
        verify(root, signing.join_commit(content, for_files))
    for text in ("", "\n", "-----BEGIN PGP SIGNATURE-----\n\nabc=\n-----END PGP SIGNATURE-----\n"):
        with pytest.raises(RegistryError, match=r"not an SSH signature, or is damaged"):
            signing.verify_commit(content, text, keys.trusted_keys(root), AT)


def test_a_second_signature_is_refused(root: Path) -> None:
    content = payload(root)
    raw = signing.join_commit(content, signer(root).sign_commit(content))
    with pytest.raises(RegistryError, match="more than one signature"):
        signing.split_commit(signing.join_commit(raw, signer(root).sign_commit(raw)))
    with pytest.raises(RegistryError, match="of a kind that is not known here"):
        signing.split_commit(raw.replace(b"\ngpgsig ", b"\ngpgsig-sha256 "))


def test_rotation_keeps_what_was_signed_and_refuses_the_old_key_later(root: Path) -> None:
    old = signer(root)
    now = AT + 60 * SECOND

    def by_old(at: datetime) -> bytes:
        return signing.join_commit(payload(root, at), old.sign_commit(payload(root, at)))

    cases = {offset: by_old(AT + offset * SECOND) for offset in (-1, 0, 60, 61)}
    assert [git_verifies(root, raw) for raw in cases.values()] == [False, True, True, True]
    keys.rotate(root, now)
    new = signer(root, now)
    assert new.fingerprint != old.fingerprint
    for offset, raw in cases.items():
        trusted = 0 <= offset <= 60
        assert git_verifies(root, raw) == trusted
        if trusted:
            assert verify(root, raw, AT + offset * SECOND) == old.fingerprint
        else:
            with pytest.raises(RegistryError, match=r"which was not valid at 2026-03-01T1\d:\d\d:\d\d\+0000"):
                verify(root, raw, AT + offset * SECOND)
    raw = signing.join_commit(payload(root, now), new.sign_commit(payload(root, now)))
    assert git_verifies(root, raw)
    assert verify(root, raw, now) == new.fingerprint


def by_model_signing(folder: Path, public_key: ec.EllipticCurvePublicKey) -> bool:
    """What model-signing's own verifier says, with no file of the folder left out but the signature."""
    from model_signing import hashing, verifying

    pem = folder.parent / "public.pem"
    pem.write_bytes(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    config = hashing.Config().set_ignored_paths(paths=["signature.json"], ignore_git_paths=False)  # type: ignore[no-untyped-call]
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=pem).set_hashing_config(config)  # type: ignore[no-untyped-call]
    try:
        verifier.verify(folder, folder / "signature.json")
    except Exception:  # whatever it raises
        return False
    return True


def agree(folder: Path, public_key: ec.EllipticCurvePublicKey) -> str | None:
    """What is wrong with the folder, by its files and by given digests alike; model-signing says yes or no as well."""
    words: list[str | None] = []
    for check in (
        lambda: signing.verify_folder(folder, folder / "signature.json", public_key),
        lambda: signing.verify_manifest(folder / "signature.json", digests(folder), public_key),
    ):
        try:
            check()  # type: ignore[no-untyped-call]
            words.append(None)
        except RegistryError as error:
            words.append(str(error))
    assert words[0] == words[1]
    assert by_model_signing(folder, public_key) == (words[0] is None)
    return words[0]


def test_model_signings_command_takes_the_signature(root: Path, folder: Path) -> None:
    (folder / ".gitignore").unlink()  # the command leaves it out, if not told otherwise
    made = signer(root)
    made.sign_folder(folder, folder / "signature.json")
    public = root / "public.pem"
    public.write_bytes(made.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    command = [Path(sys.executable).parent / "model_signing", "verify", "key", folder]
    command += ["--signature", folder / "signature.json", "--public_key", public]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n")


def test_a_signed_folder_verifies_wherever_it_lies(root: Path, folder: Path) -> None:
    key = signer(root).public_key
    assert agree(folder, key) is None
    assert agree(folder.rename(root / "elsewhere"), key) is None
    signer(root).sign_folder(root / "elsewhere", root / "elsewhere/signature.json")  # over the one that lies there
    assert agree(root / "elsewhere", key) is None


def test_paths_may_be_of_both_kinds(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    made = signer(root)
    made.sign_folder(Path("decision"), folder / "signature.json")
    signing.verify_folder(folder, Path("decision/signature.json"), made.public_key)
    made.sign_folder(folder, Path("decision/signature.json"))
    assert agree(folder, made.public_key) is None


def test_the_signature_may_lie_outside(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (folder / "signature.json").unlink()
    made = signer(root)
    made.sign_folder(Path("decision"), Path("outside.json"))
    signing.verify_folder(folder, root / "outside.json", made.public_key)
    (folder / "outside.json").write_text("extra")
    with pytest.raises(RegistryError, match=r": extra: outside\.json$"):
        signing.verify_folder(folder, root / "outside.json", made.public_key)


def test_files_that_differ_are_named(root: Path, folder: Path) -> None:
    key = signer(root).public_key
    told = f"the files are not those that key {keys.fingerprint(key)} signed in {folder}/signature.json: "
    (folder / "deep/model.onnx").write_bytes(b"Model")
    assert agree(folder, key) == f"{told}differ: deep/model.onnx"
    (folder / "deep/model.onnx").write_bytes(b"model")
    (folder / ".gitignore").write_text("all")
    assert agree(folder, key) == f"{told}differ: .gitignore"
    (folder / ".gitignore").rename(folder / ".gitattributes")
    assert agree(folder, key) == f"{told}missing: .gitignore; extra: .gitattributes"
    (folder / "card.md").unlink()
    (folder / "deep/model.onnx").write_bytes(b"")
    (folder / "a").write_text("card")
    assert agree(folder, key) == (
        f"{told}differ: deep/model.onnx; missing: .gitignore, card.md; extra: .gitattributes, a"
    )


def test_another_key_or_no_signature_is_told(root: Path, folder: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    told = agree(folder, other)
    assert told is not None
    assert told.startswith(
        f"{folder}/signature.json is no signature of files by key {keys.fingerprint(other)}: Key mis"
    )
    (folder / "signature.json").unlink()
    assert agree(folder, other) == f"{folder}/signature.json is missing, so its files are not signed"


def test_a_changed_statement_or_signature_is_found(root: Path, folder: Path) -> None:
    key = signer(root).public_key
    path = folder / "signature.json"
    bundle = json.loads(path.read_text())
    envelope = bundle["dsseEnvelope"]
    told = f"the signature by key {keys.fingerprint(key)} in {path} does not fit its content"
    statement = base64.b64decode(envelope["payload"])
    good = envelope["payload"]
    for changed in (statement.replace(b"card.md", b"cars.md"), statement + b" ", next(flips(statement))):
        envelope["payload"] = base64.b64encode(changed).decode()
        path.write_text(json.dumps(bundle))
        assert agree(folder, key) == told
    envelope["payload"] = good
    number = base64.b64decode(envelope["signatures"][0]["sig"])
    envelope["signatures"][0]["sig"] = base64.b64encode(number[:-1] + bytes([number[-1] ^ 1])).decode()
    path.write_text(json.dumps(bundle))
    assert agree(folder, key) == told


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b"null", b'{"verificationMaterial": []}', b"[" * 100_000, b'{"mediaType": "x"}'],
)
def test_a_file_that_is_no_signature_is_told(root: Path, folder: Path, content: bytes) -> None:
    (folder / "signature.json").write_bytes(content)
    told = agree(folder, signer(root).public_key)
    assert told is not None
    assert told.startswith(f"{folder}/signature.json is no signature of files by key SHA256:")
    assert "\n" not in told


def test_a_bundle_of_another_kind_is_told(root: Path, folder: Path) -> None:
    path = folder / "signature.json"
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"] = {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}}
    path.write_text(json.dumps(bundle))
    told = agree(folder, signer(root).public_key)
    assert told is not None
    assert "is no signature of files by key" in told


@pytest.mark.parametrize("gone", ["verificationMaterial", "dsseEnvelope", "mediaType", "signatures", "publicKey"])
def test_a_bundle_that_lacks_a_part_is_told(root: Path, folder: Path, gone: str) -> None:
    path = folder / "signature.json"
    bundle = json.loads(path.read_text())
    for part in (bundle, bundle["dsseEnvelope"], bundle["verificationMaterial"]):
        part.pop(gone, None)
    path.write_text(json.dumps(bundle))
    told = agree(folder, signer(root).public_key)
    assert told is not None
    assert "is no signature of files by key" in told


def test_a_folder_with_a_link_is_not_signed(root: Path, folder: Path) -> None:
    (folder / "link").symlink_to(folder / "card.md")
    with pytest.raises(RegistryError, match=r"cannot be signed: .*link"):
        signer(root).sign_folder(folder, folder / "signature.json")
    with pytest.raises(RegistryError, match=r"cannot be verified: .*link"):
        signing.verify_folder(folder, folder / "signature.json", signer(root).public_key)
