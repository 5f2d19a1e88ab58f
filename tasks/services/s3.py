"""S3-compatible object storage."""

import base64
import contextlib
import datetime
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import stamina

from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.releases.signing import UNSIGNED, Trust

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ATTEMPTS = 3
CONNECT_SECONDS = 2
READ_SECONDS = 7  # so that three attempts that hang, and the pauses, take less than 30 s

T = TypeVar("T")


def redact_url(url: str) -> str:
    """Return scheme, host, port and path of a URL, without user, password and query."""
    # Up to the last @, as a password may hold unquoted slashes and the like.
    return re.sub(r"[?#].*$", "", re.sub(r"^([^:/]*:?//).*@", r"\1", url, flags=re.S), flags=re.S)


@dataclass(frozen=True)
class S3Address:
    """Service, bucket and credentials, which boto3's chain looks for without an access key."""

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
    etag: str
    modified: datetime.datetime


class ChangedError(HandsignsError):
    """A conditional write found another object than the one expected."""


class MissingObjectError(HandsignsError):
    """The object does not exist."""


class Storage:
    """One bucket, or a folder of it, with the keys to sign and verify what is in it.

    Every call makes up to three attempts, within 30 s if the service is silent, then raises
    `ServiceError` in one line; and `ValueError` for a key that leads to another place.
    """

    def __init__(
        self,
        address: S3Address,
        trust: Trust = UNSIGNED,
        folder: str = "",
        read_seconds: float = READ_SECONDS,
    ) -> None:
        self.address = address
        self.trust = trust
        self._folder = f"{folder.strip('/')}/".lstrip("/")
        self._client = _client(address, read_seconds)

    def uri(self, key: str = "") -> str:
        return f"s3://{self.address.bucket}/{self._folder}{key}"

    def check(self) -> None:
        """Raise `ServiceError` unless the bucket answers to the credentials."""
        self._call(lambda: self._client.head_bucket(Bucket=self.address.bucket), "")

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the objects whose key starts with `prefix`, sorted by key."""
        listing = self._client.get_paginator("list_objects_v2")
        pages = listing.paginate(Bucket=self.address.bucket, Prefix=self._folder + prefix)
        for page in self._call(lambda: [*pages], prefix):
            for found in page.get("Contents", []):
                key, facts = found["Key"], (found["Size"], found["ETag"], found["LastModified"])
                yield StoredObject(key.removeprefix(self._folder), *facts)

    def keys(self, prefix: str) -> Sequence[str]:
        return [found.key for found in self.list(prefix)]

    def remove(self, key: str) -> None:
        self._call(lambda: self._client.delete_object(**self._at(key)), key)

    def put_if_absent(self, key: str, content: bytes) -> str:
        return self.put(key, content, IfNoneMatch="*")

    def put_if_match(self, key: str, content: bytes, etag: str) -> str:
        """Replace the object, or raise `ChangedError` if it changed since `etag`; the new etag."""
        return self.put(key, content, IfMatch=etag)

    def read(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        """Return an object's content, or at most `limit` first bytes of it, and its etag."""
        at = self._at(key)
        return self._call(lambda: self._read(at, limit), key)

    def get(self, key: str, limit: int | None = None) -> bytes:
        return self.read(key, limit)[0]

    def _read(self, at: Any, limit: int | None = None) -> tuple[bytes, str]:
        answer = self._client.get_object(**at)
        etag = _etag(answer)
        return answer["Body"].read(limit), etag

    def put(self, key: str, body: Path | bytes, **condition: Any) -> str:
        """Write one object, whose MD5 the service checks on arrival; the new etag."""
        at, repeated = self._at(key), False

        def send() -> str:
            nonlocal repeated
            content = body.read_bytes() if isinstance(body, Path) else body
            if repeated and condition:
                # The write may have arrived and only its answer got lost.
                with contextlib.suppress(self._client.exceptions.NoSuchKey):
                    found, etag = self._read(at)
                    if found == content:
                        return etag
            repeated = True
            digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest())
            sent: Any = {"Body": content, "ContentMD5": digest.decode(), **condition}
            return _etag(self._client.put_object(**at, **sent))

        return self._call(send, key)

    def _call(self, action: Callable[[], T], key: str) -> T:
        """Call `action`, again where its failure may pass; explain what remains."""
        from botocore import exceptions
        from urllib3.exceptions import HTTPError

        url = redact_url(self.address.endpoint_url)
        try:
            # No time-out in total: every attempt that is promised must be made.
            retried = stamina.retry(on=_may_pass, attempts=ATTEMPTS, timeout=None, wait_max=1.0)
            return retried(action)()
        except exceptions.ClientError as error:
            raise _explain(error.response, self.address, key and self._folder + key) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            advice = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            raise ServiceError(f"No S3 credentials were found for {url}. {advice}") from None
        except (exceptions.BotoCoreError, HTTPError) as error:
            raise ServiceError(
                f"S3 does not answer at {url} ({type(error).__name__}). "
                "Check HANDSIGNS_S3_ENDPOINT_URL and the service."
            ) from None

    def _at(self, key: str) -> Any:
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise ValueError(f"The key {key!r} has empty or dotted parts. Rename the object.")
        return {"Bucket": self.address.bucket, "Key": self._folder + key}


