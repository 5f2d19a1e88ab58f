"""What is sent to storage: a file, or bytes at hand."""

import base64
import contextlib
import hashlib
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

Sent = Path | bytes


def opened(source: Sent) -> AbstractContextManager[Any]:
    """What an HTTP client takes as a body; it is closed after the block."""
    return source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)


def size_of(source: Sent) -> int:
    """Its bytes."""
    return source.stat().st_size if isinstance(source, Path) else len(source)


def md5(source: Sent) -> str:
    """Its MD5 in base64, for the service to compare on arrival."""
    with opened(source) as body:
        content = BytesIO(body) if isinstance(body, bytes) else body
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()
