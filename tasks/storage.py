"""Objects in S3-compatible storage; the only module that touches boto3."""

import base64
import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import stamina

from tasks.addresses import S3Address, shown
from tasks.errors import ServiceError
from tasks.signature import UNSIGNED, Trust
from tasks.storage_errors import BUCKET, ChangedError, MissingObjectError, explain

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CONNECT_SECONDS = 3
READ_SECONDS = 8
ATTEMPTS = 3
"""Three attempts and their pauses end within 30 s, whatever the endpoint does."""
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Entry:
    """One object as a listing shows it; the etag changes when the content does."""

    key: str
    size: int
    etag: str = field(default="", compare=False)


class Storage:
    """One bucket.

    Args:
        address: endpoint, bucket and credentials.
        trust: whose signatures what is read from it must have, and how what is written
            to it is signed; kept here, so that no reader can forget to ask.

    Every method raises `ServiceError` in one line within 30 s when the service
    is unreachable, refuses the credentials or has no such bucket, and
    `ValueError` for a key that is not plain names joined by slashes.
    """

    def __init__(self, address: S3Address, trust: Trust = UNSIGNED) -> None:
        self.address = address
        self.trust = trust
        self._client = _client(address)

    def uri(self, key: str = "") -> str:
        """Return the `s3://` name of an object or a folder."""
        return f"s3://{self.address.bucket}/{key}"

    def check(self) -> None:
        """Raise `ServiceError` unless the bucket answers to the credentials."""
        self._call(lambda: self._client.head_bucket(Bucket=self.address.bucket), BUCKET)

    def check_conditions(self) -> None:
        """Raise `ServiceError` unless the endpoint honours conditional writes.

        Some S3-compatible services take `If-None-Match` and `If-Match` without a word
        and write all the same. The champion would then be whoever wrote last, so it is
        tried on an object of its own, which is removed again.
        """
        probe = f"probes/{uuid.uuid4().hex}"
        etag = self.put_if_absent(probe, b"first")
        try:
            honoured = {
                "If-None-Match": not self._takes(lambda: self.put_if_absent(probe, b"second")),
                "If-Match": self._takes(lambda: self.put_if_match(probe, b"third", etag))
                and not self._takes(lambda: self.put_if_match(probe, b"fourth", etag)),
            }
        finally:
            with contextlib.suppress(ServiceError):
                self._call(lambda: self._client.delete_object(**self._at(probe)), probe)
        if ignored := [header for header, holds in honoured.items() if not holds]:
            raise ServiceError(
                f"S3 at {shown(self.address.endpoint_url)} does not honour conditional writes, so "
                f"two promotions at once could undo each other. Received: {' and '.join(ignored)} "
                "without effect. Use a service, or a version of it, that keeps to them."
            )

    def exists(self, key: str) -> bool:
        """Tell whether the object is there."""
        try:
            self._call(lambda: self._client.head_object(**self._at(key)), key)
        except MissingObjectError:
            return False
        return True

    def list(self, prefix: str, most: int | None = None) -> Iterator[Entry]:
        """Yield the objects whose key starts with `prefix`, sorted by key, `most` at most."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.address.bucket,
            Prefix=prefix,
            PaginationConfig={"MaxItems": most} if most else {},
        )
        for page in self._whole(lambda: list(pages), prefix):
            for found in page.get("Contents", []):
                yield Entry(found["Key"], found["Size"], found.get("ETag", ""))

    def put(self, key: str, source: Path | bytes) -> None:
        """Write one object whole; the service checks its MD5 on arrival."""
        self._put(key, source)

    def put_if_absent(self, key: str, content: bytes) -> str:
        """Write the object unless one exists.

        Returns:
            The new object's etag.

        Raises:
            ChangedError: one exists.
        """
        return self._put(key, content, IfNoneMatch="*")

    def put_if_match(self, key: str, content: bytes, etag: str) -> str:
        """Replace the object if it still is the one that `etag` names.

        Returns:
            The new object's etag.

        Raises:
            ChangedError: it has been replaced or removed meanwhile.
        """
        return self._put(key, content, IfMatch=etag)

    def read(self, key: str) -> tuple[bytes, str]:
        """Return a small object's content and etag."""

        def fetch() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._at(key))
            return answer["Body"].read(), answer["ETag"]

        return self._whole(fetch, key)

    def read_start(self, key: str, limit: int) -> bytes:
        """Return at most `limit` first bytes of an object that others named.

        Args:
            key: as a listing gave it; any name without empty or dotted parts, which
                would lead to another place on the way to the service.
            limit: bytes.
        """
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise ValueError(
                f"An object's key must have no empty or dotted part. Received: {key!r}."
            )
        at: Any = {"Bucket": self.address.bucket, "Key": key}

        def fetch() -> bytes:
            return bytes(self._client.get_object(**at)["Body"].read(limit))

        return self._whole(fetch, key)

    def get(self, key: str) -> bytes:
        """Return a small object's content."""
        return self.read(key)[0]

    def digest(self, key: str) -> tuple[str, int]:
        """Read an object to its end and return its SHA-256 in hex and its size in bytes."""
        return self._whole(lambda: self._pour(key, None), key)

    def download(self, key: str, target: Path) -> tuple[str, int]:
        """Write an object to `target`, whole or not at all.

        Returns:
            SHA-256 in hex and size in bytes of what was written.
        """
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            result = self._whole(lambda: self._pour(key, part), key)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return result

    def _pour(self, key: str, target: Path | None) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        body = self._client.get_object(**self._at(key))["Body"]
        with target.open("wb") if target else contextlib.nullcontext() as file:
            for chunk in body.iter_chunks(1 << 20):
                digest.update(chunk)
                size += len(chunk)
                if file:
                    file.write(chunk)
        return digest.hexdigest(), size

    def _put(self, key: str, source: Path | bytes, **condition: Any) -> str:
        at = self._at(key)

        def send() -> str:
            with _opened(source) as body:
                answer = self._client.put_object(
                    **at, Body=body, ContentMD5=_md5(source), **condition
                )
            return answer["ETag"]

        try:
            return self._call(send, key)
        except ChangedError as error:
            # A write that arrived, but whose answer was lost, meets itself when repeated.
            if error.retried:
                content, etag = self.read(key)
                if content == source:
                    return etag
            raise

    def _takes(self, write: Callable[[], str]) -> bool:
        try:
            write()
        except ChangedError:
            return False
        return True

    def _whole(self, fetch: Callable[[], T], key: str) -> T:
        """Call `fetch`, again if the body breaks off; botocore repeats only requests."""
        from botocore.exceptions import IncompleteReadError, ResponseStreamingError
        from urllib3.exceptions import ProtocolError

        broken = (IncompleteReadError, ResponseStreamingError, ProtocolError)
        repeated = stamina.retry(on=broken, attempts=ATTEMPTS, timeout=READ_SECONDS)(fetch)
        return self._call(repeated, key)

    def _call(self, action: Callable[[], T], what: str) -> T:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )
        from urllib3.exceptions import HTTPError

        try:
            return action()
        except ClientError as error:
            raise explain(error.response, self.address, what) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise ServiceError(
                f"No S3 credentials were found for {shown(self.address.endpoint_url)}. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from None
        except (BotoCoreError, HTTPError) as error:
            # urllib3's own error comes from an answer that is not streamed and breaks off.
            raise ServiceError(
                f"S3 does not answer at {shown(self.address.endpoint_url)} "
                f"({type(error).__name__}). Check HANDSIGNS_S3_ENDPOINT_URL and the service."
            ) from None

    def _at(self, key: str) -> Any:
        return {"Bucket": self.address.bucket, "Key": check_key(key)}


def check_key(key: str) -> str:
    """Return `key`, or raise `ValueError` if it is not plain names joined by slashes."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(
            f"An object's key must be plain names joined by slashes. Received: {key!r}."
        )
    return key


def _client(address: S3Address) -> "S3Client":
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=address.endpoint_url,
        region_name=address.region,
        aws_access_key_id=address.access_key_id,
        aws_secret_access_key=address.secret_access_key,
        aws_session_token=address.session_token,
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            # The CRC trailers that botocore sends by default are unknown to some
            # S3-compatible services (boto3#4392); digests are compared by us.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
            # A proxy of the environment cannot reach this machine's own servers.
            proxies={} if urlsplit(address.endpoint_url).hostname in LOOPBACK else None,
        ),
    )


def _opened(source: Path | bytes) -> AbstractContextManager[Any]:
    return source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)


def _md5(source: Path | bytes) -> str:
    with _opened(source) as body:
        content = BytesIO(body) if isinstance(body, bytes) else body
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()
