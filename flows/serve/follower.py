"""Keep the served model the champion's, without a restart and without a gap."""

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

log = logging.getLogger(__name__)

LONGEST_PAUSE = 300.0
"""Seconds between two tries at a release that was refused; the first pause is a look's."""

Opened = Callable[[bool], AbstractContextManager[Storage | None]]
"""Opens the storage for one look; None where nothing was written since the last one, unless
it is told to open it again."""
POINTER = "pointer"
"""What was refused, where that was not the release of an etag."""


@dataclass(frozen=True)
class Served:
    """A model that answers, and what it is.

    Args:
        classifier: scores photos.
        told: what it is, in words.
        version: of a followed champion, its number in the registry; else None.
        release: of a followed champion, the id of its verified release; else None.
        promoted_at: when that became champion, ISO 8601 in UTC.
    """

    classifier: "Classifier"
    told: str
    version: int | None = None
    release: str | None = None
    promoted_at: str | None = None


class Source(Protocol):
    """What answers, what is wrong, and when that was last looked at."""

    served: Served | None
    problem: str | None
    looked_at: float | None
    failures: dict[str, int]


@dataclass
class Fixed:
    """A model that somebody named; it stays."""

    served: Served | None
    problem: str | None = None
    looked_at: float | None = None
    failures: dict[str, int] = field(default_factory=dict)

    def stop(self) -> None:
        """There is nothing to stop."""


class Follower:
    """Follow the champion pointer in a thread of its own.

    A new champion takes over once its release was fetched, verified and loaded;
    until then, and if any of that fails, the old one answers.

    Args:
        opened: gives the storage for one look.
        releases: folder for fetched releases.
        seconds: between two looks.

    Attributes:
        served: what answers; replaced whole, so a request keeps the one it began with.
        problem: why it is not the champion, or not known to be; None if all is well.
        looked_at: when the pointer was last read, in seconds since 1970.
        failures: number of looks that failed, by `storage`, `release` or `other`.
    """

    def __init__(self, opened: Opened, releases: Path, seconds: float) -> None:
        self.served: Served | None = None
        self.problem: str | None = None
        self.looked_at: float | None = None
        self.failures = dict.fromkeys(("storage", "release", "other"), 0)
        self._opened, self._releases, self._seconds = opened, releases, seconds
        self._etag: str | None = None
        self._refused: str | None = None
        self._pause = seconds
        self._not_before = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Look once, then again and again in the background until `stop`.

        Raises:
            ServiceError: the storage does not answer, which at the start is no passing fault.
        """
        self.look_safely()
        if self.failures["storage"]:
            raise ServiceError(str(self.problem))
        self._thread.start()

    def stop(self) -> None:
        """End the thread, but wait no longer than a few seconds for a storage that hangs."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def look(self) -> None:
        """Read the pointer once, and take over what it names.

        Raises:
            ServiceError: the storage does not answer.
            ReleaseError: the champion's release is not what its manifest says.
            HandsignsError: it cannot be loaded.
        """
        due = self._refused is not None and time.monotonic() >= self._not_before
        with self._opened(due) as storage:
            if storage is not None:
                self._read(storage, due)
        self.looked_at = time.time()

    def _read(self, storage: Storage, due: bool) -> None:
        try:
            champion = read_champion(storage)
        except ReleaseError:
            self._refuse(POINTER)
            raise
        if champion is None or champion.etag == self._etag:
            gone = champion is None and self.served
            self.problem = "The champion pointer is gone." if gone else None
            self._refused = None
        elif champion.etag != self._refused or due:
            self._take(storage, champion)

    def _refuse(self, what: str) -> None:
        """Let the next try come later, and later still if it fails again."""
        self._pause = self._pause * 2 if what == self._refused else self._seconds
        self._refused = what
        self._not_before = time.monotonic() + min(self._pause, LONGEST_PAUSE)

    def _take(self, storage: Storage, champion: Champion) -> None:
        pointer = champion.pointer
        try:
            classifier = self._load(storage, pointer.release)
        except ServiceError:
            raise
        except HandsignsError:
            self._refuse(champion.etag)
            raise
        told = f"champion, version {pointer.version}, release {pointer.release}"
        self.served = Served(classifier, told, pointer.version, pointer.release, pointer.at)
        self._etag, self._refused, self.problem = champion.etag, None, None
        log.info("Serving the %s.", told)

    def _load(self, storage: Storage, release: str) -> "Classifier":
        from tasks.releases.release import fetch, open_release

        if self.served and self.served.release == release:
            return self.served.classifier
        return open_release(fetch(storage, release, self._releases))

    def _follow(self) -> None:
        while not self._ending.wait(self._seconds):
            self.look_safely()

    def look_safely(self) -> None:
        """Look, and note what went wrong instead of raising it."""
        try:
            self.look()
        except BusyError:
            pass  # a run of this checkout begins or ends; the next look will do
        except ServiceError as error:
            self._note("storage", str(error))
        except HandsignsError as error:
            self._note("release", f"The champion was refused: {error}")
        except Exception as error:  # a full disk, say: the old model must go on answering
            self._note("other", f"{type(error).__name__}: {error}")

    def _note(self, kind: str, reason: str) -> None:
        self.failures[kind] += 1
        still = f" Still serving the {self.served.told}." if self.served else ""
        said = f"{reason}{still}"
        if said != self.problem:
            log.warning("%s", said)
        self.problem = said
