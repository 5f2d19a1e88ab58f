"""Follow the champion: swap the loaded model without a restart or a gap."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Counter, Gauge

from flows.workspace import Workspace
from tasks.errors import HandsignsError, ServiceError
from tasks.model.inference import Classifier
from tasks.releases.champion import Move, read_champion
from tasks.releases.release import fetch, open_release
from tasks.services.s3 import Storage

FAILURES = Counter("handsigns_follow_failures", "Failed checks of the champion.", ("kind",))
PROBLEM = Gauge(
    "handsigns_follow_problem", "1 while the loaded model is not the champion, or that is unknown."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers; what follows its description is only known of a champion."""

    classifier: Classifier
    description: str
    version: int | None = None
    release: str | None = None
    promoted_at: str | None = None
    folder: Path | None = None
    moves: tuple[Move, ...] = ()

    @property
    def told(self) -> str:
        """The description under its old name in the API."""
        return self.description


class ModelSource:
    """The model that answers, and why it is not the champion; by itself it never changes."""

    def __init__(self, model: LoadedModel | None = None) -> None:
        self.model = model
        self.problem: str | None = None
        self.checked_at: float | None = None
        self.storage: Storage | None = None  # where a followed champion's releases are
        self._etag: str | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        PROBLEM.set_function(lambda: bool(self.problem))

    @property
    def labels(self) -> tuple[str, ...]:
        """What photos may be classified as; empty without a model."""
        return self.model.classifier.labels if self.model else ()

    @property
    def waiting(self) -> str:
        """Why there is no model."""
        return self.problem or "There is no champion yet. Once one is promoted, it answers here."

    def follow(self, storage: Storage, releases: Path, seconds: float) -> None:
        """Check the champion now, which the storage must answer, and every `seconds` until `stop`.

        Until a new one is verified and loaded, the old one answers.
        """

        def run() -> None:
            while not self._stopping.wait(seconds):
                self._poll(storage, releases)

        self.storage = storage
        if not self._poll(storage, releases):
            raise ServiceError(str(self.problem))
        self._thread = threading.Thread(target=run, name="follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow the champion no longer; wait at most 5 s for a storage that hangs."""
        self._stopping.set()
        if self._thread:
            self._thread.join(5.0)

    def _poll(self, storage: Storage, releases: Path) -> bool:
        """Check the champion once; record a failure. False if the storage does not answer."""
        try:
            self._check(storage, releases)
            self.checked_at = time.time()
        except ServiceError as error:
            self._fail("storage", str(error))
            return False
        except HandsignsError as error:
            self._fail("release", f"The champion was rejected: {error}")
        except Exception as error:  # a full disk, say: the old model must go on answering
            self._fail("other", f"{type(error).__name__}: {error}")
        return True

    def _check(self, storage: Storage, releases: Path) -> None:
        champion = read_champion(storage)
        if champion is None or champion.etag == self._etag:
            gone = champion is None and self.model
            self.problem = "The champion pointer is gone." if gone else None
            return
        pointer = champion.pointer
        folder = fetch(storage, pointer.release, releases)
        if self.model and self.model.release == pointer.release:
            classifier = self.model.classifier
        else:
            classifier = open_release(folder)
        description = f"champion, version {pointer.version}, release {pointer.release}"
        found = (pointer.version, pointer.release, pointer.at, folder, pointer.moves)
        self.model = LoadedModel(classifier, description, *found)
        self._etag, self.problem = champion.etag, None
        _log.info("Serving the %s.", description)

    def _fail(self, kind: str, reason: str) -> None:
        FAILURES.labels(kind).inc()
        still = f" Still serving the {self.model.description}." if self.model else ""
        problem = f"{reason}{still}"
        if problem != self.problem:
            _log.warning("%s", problem)
        self.problem = problem


def open_source(workspace: Workspace, model: str) -> ModelSource:
    """Load the model that a person named; the champion is followed."""
    if model != "champion":
        return ModelSource(LoadedModel(*workspace.classifier(model)))
    source, seconds = ModelSource(), workspace.settings.serve_follow_seconds
    source.follow(workspace.storage, workspace.project.releases, seconds)
    return source
