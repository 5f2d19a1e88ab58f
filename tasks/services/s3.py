"""S3-compatible object storage."""

import base64
import contextlib
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import stamina

from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.io import atomic_write
from tasks.releases.signing import UNSIGNED, Trust

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_SECONDS = 3
READ_SECONDS = 8
ATTEMPTS = 3
"""For every call. Three that hang take 24 s and their pauses, 30 s at most."""
CHUNK = 256 << 10

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_BUCKET = "(bucket)"
"""Stands for the key in questions about the bucket itself."""
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""Refusals of credentials that come with status 400."""
_FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull")

T = TypeVar("T")


def redact_url(url: str) -> str:
    """Return scheme, host, port and path of a URL, without user, password and query."""
    # Up to the last @, as a password may hold unquoted slashes and the like.
    return re.sub(r"[?#].*$", "", re.sub(r"^([^:/]*:?//).*@", r"\1", url, flags=re.S), flags=re.S)


@dataclass(frozen=True)
class S3Address:
    """Where objects go and with which credentials; secrets never print.

    Args:
        endpoint_url: `http(s)://host:port` of the service.
        bucket: bucket that must exist.
        region: name that the signature carries.
        access_key_id: None leaves the search for credentials to boto3's chain.
    """

    endpoint_url: str
    bucket: str
    region: str = "us-east-1"
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    def environment(self) -> dict[str, str]:
        """The usual AWS variables, for tools that read only those."""
        known = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint_url,  # MLflow would prefer another project's
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
        }
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing; the etag changes when the content does."""

    key: str
    size: int
    etag: str = field(default="", compare=False)


class ChangedError(HandsignsError):
    """A conditional write found another object than the one expected."""


class MissingObjectError(HandsignsError):
    """The object does not exist."""


