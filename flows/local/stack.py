"""The services of one checkout: those that the settings name, and a local one for every other."""

import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil

from flows.local import servers
from flows.local.clients import (
    asking_prefect,
    check_reachable,
    configured_s3,
    local_credentials,
    point_prefect_at,
)
from flows.local.processes import LocalStack, Program, read_state, stop_programs
from flows.local.servers import PORTS, local_s3
from flows.settings import Settings, load_settings
from tasks.errors import HandsignsError, SettingsError
from tasks.project import Project
from tasks.services.s3 import S3Address, redact_url

WORKER_SECONDS = 300.0
RUN_SECONDS = 15.0  # in which a flow run that must stop notifies people
PAUSE = 2.0  # seconds between two looks at what runs
KEEPER = "service"  # the process that keeps all others up after `up`

_log = logging.getLogger(__name__)


def find_running(folder: Path) -> dict[str, Any]:
    """Pid and addresses, as far as no setting names them, of the service that is up; or empty."""
    state = read_state(folder, KEEPER)
    return {"pid": state["pid"], **state["about"]} if state else {}


class Services:
    """Addresses of S3, MLflow and Prefect; asking for one that no setting names starts it."""

    def __init__(self, settings: Settings, project: Project) -> None:
        self.settings, self.folder = settings, project.local.resolve()
        if "?" in str(self.folder):
            raise SettingsError(
                f"The path '{self.folder}' holds a question mark, which addresses of databases "
                "cannot hold. Rename the folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._stack = LocalStack(self.folder)
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

    def mlflow(self) -> tuple[str, S3Address | None, str | None]:
        """MLflow's tracking URI, where its files are if its server does not say, and its login."""
        if named := self.settings.mlflow_tracking_uri:
            return named, None, None
        if server := self._running.get("mlflow"):
            return server, self.s3(), local_credentials(self.folder).login
        self._prepare_database("mlflow")  # which needs no server
        return servers.registry_url(self.folder, self.settings), self.s3(), None

    def prefect_named(self) -> str | None:
        """Return the API that the settings or `handsigns up` name, or None."""
        return self.settings.prefect_api_url or self._running.get("prefect")

    def close(self) -> None:
        """Use no local server any more; those that nobody else uses are gone afterwards."""
        self._stack.close()

    def start_all(self) -> dict[str, Any]:
        """Start every server that the settings do not name; return where all answer."""
        for wait in (False, True):
            url = {name: self._start(name, wait).url for name in self._needed()}
        secret = self.settings.database_url
        addresses = {name: url.get(name) for name in ("mlflow", "prefect")}
        database = secret and redact_url(secret.get_secret_value())
        return {"s3": url.get("seaweedfs"), **addresses, "database": database}

    def start_keeper(self, addresses: dict[str, Any]) -> None:
        """Start the process that keeps everything up from here on, and a worker."""
        program = servers.keeper(KEEPER, self.folder, addresses)
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
    def _running(self) -> dict[str, Any]:
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


def up(project: Project, settings: Settings) -> tuple[dict[str, Any], bool]:
    """Start the service; return where each part answers, and whether it was started now."""
    from flows import deploy

    with closing(Services(settings, project)) as services:
        if found := find_running(services.folder):
            return found, False
        deploy.declared(project)
        check_reachable(settings)
        addresses = services.start_all()
        api = settings.prefect_api_url or addresses["prefect"]
        try:
            point_prefect_at(api, services.folder, settings)
            with asking_prefect(api) as client:
                deploy.check_owner(client, project)
                deploy.deploy(project, settings, api)
                services.start_keeper(addresses)
                deploy.wait_for_worker(client, WORKER_SECONDS)
        except BaseException:
            stop_programs(services.folder, [KEEPER, "worker"])
            raise
        return find_running(services.folder), True


def keep_up() -> None:
    """Keep the service of this checkout up until this process, which `up` starts, is ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with closing(Services(load_settings(), Project(Path.cwd()))) as services:
        while True:
            try:
                services.keep_up()
            except HandsignsError as error:
                _log.warning("%s", error)
            time.sleep(PAUSE)


def down(project: Project) -> bool:
    """Stop the service, and return whether anything ran; what a command uses stops with it."""
    folder = project.local.resolve()
    ran = any(read_state(folder, name) for name in (KEEPER, "worker", *PORTS))
    if worker := read_state(folder, "worker"):
        # Runs first: a worker that is stopped kills them, and they could not notify anybody.
        runs = []
        for one in psutil.Process(worker["pid"]).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # one that ends meanwhile spares no other
                if "prefect.engine" in one.cmdline():
                    one.terminate()
                    runs.append(one)
        psutil.wait_procs(runs, RUN_SECONDS)
    for name in (KEEPER, "worker"):
        stop_programs(folder, [name])
    if ran:
        stack = LocalStack(folder)
        stack.join()
        stack.close()
    return ran
