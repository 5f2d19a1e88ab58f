"""What the Prefect UI shows: the comparison, changed photos, outcomes in a few words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import ui
from flows.report import DataChanges, ModelReport, RunReport, data_changes
from flows.ui import MOST_PHOTOS, comparison_text
from tasks.io import write_json
from tasks.project import Project
from tasks.releases.comparison import PromotionDecision, compare
from tests.fixtures.photos import LABELS


def certain(classes: list[int]) -> np.ndarray:
    """Probabilities of a model that is sure of these signs."""
    return np.eye(6)[classes] * 0.94 + 0.01


def test_the_comparison_shows_scores_recalls_and_the_photos_that_changed() -> None:
    truth = [number % 6 for number in range(60)]
    before = [0] * 60
    names = [f"<b>{number}|.png" for number in range(60)]
    found = compare(certain(before), certain(truth), np.array(truth), names, classes=LABELS)
    text = comparison_text(PromotionDecision(True, found.reason, found))
    none = comparison_text(PromotionDecision(False, "The champion cannot be scored: <broken>"))
    assert "cannot be scored: &lt;broken&gt;" in none
    assert "50 photos only the challenger has right, 0 only the champion" in text
    assert "**better**" in text
    assert "| 60 photos | champion | challenger |" in text
    assert "| 3 | 10 | 0.0000 | 1.0000 | 1.0000 |" in text
    assert text.count("| right |") == MOST_PHOTOS
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.endswith("| right |")]
    assert rows[0] == "| &lt;b&gt;1\\|.png | 1 | 0 | 1 | right |"


def index(project: Project, **labels: str) -> dict[str, object]:
    """Write and return a dataset's list of photos."""
    photos = [{"name": name, "label": label} for name, label in labels.items()]
    content: dict[str, object] = {"labels": LABELS, "photos": photos}
    write_json(project.dataset / "index.json", content)
    return content


def test_photos_that_came_went_and_were_relabelled_are_counted(tmp_path: Path) -> None:
    project = Project(tmp_path)
    former = index(project, a="0", b="0", c="1", d="2")
    index(project, b="0", c="5", d="2", e="3", f="3")
    found = data_changes(project, former, since=4)
    assert (found.since, found.added, found.removed, found.relabelled) == (4, 2, 1, 1)
    assert found.per_class["0"] == {"before": 2, "added": 0, "removed": 1, "now": 1}
    assert found.per_class["3"] == {"before": 0, "added": 2, "removed": 0, "now": 2}
    first = data_changes(project, None, since=None)
    assert (first.since, first.added, first.removed) == (None, 5, 0)


def report(status: Any, **parts: Any) -> RunReport:
    return RunReport(status=status, model=ModelReport(name="signs", version=4), **parts)


def test_the_outcome_of_a_run_is_told_in_a_few_words() -> None:
    compared = {"champion": {"accuracy": 0.982}, "challenger": {"accuracy": 0.991}}
    promoted = report("promoted", comparison=compared)
    promoted.data.changes = DataChanges(since=3, added=84)
    assert promoted.headline() == "v4 promoted: 0.982 -> 0.991, +84 photos"
    check = {"name": "accuracy", "value": 0.963, "limit": 0.99, "passed": False}
    few = {"name": "test photos", "value": 3, "limit": 60, "passed": False}
    vague = {"name": "leaks", "value": None, "limit": 0, "passed": False, "detail": "missing"}
    rejected = report("rejected", gate={"checks": [check, few, vague]})
    assert rejected.headline() == "rejected: accuracy 0.963 < 0.990; test photos 3 < 60"
    assert rejected.gate.failures()[2] == "leaks: missing"
    assert report("unchanged", reason="Nothing changed.").headline() == "unchanged"
    assert report("cancelled", reason="Interrupted.").headline() == "cancelled"


def test_an_error_of_the_ui_is_logged_once_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    monkeypatch.setattr(ui, "_failed", False)
    with temporary_settings(
        {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    ):
        ui.show_gate(report("rejected"))
        ui.show_comparison(PromotionDecision(False, "none"))
    assert len([line for line in caplog.messages if "does not show everything" in line]) == 1
