"""Addresses of services as messages and records may show them."""

from urllib.parse import urlsplit


def shown(url: str) -> str:
    """Return `url` without the user, password and query that it may carry.

    Args:
        url: address of a service or database, well formed or not.

    Returns:
        Scheme, host, port and path only.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not an address)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