def check_conditional_writes(storage: Storage) -> None:
    """Raise `ServiceError` unless the endpoint honours conditional writes, by a probe object.

    Some S3-compatible services write all the same: the champion would be whoever wrote last.
    """
    probe = f"probes/{uuid.uuid4().hex}"
    first = storage.put_if_absent(probe, b"first")
    ignored = []
    try:
        storage.put_if_match(probe, b"second", first)
        with contextlib.suppress(ChangedError):
            storage.put_if_absent(probe, b"third")
            ignored.append("If-None-Match")
        with contextlib.suppress(ChangedError):
            storage.put_if_match(probe, b"fourth", first)
            ignored.append("If-Match")
    finally:
        with contextlib.suppress(ServiceError):
            storage.remove(probe)
    if ignored:
        raise ServiceError(
            f"S3 at {redact_url(storage.address.endpoint_url)} ignores {' and '.join(ignored)}: it "
            "does not honour conditional writes, which promotions need. Use a service that does."
        )


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
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return status in (408, 429, 500, 502, 503, 504)
    # urllib3's own error comes from an answer that is not streamed and breaks off.
    broken = (exceptions.HTTPClientError, exceptions.IncompleteReadError, HTTPError)
    return isinstance(error, (exceptions.ConnectionError, *broken))


def _explain(response: Any, address: S3Address, key: str) -> HandsignsError:
    """The error of an S3 answer; `key` is empty in questions about the bucket."""
    code = str(response.get("Error", {}).get("Code", ""))
    status, uri = response["ResponseMetadata"]["HTTPStatusCode"], f"s3://{address.bucket}/"
    at = f"{uri} at {redact_url(address.endpoint_url)}"
    if status == 412 or code == "ConditionalRequestConflict":
        return ChangedError(f"{uri}{key} was changed meanwhile. Read it again.")
    if status == 404 and key and code != "NoSuchBucket":
        return MissingObjectError(f"{uri}{key} does not exist.")
    if status == 404:
        fault = f"The bucket {at} does not exist. Create it, or correct the setting that names it."
    elif status in (401, 403) or "Token" in code:  # expired ones come with status 400
        fault = f"S3 refuses the credentials for {at} ({code}). Check AWS_ACCESS_KEY_ID, "
        fault += "AWS_SECRET_ACCESS_KEY, their rights and the clock."
    else:
        fault = f"S3 failed with {status} {code} for {at}. Look at the service and its disk."
    return ServiceError(fault)


def _etag(answer: Any) -> str:
    """The object's etag; an answer without one broke off in its head and seems empty."""
    from botocore.exceptions import IncompleteReadError

    if "ETag" not in answer:
        raise IncompleteReadError(actual_bytes=0, expected_bytes=1)
    return str(answer["ETag"])
