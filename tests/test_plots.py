"""The pictures: same bytes for the same numbers, and the odd cases drawn too."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tasks.scoring import plots
from tasks.scoring.metrics import score
from tests.fixtures.photos import photo


def case(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = np.arange(n) % 6
    logits = random.normal(0, 1, (n, 6)) + sharpness * np.eye(6)[y]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.stack([photo(int(label), row) for row, label in enumerate(y)]), p, y


def history(phase: str, epochs: int) -> dict[str, object]:
    numbers = {"loss": 0.4, "val_loss": 0.5, "accuracy": 0.9, "val_accuracy": 0.8}
    return {
        "phase": phase,
        "images": 1080,
        "epochs": [{"epoch": number + 1, **numbers} for number in range(epochs)],
    }


def texts(figure: Figure) -> list[str]:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        legend = axes.get_legend()
        found += [axes.get_title(), *(text.get_text() for text in axes.texts)]
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return found


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    images, p, y = case(18, 1.0)
    digests = []
    for attempt in ("one", "two"):
        folder = tmp_path / attempt
        drawn = {
            "curves": plots.curves([history("base", 3), history("full", 2)]),
            "confusion": plots.confusion(score(p, y)),
            "roc_pr": plots.roc_pr(p, y),
            "reliability": plots.reliability_diagram(p, y),
            "mistakes": plots.mistakes(images, p, y),
        }
        for name, figure in drawn.items():
            plots.save(figure, folder / f"{name}.png")
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        )
    assert digests[0] == digests[1]
    assert len(digests[0]) == 5
    with Image.open(tmp_path / "one" / "curves.png") as picture:
        assert picture.size == (1320, 528)
        assert "Software" not in picture.info


def test_curves_name_every_phase_and_join_their_epochs() -> None:
    figure = plots.curves([history("base", 3), history("fine_tune", 1), history("full", 2)])
    named = texts(figure)
    assert [text for text in named if "photos" in text] == 2 * [
        f"{name}\n1,080 photos" for name in ("base", "fine_tune", "full")
    ]
    loss, accuracy = figure.axes
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(accuracy.lines[1].get_ydata()) == [0.8] * 6


def test_confusion_shows_each_count_and_recall() -> None:
    _, p, y = case(120, 1.0)
    scores = score(p, y)
    axes = plots.confusion(scores).axes[0]
    counts = [int(text.get_text().replace("·", "0")) for text in axes.texts]
    assert counts == [count for row in scores.confusion_matrix for count in row]
    assert f"{scores.accuracy:.1%} of 120" in axes.get_title()


def test_mistakes_come_with_truth_and_reading_most_certain_first() -> None:
    images, p, y = case(60, 0.5)
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    surest = wrong[p[wrong].max(axis=1).argmax()]
    figure = plots.mistakes(images, p, y)
    assert f"{len(wrong)} of 60 test photos misread" in figure.get_suptitle()
    assert "24 most certain" in figure.get_suptitle()
    assert figure.axes[0].get_title() == f"{y[surest]} read as {p[surest].argmax()}"


def test_without_mistakes_the_least_certain_photos_are_shown() -> None:
    images, p, y = case(30, 20.0)
    figure = plots.mistakes(images, p, y)
    assert figure.get_suptitle() == "None of 30 test photos misread; the 12 least certain"
    assert figure.axes[0].get_title() == f"{y[p.max(axis=1).argmin()]}, right"


@pytest.mark.parametrize("n", [1, 5, 7])
def test_a_few_photos_and_missing_classes_are_drawn_too(n: int, tmp_path: Path) -> None:
    images, p, y = case(n, 0.0)
    roc = plots.roc_pr(p, y)
    missing = 6 - len(set(y.tolist()))
    not_defined = [text for text in texts(roc) if "not defined" in text]
    assert len(not_defined) == 2 * (missing if n > 1 else 6)
    for name, figure in (
        ("confusion", plots.confusion(score(p, y))),
        ("roc", roc),
        ("reliability", plots.reliability_diagram(p, y)),
        ("mistakes", plots.mistakes(images, p, y)),
    ):
        plots.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
