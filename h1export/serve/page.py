"""The chat page at /: files of the package, which ask nobody but their own server."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from starlette.responses import Response

FOLDER = "chat"  # in the package's assets
# path -> (file, media type)
FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def responses() -> dict[str, Response]:
    """Return path -> the answer of each file of the page."""
    folder = files("h1export").joinpath("assets", FOLDER)
    return {
        path: Response(folder.joinpath(name).read_bytes(), headers={**HEADERS, "Content-Type": kind})
        for path, (name, kind) in FILES.items()
    }
