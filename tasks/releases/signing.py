"""Signed JSON: the keys, the signature, and the newest pointer that was seen."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import BaseModel

from tasks.errors import ReleaseError, SettingsError, first_fault
from tasks.io import read_json, write_json

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what model-signing takes
SIGNATURE = "signature"

_Model = TypeVar("_Model", bound=BaseModel)


def canonical(content: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same content, the same bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Trust:
    """Whose signatures are accepted, and the key to sign with; all keys are PEM files."""

    public_keys: tuple[Path, ...] = ()  # with none, that of the signing key
    signing_key: Path | None = None
    passphrase: str | None = field(default=None, repr=False)
    seen_pointers: Path | None = None  # the number of moves of each champion pointer seen here

    @cached_property
    def known(self) -> dict[str, bytes]:
        """Accepted public keys in PEM by their fingerprint; empty where unsigned is allowed."""
        found = [public_pem(path) for path in self.public_keys]
        if not found and self.signing_key:
            found = [self._own_pem()]
        return {fingerprint(pem): pem for pem in found}

    def describe(self) -> str:
        """What is required of a release, in one sentence."""
        if not self.known:
            return "Signatures are not checked: no public key is configured."
        keys = ", ".join(map(short, self.known))
        return f"Signatures are checked against {len(self.known)} public key(s): {keys}."

    def check_signer(self) -> None:
        """Refuse, before anything is trained, what could not be signed in the end."""
        if not self.known:
            return
        if self.signing_key is None:
            raise SettingsError(
                "What is written must be signed, because public keys are configured, and there is "
                "no HANDSIGNS_SIGNING_KEY. Set it, or do this where the key is."
            )
        own = fingerprint(self._own_pem())
        if own not in self.known:
            raise SettingsError(
                f"The signing key {short(own)} of '{self.signing_key}' is none of those that are "
                "accepted. Add its public key to HANDSIGNS_PUBLIC_KEYS."
            )

    def sign(self, name: str, content: BaseModel) -> bytes:
        """Return the JSON of `content`, signed, where that is required, under this very name."""
        fields = content.model_dump(mode="json")
        self.check_signer()
        if self.signing_key:
            from model_signing import signing

            secret: Any = self._secret  # the library says text, and takes bytes only
            with _folder_with(name, fields) as folder:
                bundle = folder.with_name("bundle")
                signing.Config().use_elliptic_key_signer(
                    private_key=self.signing_key, password=secret
                ).sign(folder, bundle)
                fields[SIGNATURE] = json.loads(bundle.read_bytes())
        return canonical(fields) + b"\n"

    def read(self, kind: type[_Model], name: str, content: bytes, where: str) -> _Model:
        """Parse what `sign` returned; `ReleaseError` unless it is signed as required."""
        try:
            fields = json.loads(content)
            signature = fields.pop(SIGNATURE, None) if isinstance(fields, dict) else None
            parsed = kind.model_validate(fields)
        except (ValueError, RecursionError) as error:
            raise ReleaseError(f"{where} cannot be understood ({first_fault(error)}).") from None
        if not self.known:
            return parsed
        from cryptography.exceptions import InvalidSignature
        from model_signing import verifying

        if signature is None:
            raise ReleaseError(
                f"The signature is missing: {where} is not signed. Sign it with `handsigns keys "
                "sign` if you know where it comes from."
            )
        key = "unnamed"
        with suppress(LookupError, TypeError):
            key = str(signature["verificationMaterial"]["publicKey"]["hint"])
        if key not in self.known:
            raise ReleaseError(
                f"{where} is signed by a key that is not accepted: key {short(key)}. Add its "
                "public key to HANDSIGNS_PUBLIC_KEYS if you know whose it is."
            )
        try:
            with _folder_with(name, fields) as folder:
                public, bundle = folder.with_name("key"), folder.with_name("bundle")
                public.write_bytes(self.known[key])
                bundle.write_text(json.dumps(signature), encoding="utf-8")
                verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)
                verifier.verify(folder, bundle)
        except (InvalidSignature, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ReleaseError(
                f"The signature of {where} is damaged, forged, or of other content "
                f"({type(error).__name__}). Do not use it."
            ) from None
        return parsed

    def check_newest(self, place: str, moves: int) -> None:
        """Refuse a pointer with fewer moves than one seen before; its signature is still valid."""
        if not self.known or self.seen_pointers is None:
            return
        newest = _read_seen(self.seen_pointers).get(place, 0)
        if moves < newest:
            raise ReleaseError(
                f"The champion pointer {place} is older than one seen before: it has {moves} moves "
                f"and had {newest}. Find out who put it back; remove {self.seen_pointers} if that "
                "was right."
            )
        if moves > newest:
            self.seen_pointers.parent.mkdir(parents=True, exist_ok=True)
            # Others write too, and the slower must not take back what was seen.
            with FileLock(f"{self.seen_pointers}.lock"):
                seen = _read_seen(self.seen_pointers)
                write_json(self.seen_pointers, {**seen, place: max(moves, seen.get(place, moves))})

    @property
    def _secret(self) -> bytes | None:
        return self.passphrase.encode() if self.passphrase else None

    def _own_pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            content = Path(str(self.signing_key)).read_bytes()
            return _pem(load_pem_private_key(content, self._secret).public_key())
        except (OSError, TypeError, ValueError) as error:
            raise SettingsError(
                f"The signing key '{self.signing_key}' cannot be used ({_reason(error)}). Check "
                "HANDSIGNS_SIGNING_KEY and HANDSIGNS_SIGNING_PASSPHRASE."
            ) from None


UNSIGNED = Trust()  # nothing is signed, and nothing need be


def _read_seen(path: Path) -> dict[str, int]:
    """What was seen; a damaged file must not pass for an empty one."""
    if not path.exists():
        return {}
    seen = read_json(path)
    if not isinstance(seen, dict) or any(type(moves) is not int for moves in seen.values()):
        raise ReleaseError(
            f"The list of champion pointers seen here, {path}, cannot be read. Find out what "
            "damaged it, remove it, and run again."
        )
    return seen


@contextmanager
def _folder_with(name: str, fields: Any) -> Iterator[Path]:
    """A folder with one file, which is what the library signs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "signed"
        folder.mkdir()
        (folder / name).write_bytes(canonical(fields))
        yield folder


