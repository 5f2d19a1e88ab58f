"""Prefect flows, settings and the `handsigns` command."""
