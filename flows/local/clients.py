"""How this process reaches services: its environment, its logins, and whether they answer."""

import http.client
import json
import os
import pwd
import secrets
import textwrap
import urllib.request
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from flows.settings import Settings
from tasks.errors import HandsignsError, ServiceError, SettingsError
from tasks.io import atomic_write
from tasks.services.mlflow import Registry
from tasks.services.s3 import S3Address, Storage, check_conditional_writes, redact_url

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TAG = "handsigns"  # of our runs, on a server that may have others; see `prefect.yaml`
HEARTBEAT_SECONDS = 30  # the least that Prefect takes; see `prefect.yaml` for what silence means
PROXIES = ("all_proxy", "http_proxy", "https_proxy")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
CREDENTIALS = "credentials.json"


@dataclass(frozen=True)
class Credentials:
    """Keys for the local S3, and `user:password` for Prefect and MLflow, APIs and pages."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    login: str = field(repr=False)


def local_credentials(folder: Path) -> Credentials:
    """Return the credentials of the local servers, generated on first use."""
    file = folder / CREDENTIALS
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(file.with_suffix(".lock")):  # several processes may begin at once
        if not file.exists():
            made = Credentials(
                access_key_id="handsigns-" + secrets.token_hex(6),
                secret_access_key=secrets.token_urlsafe(30),
                login="handsigns:" + secrets.token_urlsafe(24),
            )
            with atomic_write(file) as part:
                part.touch(0o600)
                part.write_text(json.dumps(asdict(made)), encoding="utf-8")
    try:
        return Credentials(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise SettingsError(
            f"The local credentials in '{file}' cannot be understood. Remove the file, and new "
            "ones are generated."
        ) from None


def prefect_login(settings: Settings, folder: Path) -> str:
    """Return `user:password` of the local Prefect; the settings may name one."""
    if settings.prefect_auth:
        return settings.prefect_auth.get_secret_value()
    return local_credentials(folder).login


def prepare_environment(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what libraries read from the environment, before they are imported."""
    # Loopback is reached without a proxy. Most libraries read `no_proxy` alone where both
    # spellings are set, so both name all hosts.
    spellings = ("no_proxy", "NO_PROXY")
    named = [host.strip() for name in spellings for host in environment.get(name, "").split(",")]
    hosts = dict.fromkeys(filter(None, [*named, "127.0.0.1", "localhost"]))
    # Alone it means every host, and among others nothing.
    spared = "*" if "*" in hosts else ",".join(hosts)
    environment.update(dict.fromkeys(spellings, spared))
    if "HOME" not in environment:
        try:
            environment["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            environment["HOME"] = str(folder / "home")
    environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    environment.setdefault("PREFECT_HOME", str(folder / "prefect"))
    environment.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    environment.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "flows,tasks")
    # A server that is gone is asked several times before a run can end; with Prefect's default
    # each question would take more than a minute.
    environment.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")


def point_prefect_at(
    api: str, folder: Path, settings: Settings, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let a process, by default this one, talk to the Prefect server with this API."""
    prepare_environment(folder, environment)
    for name in (*PROXIES, *map(str.upper, PROXIES)):
        if (url := environment.get(name)) and urlsplit(url).scheme not in PROXY_SCHEMES:
            raise SettingsError(
                f"{name} must be an address such as http://host:port or socks5://host:port, "
                f"and is {redact_url(url)!r}. Correct or unset it."
            )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # Prefect makes its own folder only
    environment["PREFECT_API_URL"] = api
    if settings.prefect_api_url is None:
        environment["PREFECT_API_AUTH_STRING"] = prefect_login(settings, folder)


@contextmanager
def asking_prefect(api: str) -> "Iterator[SyncPrefectClient]":
    """Ask a Prefect server; what fails is one line, within 30 s, that names the server."""
    from prefect import settings
    from prefect.client.orchestration import get_client

    known = {
        settings.PREFECT_API_URL: api,
        settings.PREFECT_API_REQUEST_TIMEOUT: 10.0,
        settings.PREFECT_CLIENT_MAX_RETRIES: 1,
    }
    try:
        with settings.temporary_settings(known), get_client(sync_client=True) as client:
            if failed := client.api_healthcheck():
                raise failed
            yield client
    except HandsignsError:
        raise
    except Exception as error:  # of many kinds
        raise ServiceError(f"Prefect at {redact_url(api)} {prefect_failure(error)}") from error


def prefect_failure(error: BaseException) -> str:
    """What an error of Prefect's client says, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    while status is None and (cause := error.__cause__ or error.__context__):
        error = cause  # the innermost one says what happened
    said = textwrap.shorten(str(status or error) or type(error).__name__, 300, placeholder=" …")
    advice = "Check PREFECT_API_URL and the server's log"
    if status in (401, 403):
        advice = "It lets nobody in without a login: set PREFECT_API_AUTH_STRING to user:password"
    return f"cannot be used ({said}). {advice}."


def ask(url: str, seconds: float = 2.0) -> bytes | None:
    """Return what a loopback server answers with success, or None."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=seconds) as answer:
            return bytes(answer.read())
    except (OSError, http.client.HTTPException):
        return None


def configured_s3(settings: Settings) -> S3Address:
    """Return the address that the settings name; no endpoint means AWS."""
    known = (settings.aws_access_key_id, settings.aws_secret_access_key, settings.aws_session_token)
    keys = [secret.get_secret_value() if secret else None for secret in known]
    return S3Address(settings.s3_endpoint_url or "", settings.bucket, settings.s3_region, *keys)


def check_reachable(settings: Settings) -> None:
    """Raise `ServiceError` within 30 s if a configured service does not answer its own client."""
    if settings.s3_endpoint_url:
        storage = Storage(configured_s3(settings))
        storage.check()
        check_conditional_writes(storage)
    if (tracking := settings.mlflow_tracking_uri) and tracking.startswith("http"):
        Registry(tracking, settings.model_name).versions()
    if settings.prefect_api_url:
        with asking_prefect(settings.prefect_api_url):
            pass
