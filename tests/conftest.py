"""Fixtures live by subject in `tests/fixtures/`."""

pytest_plugins = (
    "tests.fixtures.photos",
    "tests.fixtures.models",
    "tests.fixtures.programs",
    "tests.fixtures.postgresql",
    "tests.fixtures.servers",
    "tests.fixtures.prefect_api",
    "tests.fixtures.service",
    "tests.fixtures.browser",
)
