"""Fixtures live by subject in `tests/fixtures/`; the order of the files is made here."""

import os

import pytest

from tasks.stage import collect_rarely

THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")

LONGEST = (
    "test_retrain",
    "test_up",
    "test_promotion",
    "test_trust",
    "test_surroundings",
    "test_cli",
    "test_browser",
    "test_serve",
    "test_publish_crashes",
    "test_dvc",
    "test_registry",
    "test_service_faults",
    "test_training",
    "test_backbone",
)
"""Files in the order of their duration."""

pytest_plugins = (
    "tests.fixtures.session",
    "tests.fixtures.photos",
    "tests.fixtures.models",
    "tests.fixtures.programs",
    "tests.fixtures.postgresql",
    "tests.fixtures.servers",
    "tests.fixtures.prefect_api",
    "tests.fixtures.service",
    "tests.fixtures.captures",
    "tests.fixtures.trained",
    "tests.fixtures.earlier",
    "tests.fixtures.browser",
    "tests.fixtures.dask_cluster",
)


def pytest_configure() -> None:
    """Import what is large as fast as the programs do, and leave the cores to each other.

    Several tests run at once; the threads of one would only spin while others work.
    """
    collect_rarely()
    for name in THREADS:
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them runs alone at the end."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
