"""The six classes, in the order of the model's outputs."""

LABELS: tuple[str, ...] = ("0", "1", "2", "3", "4", "5")