class Storage:
    """One bucket.

    Args:
        address: endpoint, bucket and credentials.
        trust: signatures required of what is read, and the key for what is written; kept
            here so that no reader can forget to check.
        read_seconds: longest silence of the service within one attempt.

    Every call is tried three times where the failure may pass. A service that does not
    answer is reported within 30 s. Every method raises `ServiceError` in one line when the
    service is unreachable, refuses the credentials or has no such bucket, and `ValueError`
    for a key that is not plain names joined by slashes.
    """

    def __init__(
        self, address: S3Address, trust: Trust = UNSIGNED, read_seconds: float = READ_SECONDS
    ) -> None:
        self.address = address
        self.trust = trust
        self._client = _client(address, read_seconds)

    def uri(self, key: str = "") -> str:
        """The `s3://` name of an object or a folder."""
        return f"s3://{self.address.bucket}/{key}"

    def check(self) -> None:
        """Raise `ServiceError` unless the bucket answers to the credentials."""
        self._call(lambda: self._client.head_bucket(Bucket=self.address.bucket), _BUCKET)

    def list(self, prefix: str, most: int | None = None) -> Iterator[StoredObject]:
        """Yield the objects whose key starts with `prefix`, sorted by key, `most` at most."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.address.bucket,
            Prefix=prefix,
            PaginationConfig={"MaxItems": most} if most else {},
        )
        for page in self._call(lambda: [*pages], prefix):
            for found in page.get("Contents", []):
                yield StoredObject(found["Key"], found["Size"], found.get("ETag", ""))

    def remove(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._call(lambda: self._client.delete_object(**self._at(key)), key)

    def put(self, key: str, body: Path | bytes) -> None:
        """Write one object; the service checks its MD5 on arrival."""
        self._put(key, body)

    def put_if_absent(self, key: str, content: bytes) -> str:
        """Write the object, or raise `ChangedError` if one exists; the new etag."""
        return self._put(key, content, IfNoneMatch="*")

    def put_if_match(self, key: str, content: bytes, etag: str) -> str:
        """Replace the object, or raise `ChangedError` if it changed since `etag`; the new etag."""
        return self._put(key, content, IfMatch=etag)

    def read(self, key: str) -> tuple[bytes, str]:
        """Return a small object's content and etag."""

        def fetch() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._at(key))
            return b"".join(_chunks(answer)), _etag(answer)

        return self._call(fetch, key)

    def get(self, key: str) -> bytes:
        """Return a small object's content."""
        return self.read(key)[0]

    def read_start(self, key: str, limit: int) -> bytes:
        """Return at most `limit` first bytes of an object whose key others chose."""
        # Such parts would lead to another place on the way to the service.
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise ValueError(f"The key {key!r} has empty or dotted parts. Rename the object.")
        at: Any = {"Bucket": self.address.bucket, "Key": key}

        def fetch() -> bytes:
            start = b""
            for chunk in _chunks(self._client.get_object(**at)):
                start += chunk
                if len(start) >= limit:
                    break
            return start[:limit]

        return self._call(fetch, key)

    def digest(self, key: str) -> tuple[str, int]:
        """Read an object to its end; its SHA-256 in hex and its size in bytes."""
        return self._call(lambda: self._copy(key, None), key)

    def download(self, key: str, target: Path) -> tuple[str, int]:
        """Write an object to `target` atomically; SHA-256 in hex and size in bytes."""
        with atomic_write(target) as temporary:
            return self._call(lambda: self._copy(key, temporary), key)

    def _copy(self, key: str, target: Path | None) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        answer = self._client.get_object(**self._at(key))
        with target.open("wb") if target else contextlib.nullcontext() as file:
            for chunk in _chunks(answer):
                digest.update(chunk)
                size += len(chunk)
                if file:
                    file.write(chunk)
        return digest.hexdigest(), size

    def _put(self, key: str, body: Path | bytes, **condition: Any) -> str:
        at, sent = self._at(key), 0

        def send() -> str:
            nonlocal sent
            sent += 1
            content = body.read_bytes() if isinstance(body, Path) else body
            digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest())
            return _etag(
                self._client.put_object(**at, Body=content, ContentMD5=digest.decode(), **condition)
            )

        try:
            return self._call(send, key)
        except ChangedError:
            # A write that arrived, but whose answer was lost, meets itself when repeated.
            if sent > 1:
                found, etag = self.read(key)
                if found == body:
                    return etag
            raise

    def _call(self, action: Callable[[], T], key: str) -> T:
        """Call `action`, again where its failure may pass; explain what remains."""
        from botocore import exceptions
        from urllib3.exceptions import HTTPError

        url = redact_url(self.address.endpoint_url)
        try:
            # No time-out in total: every attempt that is promised must be made.
            retried = stamina.retry(on=_may_pass, attempts=ATTEMPTS, timeout=None, wait_max=1.5)
            return retried(action)()
        except exceptions.ClientError as error:
            raise _explain(error.response, self.address, key) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            raise ServiceError(
                f"No S3 credentials were found for {url}. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from None
        except (exceptions.BotoCoreError, HTTPError) as error:
            raise ServiceError(
                f"S3 does not answer at {url} ({type(error).__name__}). "
                "Check HANDSIGNS_S3_ENDPOINT_URL and the service."
            ) from None

    def _at(self, key: str) -> Any:
        return {"Bucket": self.address.bucket, "Key": check_key(key)}


def check_key(key: str) -> str:
    """Return `key`, or raise `ValueError` if it is not plain names joined by slashes."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(f"An object's key must be plain names joined by slashes, not {key!r}.")
    return key


def check_conditional_writes(storage: Storage) -> None:
    """Raise `ServiceError` unless the endpoint honours conditional writes.

    Some S3-compatible services accept `If-None-Match` and `If-Match` and write all the
    same: the champion would be whoever wrote last. A probe object is used and removed.
    """
    probe = f"probes/{uuid.uuid4().hex}"
    etag = storage.put_if_absent(probe, b"first")
    try:
        honoured = {
            "If-None-Match": not _accepted(lambda: storage.put_if_absent(probe, b"second")),
            "If-Match": _accepted(lambda: storage.put_if_match(probe, b"third", etag))
            and not _accepted(lambda: storage.put_if_match(probe, b"fourth", etag)),
        }
    finally:
        with contextlib.suppress(ServiceError):
            storage.remove(probe)
    if ignored := [header for header, holds in honoured.items() if not holds]:
        raise ServiceError(
            f"S3 at {redact_url(storage.address.endpoint_url)} ignores {' and '.join(ignored)}: "
            "it does not honour conditional writes, so two promotions at once could undo each "
            "other. Use a service, or a version of it, that does."
        )


def _accepted(write: Callable[[], str]) -> bool:
    try:
        write()
        return True
    except ChangedError:
        return False


def _client(address: S3Address, read_seconds: float) -> "S3Client":
    import boto3
    import botocore.session
    from botocore import exceptions
    from botocore.config import Config

    logging.getLogger("stamina").setLevel(logging.ERROR)  # a retry is no news
    # Who has keys needs no profile, be it another project's or one that cannot be read.
    ignored: Any = {"profile": (None, None, None, None)}
    ignored |= dict.fromkeys(("config_file", "credentials_file"), (None, None, os.devnull, None))
    known = botocore.session.Session(ignored if address.access_key_id else None)
    try:
        session = boto3.session.Session(botocore_session=known)
    except (exceptions.ProfileNotFound, exceptions.ConfigParseError) as error:
        raise SettingsError(
            f"{error}. Set AWS_PROFILE and AWS_CONFIG_FILE to what exists, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from None

    return session.client(
        "s3",
        endpoint_url=address.endpoint_url,
        region_name=address.region,
        aws_access_key_id=address.access_key_id,
        aws_secret_access_key=address.secret_access_key,
        aws_session_token=address.session_token,
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=read_seconds,
            # `Storage._call` repeats; botocore would repeat requests, but no broken bodies.
            retries={"mode": "standard", "total_max_attempts": 1},
            # The CRC trailers that botocore sends by default are unknown to some
            # S3-compatible services (boto3#4392); we compare digests ourselves.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
            # A proxy of the environment cannot reach this machine's own servers.
            proxies={} if urlsplit(address.endpoint_url).hostname in LOOPBACK else None,
        ),
    )


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed if repeated."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in (408, 429, 500, 502, 503, 504)
    # urllib3's own error comes from an answer that is not streamed and breaks off.
    broken = (exceptions.HTTPClientError, exceptions.IncompleteReadError, HTTPError)
    return isinstance(error, (exceptions.ConnectionError, *broken))


def _explain(response: Any, address: S3Address, key: str) -> HandsignsError:
    """The error that an S3 answer stands for."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    uri = f"s3://{address.bucket}/"
    at = f"{uri} at {redact_url(address.endpoint_url)}"
    if status == 412 or code == "ConditionalRequestConflict":
        return ChangedError(f"{uri}{key} was changed meanwhile. Read it again.")
    if status in (401, 403) or code in _EXPIRED:
        return ServiceError(
            f"S3 refuses the credentials for {at} ({code}). "
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, their rights and the clock."
        )
    if status == 507 or code in _FULL:
        return ServiceError(
            f"S3 has no room left for {at} ({status} {code}). Free some, then run again."
        )
    if code == "NoSuchBucket" or (status == 404 and key == _BUCKET):
        return ServiceError(
            f"The bucket {at} does not exist. Create it, or correct the setting that names it: "
            "HANDSIGNS_BUCKET, or HANDSIGNS_INBOX."
        )
    if status == 404:
        return MissingObjectError(f"{uri}{key} does not exist.")
    return ServiceError(
        f"S3 failed with {status} {code} for {at}. Look at the service, its log and its disk, "
        "then run again."
    )


def _chunks(answer: Any) -> Iterator[bytes]:
    _etag(answer)
    yield from answer["Body"].iter_chunks(CHUNK)


def _etag(answer: Any) -> str:
    """The object's etag; an answer without one broke off in its head and seems empty."""
    from botocore.exceptions import IncompleteReadError

    if "ETag" not in answer:
        raise IncompleteReadError(actual_bytes=0, expected_bytes=1)
    return str(answer["ETag"])
