"""How far a stage is, as a bar in the Prefect UI."""

import logging
import re
import time
from typing import cast
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from tasks.progress import Progress

SECONDS = 2.0
"""Between two updates of one bar."""

_log = logging.getLogger(__name__)


class ShownProgress:
    """A `Progress` that tells the UI now and then, and another listener always.

    Args:
        also: the other listener, such as the terminal.
    """

    def __init__(self, also: Progress) -> None:
        self._also = also
        self._bars: dict[str, tuple[UUID, float]] = {}
        self._silenced = False

    def __call__(self, what: str, done: int, total: int) -> None:
        self._also(what, done, total)
        if self._silenced:
            return
        try:
            self._show(what, done, total)
        except (HTTPError, PrefectException) as error:
            # A bar is not worth a training.
            self._silenced = True
            _log.warning("Progress is not shown any more (%s).", type(error).__name__)

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        share = 100.0 * done / max(1, total)
        told = f"{what}: {done} of {total}"
        if what not in self._bars:
            if done < total:
                key = f"progress-{re.sub('[^a-z0-9]+', '-', what.lower()).strip('-')}"
                # Its type allows for a coroutine, which only an asynchronous caller gets.
                bar = cast(UUID, create_progress_artifact(share, key, told))
                self._bars[what] = (bar, now)
            return
        bar, last = self._bars[what]
        if done >= total or now - last > SECONDS:
            update_progress_artifact(bar, share, told)
            self._bars[what] = (bar, now)
        if done >= total:
            del self._bars[what]
