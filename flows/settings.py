"""Settings read from the environment."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tasks.errors import SettingsError
from tasks.services.notify import check_addresses
from tasks.services.s3 import LOOPBACK, redact_url

TOKEN_LETTERS = 16


def _host(name: str | None) -> bool:
    """Whether a host's name is one that can be asked for at all."""
    try:
        return bool(name and name.encode("idna"))
    except UnicodeError:
        return False


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not _host(parts.hostname):
        raise ValueError("must be an address such as http://host:port")
    if parts.port == 0:  # reading it also refuses what is no port number
        raise ValueError("must name a port from 1 to 65535")
    if "@" in parts.netloc or parts.query:
        raise ValueError("must hold no user, password or query; set credentials on their own")
    return url.rstrip("/")


def _any_address(url: str) -> str:
    if not urlsplit(url).scheme:
        raise ValueError("must be an address such as http://host:port or sqlite:///file.db")
    return url


def _postgresql(secret: SecretStr) -> SecretStr:
    parts = urlsplit(secret.get_secret_value())
    known = parts.scheme in ("postgresql", "postgres") and bool(parts.path.strip("/"))
    try:
        # Reading the port refuses what is no number, such as that of several hosts.
        known = known and (parts.hostname is None or _host(parts.hostname)) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ValueError("must be an address such as postgresql://user:password@host:5432/name")
    return secret


def _login(secret: SecretStr) -> SecretStr:
    user, _, password = secret.get_secret_value().partition(":")
    if not user or not password:
        raise ValueError("must be user:password")
    return secret


def _long(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value()) < TOKEN_LETTERS:
        raise ValueError(f"must have {TOKEN_LETTERS} characters or more")
    return secret


def _people(secret: SecretStr) -> SecretStr:
    check_addresses(secret.get_secret_value())
    return secret


def _remote(place: str) -> str:
    if not urlsplit(place).scheme and not Path(place).is_absolute():
        raise ValueError("must be an address such as s3://bucket/dvc, or a folder's full path")
    if place.startswith("s3:") and not urlsplit(place).netloc:
        raise ValueError("must name a bucket, such as s3://bucket/dvc")
    return place


def _scheduler(address: str) -> str:
    parts = urlsplit(address)
    plain = f"{parts.scheme}://{parts.netloc}" == address and "@" not in parts.netloc
    # Reading the port also refuses what is no port number.
    known = parts.scheme in ("tcp", "tls") and _host(parts.hostname) and parts.port
    if not plain or not known:
        raise ValueError("must be a scheduler's address such as tcp://host:8786")
    return address


def _inbox(place: str) -> str:
    if "://" in place and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", place):
        raise ValueError("must be a folder or s3://bucket/prefix")
    return place


