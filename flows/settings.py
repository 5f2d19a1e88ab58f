"""Addresses, credentials and names of services, from the environment only."""

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flows.setting_types import (
    AnyAddress,
    Branch,
    Bucket,
    Inbox,
    Login,
    Paths,
    People,
    PostgreSQL,
    Remote,
    Scheduler,
    Token,
    WebAddress,
)
from tasks.errors import SettingsError
from tasks.services.addresses import LOOPBACK, shown

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
            with `HANDSIGNS_` and is not one of ours; no secret is shown.
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
    return f"{variable}: {message} (received {shown(received)!r})"
