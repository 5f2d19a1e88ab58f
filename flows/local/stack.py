"""The services of one checkout: those that the settings name, and a local one for every other."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel

from flows.local import servers
from flows.local.clients import check_reachable, configured_s3
from flows.local.credentials import local_credentials
from flows.local.database import (
    database_url,
    make_databases,
    migrate,
    mlflow_file_url,
    redact_database,
)
from flows.local.processes import (
    LocalStack,
    Program,
    is_alive,
    is_used,
    read_state,
)
from flows.local.servers import HOST, PORTS, local_s3
from flows.local.supervisor import POLL_SECONDS, USERS, open_lock, stop_group
from flows.settings import Settings
from tasks.errors import BusyError, HandsignsError, ServiceError
from tasks.project import Project
from tasks.releases.signing import Trust
from tasks.services.s3 import S3Address, Storage

START_SECONDS = 300.0
STOP_SECONDS = 60.0
RUN_SECONDS = 15.0
"""In which a flow run that is told to stop notifies people."""


class Running(BaseModel):
    """Addresses of a service that `handsigns up` started.

    Args:
        pid: the worker's supervisor.
        s3: endpoint; None, as below, where the settings name a service.
        mlflow: tracking URI.
        prefect: URL of the API.
        database: PostgreSQL's address without user and password; None with SQLite.
    """

    pid: int = 0
    s3: str | None = None
    mlflow: str | None = None
    prefect: str | None = None
    database: str | None = None


def find_running(folder: Path) -> Running | None:
    """Return the service that is up in a checkout with this `.local/`, or None."""
    state = read_state(folder, "worker")
    return Running(pid=state["pid"], **state["about"]) if state else None


class Services:
    """Addresses of S3, MLflow and Prefect; asking for one starts it if need be.

    Args:
        settings: what they name is used as it is.
        folder: the checkout's `.local/`; local servers keep their state here.
        patience: longest wait in seconds for a local server that does not answer.

    Every method raises `ServiceError` for a local server that does not start or answer, and
    `BusyError` for one that does not stop or runs with other settings.
    """

    def __init__(self, settings: Settings, folder: Path, patience: float = 30.0) -> None:
        self.settings, self.folder = settings, folder
        self._stack = LocalStack(folder, patience)
        self._programs: dict[str, Program] = {}

    def start_s3(self) -> None:
        """Start the local S3 server in the background, if one is needed."""
        if self.settings.s3_endpoint_url is None:
            self._start("seaweedfs")

    def start_prefect(self, host: str = HOST) -> str:
        """Return the URL of Prefect's API; a local server starts in the background."""
        return self.prefect_named() or self._start("prefect", host).url

    def s3(self) -> S3Address:
        """Return the address of S3 once it is ready."""
        address = self._s3_address()
        if self.settings.s3_endpoint_url is None:
            self._stack.wait(self._programs["seaweedfs"])
        return address

    def mlflow(self) -> str:
        """Return MLflow's tracking URI; locally a database, which needs no server."""
        if named := self.settings.mlflow_tracking_uri or (self._running and self._running.mlflow):
            return named
        self._prepare_database("mlflow")
        if self.settings.database_url:
            return database_url(self.settings.database_url.get_secret_value(), "mlflow")
        return mlflow_file_url(self.folder)

    def mlflow_artifacts(self) -> S3Address | None:
        """Return where MLflow's files are, or None where its server decides."""
        return None if self.settings.mlflow_tracking_uri else self.s3()

    def mlflow_login(self) -> str | None:
        """Return the login of the MLflow server of `handsigns up`; None where it is not used."""
        if self.settings.mlflow_tracking_uri or not (self._running and self._running.mlflow):
            return None
        return local_credentials(self.folder).login

    def prefect(self) -> str:
        """Return the URL of Prefect's API once it is ready."""
        return self.prefect_named() or self._ready("prefect").url

    def prefect_named(self) -> str | None:
        """Return the API that the settings or `handsigns up` name, or None."""
        running = self._running.prefect if self._running else None
        return self.settings.prefect_api_url or running

    def stop(self) -> None:
        """Use no local server any more; those that nobody else uses are gone afterwards."""
        self._stack.close()
        self._programs.clear()

    def start_all(self) -> Running:
        """Start every server that the settings do not name, and wait until all answer."""
        known = self.settings
        self.start_s3()
        self.start_prefect(known.host)
        if not known.mlflow_tracking_uri:
            self._start("mlflow")
        url = {name: self._ready(name).url for name in self._programs}
        database = known.database_url and redact_database(known.database_url.get_secret_value())
        return Running(
            s3=url.get("seaweedfs"),
            mlflow=url.get("mlflow"),
            prefect=url.get("prefect"),
            database=database,
        )

    def start_worker(self, running: Running) -> None:
        """Start a worker; it stays after `stop`, and with it all that runs now."""
        about = running.model_dump(exclude={"pid"})
        program = servers.worker(self.folder, self.settings, self.start_prefect(), about)
        self._stack.start("worker", 0, lambda ports: program)

    @cached_property
    def _running(self) -> Running | None:
        return find_running(self.folder)

    def _s3_address(self) -> S3Address:
        if self.settings.s3_endpoint_url:
            return configured_s3(self.settings)
        return local_s3(self.folder, self.settings.bucket, self._start("seaweedfs").ports[0])

    def _ready(self, name: str) -> Program:
        program = self._start(name)
        self._stack.wait(program)
        return program

    def _start(self, name: str, host: str = HOST) -> Program:
        if name not in self._programs:
            settings = self.settings

            def describe(ports: tuple[int, ...]) -> Program:
                if name == "seaweedfs":
                    return servers.seaweedfs(self.folder, settings.bucket, ports)
                if name == "mlflow":
                    return servers.mlflow(self.folder, settings, self._s3_address(), ports)
                return servers.prefect(self.folder, settings, ports, host)

            if name != "seaweedfs":
                self._prepare_database(name)
            self._programs[name] = self._stack.start(name, PORTS[name], describe)
        return self._programs[name]

    def _prepare_database(self, name: str) -> None:
        if self.settings.database_url:
            make_databases(self.settings.database_url.get_secret_value())
        elif not is_alive(self.folder, name):
            migrate(self.folder, name)


