"""ApiKeys: who may ask, by the keys in a file; only their hashes are kept in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from h1export import forms
from h1export.errors import H1ExportError, reason

NEXT = "give a text file with a key a line, each of 8 to 512 visible ASCII characters; # begins a comment"
LEAST_KEY, MOST_KEY = 8, 512
MOST_KEYS = 10_000


@dataclass(frozen=True)
class ApiKeys:
    """The keys of a file.

    Attributes:
        digests: The sha256 of each.
    """

    digests: frozenset[bytes]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a file with a key a line. Raises H1ExportError where it cannot be read, or has no keys or others."""
        try:
            text = forms.read_bytes(path).decode("ascii")
        except (OSError, ValueError) as error:
            raise H1ExportError(path, f"no keys can be read ({reason(error)})", NEXT) from None
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not 0 < len(keys) <= MOST_KEYS:
            raise H1ExportError(path, f"has {len(keys)} keys", NEXT)
        if not all(LEAST_KEY <= len(key) <= MOST_KEY and key.isprintable() and " " not in key for key in keys):
            raise H1ExportError(path, "has a line that is no key", NEXT)
        return cls(frozenset(_digest(key) for key in keys))

    def has(self, header: str | None) -> bool:
        """Return whether the value of the header Authorization has one of the keys."""
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip())
        matches = [compare_digest(given, digest) for digest in self.digests]  # all, so that the time tells nothing
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
