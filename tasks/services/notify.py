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
    people = _apprise().Apprise()
    if not (people.add(addresses) and people):
        raise ValueError(
            "must be addresses such as json://host/path or mailto://…, each for a service that "
            "apprise knows"
        )


def _apprise() -> Any:
    import apprise

    for name in ("apprise", "urllib3.connectionpool"):  # they quote addresses
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return apprise
