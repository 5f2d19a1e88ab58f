"""Notifications through apprise, to addresses that are secrets and appear in no message or log."""

import logging
from typing import Any

_log = logging.getLogger(__name__)


def notify(addresses: str, title: str, body: str) -> bool:
    """Send a message to apprise's addresses; whether all of them took it. Never raises."""
    try:
        apprise = _apprise()
        people, failure = apprise.Apprise(), apprise.NotifyType.FAILURE
        known = people.add(addresses)
        sent = people.notify(body, title=title, notify_type=failure, body_format="text")
        delivered = bool(known and sent)
    except Exception:  # a plugin of apprise may raise anything, with the address in it
        delivered = False
    if not delivered:
        _log.warning(
            "Not everybody was notified: an address in HANDSIGNS_NOTIFY_URLS was refused or did "
            "not answer."
        )
    return delivered


def check_addresses(addresses: str) -> None:
    """Raise `ValueError`, which does not show it, for an address that apprise cannot use."""
    apprise = _apprise()
    from apprise.utils.parse import parse_urls

    known: list[str] = parse_urls(addresses)  # type: ignore[no-untyped-call]
    bad = [number for number, one in enumerate(known, 1) if not apprise.Apprise.instantiate(one)]
    if bad or not known:
        which = f"number {bad[0]} of {len(known)} is none" if bad else "there is none"
        raise ValueError(
            f"must be addresses such as json://host/path or mailto://…, and {which} that apprise "
            "can use"
        )


def _apprise() -> Any:
    import apprise

    for name in ("apprise", "urllib3.connectionpool"):  # they quote addresses
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return apprise
