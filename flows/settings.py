"""Settings read from the environment."""

import difflib
import os
import re
from collections.abc import Callable
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
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tasks.errors import SettingsError
from tasks.services.notify import check_addresses
from tasks.services.s3 import LOOPBACK, redact_url

TOKEN_LETTERS = 16


def _must(be: str, test: Callable[[str], Any]) -> AfterValidator:
    """Validate text or a secret by a test, which fails by what it returns or by ValueError."""

    def check(value: Any) -> Any:
        try:
            valid = test(value.get_secret_value() if isinstance(value, SecretStr) else value)
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"must {be}")
        return value

    return AfterValidator(check)


def _is_address(url: str, *schemes: str) -> bool:
    """Whether scheme, host and port can be used; a bad port raises ValueError."""
    parts = urlsplit(url)
    return (
        parts.scheme in schemes
        and bool((parts.hostname or "").encode("idna"))
        and (parts.port != 0)
    )


def _is_web_address(url: str) -> bool:
    parts = urlsplit(url)
    return _is_address(url, "http", "https") and "@" not in parts.netloc and not parts.query


def _is_scheduler(url: str) -> bool:
    parts = urlsplit(url)
    plain = f"{parts.scheme}://{parts.netloc}" == url and "@" not in parts.netloc
    return plain and parts.port is not None and _is_address(url, "tcp", "tls")


def _is_postgresql(url: str) -> bool:
    parts = urlsplit(url)  # without a host it is the local socket
    named = parts.scheme in ("postgresql", "postgres") and bool(parts.path.strip("/"))
    return named and (parts.hostname is None or _is_address(url, "postgresql", "postgres"))


def _is_remote(place: str) -> bool:
    parts = urlsplit(place)
    return bool(parts.scheme or Path(place).is_absolute()) and (
        parts.scheme != "s3" or bool(parts.netloc)
    )


def _is_branch(name: str) -> bool:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", name)
    return bool(plain) and not re.search(r"\.\.|//|/\.|[./]$|\.lock(/|$)", name)


S3_PLACE = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"
WebAddress = Annotated[
    str,
    _must("be an address such as http://host:port, without user or query", _is_web_address),
    AfterValidator(lambda url: url.rstrip("/")),
]
AnyAddress = Annotated[
    str,
    _must(
        "be an address such as http://host:port or sqlite:///file.db",
        lambda url: urlsplit(url).scheme,
    ),
]
Paths = Annotated[
    tuple[Path, ...],
    NoDecode,
    BeforeValidator(lambda text: text.split(os.pathsep) if isinstance(text, str) else text),
]
Bucket = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
Recipients = Annotated[
    SecretStr,
    AfterValidator(lambda secret: check_addresses(secret.get_secret_value()) or secret),
]
PostgreSQL = Annotated[
    SecretStr,
    _must("be an address such as postgresql://user:password@host:5432/name", _is_postgresql),
]
Login = Annotated[SecretStr, _must("be user:password", lambda text: all(text.partition(":")[::2]))]
Token = Annotated[
    SecretStr,
    _must(f"have {TOKEN_LETTERS} characters or more", lambda text: len(text) >= TOKEN_LETTERS),
]
Remote = Annotated[
    str,
    _must("be an address such as s3://bucket/dvc, or a folder's full path", _is_remote),
]
Scheduler = Annotated[str, _must("be a scheduler's address such as tcp://host:8786", _is_scheduler)]
Inbox = Annotated[
    str,
    _must(
        "be a folder or s3://bucket/prefix",
        lambda place: "://" not in place or re.fullmatch(S3_PLACE, place),
    ),
]
Branch = Annotated[str, _must("be the plain name of a branch, such as handsigns/data", _is_branch)]

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
"""Variables whose value is never shown."""


class Settings(BaseSettings):
    """Where the services are; one that is not named is started on loopback.

    A field is read from `HANDSIGNS_<FIELD>`, or from its alias: the variable that the
    service's own tools read.
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
    notify_urls: Recipients | None = None
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
    """Read the settings from the environment.

    Raises:
        SettingsError: A variable is malformed, contradicts another, or starts with
            `HANDSIGNS_` and is not a setting; no secret is shown.
    """
    _reject_unknown()
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise SettingsError(f"Settings cannot be used: {faults}. Fix the environment.") from None


def _reject_unknown() -> None:
    """A mistyped name would otherwise start a local server in silence."""
    read = {name for info in Settings.model_fields.items() for name in _variables(*info)}
    known = sorted(name for name in read if name.startswith(PREFIX))
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            plain = name.removeprefix(PREFIX)
            close = [plain] if plain in read else difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
            raise SettingsError(f"{name} is no setting. {advice}")


def _variables(field: str, info: FieldInfo) -> list[str]:
    """Environment variables that a field is read from, the first one first."""
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias or PREFIX + field.upper())]


def _variable(name: str) -> str:
    """The variable that was read, where pydantic names a field or its first alias."""
    for field, info in Settings.model_fields.items():
        names = _variables(field, info)
        if name == field or name in names:
            return next((one for one in names if os.environ.get(one)), names[0])
    return name


def _explain(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return str(message)
    variable = _variable(str(fault["loc"][0]))
    received = fault["input"]
    if not isinstance(received, str) or variable.startswith(SECRET):
        return f"{variable}: {message}"
    return f"{variable}: {message} (received {redact_url(received)!r})"