def _branch(name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", name)
    if not plain or re.search(r"\.\.|//|/\.|[./]$|\.lock(/|$)", name):
        raise ValueError("must be the plain name of a branch, such as handsigns/data")
    return name


WebAddress = Annotated[str, AfterValidator(_web_address)]
AnyAddress = Annotated[str, AfterValidator(_any_address)]
Paths = Annotated[
    tuple[Path, ...],
    NoDecode,
    BeforeValidator(lambda text: text.split(os.pathsep) if isinstance(text, str) else text),
]
Bucket = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
People = Annotated[SecretStr, AfterValidator(_people)]
PostgreSQL = Annotated[SecretStr, AfterValidator(_postgresql)]
Login = Annotated[SecretStr, AfterValidator(_login)]
Token = Annotated[SecretStr, AfterValidator(_long)]
Remote = Annotated[str, AfterValidator(_remote)]
Scheduler = Annotated[str, AfterValidator(_scheduler)]
Inbox = Annotated[str, AfterValidator(_inbox)]
Branch = Annotated[str, AfterValidator(_branch)]


PREFIX = "HANDSIGNS_"
SECRET = (
    "AWS_ACCESS",
    "AWS_SECRET",
    "AWS_SESSION",
    "DATABASE_URL",
    "PREFECT_SERVER_API_AUTH_STRING",
    "HANDSIGNS_NOTIFY_URLS",
    "HANDSIGNS_SERVE_TOKEN",
)
"""Variables whose value no message shows."""


class Settings(BaseSettings):
    """Where the services are; one that is not named is started on loopback.

    Each field is read from `HANDSIGNS_<FIELD>` or, where an alias stands, from the
    variable that the service's own tools read.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore"
    )

    s3_endpoint_url: WebAddress | None = None
    s3_region: str = Field(
        default="us-east-1",
        pattern=r"^[a-z0-9-]{1,64}$",
        validation_alias=AliasChoices("HANDSIGNS_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    bucket: Bucket = "artifacts"
    model_name: str = Field(default="hand-signs", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    dvc_remote_url: Remote | None = None
    inbox: Inbox | None = None
    dask_address: Scheduler | None = None
    git_push: Branch | None = None
    notify_urls: People | None = None
    promotion: Literal["auto", "approval"] = "auto"
    approval_seconds: int = Field(default=86_400, ge=1, le=30 * 86_400)

    serve_rate: str = Field(default="600/minute", pattern=r"^[1-9]\d{0,6}/(second|minute|hour)$")
    serve_max_mb: int = Field(default=10, ge=1, le=64)
    serve_follow_seconds: float = Field(default=10.0, ge=0.1, le=25.0)
    serve_token: Token | None = None

    signing_key: Path | None = None
    signing_passphrase: SecretStr | None = None
    public_keys: Paths = ()

    mlflow_tracking_uri: AnyAddress | None = Field(
        default=None, validation_alias="MLFLOW_TRACKING_URI"
    )
    prefect_api_url: WebAddress | None = Field(default=None, validation_alias="PREFECT_API_URL")
    aws_access_key_id: SecretStr | None = Field(default=None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(
        default=None, validation_alias="AWS_SECRET_ACCESS_KEY"
    )
    aws_session_token: SecretStr | None = Field(default=None, validation_alias="AWS_SESSION_TOKEN")
    host: str = "127.0.0.1"
    prefect_auth: Login | None = Field(
        default=None, validation_alias="PREFECT_SERVER_API_AUTH_STRING"
    )
    database_url: PostgreSQL | None = Field(default=None, validation_alias="DATABASE_URL")

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> "Settings":
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError(
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together or not at all"
            )
        return self

    @model_validator(mode="after")
    def _only_loopback_is_open(self) -> "Settings":
        if self.host not in LOOPBACK and self.prefect_auth is None:
            raise ValueError(
                "HANDSIGNS_HOST lets others reach Prefect, so PREFECT_SERVER_API_AUTH_STRING must "
                f"be set to user:password (received host {self.host!r} and no password)"
            )
        return self


def load_settings() -> Settings:
    """Read the settings from the environment.

    Returns:
        The frozen settings; secrets in them print as asterisks.

    Raises:
        SettingsError: a variable is malformed, contradicts another, or starts
            with `HANDSIGNS_` and is not one of ours; no secret is redact_url.
    """
    _refuse_unknown()
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise SettingsError(f"Settings cannot be used: {faults}. Mend the environment.") from None


def _refuse_unknown() -> None:
    """A mistyped name would otherwise start a local server in silence."""
    read = _variables()
    known = sorted(name for name in read if name.startswith(PREFIX))
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            plain = name.removeprefix(PREFIX)
            close = [plain] if plain in read else difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            raise SettingsError(f"Unknown setting in the environment. Received: {name}. {advice}")


def _variables() -> list[str]:
    """Names of all variables that are read."""
    names: set[str] = set()
    for field, info in Settings.model_fields.items():
        alias = info.validation_alias
        if isinstance(alias, AliasChoices):
            names.update(str(choice) for choice in alias.choices)
        else:
            names.add(str(alias or PREFIX + field.upper()))
    return sorted(names)


def _variable(name: str) -> str:
    """The variable that was read where pydantic tells of a field or its first alias."""
    for info in Settings.model_fields.values():
        alias = info.validation_alias
        if isinstance(alias, AliasChoices) and name in alias.choices:
            read = (str(choice) for choice in alias.choices if os.environ.get(str(choice)))
            return next(read, name)  # one that is written in small letters is read too
    return name if name.isupper() else PREFIX + name.upper()


def _explain(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return str(message)
    variable = _variable(str(fault["loc"][0]))
    received = fault["input"]
    if not isinstance(received, str) or variable.startswith(SECRET):
        return f"{variable}: {message}"
    return f"{variable}: {message} (received {redact_url(received)!r})"
