"""Publish and fetch releases: complete or invisible, verified on every use.

Below `releases/<id>/` lie the files and, written last, `manifest.json`. See
`tasks.releases.manifest` for what it holds and where the id comes from.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import ReleaseError
from tasks.releases.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Digest,
    Manifest,
    check_id,
    compare_sizes,
    damaged,
    describe,
    parse,
    verify_folder,
)
from tasks.services.storage import Storage
from tasks.services.storage_errors import ChangedError, MissingObjectError


@dataclass(frozen=True)
class Release:
    """A release that was verified to the last byte.

    Args:
        id: 32 hex digits, derived from the files.
        uri: its `s3://` folder.
        manifest: digests and facts.
    """

    id: str
    uri: str
    manifest: Manifest = field(repr=False)


def publish(
    storage: Storage, files: Mapping[str, Path], facts: Mapping[str, Any] | None = None
) -> Release:
    """Upload a release whose manifest appears last, after every byte was read back.

    What is stored already and right is left alone, so a complete release is found
    and an incomplete or damaged one is mended.

    Args:
        storage: bucket that takes `releases/<id>/`.
        files: path by the plain name that the file gets in the release.
        facts: JSON values for people; they do not change the id.

    Returns:
        The release, whether it was uploaded or there already.

    Raises:
        ReleaseError: a file changes meanwhile, or the folder holds a foreign one.
        SettingsError: it must be signed and cannot be.
        ServiceError: the storage does not answer.
    """
    manifest = describe(files, facts).signed(storage.trust)
    stored = _stored(storage, manifest.id)
    if foreign := sorted(stored.keys() - manifest.files.keys() - {MANIFEST}):
        raise ReleaseError(
            f"A file was added to the release. Received: {_uri(storage, manifest.id)} with "
            f"{foreign}. Remove it, then run again."
        )
    for name in sorted(files):
        _upload(storage, _key(manifest.id, name), files[name], manifest.files[name])
    _put_manifest(storage, manifest, MANIFEST in stored)
    return Release(manifest.id, _uri(storage, manifest.id), _manifest(storage, manifest.id))


def verify(storage: Storage, release_id: str) -> Release:
    """Check the signature, read every byte of a release and compare it with the manifest.

    Raises:
        ReleaseError: anything is missing, added, or differs; the message says which.
        ServiceError: the storage does not answer.
    """
    manifest = _manifest(storage, release_id)
    for name, wanted in manifest.files.items():
        key = _key(release_id, name)
        if _digest(storage, key) != wanted:
            raise damaged(storage.uri(key))
    return Release(release_id, _uri(storage, release_id), manifest)


def fetch(storage: Storage, release_id: str, cache: Path) -> Path:
    """Return a local folder with the verified files of a release.

    What is there already is verified again, and fetched again if it is damaged.

    Args:
        storage: bucket that holds `releases/<id>/`.
        release_id: 32 hex digits.
        cache: takes one folder per release.

    Raises:
        ReleaseError: the stored release is missing, incomplete or damaged.
        ServiceError: the storage does not answer.
    """
    target = cache / check_id(release_id)
    if target.exists():
        try:
            verify_folder(target, release_id, storage.trust)
        except ReleaseError:
            shutil.rmtree(target)
        else:
            return target
    manifest = _manifest(storage, release_id)
    part = cache / f".{release_id}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name in manifest.files:
            storage.download(_key(release_id, name), part / name)
        (part / MANIFEST).write_bytes(manifest.to_bytes())
        verify_folder(part, release_id, storage.trust)
        try:
            part.replace(target)
        except OSError:  # another process may have fetched the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    verify_folder(target, release_id, storage.trust)
    return target


def sign_again(storage: Storage, release_id: str) -> None:
    """Replace a release's signature, whoever made it, by ours; every byte is read before.

    Raises:
        ReleaseError: the release is not what its manifest says.
        SettingsError: there is no usable signing key.
        ServiceError: the storage does not answer, or another writer came between.
    """
    anybody = Storage(storage.address)
    content, etag = anybody.read(_key(check_id(release_id), MANIFEST))
    manifest = verify(anybody, release_id).manifest
    if parse(content, release_id, _uri(storage, release_id), anybody.trust) == manifest:
        signed = manifest.signed(storage.trust)
        storage.put_if_match(_key(release_id, MANIFEST), signed.to_bytes(), etag)


def _upload(storage: Storage, key: str, source: Path, wanted: Digest) -> None:
    if _digest(storage, key) == wanted:
        return
    storage.put(key, source)
    if _digest(storage, key) != wanted:
        raise ReleaseError(
            f"An uploaded file came back different. Received: {storage.uri(key)} from {source}. "
            "Let nothing write to the file, check the storage, then run again."
        )


def _put_manifest(storage: Storage, manifest: Manifest, stored: bool) -> None:
    """Write the manifest; one that is there, of another run with the same files, stands.

    One that lacks our signature where it must have one is replaced.
    """
    key = _key(manifest.id, MANIFEST)
    if not stored:
        with contextlib.suppress(ChangedError):
            storage.put_if_absent(key, manifest.to_bytes())
    if manifest.signature is None:
        return
    content, etag = storage.read(key)
    try:
        parse(content, manifest.id, _uri(storage, manifest.id), storage.trust)
    except ReleaseError:
        with contextlib.suppress(ChangedError):
            storage.put_if_match(key, manifest.to_bytes(), etag)


def _manifest(storage: Storage, release_id: str) -> Manifest:
    stored = _stored(storage, check_id(release_id))
    where = _uri(storage, release_id)
    if MANIFEST not in stored:
        raise ReleaseError(f"There is no complete release. Received: {where}. Publish it first.")
    if stored.pop(MANIFEST) > MAX_MANIFEST_BYTES:
        raise ReleaseError(f"The manifest is too large to be one. Received: {where}{MANIFEST}.")
    manifest = parse(storage.get(_key(release_id, MANIFEST)), release_id, where, storage.trust)
    compare_sizes(manifest, stored, where)
    return manifest


def _stored(storage: Storage, release_id: str) -> dict[str, int]:
    prefix = _key(release_id, "")
    return {entry.key.removeprefix(prefix): entry.size for entry in storage.list(prefix)}


def _digest(storage: Storage, key: str) -> Digest | None:
    try:
        sha256, size = storage.digest(key)
    except MissingObjectError:
        return None
    return Digest(sha256=sha256, bytes=size)


def _key(release_id: str, name: str) -> str:
    return f"releases/{release_id}/{name}"


def _uri(storage: Storage, release_id: str) -> str:
    return storage.uri(_key(release_id, ""))
