"""Follow the champion: swap the loaded model without a restart or a gap."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tasks.errors import BusyError, HandsignsError, ReleaseError, ServiceError
from tasks.releases.pointer import Champion, read_champion
from tasks.services.s3 import Storage

if TYPE_CHECKING:
    from tasks.model.inference import Classifier

_log = logging.getLogger(__name__)

MAX_PAUSE = 300.0
"""Longest back-off in seconds between two tries of a rejected release."""
POINTER = "pointer"
"""Marks a rejected pointer, where others are marked with their ETag."""

OpenStorage = Callable[[bool], AbstractContextManager[Storage | None]]
"""Opens the storage for one check. With False it may give None if nothing was written since."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers requests.

    Args:
        classifier: scores photos.
        description: what it is, in words.
        version: number in the registry; only of a champion, like the rest.
        release: id of its verified release.
        promoted_at: when it became champion, ISO 8601 in UTC.
    """

    classifier: "Classifier"
    description: str
    version: int | None = None
    release: str | None = None
    promoted_at: str | None = None


class ModelSource(Protocol):
    """The loaded model, what is wrong with it, and when that was last checked."""

    model: LoadedModel | None
    problem: str | None
    checked_at: float | None
    failures: dict[str, int]

    def stop(self) -> None:
        """Release what the source holds."""


@dataclass
class StaticModel:
    """A model named on the command line; it never changes."""

    model: LoadedModel | None
    problem: str | None = None
    checked_at: float | None = None
    failures: dict[str, int] = field(default_factory=dict)

    def stop(self) -> None:
        """Nothing to stop."""


class Follower:
    """Follow the champion pointer in a background thread.

    A new champion answers once its release is fetched, verified and loaded. Until then,
    and if any of that fails, the old model answers.

    Args:
        open_storage: opens the storage for one check.
        releases: folder for fetched releases.
        seconds: pause between two checks.

    Attributes:
        model: the model that answers; replaced, never changed.
        problem: why it is not the champion, or why that is unknown.
        checked_at: when the pointer was last read, as a Unix time.
        failures: failed checks by `storage`, `release` or `other`.
    """

    def __init__(self, open_storage: OpenStorage, releases: Path, seconds: float) -> None:
        self.model: LoadedModel | None = None
        self.problem: str | None = None
        self.checked_at: float | None = None
        self.failures = dict.fromkeys(("storage", "release", "other"), 0)
        self._open, self._releases, self._seconds = open_storage, releases, seconds
        self._etag: str | None = None
        self._rejected: str | None = None
        self._pause = seconds
        self._retry_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Check once, then in the background until `stop`.

        Raises:
            ServiceError: the storage does not answer the first check.
        """
        self.poll()
        if self.failures["storage"]:
            raise ServiceError(str(self.problem))
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; wait at most 5 s for a storage that hangs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def poll(self) -> None:
        """Check the champion once; record a failure instead of raising it."""
        try:
            self._check()
        except BusyError:
            pass  # a run of this checkout starts or stops the storage; the next check will do
        except ServiceError as error:
            self._fail("storage", str(error))
        except HandsignsError as error:
            self._fail("release", f"The champion was rejected: {error}")
        except Exception as error:  # a full disk, say: the old model must go on answering
            self._fail("other", f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self.poll()

    def _check(self) -> None:
        retry = self._rejected is not None and time.monotonic() >= self._retry_at
        with self._open(retry) as storage:
            if storage is not None:
                self._read(storage, retry)
        self.checked_at = time.time()

    def _read(self, storage: Storage, retry: bool) -> None:
        try:
            champion = read_champion(storage)
        except ReleaseError:
            self._reject(POINTER)
            raise
        if champion is None or champion.etag == self._etag:
            gone = champion is None and self.model
            self.problem = "The champion pointer is gone." if gone else None
            self._rejected = None
        elif champion.etag != self._rejected or retry:
            self._take(storage, champion)

    def _reject(self, what: str) -> None:
        self._pause = self._pause * 2 if what == self._rejected else self._seconds
        self._rejected = what
        self._retry_at = time.monotonic() + min(self._pause, MAX_PAUSE)

    def _take(self, storage: Storage, champion: Champion) -> None:
        pointer = champion.pointer
        try:
            classifier = self._load(storage, pointer.release)
        except ServiceError:
            raise
        except HandsignsError:
            self._reject(champion.etag)
            raise
        description = f"champion, version {pointer.version}, release {pointer.release}"
        self.model = LoadedModel(
            classifier, description, pointer.version, pointer.release, pointer.at
        )
        self._etag, self._rejected, self.problem = champion.etag, None, None
        _log.info("Serving the %s.", description)

    def _load(self, storage: Storage, release: str) -> "Classifier":
        from tasks.releases.release import fetch, open_release

        if self.model and self.model.release == release:
            return self.model.classifier
        return open_release(fetch(storage, release, self._releases))

    def _fail(self, kind: str, reason: str) -> None:
        self.failures[kind] += 1
        still = f" Still serving the {self.model.description}." if self.model else ""
        problem = f"{reason}{still}"
        if problem != self.problem:
            _log.warning("%s", problem)
        self.problem = problem
