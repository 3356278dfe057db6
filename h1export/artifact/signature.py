"""Signatures of artifacts: Ed25519 (RFC 8032) over the bytes of manifest.json, which lists the sha256 of every file.

A signature is 64 bytes in ``manifest.json.sig``, as ``openssl pkeyutl -verify -rawin`` reads it. Keys are those of
``openssl genpkey -algorithm ed25519`` and of ``ssh-keygen -t ed25519``.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from h1export import forms
from h1export.artifact.artifact import REPORT, Artifact
from h1export.artifact.files import PAGE, names
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.writing import write_into

SIGNATURE = f"{MANIFEST}.sig"
SIGNATURE_BYTES = 64
MOST_KEY = 4096  # bytes; a key of Ed25519 has some hundred, and what is longer is of another algorithm
UNSIGNED = frozenset({MANIFEST, SIGNATURE, REPORT, PAGE})  # nothing is decided by the last two
# InternalError comes from OpenSSL where a file names an algorithm whose keys have another length
UNREADABLE = (ValueError, UnsupportedAlgorithm, InternalError)
MAKE_KEY = "give a key that `openssl genpkey -algorithm ed25519` has made"


def sign(folder: Path, key: Path) -> None:
    """Sign the artifact in ``folder`` with the private key in the file ``key``; an older signature is replaced.

    Raises:
        H1ExportError: the artifact is damaged, or the file holds no private key of Ed25519.
    """
    private = _private(key)
    Artifact.open(folder).check_hashes()
    write_into(folder, SIGNATURE, private.sign(forms.content(folder / MANIFEST, MAKE_KEY)))


def verify(folder: Path, key: Path) -> Artifact:
    """Return the artifact in ``folder`` after a check that the owner of ``key`` has signed it, every file included.

    Args:
        folder: the artifact.
        key: a file with the public key, or with the private one.

    Raises:
        H1ExportError: there is no signature, it is another key's, a file was changed after it was signed, or there is a
            file that is not signed and is none of those that h1export writes for people.
    """
    public = _public(key)
    where = folder / SIGNATURE
    if not where.is_file():
        raise H1ExportError(folder, "is not signed", f"sign it with `h1export sign`, which writes {SIGNATURE}")
    signature = forms.content(where, "sign the artifact again", SIGNATURE_BYTES)
    signed = forms.content(folder / MANIFEST, "build the artifact again")
    try:
        public.verify(signature, signed)
    except InvalidSignature:
        what = "is not this key's signature of manifest.json"
        raise H1ExportError(where, what, "give the signer's key; if it is, the artifact was changed") from None
    artifact = Artifact.open(folder)
    if forms.content(folder / MANIFEST, "build the artifact again") != signed:
        raise H1ExportError(folder / MANIFEST, "was changed while it was verified", "let nothing write to the artifact")
    artifact.check_hashes()
    for name in names(folder):
        if name not in artifact.manifest.files and name not in UNSIGNED:
            raise H1ExportError(folder / name, "is no file of the signed artifact", "remove it")
    return artifact


def _private(file: Path) -> Ed25519PrivateKey:
    text = forms.content(file, MAKE_KEY, MOST_KEY)
    load = serialization.load_ssh_private_key if b"OPENSSH" in text else serialization.load_pem_private_key
    try:
        found = load(text, password=None)
    except TypeError:
        raise H1ExportError(file, "is encrypted", "decrypt it with `openssl pkey` first") from None
    except UNREADABLE:
        raise H1ExportError(file, "holds no private key", MAKE_KEY) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise _other_kind(file)
    return found


def _public(file: Path) -> Ed25519PublicKey:
    text = forms.content(file, MAKE_KEY, MOST_KEY)
    if b"PRIVATE KEY" in text:
        return _private(file).public_key()
    load = serialization.load_ssh_public_key if text.startswith(b"ssh-") else serialization.load_pem_public_key
    try:
        found = load(text)
    except UNREADABLE:
        raise H1ExportError(file, "holds no public key", "make one with `openssl pkey -pubout`") from None
    if not isinstance(found, Ed25519PublicKey):
        raise _other_kind(file)
    return found


def _other_kind(file: Path) -> H1ExportError:
    return H1ExportError(file, "is a key of another algorithm than Ed25519", MAKE_KEY)
