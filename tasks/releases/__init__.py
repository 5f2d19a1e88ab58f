"""Releases and the champion among them: written whole, signed, compared, moved."""
