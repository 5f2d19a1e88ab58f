"""Tables in Markdown, for the model card and the Prefect UI."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Draw a table; what a cell holds cannot break out of it.

    Args:
        heads: one for each column.
        rows: cells in the order of `heads`; each is shown as `str` gives it.

    Returns:
        Lines without an end of line at the last.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
