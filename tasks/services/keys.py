"""The elliptic-curve keys that releases are signed with."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import SettingsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PRIVATE_KEY = "signing.pem"
PUBLIC_KEY = "signing.pub.pem"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""What model-signing takes."""


def new_keys(folder: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Make a key pair on the curve P-256; neither file may exist.

    Args:
        folder: takes both; made with mode 0700 when missing.
        passphrase: encrypts the private key.

    Returns:
        The private key, which only its owner can read, and the public key.

    Raises:
        SettingsError: one of the files exists.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private, public = folder / PRIVATE_KEY, folder / PUBLIC_KEY
    for path in (private, public):
        if path.exists():
            raise SettingsError(
                f"A key must not be replaced: what it signed could not be checked any more. "
                f"Received: '{path}', which exists. Name another folder."
            )
    key = ec.generate_private_key(ec.SECP256R1())
    for path, content, mode in (
        (private, _private_pem(key, passphrase), 0o600),
        (public, _pem(key.public_key()), 0o644),
    ):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(opened, "wb") as file:
            file.write(content)
    return private, public


def public_pem(path: Path) -> bytes:
    """A public key's file in the one form that its fingerprint is taken of.

    Raises:
        SettingsError: it cannot be read, or is of another kind.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"A public key cannot be read ({_reason(error)}). Received: '{path}'. "
            "Check HANDSIGNS_PUBLIC_KEYS."
        ) from None
    return _pem(key)


def public_pem_of(private: Path, passphrase: str | None) -> bytes:
    """The public half, in PEM, of a private key's file.

    Raises:
        SettingsError: it cannot be read, or is of another kind.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    secret = passphrase.encode() if passphrase else None
    try:
        key = load_pem_private_key(private.read_bytes(), secret)
    except (OSError, TypeError, ValueError) as error:
        raise SettingsError(
            f"The signing key cannot be used ({_reason(error)}). Received: '{private}'. "
            "Check HANDSIGNS_SIGNING_KEY and HANDSIGNS_SIGNING_PASSPHRASE."
        ) from None
    return _pem(key.public_key())


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a public key in hex, as model-signing names it in a signature."""
    return hashlib.sha256(pem).hexdigest()


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise SettingsError(
            f"A key must be on one of the curves {', '.join(CURVES)}. Received: another kind. "
            "Make one with `handsigns keys new`."
        )
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _private_pem(key: "EllipticCurvePrivateKey", passphrase: str | None) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode())
        if passphrase
        else serialization.NoEncryption(),
    )


def _reason(error: Exception) -> str:
    """Why a key cannot be read; a library's message may run over lines, or be long."""
    return (getattr(error, "strerror", None) or str(error)).split("\n")[0].split(". ")[0][:120]
