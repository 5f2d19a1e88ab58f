"""Settings read from the environment."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    Secret,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tasks.errors import SettingsError
from tasks.services.notify import check_addresses
from tasks.services.s3 import LOOPBACK, redact_url

PREFIX = "HANDSIGNS_"
PLAIN = "without user or query"
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
PLACE = rf"^(s3://{BUCKET}(/.*)?|(?!.*://).*)$"
BRANCH = r"(?!.*(\.\.|//|/\.|[./]$|\.lock(/|$)))[A-Za-z0-9][A-Za-z0-9._/-]{0,199}"


def _url(*schemes: str, login: bool = False) -> AfterValidator:
    """Validate scheme, host and port; with `login`, the host may be missing (a local socket)."""

    def check(url: str) -> str:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna"), parts.port  # may raise ValueError
        plain = bool(host) and "@" not in parts.netloc and not parts.query
        if parts.scheme not in schemes or port == 0 or not (plain or login):
            raise ValueError
        return url.rstrip("/")

    return AfterValidator(check)


WebAddress = Annotated[str, _url("http", "https")]
PostgreSQL = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z]+://[^/]*/."),
    _url("postgresql", "postgres", login=True),
]
Paths = Annotated[
    tuple[Path, ...],
    NoDecode,
    BeforeValidator(lambda text: text.split(os.pathsep) if isinstance(text, str) else text),
]
Recipients = Annotated[
    SecretStr,
    AfterValidator(lambda secret: check_addresses(secret.get_secret_value()) or secret),
]


def _like(
    what: str,
    pattern: str | None = None,
    default: Any = None,
    alias: str | AliasChoices | None = None,
) -> Any:
    """A field that must be what is said here, read from the variable of the service's own tools."""
    return Field(default, pattern=pattern, description=what, validation_alias=alias)


class Settings(BaseSettings):
    """Read from `HANDSIGNS_<FIELD>` or the alias; a description says what it must be."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        loc_by_alias=False,
        regex_engine="python-re",  # has look-ahead
    )

    s3_endpoint_url: WebAddress | None = _like(f"an address such as http://host:port, {PLAIN}")
    s3_region: str = _like(
        "a region such as us-east-1",
        r"^[a-z0-9-]{1,64}$",
        "us-east-1",
        AliasChoices("HANDSIGNS_S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    bucket: str = _like("a bucket's name, such as artifacts", f"^{BUCKET}$", "artifacts")
    model_name: str = _like(
        "a plain name of 64 characters or fewer", r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", "hand-signs"
    )
    dvc_remote_url: str | None = _like(
        "an address such as s3://bucket/dvc, or a folder's full path",
        r"^(/|s3://[^/]|(?!s3:)[a-z][a-z0-9+.-]*:)",
    )
    inbox: str | None = _like("a folder or s3://bucket/prefix", PLACE)
    capture: str | None = _like("a folder or s3://bucket/prefix", PLACE)
    capture_below: float = Field(0.8, ge=0.0, le=1.0)
    capture_share: float = Field(0.01, ge=0.0, le=1.0)
    capture_per_day: int = Field(500, ge=1)
    capture_total: int = Field(10_000, ge=1)
    capture_days: int = Field(30, ge=1)
    dask_address: Annotated[str, _url("tcp", "tls")] | None = _like(
        "a scheduler's address such as tcp://host:8786", r"^[a-z]+://[^/?#]+:\d+$"
    )
    git_push: str | None = _like(
        "the plain name of a branch, such as handsigns/data", f"^{BRANCH}$"
    )
    notify_urls: Recipients | None = None
    promotion: Literal["auto", "approval"] = "auto"
    approval_seconds: int = Field(86_400, ge=1, le=30 * 86_400)

    serve_rate: str = _like(
        "a rate such as 600/minute", r"^[1-9]\d{0,6}/(second|minute|hour)$", "600/minute"
    )
    serve_max_mb: int = Field(10, ge=1, le=64)
    serve_follow_seconds: float = Field(10.0, ge=0.1, le=25.0)
    serve_token: SecretStr | None = Field(None, min_length=16, description="16 characters or more")

    signing_key: Path | None = None
    signing_passphrase: SecretStr | None = None
    public_keys: Paths = ()

    mlflow_tracking_uri: str | None = _like(
        "an address such as http://host:port or sqlite:///file.db",
        r"^[a-z][a-z0-9+.-]*:",
        alias="MLFLOW_TRACKING_URI",
    )
    prefect_api_url: WebAddress | None = _like(
        f"an address such as http://host:port/api, {PLAIN}", alias="PREFECT_API_URL"
    )
    aws_access_key_id: SecretStr | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    aws_session_token: SecretStr | None = Field(None, validation_alias="AWS_SESSION_TOKEN")
    host: str = "127.0.0.1"
    prefect_auth: Secret[Annotated[str, StringConstraints(pattern=".:.")]] | None = _like(
        "user:password", alias="PREFECT_SERVER_API_AUTH_STRING"
    )
    database_url: Secret[PostgreSQL] | None = _like(
        "an address such as postgresql://user:password@host:5432/name", alias="DATABASE_URL"
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError(
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set together or not at all"
            )
        if self.host not in LOOPBACK and self.prefect_auth is None:
            raise ValueError(
                "HANDSIGNS_HOST lets others reach Prefect, so PREFECT_SERVER_API_AUTH_STRING must "
                f"be set to user:password (received host {self.host!r} and no password)"
            )
        return self


def load_settings() -> Settings:
    """Read the settings; `SettingsError`, which shows no secret, for what cannot be used."""
    _reject_unknown()
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise SettingsError(f"Settings cannot be used: {faults}. Fix the environment.") from None


def _reject_unknown() -> None:
    """A mistyped name would otherwise start a local server without a word."""
    read = {name for field in Settings.model_fields for name in _variables(field)}
    known = sorted(name for name in read if name.startswith(PREFIX))
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            plain = name.removeprefix(PREFIX)
            close = [plain] if plain in read else difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            raise SettingsError(f"{name} is no setting. {advice}")


def _variables(field: str) -> list[str]:
    """Environment variables that a field is read from, the first one first."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias or PREFIX + field.upper())]


def _explain(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return str(message)
    field = Settings.model_fields[fault["loc"][0]]
    variables = _variables(fault["loc"][0])
    variable = next((name for name in variables if os.environ.get(name)), variables[0])
    received = fault["input"]
    message = f"must be {field.description}" if field.description else message
    if not isinstance(received, str) or "Secret" in repr(field.annotation):
        return f"{variable}: {message}"
    return f"{variable}: {message} (received {redact_url(received)!r})"
