"""Generated logins of the local servers."""

import configparser
import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from filelock import FileLock

from flows.settings import Settings
from tasks.errors import SettingsError
from tasks.io import atomic_directory, atomic_write

FILE = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """What the local servers ask for.

    Args:
        access_key_id: for S3.
        secret_access_key: for S3.
        login: `user:password` for Prefect and MLflow, API and pages.
    """

    access_key_id: str
    secret_access_key: str = field(repr=False)
    login: str = field(repr=False)


def local_credentials(folder: Path) -> Credentials:
    """Return the credentials of the local servers, generated on first use.

    Args:
        folder: the checkout's `.local/`, made when missing; takes `FILE` with mode 0600.

    Raises:
        SettingsError: others may read the file, or it does not hold all of them.
    """
    file = folder / FILE
    if not file.exists():
        _generate(file)
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise SettingsError(
            f"Local credentials must be readable by their owner only. Received: mode {mode:03o} "
            f"of {file}. Remove the file, and new ones are generated."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Credentials(**{one.name: str(content[one.name]) for one in fields(Credentials)})
    except PermissionError:
        raise SettingsError(
            f"Local credentials are another user's. Received: {file}. "
            "Run as their owner, or in a checkout of your own."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(
            f"Local credentials cannot be read. Received: {file}. "
            "Remove the file, and new ones are generated."
        ) from None


def prefect_login(settings: Settings, folder: Path) -> str:
    """Return the `user:password` that the local Prefect asks for.

    Args:
        settings: may hold one of the person's own.
        folder: the checkout's `.local/`.
    """
    if settings.prefect_auth:
        return settings.prefect_auth.get_secret_value()
    return local_credentials(folder).login


def mlflow_guard(folder: Path) -> dict[str, str]:
    """Return the environment in which MLflow's `basic-auth` asks for the local login.

    Args:
        folder: the checkout's `.local/`; takes MLflow's own notes of who may come in.
    """
    login = local_credentials(folder).login
    user, _, password = login.partition(":")
    # MLflow keeps the first password that it is given, so a new one takes a new file.
    digest = hashlib.sha256(login.encode()).hexdigest()[:16]
    config = configparser.RawConfigParser()
    config["mlflow"] = {
        "database_uri": f"sqlite:///{folder}/mlflow_login_{digest}.db".replace("%", "%%"),
        "default_permission": "READ",
        # Comparing takes longer than most answers; what was right stays so for a minute.
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
        # A link appears whole and never replaces what another run wrote first.
        os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink(missing_ok=True)


_PARTS = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")
"""Whoever answers or asks over gRPC within SeaweedFS."""


@dataclass(frozen=True)
class Certificates:
    """Files in PEM.

    Args:
        authority: its certificate; its key was thrown away.
        certificate: of 127.0.0.1, to answer and to ask with.
        key: of that certificate, a secret.
    """

    authority: Path
    certificate: Path
    key: Path


def local_certificates(folder: Path) -> Certificates:
    """Return the certificates of the local servers, made on first use.

    Args:
        folder: the checkout's `.local/`; takes `certificates/`, for its owner alone.
    """
    kept = folder / "certificates"
    files = [kept / name for name in ("authority.pem", "certificate.pem", "key.pem")]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / "certificates.lock"):
            if not all(file.exists() for file in files):
                _make(kept)
    return Certificates(*files)


def seaweedfs_guard(folder: Path) -> dict[str, str]:
    """Return the environment in which SeaweedFS's gRPC asks for the local certificate.

    Args:
        folder: the checkout's `.local/`.
    """
    files = local_certificates(folder)
    return {"WEED_GRPC_CA": str(files.authority)} | {
        f"WEED_GRPC_{part}_{what}": str(file)
        for part in _PARTS
        for what, file in (("CERT", files.certificate), ("KEY", files.key))
    }


def _make(kept: Path) -> None:
    import trustme

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    with atomic_directory(kept) as folder:
        folder.chmod(0o700)
        authority.cert_pem.write_to_path(folder / "authority.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        (folder / "key.pem").touch(mode=0o600)
        issued.private_key_pem.write_to_path(folder / "key.pem")
