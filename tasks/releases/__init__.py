"""Signed releases and the champion."""
