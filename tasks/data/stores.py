"""Small files by key, in a folder or below a prefix of a bucket."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tasks.io import atomic_write
from tasks.services.s3 import ChangedError, MissingObjectError, Storage


class Store(Protocol):
    """What a folder and a bucket have in common; every write is atomic."""

    def list(self, folder: str) -> Sequence[str]:
        """Keys of everything below a folder."""

    def get(self, key: str) -> bytes:
        """The content, or `MissingObjectError`."""

    def put(self, key: str, content: bytes) -> None:
        """Write or replace."""

    def put_if_absent(self, key: str, content: bytes) -> None:
        """Write, or raise `ChangedError` if the key exists."""

    def remove(self, key: str) -> None:
        """Remove, if it is there."""


@dataclass(frozen=True)
class FolderStore(Store):
    """Files below a folder."""

    root: Path

    def list(self, folder: str) -> Sequence[str]:
        # Hidden files and folders are being written.
        found = (path.relative_to(self.root) for path in (self.root / folder).rglob("*.*"))
        return [str(p) for p in found if not any(name.startswith(".") for name in p.parts)]

    def get(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            raise MissingObjectError(f"'{self.root / key}' does not exist.") from None

    def put(self, key: str, content: bytes) -> None:
        with atomic_write(self.root / key) as temporary:
            temporary.write_bytes(content)

    def put_if_absent(self, key: str, content: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".") as file:
            file.write(content)
            file.flush()
            try:
                os.link(file.name, path)
            except FileExistsError:
                raise ChangedError(f"'{path}' exists.") from None

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)


@dataclass(frozen=True)
class BucketStore(Store):
    """Objects of a bucket below a prefix, which is empty or ends with a slash."""

    storage: Storage
    prefix: str

    def list(self, folder: str) -> Sequence[str]:
        found = self.storage.list(f"{self.prefix}{folder}/")
        return [one.key.removeprefix(self.prefix) for one in found]

    def get(self, key: str) -> bytes:
        return self.storage.get(self.prefix + key)

    def put(self, key: str, content: bytes) -> None:
        self.storage.put(self.prefix + key, content)

    def put_if_absent(self, key: str, content: bytes) -> None:
        self.storage.put_if_absent(self.prefix + key, content)

    def remove(self, key: str) -> None:
        self.storage.remove(self.prefix + key)


def open_store(place: str, bucket: Callable[[str], Storage]) -> Store:
    """Open a folder or `s3://bucket/prefix`; a bucket must answer."""
    if not place.startswith("s3://"):
        return FolderStore(Path(place))
    name, _, prefix = place.removeprefix("s3://").partition("/")
    storage = bucket(name)
    storage.check()
    return BucketStore(storage, f"{prefix.strip('/')}/".lstrip("/"))
