"""What one retrain leaves in the registry, in plain values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """Everything about one retrain besides the model.

    Args:
        content_id: id of the release.
        params: nested; keys are joined with dots.
        histories: contents of the phases' `history.json`, in order.
        metrics: nested final metrics; values that are not numbers are left out.
        pictures: files that go to `pictures/`.
        files: files that go to `files/`, such as `dvc.lock`.
        tags: plain facts, such as git revision and data version.
    """

    content_id: str
    params: Mapping[str, Any]
    histories: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()
    files: Sequence[Path] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> list[tuple[str, str]]:
        """Return each parameter's dotted name and its value as text."""
        return [(name, str(value)) for name, value in _flat(self.params)]

    def points(self) -> list[tuple[str, float, int]]:
        """Return name, value and epoch of every number, such as ("base/val_loss", 0.3, 1).

        Final metrics have epoch 0.
        """
        training = [
            (f"{history['phase']}/{name}", float(value), int(epoch["epoch"]))
            for history in self.histories
            for epoch in history["epochs"]
            for name, value in epoch.items()
            if name != "epoch" and _is_number(value)
        ]
        final = [
            (name.replace(".", "/"), float(value), 0)
            for name, value in _flat(self.metrics)
            if _is_number(value)
        ]
        return training + final


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
