"""Fixtures live by subject in `tests/fixtures/`; the order of the files is made here."""

import os

import pytest

from tasks.stage import collect_rarely

THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")

LONGEST = ("retrain", "up", "promotion", "trust", "surroundings", "cli", "browser", "serve")
LONGEST += ("publish_crashes", "dvc", "registry", "storage", "training", "model")
"""Files in the order of their duration."""

FIXTURES = ("servers", "photos", "models", "checkouts", "service")
pytest_plugins = [f"tests.fixtures.{name}" for name in FIXTURES]


def pytest_configure() -> None:
    """Import what is large as fast as the programs do, and leave the cores to each other.

    Several tests run at once; the threads of one would only spin while others work.
    """
    collect_rarely()
    for name in THREADS:
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them runs alone at the end."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
