"""The local stack of one checkout: opened by its first user, closed by its last."""

import contextlib
import fcntl
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr, ValidationError

from flows.local import servers
from flows.local.credentials import local_credentials, prefect_login
from flows.local.servers import POLL_SECONDS, Server, running_seaweedfs
from flows.settings import Settings
from tasks.errors import BusyError, HandsignsError, ServiceError
from tasks.io import write_json
from tasks.project import Project
from tasks.releases.signing import Trust
from tasks.services.s3 import S3Address, Storage, check_conditional_writes, redact_url

FILE = "service.json"
LOCK = "service.lock"


class Running(BaseModel):
    """Addresses of a running service.

    Args:
        pid: the process runner.
        s3: endpoint of the local S3 server; None where the environment names another.
        mlflow: tracking URI of the local MLflow server, or None as before.
        prefect: URL of the local Prefect API, or None as before.
        database: PostgreSQL's address without user and password; None with SQLite.
    """

    pid: int
    s3: str | None = None
    mlflow: str | None = None
    prefect: str | None = None
    database: str | None = None


def find_running(folder: Path) -> Running | None:
    """Return the service that runs in a checkout, or None.

    Args:
        folder: the checkout's `.local/`.
    """
    file = folder / FILE
    if not file.is_file() or not is_held(folder):
        return None
    try:
        return Running.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def keep_running(folder: Path, running: Running) -> None:
    """Write what `find_running` reads, for its owner alone."""
    write_json(folder / FILE, running.model_dump())
    (folder / FILE).chmod(0o600)


def hold(folder: Path) -> int | None:
    """Take the service's lock.

    Returns:
        A descriptor that holds it, to be handed to the process runner; None where
        another one has it.
    """
    descriptor = _open(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_held(folder: Path) -> bool:
    """Tell whether a process runner is there."""
    descriptor = _open(folder)
    try:
        # Shared, so that two who look at once do not take each other for it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


Mark = tuple[tuple[str, int], ...]


class SharedStorage:
    """Open the storage of a checkout; the configured one, or the local one for a moment.

    Args:
        settings: may name an S3 service.
        project: a local server keeps its files below `project.local`.
        trust: whose signatures releases must have.
    """

    def __init__(self, settings: Settings, project: Project, trust: Trust) -> None:
        self._settings, self._project, self._trust = settings, project, trust
        self._seen: Mark | None = None

    @cached_property
    def _configured(self) -> Storage:
        with embedded(self._settings, self._project) as services:
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
                with embedded(self._settings, self._project, patience=0) as services:
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
        return running_seaweedfs(self._project.local.resolve(), self._settings.bucket)

    def _mark(self) -> Mark:
        """Sizes of the volumes, which only ever grow by what is written."""
        volumes = (self._project.local / "seaweedfs").rglob("*.dat")
        return tuple(sorted((str(path), path.stat().st_size) for path in volumes))


CHECK_SECONDS = 10.0


@dataclass
class Services:
    """Addresses of S3, MLflow and Prefect; asking for one starts it if need be.

    Args:
        settings: what the environment names is used as it is.
        folder: servers keep their state here.
        patience: longest wait in seconds for another run's server.
        share: use the S3 server that another run of this checkout keeps, while it
            does; for what only reads and is soon done.
    """

    settings: Settings
    folder: Path
    patience: float = 30.0
    share: bool = False
    _s3: tuple[Server, S3Address] | None = field(default=None, init=False)
    _prefect: tuple[Server, str] | None = field(default=None, init=False)

    def start_s3(self) -> None:
        """Let the local S3 server start in the background, if one is needed."""
        kept = self._running and self._running.s3
        if self.settings.s3_endpoint_url is None and not kept and self._shared_s3() is None:
            self._own_s3()

    def start_prefect(self) -> str:
        """Let the local Prefect server start in the background, if one is needed.

        Returns:
            The URL at which Prefect's API answers, once it is ready.
        """
        if named := self.prefect_named():
            return named
        if self._prefect is None:
            self._prefect = servers.prefect(
                self.folder,
                self.patience,
                prefect_login(self.settings, self.folder),
                database=self._database("prefect"),
            )
            self._prefect[0].start()
        return self._prefect[1]

    def s3(self) -> S3Address:
        """Return the address of S3 once it is ready.

        Raises:
            ServiceError: the local server did not start, or that of `handsigns up` is silent.
            BusyError: another run of this checkout keeps it.
        """
        if self.settings.s3_endpoint_url:
            return configured_s3(self.settings)
        if shared := self._shared_s3():
            return shared
        server, address = self._own_s3()
        server.wait()
        return address

    def mlflow(self) -> str:
        """Return MLflow's tracking URI; locally a database, which needs no server."""
        if named := self.settings.mlflow_tracking_uri or (self._running and self._running.mlflow):
            return named
        return self._database("mlflow") or f"sqlite:///{self.folder / 'mlflow.db'}"

    def mlflow_artifacts(self) -> S3Address | None:
        """Return where MLflow's files are, or None where its server decides."""
        return None if self.settings.mlflow_tracking_uri else self.s3()

    def mlflow_login(self) -> str | None:
        """Return what the MLflow of `handsigns up` asks for; None where it is not used."""
        if self.settings.mlflow_tracking_uri or not (self._running and self._running.mlflow):
            return None
        return local_credentials(self.folder).login

    def prefect(self) -> str:
        """Return the URL of Prefect's API once it is ready.

        Raises:
            ServiceError: the local server did not start.
            BusyError: another run of this checkout keeps it.
        """
        url = self.start_prefect()
        if self._prefect:
            self._prefect[0].wait()
        return url

    def stop(self) -> None:
        """Stop every server that was started here, and return when all are gone."""
        started = [pair[0] for pair in (self._s3, self._prefect) if pair]
        self._s3 = self._prefect = None
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.stop, started))

    @cached_property
    def _running(self) -> Running | None:
        return find_running(self.folder)

    def prefect_named(self) -> str | None:
        """Return the API that the environment or `handsigns up` names, or None."""
        running = self._running.prefect if self._running else None
        return self.settings.prefect_api_url or running

    def _database(self, name: str) -> str | None:
        if self.settings.database_url is None:
            return None
        from flows.local.servers import database_url, make_databases

        url = self.settings.database_url.get_secret_value()
        make_databases(url)
        return database_url(url, name)

    def _shared_s3(self) -> S3Address | None:
        if self._s3:
            return None
        if self._running and self._running.s3:
            return self._kept_s3()
        return self._found_s3() if self.share else None

    def _found_s3(self) -> S3Address | None:
        return servers.running_seaweedfs(self.folder, self.settings.bucket)

    def _kept_s3(self) -> S3Address | None:
        """The server of `handsigns up`, which starts it again where it ends; nobody else may."""
        deadline = time.monotonic() + self.patience
        while (running := find_running(self.folder)) and running.s3:
            if found := self._found_s3():
                return found
            if time.monotonic() > deadline:
                # Who waits for nobody looks again soon.
                kind = ServiceError if self.patience else BusyError
                raise kind(
                    f"The S3 server of `handsigns up` does not answer. Received: {running.s3}. "
                    f"See {self.folder / 'logs' / 'seaweedfs.log'}, and run again."
                )
            time.sleep(POLL_SECONDS)
        return None

    def _own_s3(self) -> tuple[Server, S3Address]:
        if self._s3 is None:
            self._s3 = servers.seaweedfs(self.folder, self.settings.bucket, self.patience)
            self._s3[0].start()
        return self._s3


