"""What is recorded of one retrain in the MLflow registry, besides the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """Everything about one retrain besides the model.

    Args:
        content_id: id of the release; None of a rejected model.
        params: nested; keys are joined with dots.
        histories: contents of the phases' `history.json`, in order.
        metrics: nested final metrics; only numbers are recorded.
        name: of the run; `Registry.name_run` adds the outcome.
        description: in Markdown.
        data_version: DVC's hash of the photos.
        photos: number of photos by split.
        started: when training began, as a Unix time.
    """

    content_id: str | None
    params: Mapping[str, Any]
    name: str | None = None
    description: str = ""
    data_version: str = ""
    photos: Mapping[str, int] = field(default_factory=dict)
    started: float | None = None
    histories: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()
    files: Sequence[Path] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def flat_params(self) -> Iterator[tuple[str, Any]]:
        """Parameters by their dotted keys."""
        return _flat(self.params)

    def points(self) -> Iterator[tuple[str, Any, int]]:
        """Name, value and epoch; final metrics have epoch 0."""
        for history in self.histories:
            for epoch in history["epochs"]:
                for name in epoch.keys() - {"epoch"}:
                    yield f"{history['phase']}/{name}", epoch[name], epoch["epoch"]
        for name, value in _flat(self.metrics):
            yield name, value, 0


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
