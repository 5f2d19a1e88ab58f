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


@dataclass
class ModelSource:
    """The model that answers, and why it is not the champion; by itself it never changes.

    `storage` is where a followed champion's releases are.
    """

    model: LoadedModel | None = None
    problem: str | None = None
    checked_at: float | None = None
    storage: Storage | None = None

    def __post_init__(self) -> None:
        PROBLEM.set_function(lambda: bool(self.problem))

    @property
    def labels(self) -> tuple[str, ...]:
        """What photos may be classified as; empty without a model."""
        return self.model.classifier.labels if self.model else ()

    @property
    def waiting(self) -> str:
        """Why there is no model."""
        return self.problem or "There is no champion yet. Once one is promoted, it answers here."

    def stop(self) -> None:
        """Stop what runs in the background."""


class Follower(ModelSource):
    """Follow the champion every `seconds`; until it is verified and loaded, the old one answers."""

    def __init__(self, storage: Storage, releases: Path, seconds: float) -> None:
        super().__init__(storage=storage)
        self._storage, self._releases, self._seconds = storage, releases, seconds
        self._etag: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Check once, which the storage must answer, then in the background until `stop`."""
        if not self.poll():
            raise ServiceError(str(self.problem))
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; wait at most 5 s for a storage that hangs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def poll(self) -> bool:
        """Check the champion once; record a failure. False if the storage does not answer."""
        try:
            self._check()
            self.checked_at = time.time()
        except ServiceError as error:
            self._fail("storage", str(error))
            return False
        except HandsignsError as error:
            self._fail("release", f"The champion was rejected: {error}")
        except Exception as error:  # a full disk, say: the old model must go on answering
            self._fail("other", f"{type(error).__name__}: {error}")
        return True

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self.poll()

    def _check(self) -> None:
        champion = read_champion(self._storage)
        if champion is None or champion.etag == self._etag:
            gone = champion is None and self.model
            self.problem = "The champion pointer is gone." if gone else None
            return
        pointer = champion.pointer
        folder = fetch(self._storage, pointer.release, self._releases)
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
    seconds = workspace.settings.serve_follow_seconds
    follower = Follower(workspace.storage, workspace.project.releases, seconds)
    follower.start()
    return follower