@contextlib.contextmanager
def embedded(
    settings: Settings, project: Project, patience: float = 30.0, share: bool = False
) -> Iterator[Services]:
    """Resolve the services for one run and stop with it what was started.

    Args:
        settings: names the services that exist already.
        project: local servers keep their state below `project.local`.
        patience: longest wait in seconds for another run's local server.
        share: use another run's S3 server instead of waiting; for short readers.
    """
    folder = project.local.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    services = Services(settings, folder, patience, share)
    try:
        yield services
    finally:
        services.stop()


def check_reachable(settings: Settings) -> None:
    """Ask every configured service for a sign of life, all at once, within 30 s.

    Raises:
        ServiceError: one does not answer; the message names its address.
    """
    checks: list[Callable[[], None]] = []
    if settings.s3_endpoint_url:
        checks.append(lambda: _check_s3(Storage(configured_s3(settings))))
    tracking, api = settings.mlflow_tracking_uri, settings.prefect_api_url
    if tracking and tracking.startswith("http"):
        checks.append(lambda: _check("MLflow", "MLFLOW_TRACKING_URI", tracking))
    if api:
        checks.append(lambda: _check("Prefect", "PREFECT_API_URL", api))
    if settings.dask_address:
        scheduler = settings.dask_address
        checks.append(lambda: _check_dask(scheduler))
    with ThreadPoolExecutor() as pool:
        for outcome in [pool.submit(check) for check in checks]:
            outcome.result()


def _check_s3(storage: Storage) -> None:
    storage.check()
    check_conditional_writes(storage)


def _check(service: str, variable: str, url: str) -> None:
    address = url.rstrip("/") + "/health"
    try:
        with urllib.request.urlopen(address, timeout=CHECK_SECONDS):  # noqa: S310
            return
    except urllib.error.HTTPError as error:
        # It answers; whether it lets us in is for its own client to find out.
        if error.code in (401, 403):
            return
        reason = f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
    raise ServiceError(
        f"{service} does not answer at {redact_url(url)} ({reason}). "
        f"Check {variable} and the service."
    )


def _check_dask(scheduler: str) -> None:
    parts = urlsplit(scheduler)
    try:
        socket.create_connection((str(parts.hostname), parts.port or 0), CHECK_SECONDS).close()
    except OSError as error:
        raise ServiceError(
            f"Dask does not answer at {scheduler} ({error.strerror or error}). "
            "Check HANDSIGNS_DASK_ADDRESS and the scheduler."
        ) from None
    from flows.dask import check_scheduler

    check_scheduler(scheduler, CHECK_SECONDS)


def configured_s3(settings: Settings) -> S3Address:
    return S3Address(
        str(settings.s3_endpoint_url),
        settings.bucket,
        settings.s3_region,
        _plain(settings.aws_access_key_id),
        _plain(settings.aws_secret_access_key),
        _plain(settings.aws_session_token),
    )


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
