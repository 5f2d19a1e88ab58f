"""Verbs of the `handsigns` command, and what they print."""