@contextmanager
def embedded(settings: Settings, project: Project, patience: float = 30.0) -> Iterator[Services]:
    """Use the services for as long as the block lasts."""
    folder = project.local.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    services = Services(settings, folder, patience)
    try:
        yield services
    finally:
        services.stop()


def up(project: Project, settings: Settings) -> tuple[Running, bool]:
    """Start what the settings do not name, wait until each answers, and register the flows.

    Returns:
        Where each part answers, and whether it was started now.

    Raises:
        BusyError: another command starts or stops the service.
        SettingsError: `prefect.yaml` cannot be used, or another checkout has the work pool.
        ServiceError: a part did not start; all others are stopped again.
    """
    from flows.deploy import (
        asking,
        check_owner,
        declared_deployments,
        deploy,
        mark_lost_runs,
        wait_for_worker,
    )

    with _changing(project) as folder, embedded(settings, project) as services:
        if found := find_running(folder):
            return found, False
        declared_deployments(project)
        check_reachable(settings)
        running = services.start_all()
        api = str(settings.prefect_api_url or running.prefect)
        try:
            check_owner(project, settings, api)
            deploy(project, settings, api)
            with asking(api):
                if running.prefect:
                    # Of a database that others use, too, those without a pool may be theirs.
                    mark_lost_runs(project, settings.database_url is None)
                services.start_worker(running)
                wait_for_worker(START_SECONDS)
        except BaseException:
            _stop_worker(folder)
            raise
        return find_running(folder) or running, True


def down(project: Project) -> bool:
    """Stop the service; what another command still uses stops with that.

    Flow runs are stopped first: a worker that is stopped kills them, and they could not
    notify anybody.

    Returns:
        Whether anything ran.

    Raises:
        ServiceError: something is still there after 60 s.
    """
    if not project.local.is_dir():
        return False
    with _changing(project) as folder:
        stopped = _stop_worker(folder)
        users = open_lock(folder / USERS)
        for name in PORTS:
            if is_alive(folder, name) and not is_used(users):
                _wait_for_end(folder, name)
            elif not is_alive(folder, name):
                stopped |= stop_group(folder, name)
        os.close(users)
    return stopped


@contextmanager
def _changing(project: Project) -> Iterator[Path]:
    folder = project.local.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(folder / "service.lock", timeout=0):
            yield folder
    except Timeout:
        raise BusyError(
            "Another command starts or stops the service of this checkout. "
            "Wait for it, and run again."
        ) from None


def _stop_worker(folder: Path) -> bool:
    state = read_state(folder, "worker")
    with suppress(OSError, ValueError):
        _stop_runs(int((folder / "worker.group").read_text()))
    if state:
        with suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGTERM)
        _wait_for_end(folder, "worker")
    return state is not None


def _stop_runs(worker: int) -> None:
    """Let a worker's flow runs end by themselves."""
    import psutil

    runs = []
    with suppress(psutil.NoSuchProcess):
        for one in psutil.Process(worker).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that ends meanwhile spares no other
                if "prefect.engine" in one.cmdline():
                    one.terminate()
                    runs.append(one)
    psutil.wait_procs(runs, RUN_SECONDS)


def _wait_for_end(folder: Path, name: str) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while is_alive(folder, name):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"The local {name} server does not stop. See {folder / 'logs' / name}.log, and "
                "stop it yourself."
            )
        time.sleep(POLL_SECONDS)


Mark = tuple[tuple[str, int], ...]


class SharedStorage:
    """The storage of a checkout; a local one is opened for a moment whenever it changed."""

    def __init__(self, settings: Settings, project: Project, trust: Trust) -> None:
        self._settings, self._project, self._trust = settings, project, trust
        self._seen: Mark | None = None

    @cached_property
    def _configured(self) -> Storage:
        return Storage(configured_s3(self._settings), self._trust)

    @contextmanager
    def opened(self, again: bool = False) -> Iterator[Storage | None]:
        """Give the storage, or None where nothing was written since, unless asked `again`."""
        if self._settings.s3_endpoint_url:
            yield self._configured
            return
        before = self._mark()
        if before == self._seen and not again:
            yield None
            return
        try:
            with embedded(self._settings, self._project) as services:
                yield Storage(services.s3(), self._trust)
        except HandsignsError as error:
            # What was read and refused need not be read again, either.
            if isinstance(error, (BusyError, ServiceError)):
                raise
            self._seen = self._mark_after(before)
            raise
        self._seen = self._mark_after(before)

    def _mark_after(self, before: Mark) -> Mark:
        """A server writes notes while it stops; what another user writes is seen next time."""
        return before if is_alive(self._project.local, "seaweedfs") else self._mark()

    def _mark(self) -> Mark:
        """Sizes of the volumes, which only grow by what is written."""
        volumes = (self._project.local / "seaweedfs").rglob("*.dat")
        return tuple(sorted((str(path), path.stat().st_size) for path in volumes))
