"""Objects in S3-compatible storage; the only module that touches boto3."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import stamina

from tasks.errors import ServiceError
from tasks.services.addresses import LOOPBACK, S3Address, check_key, shown
from tasks.services.deadline import SECONDS, Deadline, allow, heed_deadlines
from tasks.services.sending import Sent, md5, opened, size_of
from tasks.services.signature import UNSIGNED, Trust
from tasks.services.storage_errors import BUCKET, ChangedError, explain

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")
CONNECT_SECONDS = 3
READ_SECONDS = 8
ATTEMPTS = 3
PIECE = 256 << 10
PAGE = 1 << 20
"""Bytes that a page of a listing stands for where time is measured out."""


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
        seconds: longest time for one question, besides that for the bytes it moves.

    Every method raises `ServiceError` in one line within 30 s, and a second more for
    each 128 KiB that were moved, when the service is unreachable, trickles, refuses the
    credentials or has no such bucket, and `ValueError` for a key that is not plain names
    joined by slashes.
    """

    def __init__(
        self, address: S3Address, trust: Trust = UNSIGNED, seconds: float = SECONDS
    ) -> None:
        self.address = address
        self.trust = trust
        self._seconds = seconds
        self._client = _client(address)

    def uri(self, key: str = "") -> str:
        """Return the `s3://` name of an object or a folder."""
        return f"s3://{self.address.bucket}/{key}"

    def check(self) -> None:
        """Raise `ServiceError` unless the bucket answers to the credentials."""
        self._call(lambda: self._client.head_bucket(Bucket=self.address.bucket), BUCKET)

    def list(self, prefix: str, most: int | None = None) -> Iterator[Entry]:
        """Yield the objects whose key starts with `prefix`, sorted by key, `most` at most."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.address.bucket,
            Prefix=prefix,
            PaginationConfig={"MaxItems": most} if most else {},
        )

        def fetch() -> list[Any]:
            found: list[Any] = []
            for page in pages:
                allow(PAGE)
                found.append(page)
            return found

        for page in self._whole(fetch, prefix):
            for found in page.get("Contents", []):
                yield Entry(found["Key"], found["Size"], found.get("ETag", ""))

    def remove(self, key: str) -> None:
        """Remove an object; one that is not there is none the worse."""
        self._call(lambda: self._client.delete_object(**self._at(key)), key)

    def put(self, key: str, source: Sent) -> None:
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
            return b"".join(_pieces(answer)), _etag(answer)

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
            start = b""
            for piece in _pieces(self._client.get_object(**at)):
                start += piece
                if len(start) >= limit:
                    break
            return start[:limit]

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
        answer = self._client.get_object(**self._at(key))
        with target.open("wb") if target else contextlib.nullcontext() as file:
            for piece in _pieces(answer):
                digest.update(piece)
                size += len(piece)
                if file:
                    file.write(piece)
        return digest.hexdigest(), size

    def _put(self, key: str, source: Sent, **condition: Any) -> str:
        at = self._at(key)

        def send() -> str:
            allow(size_of(source))
            with opened(source) as body:
                answer = self._client.put_object(
                    **at, Body=body, ContentMD5=md5(source), **condition
                )
            return _etag(answer)

        try:
            return self._call(send, key)
        except ChangedError as error:
            # A write that arrived, but whose answer was lost, meets itself when repeated.
            if error.retried:
                content, etag = self.read(key)
                if content == source:
                    return etag
            raise

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
            return self._in_time(action, what)
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

    def _in_time(self, action: Callable[[], T], what: str) -> T:
        deadline = Deadline(self._seconds)
        try:
            with deadline:
                return action()
        finally:
            if deadline.passed:  # what came through by then may look whole, and is not
                raise ServiceError(
                    f"S3 at {shown(self.address.endpoint_url)} takes too long. Received: "
                    f"{what} not through in {deadline.told}. Check the network and the service."
                ) from None

    def _at(self, key: str) -> Any:
        return {"Bucket": self.address.bucket, "Key": check_key(key)}


def _client(address: S3Address) -> "S3Client":
    import boto3
    from botocore.config import Config

    client = boto3.session.Session().client(
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
    # botocore has no setting for a deadline; its pools' classes are where one can be added.
    heed_deadlines(client._endpoint.http_session._pool_classes_by_scheme)  # type: ignore[attr-defined]
    return client


def _pieces(answer: Any) -> Iterator[bytes]:
    """The body of an answer; each piece that arrives gives time for the next."""
    _etag(answer)
    for piece in answer["Body"].iter_chunks(PIECE):
        allow(len(piece))
        yield piece


def _etag(answer: Any) -> str:
    """The object's etag; an answer without one broke off in its head and seems empty."""
    from botocore.exceptions import IncompleteReadError

    if "ETag" not in answer:
        raise IncompleteReadError(actual_bytes=0, expected_bytes=1)
    return str(answer["ETag"])
