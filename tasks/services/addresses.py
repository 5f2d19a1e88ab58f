"""Addresses of services, and how messages and records may show them."""

import re
from dataclasses import dataclass, field

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def shown(url: str) -> str:
    """Return `url` without the user, password and query that it may carry.

    Args:
        url: address of a service or database, well formed or not.

    Returns:
        Scheme, host, port and path only.
    """
    # Up to the last @, as a password may hold unquoted slashes and the like.
    return re.sub(r"[?#].*$", "", re.sub(r"^([^:/]*:?//).*@", r"\1", url, flags=re.S), flags=re.S)


@dataclass(frozen=True)
class S3Address:
    """Where objects go and with which credentials; secrets never print.

    Args:
        endpoint_url: `http(s)://host:port` of the service.
        bucket: bucket that must exist.
        region: name that the signature carries.
        access_key_id: None leaves the search for credentials to boto3's chain.
    """

    endpoint_url: str
    bucket: str
    region: str = "us-east-1"
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    def environment(self) -> dict[str, str]:
        """Return the usual AWS variables, for tools that read only those."""
        known = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
        }
        return {name: value for name, value in known.items() if value is not None}


def check_key(key: str) -> str:
    """Return `key`, or raise `ValueError` if it is not plain names joined by slashes."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(
            f"An object's key must be plain names joined by slashes. Received: {key!r}."
        )
    return key
