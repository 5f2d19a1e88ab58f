"""The local programs, SeaweedFS, MLflow, Prefect and its worker, and their databases."""

import hashlib
import logging
import os
import secrets
import sqlite3
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from flows.local.clients import ask, local_credentials, point_prefect_at, prefect_login
from flows.local.processes import GRPC, Program, read_state
from flows.settings import Settings
from tasks.errors import ServiceError
from tasks.io import atomic_write, read_json, write_json
from tasks.services.mlflow import PREFIX
from tasks.services.s3 import S3Address, Storage, redact_url

HOST = "127.0.0.1"
TMP = "/tmp"  # noqa: S108, SeaweedFS's gRPC sockets are there, whatever TMPDIR says
DVC_BUCKET = "dvc"
POOL = "handsigns"  # work pool of the local worker
PORTS = {"seaweedfs": 5, "mlflow": 1, "prefect": 1}  # servers, and how many ports each listens on
CONNECT_SECONDS = 10
SQLITE = {"mlflow": "mlflow.db", "prefect": "prefect/prefect.db"}
# As `python -m` does, in half the time; see `tasks.stage.collect_rarely`.
_RUN_MODULE = (
    "import atexit, gc, runpy, sys; gc.set_threshold(50_000); atexit.register(gc.freeze); "
    "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)

_log = logging.getLogger(__name__)


def local_s3(folder: Path, bucket: str, port: int) -> S3Address:
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
    command = [f"{sysconfig.get_path('scripts')}/weed", "mini", "-dir=."]
    command += [f"-bucket={bucket},{DVC_BUCKET}"]
    command += [f"-ip={HOST}", f"-ip.bind={HOST}"]
    for name, port in zip(("s3", "master", "volume", "filer", "admin"), ports, strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + GRPC}"]
    # In /tmp sockets would stay behind, and belong to the first user. A socket's path may have
    # 107 letters, so these are relative to the working directory.
    command += ["-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock"]
    # With its old state the master at times waits 15 s for volumes of other machines.
    command += ["-master.resumeState=false", "-master.telemetry=false", "-webdav=false"]
    # Its parts speak gRPC; what they offer over HTTP besides asks for no credentials.
    command += ["-disableHttp", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    # Everything is in one process, so no part needs an early notice that it stops.
    command += ["-volume.preStopSeconds=0"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "TMPDIR": str(data),
        # Without any keys the store would be open to everybody.
        "AWS_ACCESS_KEY_ID": str(address.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(address.secret_access_key),
    }
    # The parts behind S3 would otherwise hand out files by plain HTTP.
    for part in ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ"):
        environment[f"WEED_JWT_{part}_KEY"] = secrets.token_urlsafe(32)
    storage, url = Storage(address), address.endpoint_url

    def ready() -> bool:
        # Asking for the bucket takes a while where nobody listens.
        if ask(f"{url}/healthz") is None:
            return False
        with suppress(ServiceError):
            storage.check()
            return True
        return False

    return Program("seaweedfs", command, environment, ready, ports, url, bucket, data)


def prefect(folder: Path, settings: Settings, ports: tuple[int, ...]) -> Program:
    """Describe a Prefect server with its UI; `url` is that of its API."""
    host = settings.host
    # This machine's own way to a server that listens everywhere.
    reached = HOST if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    url = f"http://{reached}:{ports[0]}/api"
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
    database = ""
    if settings.database_url:
        database = database_url(settings.database_url.get_secret_value(), "prefect")
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    ready, variant = partial(ask, f"{url}/health"), f"{host} {database}"
    return Program("prefect", command, environment, ready, ports, url, variant)


def mlflow(folder: Path, settings: Settings, store: S3Address, ports: tuple[int, ...]) -> Program:
    """Describe an MLflow server with its UI and its files on S3; it asks for the local login."""
    url = f"http://{HOST}:{ports[0]}"
    command = [*_module("mlflow"), "server", "--workers", "1", "--app-name", "basic-auth"]
    command += ["--host", HOST, "--port", str(ports[0])]
    # Otherwise a page elsewhere could reach it through a name that points here.
    command += ["--allowed-hosts", f"{HOST}:{ports[0]},localhost:{ports[0]}"]
    command += ["--artifacts-destination", f"s3://{store.bucket}/{PREFIX}"]
    database = registry_url(folder, settings)
    # Of an S3 service in the settings AWS's other variables, such as a role or CA, hold too.
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
    ready, variant = (
        partial(ask, f"{url}/health"),
        f"{store.endpoint_url} {store.bucket} {database}",
    )
    return Program("mlflow", command, environment, ready, ports, url, variant)


def _mlflow_login(folder: Path) -> dict[str, str]:
    """Return the environment in which MLflow's `basic-auth` asks for the local login."""
    login = local_credentials(folder).login
    user, _, password = login.partition(":")
    # MLflow keeps the first password that it gets, so a new one takes a new file.
    digest = hashlib.sha256(login.encode()).hexdigest()[:16]
    database = f"sqlite:///{folder}/mlflow_login_{digest}.db".replace("%", "%%")
    config = f"[mlflow]\ndatabase_uri = {database}\ndefault_permission = READ\n"
    config += "auth_cache_ttl_seconds = 60\n"  # comparing a password takes longer than most answers
    file = folder / "mlflow_login.ini"
    with atomic_write(file) as part:
        part.write_text(config, encoding="utf-8")
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
    foreign = ("PREFECT_SERVER_", "PREFECT_API_DATABASE_", "DATABASE_URL", "HANDSIGNS_HOST")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
    point_prefect_at(api, folder, settings, environment)
    command = [*_module("prefect"), "worker", "start", "--type", "process"]
    command += ["--pool", POOL, "--name", "local", "--install-policy", "never"]
    return Program("worker", command, environment, cwd=Path.cwd())


def keeper(name: str, folder: Path, about: Mapping[str, Any]) -> Program:
    """Describe the process that starts a worker and keeps all up after `handsigns up`."""
    command = [sys.executable, "-P", "-c", "from flows.local.stack import keep_up; keep_up()"]
    ready = partial(read_state, folder, "worker")
    return Program(name, command, dict(os.environ), ready, cwd=Path.cwd(), about=about)


def _without_foreign(of_aws: bool = False) -> dict[str, str]:
    """This environment without secrets, and without another server's address or database."""
    foreign = ("MLFLOW_", "HANDSIGNS_", "PREFECT_", "DATABASE_URL", *(() if of_aws else ("AWS_",)))
    return {name: text for name, text in os.environ.items() if not name.startswith(foreign)}


def _module(name: str) -> list[str]:
    return [sys.executable, "-P", "-c", _RUN_MODULE, name]


def registry_url(folder: Path, settings: Settings) -> str:
    if settings.database_url:
        return database_url(settings.database_url.get_secret_value(), "mlflow")
    return f"sqlite:///{folder / SQLITE['mlflow']}"


def database_url(url: str, name: str) -> str:
    """Return the address of the database `<DATABASE_URL>_<name>`; it holds the password."""
    from sqlalchemy.engine import make_url  # which takes half a second to import

    known, driver = make_url(url), "psycopg2"
    if name == "prefect":
        driver = "asyncpg"  # which has another word for the same option
        query = {"ssl" if key == "sslmode" else key: text for key, text in known.query.items()}
        known = known.set(query=query)
    known = known.set(drivername=f"postgresql+{driver}", database=f"{known.database}_{name}")
    return known.render_as_string(hide_password=False)


def make_databases(url: str) -> None:
    """Create the databases of Prefect and MLflow; `ServiceError` where PostgreSQL refuses."""
    import psycopg2
    from psycopg2 import errors, sql
    from sqlalchemy.engine import make_url

    known = make_url(url)
    names = [f"{known.database}_{name}" for name in ("prefect", "mlflow")]
    try:
        parts = known.translate_connect_args(username="user", database="dbname") | dict(known.query)
        parts |= {"dbname": "postgres", "connect_timeout": CONNECT_SECONDS}  # which each server has
        with closing(psycopg2.connect(**parts)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            for name in names:
                cursor.execute("select 1 from pg_database where datname = %s", (name,))
                if not cursor.fetchone():
                    with suppress(errors.DuplicateDatabase):  # another process was faster
                        cursor.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    except psycopg2.Error as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        raise ServiceError(
            f"PostgreSQL at {redact_url(url)} cannot be used ({reason}). Check DATABASE_URL, "
            f"and that its user may create the databases {' and '.join(names)}, or create them "
            "yourself."
        ) from None


def migrate(folder: Path, name: str) -> None:
    """Back up a local SQLite database after an upgrade of its library; migrate that of MLflow."""
    file, present, versions = folder / SQLITE[name], version(name), folder / "versions.json"
    with FileLock(folder / "migrate.lock"):
        known = read_json(versions) or {}
        if known.get(name) == present:
            return
        if file.exists():
            backup = file.with_name(f"{file.name}.before-{present}")
            if not backup.exists():  # else from an attempt that failed; the first is the good one
                _back_up(file, backup)
            said = "%s %s may need another schema: '%s' is migrated; the backup is '%s'."
            _log.warning(said, name, present, file, backup)
            command = [*_module("mlflow"), "db", "upgrade", f"sqlite:///{file}"]
            environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
            done = name == "mlflow" and subprocess.run(  # noqa: S603
                command, env=environment, capture_output=True, text=True
            )
            if done and done.returncode:
                reason = textwrap.shorten(done.stderr.strip().split("\n")[-1], 300)
                raise ServiceError(
                    f"The registry '{file}' of MLflow {known.get(name, 'another version')} cannot "
                    f"be migrated to {present} ({reason}). Install the version that made it; the "
                    f"backup is '{backup}'."
                )
        write_json(versions, {**known, name: present})


def _back_up(file: Path, backup: Path) -> None:
    try:
        with (
            atomic_write(backup) as part,
            closing(sqlite3.connect(file)) as source,
            closing(sqlite3.connect(part)) as target,
        ):
            source.backup(target)
    except sqlite3.DatabaseError as error:
        raise ServiceError(
            f"The database '{file}' cannot be read ({error}). Restore it from a backup, or move "
            "it away, which begins an empty one."
        ) from None
