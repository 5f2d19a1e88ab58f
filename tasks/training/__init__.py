"""The training phases."""
