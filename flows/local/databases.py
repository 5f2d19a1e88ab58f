"""Databases of the local Prefect and MLflow: PostgreSQL for `DATABASE_URL`, SQLite otherwise."""

import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from flows.settings import Settings
from tasks.errors import ServiceError, SettingsError
from tasks.io import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

CONNECT_SECONDS = 10
SQLITE = {"mlflow": "mlflow.db", "prefect": "prefect/prefect.db"}

_log = logging.getLogger(__name__)


def registry_url(folder: Path, settings: Settings) -> str:
    """Return the address of the local registry; `SettingsError` if no address can hold it."""
    if settings.database_url:
        return database_url(settings.database_url.get_secret_value(), "mlflow")
    if "?" in str(folder):
        raise SettingsError(
            f"The path '{folder}' holds a question mark, which database addresses cannot hold. "
            "Rename the folder."
        )
    return f"sqlite:///{folder / SQLITE['mlflow']}"


def database_url(url: str, name: str) -> str:
    """Return the address of the database `<DATABASE_URL>_<name>`; it holds the password."""
    known = _named(_parse(url), name)
    if name != "prefect":
        known = known.set(drivername="postgresql+psycopg2")
    else:
        # asyncpg has another word for the same option.
        query = {"ssl" if key == "sslmode" else key: text for key, text in known.query.items()}
        known = known.set(drivername="postgresql+asyncpg", query=query)
    return known.render_as_string(hide_password=False)


def redact_database(url: str) -> str:
    """Return the address without user, password and options."""
    known = _parse(url)
    port = f":{known.port}" if known.port else ""
    return f"postgresql://{known.host or 'localhost'}{port}/{known.database}"


def make_databases(url: str) -> None:
    """Create the databases of Prefect and MLflow where they are missing.

    Raises:
        ServiceError: PostgreSQL does not answer, or its user may not create one.
    """
    import psycopg2
    from psycopg2 import errors, sql

    known = _parse(url)
    names = [str(_named(known, name).database) for name in ("prefect", "mlflow")]
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
            f"PostgreSQL at {redact_database(url)} cannot be used ({reason}). Check DATABASE_URL, "
            f"and that its user may create the databases {' and '.join(names)}, or create them "
            "yourself."
        ) from None


def _parse(url: str) -> "URL":
    from sqlalchemy.engine import make_url  # which takes half a second to import

    return make_url(url)


def _named(url: "URL", name: str) -> "URL":
    return url.set(database=f"{url.database}_{name}")


def migrate(folder: Path, name: str) -> None:
    """Back up and migrate a local SQLite database after an upgrade of its library.

    `versions.json` notes which version used it last. Prefect's server migrates by itself.

    Raises:
        ServiceError: the database cannot be migrated; the backup is named.
    """
    file, present, versions = folder / SQLITE[name], version(name), folder / "versions.json"
    if (read_json(versions) or {}).get(name) == present:
        return
    with FileLock(folder / "migrate.lock"):
        known = read_json(versions) or {}
        if file.exists() and known.get(name) != present:
            backup = file.with_name(f"{file.name}.before-{present}")
            _back_up(file, backup)
            said = "%s %s may need another schema: '%s' is migrated; the backup is '%s'."
            _log.warning(said, name, present, file, backup)
            if name == "mlflow":
                _upgrade_mlflow(file, backup, known.get(name, "another version"))
        write_json(versions, {**known, name: present})


def _back_up(file: Path, backup: Path) -> None:
    if backup.exists():  # from an attempt that failed; the first copy is the good one
        return
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


def _upgrade_mlflow(file: Path, backup: Path, last: str) -> None:
    done = subprocess.run(  # noqa: S603, the command is ours
        [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", f"sqlite:///{file}"],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = textwrap.shorten(lines[-1] if lines else "no reason given", 300, placeholder=" …")
        raise ServiceError(
            f"The registry '{file}' of MLflow {last} cannot be migrated to {version('mlflow')} "
            f"({reason}). Install the version that made it; the backup is '{backup}'."
        )
