"""`artifacts/run.json`: what a retrain did, for scripts."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.layout import Layout
from tasks.whole import write_json

Status = Literal["promoted", "registered", "rejected", "unchanged", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataChanges(_Part):
    """Photos that came and went since the champion was trained.

    Args:
        since: version of the champion; None where there is none yet.
        added: photos that it did not know.
        removed: photos that it knew and that are gone.
        relabelled: photos that have another label now.
        per_class: `before`, `added`, `removed` and `now` by label.
    """

    since: int | None = None
    added: int = 0
    removed: int = 0
    relabelled: int = 0
    per_class: dict[str, dict[str, int]] = Field(default_factory=dict)


class DataReport(_Part):
    version: str = ""
    train: int = 0
    val: int = 0
    test: int = 0
    quarantined: int = 0
    duplicates: int = 0
    leaks: int = 0
    changes: DataChanges | None = None


class PhaseReport(_Part):
    name: str
    images: int
    epochs: int
    seconds: float
    val_accuracy: float
    val_loss: float


class TestReport(_Part):
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    loss: float | None = None
    auc: float | None = None
    ece: float | None = None
    per_class: list[dict[str, Any]] = Field(default_factory=list)
    robustness: dict[str, Any] = Field(default_factory=dict)


class GateReport(_Part):
    passed: bool = False
    checks: list[dict[str, Any]] = Field(default_factory=list)


class ModelReport(_Part):
    name: str
    version: int | None = None
    alias: str | None = None


class ReleaseReport(_Part):
    id: str | None = None
    uri: str | None = None


class FeaturesReport(_Part):
    views: int = 0
    computed: int = 0
    reused: int = 0
    images_per_second: float = 0.0


class RunReport(_Part):
    """The whole of `run.json`; a part that was not reached keeps its empty value."""

    status: Status
    reason: str
    data: DataReport = Field(default_factory=DataReport)
    phases: list[PhaseReport] = Field(default_factory=list)
    test: TestReport = Field(default_factory=TestReport)
    gate: GateReport = Field(default_factory=GateReport)
    comparison: dict[str, Any] | None = None
    model: ModelReport
    release: ReleaseReport = Field(default_factory=ReleaseReport)
    features: FeaturesReport = Field(default_factory=FeaturesReport)
    seconds: dict[str, float] = Field(default_factory=dict)

    def write(self, layout: Layout) -> None:
        """Write `run.json` whole."""
        write_json(layout.run, self.model_dump(mode="json"))
