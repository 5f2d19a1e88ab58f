"""Keys of the local S3 server: generated once, kept in a file only its owner can read."""

import json
import os
import secrets
from pathlib import Path

from tasks.errors import SettingsError


def local_credentials(file: Path) -> tuple[str, str]:
    """Return the local access key id and secret, generated on first use.

    Args:
        file: JSON file with mode 0600; its folder is made when missing.

    Raises:
        SettingsError: others may read the file, or it holds no keys.
    """
    if not file.exists():
        _generate(file)
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise SettingsError(
            f"Local credentials must be readable by their owner only. Received: mode {mode:03o} "
            f"of {file}. Remove the file, and new ones are generated."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return str(content["access_key_id"]), str(content["secret_access_key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(
            f"Local credentials cannot be read. Received: {file}. "
            "Remove the file, and new ones are generated."
        ) from None


def _generate(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    content = {
        "access_key_id": "handsigns-" + secrets.token_hex(6),
        "secret_access_key": secrets.token_urlsafe(30),
    }
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(content, opened)
        # A link appears whole and never replaces what another run wrote first.
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink(missing_ok=True)
