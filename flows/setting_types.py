"""What a setting may look like: a pattern or a check each, and what is wanted instead."""

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from tasks.services.notify import check_addresses

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
