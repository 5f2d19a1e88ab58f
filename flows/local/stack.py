"""The services of one checkout: those that the settings name, and a local one for every other."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path

import psutil
from pydantic import BaseModel

from flows.local import servers
from flows.local.clients import check_reachable, configured_s3, local_credentials
from flows.local.processes import LocalStack, Program, read_state, stop_programs
from flows.local.servers import PORTS, local_s3
from flows.settings import Settings, load_settings
from tasks.errors import HandsignsError, SettingsError
from tasks.project import Project
from tasks.services.s3 import S3Address, redact_url

WORKER_SECONDS = 300.0
RUN_SECONDS = 15.0
"""In which a flow run that must stop notifies people."""
PAUSE = 2.0
"""Seconds between two looks at what runs."""
LOG_BYTES = 20_000_000
KEEPER = "service"
"""The process that keeps all others up after `up`."""
PROGRAMS = (KEEPER, "worker", *PORTS)

_log = logging.getLogger(__name__)


class Running(BaseModel):
    """Addresses of a service that `handsigns up` started; None where the settings name one."""

    pid: int = 0
    s3: str | None = None
    mlflow: str | None = None
    prefect: str | None = None
    database: str | None = None


def find_running(folder: Path) -> Running | None:
    """Return the service that is up in a checkout with this `.local/`, or None."""
    state = read_state(folder, KEEPER)
    return Running(pid=state["pid"], **state["about"]) if state else None


class Services:
    """Addresses of S3, MLflow and Prefect; asking for one starts it if need be.

    What the settings name is used as it is. Local servers keep their state in `folder`, the
    checkout's `.local/`.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        if "?" in str(folder):
            raise SettingsError(
                f"The path '{folder}' holds a question mark, which addresses of databases cannot "
                "hold. Rename the folder."
            )
        self.settings, self.folder = settings, folder
        self._stack = LocalStack(folder)
        self._programs: dict[str, Program] = {}

    def s3(self, wait: bool = True) -> S3Address:
        """Return the address of S3; a local server starts in the background."""
        if self.settings.s3_endpoint_url:
            return configured_s3(self.settings)
        program = self._start("seaweedfs", wait)
        return local_s3(self.folder, self.settings.bucket, program.ports[0])

    def prefect(self, wait: bool = True) -> str:
        """Return the URL of Prefect's API; a local server starts in the background."""
        return self.prefect_named() or self._start("prefect", wait).url

    def mlflow(self) -> str:
        """Return MLflow's tracking URI; locally a database, which needs no server."""
        if named := self.settings.mlflow_tracking_uri or (self._running and self._running.mlflow):
            return named
        self._prepare_database("mlflow")
        return servers.registry_url(self.folder, self.settings)

    def mlflow_artifacts(self) -> S3Address | None:
        """Return where MLflow's files are, or None where its server decides."""
        return None if self.settings.mlflow_tracking_uri else self.s3()

    def mlflow_login(self) -> str | None:
        """Return the login of the MLflow server of `handsigns up`; None where it is not used."""
        if self.settings.mlflow_tracking_uri or not (self._running and self._running.mlflow):
            return None
        return local_credentials(self.folder).login

    def prefect_named(self) -> str | None:
        """Return the API that the settings or `handsigns up` name, or None."""
        running = self._running.prefect if self._running else None
        return self.settings.prefect_api_url or running

    def stop(self) -> None:
        """Use no local server any more; those that nobody else uses are gone afterwards."""
        self._stack.close()

    def start_all(self) -> Running:
        """Start every server that the settings do not name, and wait until all answer."""
        for wait in (False, True):
            url = {name: self._start(name, wait).url for name in self._needed()}
        database = self.settings.database_url
        return Running(
            s3=url.get("seaweedfs"),
            mlflow=url.get("mlflow"),
            prefect=url.get("prefect"),
            database=database and redact_url(database.get_secret_value()),
        )

    def start_keeper(self, running: Running) -> None:
        """Start the process that keeps everything up from here on, and a worker."""
        about = running.model_dump(exclude={"pid"})
        program = servers.keeper(KEEPER, self.folder, about)
        # Until it is a user, too, whoever started it would stop everything with itself.
        self._stack.wait(self._stack.start(KEEPER, 0, lambda _: program))

    def keep_up(self) -> None:
        """Start what ended, and a worker."""
        for name in self._needed():
            if not read_state(self.folder, name):
                _log.warning("%s ended, and is started again.", name)
                self._start(name)
        if not read_state(self.folder, "worker"):
            api = self.settings.prefect_api_url or self._start("prefect").url
            program = servers.worker(self.folder, self.settings, api)
            self._stack.start("worker", 0, lambda _: program)

    @cached_property
    def _running(self) -> Running | None:
        return find_running(self.folder)

    def _needed(self) -> list[str]:
        known = self.settings
        named = (known.s3_endpoint_url, known.mlflow_tracking_uri, known.prefect_api_url)
        return [name for name, address in zip(PORTS, named, strict=True) if address is None]

    def _start(self, name: str, wait: bool = False) -> Program:
        if name not in self._programs or not read_state(self.folder, name):
            folder, settings = self.folder, self.settings
            describe: Callable[[tuple[int, ...]], Program]
            if name == "seaweedfs":
                describe = partial(servers.seaweedfs, folder, settings.bucket)
            else:
                self._prepare_database(name)
                describe = partial(servers.prefect, folder, settings)
            if name == "mlflow":
                describe = partial(servers.mlflow, folder, settings, self.s3(wait=False))
            self._programs[name] = self._stack.start(name, PORTS[name], describe)
        if wait:
            self._stack.wait(self._programs[name])
        return self._programs[name]

    def _prepare_database(self, name: str) -> None:
        if self.settings.database_url:
            servers.make_databases(self.settings.database_url.get_secret_value())
        elif not read_state(self.folder, name):
            servers.migrate(self.folder, name)


