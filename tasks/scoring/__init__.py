"""Metrics, comparison and plots."""
