"""S3-compatible object storage."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import stamina

from tasks.errors import HandsignsError, ServiceError
from tasks.io import atomic_write
from tasks.releases.signing import UNSIGNED, Trust

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def redact_url(url: str) -> str:
    """Return `url` without the user, password and query that it may carry.

    Args:
        url: address of a service or database, well formed or not.

    Returns:
        Scheme, host, port and path only.
    """
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
        """Return the usual AWS variables, for tools that read only those."""
        known = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
        }
        return {name: value for name, value in known.items() if value is not None}


def check_key(key: str) -> str:
    """Return `key`, or raise `ValueError` if it is not plain names joined by slashes."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(
            f"An object's key must be plain names joined by slashes. Received: {key!r}."
        )
    return key


BUCKET = "(bucket)"
"""Stands for the key in questions about the bucket itself."""


EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""Refusals of credentials that come with status 400."""
FULL = ("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull")


class ChangedError(HandsignsError):
    """A conditional write found another object than the one expected."""

    retried = False
    """Whether an earlier attempt of the same write may have arrived."""


class MissingObjectError(HandsignsError):
    """The object does not exist."""


def explain(response: Any, address: S3Address, key: str) -> HandsignsError:
    """Return the error that an S3 answer stands for.

    Args:
        response: botocore's parsed answer with `Error` and `ResponseMetadata`.
        address: whom we asked.
        key: the object in question, or `BUCKET`.
    """
    code = str(response.get("Error", {}).get("Code", ""))
    facts = response.get("ResponseMetadata", {})
    status = facts.get("HTTPStatusCode", 0)
    uri = f"s3://{address.bucket}/"
    at = f"{uri} at {redact_url(address.endpoint_url)}"
    if status == 412 or code == "ConditionalRequestConflict":
        changed = ChangedError(f"{uri}{key} was changed meanwhile. Read it again.")
        changed.retried = facts.get("RetryAttempts", 0) > 0
        return changed
    if status in (401, 403) or code in EXPIRED:
        return ServiceError(
            f"S3 refuses the credentials for {at} ({code}). "
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, their rights and the clock."
        )
    if status == 507 or code in FULL:
        return ServiceError(
            f"S3 has no room left for {at} ({status} {code}). Free some, then run again."
        )
    if code == "NoSuchBucket" or (status == 404 and key == BUCKET):
        return ServiceError(
            f"The bucket {at} does not exist. Create it, or mend the setting that names it: "
            "HANDSIGNS_BUCKET, or HANDSIGNS_INBOX."
        )
    if status == 404:
        return MissingObjectError(f"{uri}{key} does not exist.")
    return ServiceError(
        f"S3 failed with {status} {code} for {at}. Look at the service, its log and its disk, "
        "then run again."
    )


SECONDS = 26.0
"""Three attempts that hang take 24 s and their pauses; these end them, and what trickles."""
BYTES_A_SECOND = 128 << 10
"""Each so many bytes that are moved give a second more: a slow line may take its time."""


class Deadline:
    """As a context, ends the connections that are used within it when time is over.

    Args:
        seconds: until then; `allow` adds to it.

    Attributes:
        passed: whether time was over before the block was.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._lines: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        threading.Thread(target=self._expire, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        self._done.set()

    @property
    def told(self) -> str:
        """How long it was, in words."""
        return f"{self._seconds:.0f} s, and a second for each {BYTES_A_SECOND >> 10} KiB"

    def add(self, seconds: float) -> None:
        """Give more time."""
        self._ends += seconds

    def watch(self, line: socket.socket) -> None:
        """Shut this line too when time is over.

        Raises:
            TimeoutError: it is over already.
        """
        with self._lock:
            if self.passed:
                raise TimeoutError("no time is left")
            self._lines.add(line)

    def _expire(self) -> None:
        while not self._done.wait(max(0.0, self._ends - time.monotonic())):
            if time.monotonic() >= self._ends:
                break
        else:
            return
        with self._lock:
            self.passed = True
            for line in self._lines:
                with contextlib.suppress(OSError):  # it is closed already
                    line.shutdown(socket.SHUT_RDWR)


_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def allow(size: int) -> None:
    """Give the deadline around the caller the time that these bytes may take."""
    if deadline := _current.get():
        deadline.add(size / BYTES_A_SECOND)


def heed_deadlines(pools: dict[str, type[Any]]) -> None:
    """Let connections end with the deadline around whoever uses them.

    Args:
        pools: urllib3's classes of pools by scheme; replaced by some that do.
    """
    for scheme, pool in pools.items():
        pools[scheme] = type(
            pool.__name__, (pool,), {"ConnectionCls": _heeding(pool.ConnectionCls)}
        )


def _heeding(connection: type[Any]) -> type[Any]:
    class Heeding(connection):  # type: ignore[misc]
        line: socket.socket | None = None

        def connect(self) -> None:
            super().connect()
            self.line = self.sock
            self._heed()

        def request(self, *words: Any, **options: Any) -> Any:
            self._heed()  # one that is used again does not connect
            return super().request(*words, **options)

        def _heed(self) -> None:
            deadline = _current.get()
            if deadline and self.line:
                deadline.watch(self.line)

    return Heeding


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
                f"No S3 credentials were found for {redact_url(self.address.endpoint_url)}. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from None
        except (BotoCoreError, HTTPError) as error:
            # urllib3's own error comes from an answer that is not streamed and breaks off.
            raise ServiceError(
                f"S3 does not answer at {redact_url(self.address.endpoint_url)} "
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
                    f"S3 at {redact_url(self.address.endpoint_url)} takes too long. Received: "
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


_MD5 = re.compile(r"[0-9a-f]{32}")


def place(cache: Any, name: str) -> Path:
    """Path of an object in the local cache."""
    return Path(cache.oid_to_path(name))


def listed(cache: Any, name: str) -> dict[str, str]:
    """Path by object of what a version of a folder consists of; a file has no such list.

    Raises:
        OSError, ValueError: the version's list is not in the cache, or is none.
    """
    if not name.endswith(".dir"):
        return {}
    content = json.loads(place(cache, name).read_bytes())
    return {entry["md5"]: entry["relpath"] for entry in content}


def drop_damaged(cache: Any, names: Iterable[str]) -> list[str]:
    """Remove from the local cache what is not what its name says; the names of those.

    DVC then takes them from a remote, or makes them again, as it does with what it
    never had.
    """
    spoilt = []
    for name in names:
        path = place(cache, name)
        if path.is_file() and _md5(path) != name.removesuffix(".dir"):
            path.unlink()
            spoilt.append(name)
    return spoilt


def drop_damaged_version(cache: Any, name: str) -> list[str]:
    """Do the same with a version of a file or a folder, and all that it consists of."""
    spoilt = drop_damaged(cache, [name])
    try:
        return spoilt + drop_damaged(cache, listed(cache, name))
    except (OSError, ValueError):
        return spoilt


def put_back(cache: Any, folder: Path, name: str) -> None:
    """Fill the gaps in a cached version from the folder, where that has the same bytes."""
    for digest, relative in listed(cache, name).items():
        source, target = folder / relative, place(cache, digest)
        if not target.exists() and source.is_file() and _md5(source) == digest:
            with atomic_write(target) as temporary:
                shutil.copyfile(source, temporary)
                temporary.chmod(0o444)


def send_again(cache: Any, remote: Any, name: str) -> list[str]:
    """Send what a remote lacks of a version, or holds damaged; the names of those.

    One listing tells: where it gives MD5 sums as etags, as S3 does for what is sent in
    one piece, those are compared; a folder of this machine is read; of others the size
    must do.

    Raises:
        OSError: the remote does not answer, or the cache lacks an object too.
    """
    remote.fs.fs.invalidate_cache()
    stored = {"".join(Path(path).parts[-2:]): info for path, info in _find(remote).items()}
    sent = []
    for wanted in (*listed(cache, name), name):
        if wanted not in stored or not _is_sound(remote, stored[wanted], cache, wanted):
            remote.fs.put_file(os.fspath(place(cache, wanted)), remote.oid_to_path(wanted))
            sent.append(wanted)
    return sent


def _find(remote: Any) -> dict[str, Any]:
    """Facts by path; a folder of this machine gives none."""
    found = remote.fs.fs.find(remote.path, detail=True)
    return found if isinstance(found, dict) else {path: {} for path in found}


def _is_sound(remote: Any, info: Any, cache: Any, name: str) -> bool:
    etag = str(info.get("ETag", "")).strip('"')
    if _MD5.fullmatch(etag):
        return etag == name.removesuffix(".dir")
    if remote.fs.protocol == "local":
        return _md5(Path(remote.oid_to_path(name))) == name.removesuffix(".dir")
    return bool(info.get("size") == place(cache, name).stat().st_size)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_conditional_writes(storage: Storage) -> None:
    """Raise `ServiceError` unless the endpoint honours conditional writes.

    Some S3-compatible services take `If-None-Match` and `If-Match` without a word and
    write all the same. The champion would then be whoever wrote last, so it is tried on
    an object of its own, which is removed again.
    """
    probe = f"probes/{uuid.uuid4().hex}"
    etag = storage.put_if_absent(probe, b"first")
    try:
        honoured = {
            "If-None-Match": not _takes(lambda: storage.put_if_absent(probe, b"second")),
            "If-Match": _takes(lambda: storage.put_if_match(probe, b"third", etag))
            and not _takes(lambda: storage.put_if_match(probe, b"fourth", etag)),
        }
    finally:
        with contextlib.suppress(ServiceError):
            storage.remove(probe)
    if ignored := [header for header, holds in honoured.items() if not holds]:
        raise ServiceError(
            f"S3 at {redact_url(storage.address.endpoint_url)} does not honour conditional "
            f"writes, so two promotions at once could undo each other. "
            f"Received: {' and '.join(ignored)} "
            "without effect. Use a service, or a version of it, that keeps to them."
        )


def _takes(write: Callable[[], str]) -> bool:
    try:
        write()
    except ChangedError:
        return False
    return True
