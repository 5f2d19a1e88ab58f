"""This checkout's own S3 server, opened for a moment at a time.

A process that runs for long must not keep the server, or no retrain could start. It
looks at the files instead, and opens the server only when somebody wrote to them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from flows.loopback.local import embedded
from flows.loopback.servers import running_seaweedfs
from flows.settings import Settings
from tasks.errors import BusyError, HandsignsError, ServiceError
from tasks.layout import Layout
from tasks.services.addresses import S3Address
from tasks.services.signature import Trust
from tasks.services.storage import Storage

Mark = tuple[tuple[str, int], ...]


class SharedStorage:
    """Open the storage of a checkout; the configured one, or the local one for a moment.

    Args:
        settings: may name an S3 service.
        layout: a local server keeps its files below `layout.local`.
        trust: whose signatures releases must have.
    """

    def __init__(self, settings: Settings, layout: Layout, trust: Trust) -> None:
        self._settings, self._layout, self._trust = settings, layout, trust
        self._seen: Mark | None = None

    @cached_property
    def _configured(self) -> Storage:
        with embedded(self._settings, self._layout) as services:
            return Storage(services.s3(), self._trust)

    @contextmanager
    def opened(self, again: bool = False) -> Iterator[Storage | None]:
        """Give the storage, or None where nothing was written since it was last read.

        Args:
            again: give it all the same.

        Raises:
            BusyError: a run keeps the local server and does not answer yet, or no longer.
            ServiceError: the local server did not start.
        """
        if self._settings.s3_endpoint_url:
            yield self._configured
            return
        mark = self._mark()
        if mark == self._seen and not again:
            yield None
            return
        kept = self._kept_by_a_run()
        try:
            if kept:
                yield Storage(kept, self._trust)
            else:
                with embedded(self._settings, self._layout, patience=0) as services:
                    yield Storage(services.s3(), self._trust)
        except HandsignsError as error:
            # What was read and refused is no more to be read than what was accepted.
            if not isinstance(error, (BusyError, ServiceError)):
                self._seen = self._mark_after(kept, mark)
            raise
        self._seen = self._mark_after(kept, mark)

    def _mark_after(self, kept: S3Address | None, before: Mark) -> Mark:
        """Of a run's server, so that the next look sees what was written meanwhile, the one before.

        A server of our own writes notes while it stops, and nobody else could.
        """
        return before if kept else self._mark()

    def _kept_by_a_run(self) -> S3Address | None:
        return running_seaweedfs(self._layout.local.resolve(), self._settings.bucket)

    def _mark(self) -> Mark:
        """Sizes of the volumes, which only ever grow by what is written."""
        volumes = (self._layout.local / "seaweedfs").rglob("*.dat")
        return tuple(sorted((str(path), path.stat().st_size) for path in volumes))
