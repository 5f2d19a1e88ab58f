"""Fixtures live by subject in `tests/fixtures/`; the order of the files is made here."""

import gc
from collections import Counter

import pytest

from tasks.garbage import RARELY

pytest_plugins = (
    "tests.fixtures.photos",
    "tests.fixtures.models",
    "tests.fixtures.programs",
    "tests.fixtures.postgresql",
    "tests.fixtures.servers",
    "tests.fixtures.prefect_api",
    "tests.fixtures.service",
    "tests.fixtures.trained",
    "tests.fixtures.browser",
)


def pytest_configure() -> None:
    """Import what is large as fast as the programs do."""
    gc.set_threshold(RARELY)


def pytest_unconfigure() -> None:
    """Leave as fast, too."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests, so that none of them runs alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
