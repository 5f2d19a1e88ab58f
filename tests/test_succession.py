"""What is told about photos and models before a champion is changed."""

from pathlib import Path

import numpy as np

from flows.report import data_changes
from flows.ui import MOST_PHOTOS, comparison_text
from tasks.io import write_json
from tasks.project import Project
from tasks.releases.challenger import PromotionDecision
from tasks.scoring.compare import compare


def certain(classes: list[int]) -> np.ndarray:
    """Probabilities of a model that is sure of these signs."""
    return np.eye(6)[classes] * 0.94 + 0.01


def test_the_comparison_shows_scores_recalls_and_the_photos_that_changed() -> None:
    truth = [number % 6 for number in range(60)]
    before = [0] * 60
    names = [f"<b>{number}|.png" for number in range(60)]
    found = compare(certain(before), certain(truth), np.array(truth), names)
    text = comparison_text(PromotionDecision(True, found.reason, found))
    assert "50 photos only the challenger has right, 0 only the champion" in text
    assert "**better**" in text
    assert "| 60 photos | champion | challenger |" in text
    assert "| 3 | 10 | 0.0000 | 1.0000 | 1.0000 |" in text
    assert text.count("| right |") == MOST_PHOTOS
    assert "<b>" not in text
    rows = [line for line in text.splitlines() if line.endswith("| right |")]
    assert rows[0] == "| &lt;b&gt;1\\|.png | 1 | 0 | 1 | right |"


def test_a_comparison_that_was_not_made_says_why() -> None:
    text = comparison_text(PromotionDecision(False, "The champion cannot be scored: <broken>"))
    assert "cannot be scored: &lt;broken&gt;" in text
    assert "McNemar" not in text


def index(project: Project, **labels: str) -> dict[str, object]:
    """Write and return a dataset's list of photos."""
    content = {"photos": [{"name": name, "label": label} for name, label in labels.items()]}
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
