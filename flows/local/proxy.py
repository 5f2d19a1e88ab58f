"""A proxy that the environment names cannot reach this machine's loopback."""

import os
from collections.abc import MutableMapping


def spare_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let what reads the usual variables reach loopback directly.

    Both spellings are read, by most libraries the lower one alone where it is set, so
    that each has to name what both do.

    Args:
        environment: changed in place.
    """
    spellings = ("no_proxy", "NO_PROXY")
    named = [host.strip() for name in spellings for host in environment.get(name, "").split(",")]
    hosts = dict.fromkeys(filter(None, [*named, "127.0.0.1", "localhost"]))
    # Alone it means every host, and among others nothing.
    spared = "*" if "*" in hosts else ",".join(hosts)
    environment.update(dict.fromkeys(spellings, spared))