def new_keys(folder: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Make a private key, which only its owner can read, and its public key; both are new files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private, public = folder / "signing.pem", folder / "signing.pub.pem"
    if private.exists() or public.exists():
        raise SettingsError(
            f"A key must not be replaced: what it signed could not be checked any more. There is "
            f"one in '{folder}'; name another folder."
        )
    key, form = ec.generate_private_key(ec.SECP256R1()), serialization.PrivateFormat.PKCS8
    locked: Any = serialization.NoEncryption()
    if passphrase:
        locked = serialization.BestAvailableEncryption(passphrase.encode())
    secret = key.private_bytes(serialization.Encoding.PEM, form, locked)
    for path, content, mode in ((private, secret, 0o600), (public, _pem(key.public_key()), 0o644)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    return private, public


def public_pem(path: Path) -> bytes:
    """A public key's file in the one form that its fingerprint is taken of."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _pem(load_pem_public_key(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"The public key '{path}' cannot be read ({_reason(error)}). Check "
            "HANDSIGNS_PUBLIC_KEYS."
        ) from None


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a public key in hex, as model-signing names it in a signature."""
    return hashlib.sha256(pem).hexdigest()


def short(name: str) -> str:
    """The part of a fingerprint that people read."""
    return name[:16]


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    if getattr(getattr(key, "curve", None), "name", None) not in CURVES:
        raise SettingsError(
            f"A key must be on one of the curves {', '.join(CURVES)}. "
            "Make one with `handsigns keys new`."
        )
    pem: bytes = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, which may run over lines."""
    return (getattr(error, "strerror", None) or str(error)).split("\n")[0].split(". ")[0]
