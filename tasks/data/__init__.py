"""Photos: import, near-duplicates, splits, datasets."""
