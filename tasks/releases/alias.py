"""The registry's alias for the champion, which follows the pointer in storage."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tasks.errors import HandsignsError, PromotionError
from tasks.releases.pointer import Champion, read_champion
from tasks.services.registry import CHAMPION, Registry, Version
from tasks.services.storage import Storage

_log = logging.getLogger(__name__)


def check_alias(registry: Registry, expected: Champion) -> None:
    """Refuse to go on where somebody moved the alias by hand, rather than undo it in silence.

    Raises:
        PromotionError: the alias names another version than the pointer.
    """
    versions = registry.versions()
    held = _held(versions)
    number = expected.pointer.version
    # A registry that never knew the champion's version cannot name it.
    known = any(one.number == number for one in versions)
    if held != number and (known or held is not None):
        raise PromotionError(
            f"The alias '{CHAMPION}' was changed meanwhile, in the registry. Received: "
            f"{f'version {held}' if held else 'nothing'}, where the champion is version {number}. "
            "Find out who moved it, use `handsigns promote` for what was meant, and run again."
        )


@contextmanager
def following(version: int) -> Iterator[None]:
    """Tell the registry of a champion that has moved; that it fails is told and no failure.

    Whoever was told of one would move the champion once more.

    Args:
        version: the champion.
    """
    try:
        yield
    except HandsignsError as error:
        _log.warning(
            "Version %d is champion, and the registry could not be told. Its alias follows with "
            "the next retrain or promotion. %s",
            version,
            error,
        )


def lead_alias(storage: Storage, registry: Registry, moved: Champion) -> None:
    """Let the alias name the champion, also where the next promotion overtook this one."""
    for _ in range(10):
        registry.set_alias(CHAMPION, moved.pointer.version)
        present = read_champion(storage)
        if present is None or present.etag == moved.etag:
            return
        moved = present


def mend_alias(registry: Registry, champion: Champion) -> str | None:
    """Let the alias follow the pointer where a crash came between; what was done, in words."""
    versions = registry.versions()
    held = _held(versions)
    number = champion.pointer.version
    if held == number:
        return None
    was = f"version {held}" if held else "nothing"
    if all(one.number != number for one in versions):
        return f"The champion, version {number}, is not in this registry; its alias names {was}."
    registry.set_alias(CHAMPION, number)
    return f"The alias named {was}; it follows the pointer to version {number} again."


def _held(versions: Sequence[Version]) -> int | None:
    return next((one.number for one in versions if CHAMPION in one.aliases), None)
