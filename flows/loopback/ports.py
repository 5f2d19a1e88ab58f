"""Free loopback ports, the same from run to run where they still are free."""

import json
import os
import random
import socket
from pathlib import Path

FILE = "ports.json"
PAIR = 10_000
"""SeaweedFS's admin worker looks for its server this far above the web port."""
RANGE = range(12_000, 22_000)
"""With `PAIR` above each below Linux's ephemeral ports, which begin at 32,768, so that no
outgoing connection takes one first."""


def choose_ports(folder: Path, name: str, count: int) -> tuple[int, ...]:
    """Return `count` ports that are free on loopback, as is the one `PAIR` above each.

    Args:
        folder: where `remember_ports` keeps them.
        name: server whose ports are wanted.
        count: how many.
    """
    ports = known_ports(folder, name)
    if len(ports) == count and all(_free(port) for port in ports):
        return ports
    chosen: list[int] = []
    while len(chosen) < count:
        port = random.choice(RANGE)
        if port not in chosen and _free(port):
            chosen.append(port)
    return tuple(chosen)


def known_ports(folder: Path, name: str) -> tuple[int, ...]:
    """Return the ports that a server of this folder had when it last was ready."""
    return tuple(_known(folder).get(name, ()))


def remember_ports(folder: Path, name: str, ports: tuple[int, ...]) -> None:
    """Keep the ports of a server that runs; SeaweedFS names a folder after one of them."""
    known = _known(folder)
    if known.get(name) == list(ports):
        return
    file = folder / FILE
    part = folder / f".{FILE}.{os.getpid()}"
    part.write_text(json.dumps({**known, name: list(ports)}) + "\n", encoding="utf-8")
    part.replace(file)


def _known(folder: Path) -> dict[str, list[int]]:
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _free(port: int) -> bool:
    for candidate in (port, port + PAIR):
        with socket.socket() as probe:
            # As servers do: a closed connection's remains do not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                return False
    return True
