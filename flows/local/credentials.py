"""Generated logins of the local servers."""

import configparser
import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flows.settings import Settings
from tasks.errors import SettingsError
from tasks.io import atomic_write

FILE = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """Keys for S3, and `user:password` for Prefect and MLflow, APIs and pages."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    login: str = field(repr=False)


def local_credentials(folder: Path) -> Credentials:
    """Return the credentials of the local servers, generated on first use.

    Raises:
        SettingsError: others may read the file, or it does not hold all of them.
    """
    file = folder / FILE
    try:
        if not file.exists():
            _generate(file)
        mode = file.stat().st_mode & 0o777
    except PermissionError:
        mode = 0  # that of the folder; reading the file says so
    if mode & 0o077:
        raise SettingsError(
            f"Others may read the local credentials: '{file}' has mode {mode:03o}. "
            "Remove the file, and new ones are generated."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Credentials(**{one.name: str(content[one.name]) for one in fields(Credentials)})
    except PermissionError:
        raise SettingsError(
            f"The local credentials in '{file}' belong to another user. "
            "Run as that user, or in a checkout of your own."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(
            f"The local credentials in '{file}' cannot be read. "
            "Remove the file, and new ones are generated."
        ) from None


def prefect_login(settings: Settings, folder: Path) -> str:
    """Return `user:password` of the local Prefect; the settings may name one."""
    if settings.prefect_auth:
        return settings.prefect_auth.get_secret_value()
    return local_credentials(folder).login


def mlflow_guard(folder: Path) -> dict[str, str]:
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


def _generate(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    made = Credentials(
        access_key_id="handsigns-" + secrets.token_hex(6),
        secret_access_key=secrets.token_urlsafe(30),
        login="handsigns:" + secrets.token_urlsafe(24),
    )
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(asdict(made), opened, indent=2)
        # A link appears at once and never replaces what another process wrote first.
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink(missing_ok=True)
