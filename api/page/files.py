"""The files of the page, read once, with the headers that keep strangers' text from running.

A model's answer, a device's name and an error are text of strangers. The page puts them into the
document as text. If it ever failed to, the browser would still run no script but the page's files.
"""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""No script, style or picture but the page's own, and no text that becomes a script."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Sent with every file. A browser asks each time whether its copy is still the newest."""

TYPES = {".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
"""Types that must not depend on the machine's own list."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    tag: str
    """Its ETag."""


def read_files() -> dict[str, PageFile]:
    """Read every file of the page, by its path below ``static``."""
    folder = Path(__file__).parent / "static"
    return {
        path.relative_to(folder).as_posix(): _read(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    media_type = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
