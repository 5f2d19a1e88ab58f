"""Addresses of services as messages and records may show them."""

import re


def shown(url: str) -> str:
    """Return `url` without the user, password and query that it may carry.

    Args:
        url: address of a service or database, well formed or not.

    Returns:
        Scheme, host, port and path only.
    """
    # Up to the last @, as a password may hold unquoted slashes and the like.
    return re.sub(r"[?#].*$", "", re.sub(r"^([^:/]*:?//).*@", r"\1", url, flags=re.S), flags=re.S)
