"""How a long task tells how far it is, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`; cheap, and called often."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
