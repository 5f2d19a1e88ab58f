"""PostgreSQL for Prefect and MLflow: one database each, made when it is missing."""

import logging
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import URL, make_url

from tasks.errors import ServiceError

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
