"""A signature holds for the key and the files that were signed, and for nothing else; openssl agrees."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_files import NESTED, build
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from odd_files import ODD, bounded

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.signature import SIGNATURE, sign, verify
from h1export.cli import run
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def write_keys(folder: Path, key: Private, name: str = "key") -> tuple[Path, Path]:
    private = folder / f"{name}.pem"
    public = folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, ed25519.Ed25519PrivateKey.generate())


def test_what_was_signed_is_verified_by_either_half_of_the_key(artifact: Artifact, keys: tuple[Path, Path]) -> None:
    sign(artifact.folder, keys[0])
    for key in keys:
        assert verify(artifact.folder, key).manifest == artifact.manifest


def test_keys_of_openssh(artifact: Artifact, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private = tmp_path / "id_ed25519"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    public = tmp_path / "id_ed25519.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b" me\n"
    )
    sign(artifact.folder, private)
    verify(artifact.folder, public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
def test_openssl_verifies_the_signature(artifact: Artifact, keys: tuple[Path, Path]) -> None:
    sign(artifact.folder, keys[0])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    done = subprocess.run(
        [*command, "-in", str(artifact.folder / MANIFEST), "-sigfile", str(artifact.folder / SIGNATURE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Signature Verified Successfully" in done.stdout


def edit_manifest(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["options"]["accuracy_level"] = 0
    (folder / MANIFEST).write_text(json.dumps(data))


def edit_file(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"grapH")


def swap_files(folder: Path) -> None:
    """Give two files of one size each other's content."""
    (folder / "model.onnx.data").write_bytes((folder / NESTED).read_bytes())


def link_elsewhere(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "kept")
    (folder / "model.onnx").symlink_to(folder.parent / "kept")


def link_folder(folder: Path) -> None:
    (folder / "model.mlpackage").rename(folder.parent / "package")
    (folder / "model.mlpackage").symlink_to(folder.parent / "package")


def add_inside(folder: Path) -> None:
    (folder / "model.mlpackage" / "Data" / "x.bin").write_bytes(b"")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest": (edit_manifest, "is not this key's signature"),
    "format": (lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b"\n"), "is not this"),
    "file": (edit_file, r"model\.onnx: was changed after the build"),
    "no signature": (lambda folder: (folder / SIGNATURE).unlink(), "is not signed"),
    "cut signature": (lambda folder: (folder / SIGNATURE).write_bytes(b"x" * 63), "is not this key's"),
    "empty signature": (lambda folder: (folder / SIGNATURE).write_bytes(b""), "is not this key's"),
    "another file": (lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"), "no file of the signed"),
    "long signature": (
        lambda folder: (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes() + b"x"),
        "has 65 bytes, and at most 64 are read",
    ),
    "swapped files": (swap_files, "was changed after the build"),
    "removed": (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx: is missing"),
    "longer": (lambda folder: (folder / "model.onnx").write_bytes(b"graphs"), "has 6 bytes, and the manifest says 5"),
    "a link to the same bytes": (link_elsewhere, "is not a plain file"),
    "a linked folder": (link_folder, "is not a plain file"),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), "no file of the signed"),
    "a hidden file": (lambda folder: (folder / ".x").write_bytes(b""), "no file of the signed"),
    "a file in a folder": (add_inside, "no file of the signed"),
    "another case": (lambda folder: (folder / "CONFIG.JSON").write_bytes(b"{}"), "no file of the signed"),
    "a link": (lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"), "no file of the signed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_it_was_signed(change: str, artifact: Artifact, keys: tuple[Path, Path]) -> None:
    sign(artifact.folder, keys[0])
    edit, said = CHANGES[change]
    edit(artifact.folder)
    with pytest.raises(H1ExportError, match=said):
        verify(artifact.folder, keys[1])


def test_another_key(artifact: Artifact, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(artifact.folder, keys[0])
    _, other = write_keys(tmp_path, ed25519.Ed25519PrivateKey.generate(), "other")
    with pytest.raises(H1ExportError, match="is not this key's signature"):
        verify(artifact.folder, other)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"-----BEGIN PRIVATE KEY-----\nx\n", b"ssh-ed25519 AAAA"])