@contextmanager
def embedded(settings: Settings, project: Project) -> Iterator[Services]:
    """Use the services for as long as the block lasts."""
    services = Services(settings, _local_folder(project))
    try:
        yield services
    finally:
        services.stop()


def _local_folder(project: Project) -> Path:
    folder = project.local.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def up(project: Project, settings: Settings) -> tuple[Running, bool]:
    """Start what the settings do not name, wait until each answers, and register the flows.

    Returns where each part answers, and whether it was started now.
    """
    from flows import deploy

    with embedded(settings, project) as services:
        if found := find_running(services.folder):
            return found, False
        deploy.declared_deployments(project)
        check_reachable(settings)
        running = services.start_all()
        api = str(settings.prefect_api_url or running.prefect)
        try:
            deploy.check_owner(project, settings, api)
            deploy.deploy(project, settings, api)
            with deploy.asking(api):
                if running.prefect:
                    # Of a database that others use, too, those without a pool may be theirs.
                    deploy.mark_lost_runs(project, settings.database_url is None)
                services.start_keeper(running)
                deploy.wait_for_worker(WORKER_SECONDS)
        except BaseException:
            stop_programs(services.folder, [KEEPER, "worker"])
            raise
        return find_running(services.folder) or running, True


def keep_up() -> None:
    """Keep the service of this checkout up until this process, which `up` starts, is ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with embedded(load_settings(), Project(Path.cwd())) as services:
        while True:
            try:
                services.keep_up()
            except HandsignsError as error:
                _log.warning("%s", error)
            for log in (services.folder / "logs").glob("*.log"):
                if log.stat().st_size > LOG_BYTES:
                    shutil.copyfile(log, f"{log}.1")
                    log.write_bytes(b"")
            time.sleep(PAUSE)


def down(project: Project) -> bool:
    """Stop the service, and return whether anything ran; what a command uses stops with it."""
    if not project.local.is_dir():
        return False
    folder = project.local.resolve()
    before = [name for name in PROGRAMS if read_state(folder, name)]
    if worker := read_state(folder, "worker"):
        # Runs first: a worker that is stopped kills them, and they could not notify anybody.
        runs = []
        for one in psutil.Process(worker["pid"]).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that ends meanwhile spares no other
                if "prefect.engine" in one.cmdline():
                    one.terminate()
                    runs.append(one)
        psutil.wait_procs(runs, RUN_SECONDS)
    stop_programs(folder, [KEEPER])
    stop_programs(folder, ["worker"])
    stack = LocalStack(folder)
    stack.join()
    stack.close()
    return before != [name for name in PROGRAMS if read_state(folder, name)]
