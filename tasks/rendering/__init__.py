"""Hands drawn in three dimensions, for the sample data set and nobody's photographs."""