def test_a_file_without_a_key(content: bytes, artifact: Artifact, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(artifact.folder, keys[0])
    place = tmp_path / "none.pem"
    place.write_bytes(content)
    for act in (sign, verify):
        with pytest.raises(H1ExportError, match=r"none\.pem: holds no (private|public) key"):
            act(artifact.folder, place)


@pytest.mark.parametrize("last", [byte for byte in range(128) if byte not in (110, 112)])
def test_a_key_that_says_it_is_another_algorithms(last: int, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Keys of 32 bytes under the identifiers 1.3.101.0 to 127: OpenSSL fails in its own way where 57 are expected."""
    content = base64.b64decode("".join(keys[0].read_text().splitlines()[1:-1]))
    body = base64.b64encode(content.replace(b"\x2b\x65\x70", bytes([0x2B, 0x65, last]))).decode()
    place = tmp_path / "other.pem"
    place.write_text(f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n")
    with pytest.raises(H1ExportError, match=r"other\.pem: holds no private key"):
        sign(tmp_path, place)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", ["key", "signature"])
def test_what_is_no_file_is_no_key_and_no_signature(
    place: str, odd: str, artifact: Artifact, keys: tuple[Path, Path], *, tmp_path: Path
) -> None:
    sign(artifact.folder, keys[0])
    where = tmp_path / "odd.pem" if place == "key" else artifact.folder / SIGNATURE
    where.unlink(missing_ok=True)
    ODD[odd](where)
    with bounded(), pytest.raises(H1ExportError):
        verify(artifact.folder, where if place == "key" else keys[1])
    if place == "key":
        with bounded(), pytest.raises(H1ExportError, match=r"odd\.pem: "):
            sign(artifact.folder, where)


def other_keys() -> dict[str, bytes]:
    """Return files with keys of other kinds, by their names."""
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    traditional = serialization.PrivateFormat.TraditionalOpenSSL
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    small, large = (rsa.generate_private_key(65537, size) for size in (1024, 2048))
    curve = ec.generate_private_key(ec.SECP256R1())
    exchange = x25519.X25519PrivateKey.generate()
    return {
        "rsa": large.private_bytes(pem, traditional, PLAIN),
        "rsa public": large.public_key().public_bytes(pem, public),
        "small rsa": small.private_bytes(pem, pkcs8, PLAIN),
        "curve": curve.private_bytes(pem, traditional, PLAIN),
        "exchange": exchange.private_bytes(pem, pkcs8, PLAIN),
        "ssh rsa": large.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
        "der": ed25519.Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.DER, pkcs8, PLAIN),
        "long": b"-----BEGIN PRIVATE KEY-----\n" + b"A" * 100_000 + b"\n-----END PRIVATE KEY-----\n",
        "two words": b"OPENSSH -----BEGIN PRIVATE KEY-----",
        "not text": bytes(range(256)),
    }


@pytest.mark.parametrize("kind", OTHER := other_keys())
def test_keys_of_other_kinds(kind: str, artifact: Artifact, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(artifact.folder, keys[0])
    place = tmp_path / "other.pem"
    place.write_bytes(OTHER[kind])
    for act in (sign, verify):
        with bounded(), pytest.raises(H1ExportError, match=r"other\.pem: ") as caught:
            act(artifact.folder, place)
        assert "\n" not in str(caught.value)


def test_the_signature_of_another_artifact(
    artifact: Artifact, keys: tuple[Path, Path], tmp_path: Path, config_of: Callable[..., FalconH1Config]
) -> None:
    other = build(tmp_path / "other", config_of())
    edit_manifest(other.folder)
    for folder in (artifact.folder, other.folder):
        sign(folder, keys[0])
    shutil.copy(other.folder / SIGNATURE, artifact.folder / SIGNATURE)
    with pytest.raises(H1ExportError, match="is not this key's signature"):
        verify(artifact.folder, keys[1])


def test_a_signature_that_is_not_canonical(artifact: Artifact, keys: tuple[Path, Path]) -> None:
    """The second half of a signature is below the order of the group, else there would be others for one text."""
    order = (1 << 252) + 27742317777372353535851937790883648493
    sign(artifact.folder, keys[0])
    place = artifact.folder / SIGNATURE
    whole = place.read_bytes()
    place.write_bytes(whole[:32] + (int.from_bytes(whole[32:], "little") + order).to_bytes(32, "little"))
    with pytest.raises(H1ExportError, match="is not this key's signature"):
        verify(artifact.folder, keys[1])


def test_keys_that_do_not_fit(artifact: Artifact, keys: tuple[Path, Path], tmp_path: Path) -> None:
    curve, _ = write_keys(tmp_path, ec.generate_private_key(ec.SECP256R1()), "curve")
    with pytest.raises(H1ExportError, match="another algorithm than Ed25519"):
        sign(artifact.folder, curve)
    locked = tmp_path / "locked.pem"
    secret = serialization.BestAvailableEncryption(b"x")
    locked.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret)
    )
    with pytest.raises(H1ExportError, match="is encrypted; decrypt it"):
        sign(artifact.folder, locked)
    with pytest.raises(H1ExportError, match="holds no private key"):
        sign(artifact.folder, keys[1])


def test_the_command_line(artifact: Artifact, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sign", str(artifact.folder), "--key", str(keys[0])]) == 0
    assert run(["verify", str(artifact.folder), "--key", str(keys[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"signed": True, "files": sorted(artifact.manifest.files)}
    edit_file(artifact.folder)
    assert run(["verify", str(artifact.folder), "--key", str(keys[1])]) == 2
    assert run(["sign", str(artifact.folder), "--key", str(keys[0])]) == 2  # nobody signs a damaged artifact
    assert capsys.readouterr().err.count("was changed after the build") == 2
