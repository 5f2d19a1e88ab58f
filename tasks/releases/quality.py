"""Quality over time: champions on the photos that all were tested on, and what they see now."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.data.capture import Store
from tasks.data.traffic import Counts, read_drift
from tasks.io import read_json
from tasks.releases.champion import PHOTOS, Move
from tasks.scoring.drift import BINS
from tasks.scoring.metrics import score
from tasks.services.s3 import MissingObjectError, Storage

PREDICTIONS = "predictions.json"
"""File of a release: its probabilities for each photo of its test split."""
RECENT = 12
"""Champions that are compared; the more there are, the fewer photos all of them were tested on."""
SCORES = {"accuracy": "accuracy", "loss": "loss", "calibration error": "ece"}
MAX_BARS = 20  # with names below
DRIFT = ("labels", "confidences", "embeddings")  # what the drift monitor compares

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Quality:
    """One champion: `own` scores on the test photos of its day, `common` on those of all.

    `drift` is the monitor's last result for it, by what was compared, as a share of the limit.
    """

    version: int
    own: Scores
    common: Scores
    drift: Mapping[str, float]


def read_quality(
    storage: Storage, moves: Sequence[Move], traffic: Store
) -> tuple[list[Quality], int]:
    """Score the last champions, oldest first, on the test photos that all have; and their number.

    Photos keep their split when others are added, so test splits overlap. No model runs: each
    release holds its predictions. A release without them, or with other labels than the present
    champion's, has no common scores.
    """
    champions = list({move.release: move for move in moves}.values())[-RECENT:]
    made = {move.release: _read_predictions(storage, move.release) for move in champions}
    labels = made[champions[-1].release][0] if champions else []
    tests = {release: photos for release, (names, photos) in made.items() if names == labels}
    common = sorted(set.intersection(*(set(photos) for photos in tests.values()))) if labels else []
    rows = []
    for move in champions:
        scores: Scores = {}
        if common and (photos := tests.get(move.release)):
            probabilities = np.array([photos[photo] for photo in common])
            truth = np.array([labels.index(label) for _, label in common])
            result = score(probabilities, truth, labels)
            scores = {name: getattr(result, name) for name in SCORES.values()}
        found = read_drift(traffic, move.release).items()
        drift = {name: value / limit for name, (value, limit) in found}
        rows.append(Quality(move.version, move.metrics, scores, drift))
    return rows, len(common)


def _read_predictions(
    storage: Storage, release: str
) -> tuple[list[str], dict[tuple[str, str], list[float]]]:
    """Labels, and probabilities by name and label of each test photo."""
    try:
        content = json.loads(storage.get(f"releases/{release}/{PREDICTIONS}"))
    except MissingObjectError:  # made by an earlier version of this program, or pruned
        return [], {}
    photos = {(one["name"], one["label"]): one["probabilities"] for one in content["photos"]}
    return content["labels"], photos


def draw_quality(rows: Sequence[Quality], common_photos: int, path: Path) -> None:
    """Draw the scores, training photos and drift of the champions, by version."""
    from matplotlib.figure import Figure

    from tasks.scoring.plots import COLORS, save

    figure = Figure(figsize=(11, 6), layout="constrained")
    day, common = "test photos of the day", f"{common_photos} common test photos"
    lines: dict[str, dict[str, list[float | None]]] = {
        title: {
            day: [one.own.get(key) for one in rows],
            common: [one.common.get(key) for one in rows],
        }
        for title, key in SCORES.items()
    }
    lines["training photos"] = {PHOTOS: [one.own.get(PHOTOS) for one in rows]}
    drift = {name: [one.drift.get(name) for one in rows] for name in DRIFT}
    lines["drift, as a share of its limit"] = drift
    x, panels = range(len(rows)), figure.subplots(2, 3).flat
    for axes, (title, shown) in zip(panels, lines.items(), strict=False):
        for color, (label, values) in zip(COLORS[3:], shown.items(), strict=False):
            axes.plot(x, np.array(values, float), "o-", color=color, label=label)
        axes.set(title=title, xlabel="version", xticks=x, xlim=(-0.5, len(x) - 0.5))
        versions = [f"v{one.version}" for one in rows]
        axes.set_xticklabels(versions, rotation="vertical" if len(x) > 6 else 0)
    panels[3].set_ylim(bottom=0)
    panels[4].axhline(1, color="grey", linestyle=":")
    panels[5].set_axis_off()
    for axes, place in ((panels[0], "upper left"), (panels[4], "lower left")):
        panels[5].add_artist(panels[5].legend(*axes.get_legend_handles_labels(), loc=place))
    save(figure, path)


def draw_traffic(release: Path, counts: Counts, path: Path) -> None:
    """Draw what a fetched release answered beside its answers for the validation photos."""
    from matplotlib.figure import Figure

    from tasks.scoring.plots import COLORS, save

    labels = read_json(release / "labels.json")
    with np.load(release / "reference.npz") as reference:
        shown = {
            "label": (labels, reference["labels"], [counts.labels[label] for label in labels]),
            "confidence": (
                [f"{bin_ / BINS:.1f}" for bin_ in range(BINS)],
                reference["confidences"],
                counts.confidences,
            ),
        }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, (names, *both)) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        for place, (values, what) in enumerate(
            zip(both, ("validation", "production"), strict=True)
        ):
            shares = np.array(values) / max(sum(values), 1)
            x = np.arange(len(names)) + 0.4 * place
            axes.bar(x, shares, 0.4, color=COLORS[4 + place], label=what)
        axes.set(xlabel=title, ylabel="share of photos")
        if len(names) <= MAX_BARS:
            axes.set_xticks(np.arange(len(names)) + 0.2, names)
        axes.legend()
    save(figure, path)
