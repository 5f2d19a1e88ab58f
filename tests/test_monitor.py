"""Drift between what the service answers and what its release was validated on."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest

from flows.monitor import compare_with_reference
from tasks.data.capture import Capture
from tasks.data.stores import FolderStore
from tasks.data.traffic import Counts, Traffic, count_window, read_result
from tasks.io import write_json
from tasks.model.augment import enlarge
from tasks.model.files import export_graph
from tasks.model.inference import Engine
from tests.fixtures.photos import CHECKOUT, LABELS, photo

RELEASE = "0123456789abcdef" * 2


def test_answers_are_counted_by_the_hour_for_each_release(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first, second = Traffic(store), Traffic(store)
    for number in range(6):
        first.add(RELEASE, "3", 0.95)
        second.add("another" if number % 2 else RELEASE, "0", 1.0)
    assert count_window(store, RELEASE, hours=2).labels == {}
    first.save()
    second.save()
    second.save()
    found = count_window(store, RELEASE, hours=2)
    assert found.labels == {"3": 6, "0": 3}
    assert +found.confidences == {9: 9}
    first.add(RELEASE, "3", 0.05)
    first.save()
    assert count_window(store, RELEASE, hours=2).labels == {"3": 7, "0": 3}


def test_what_is_older_than_the_window_does_not_count_and_is_removed_in_time(
    tmp_path: Path,
) -> None:
    store = FolderStore(tmp_path)
    now = datetime.now(UTC)
    for hours in (0, 5, 30, 24 * 31):
        hour = f"{now - timedelta(hours=hours):%Y-%m-%dT%H}"
        content = b'{"labels": {"1": 1}, "confidences": [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]}'
        store.put(f"traffic/{hour}/{RELEASE}-x.json", content)
    assert count_window(store, RELEASE, hours=24).labels == {"1": 2}
    assert len(store.list("traffic")) == 3
    assert read_result(store) == {}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fetched release, whose reference is 60 usual photos."""
    from tasks.model.network import build_model

    folder = tmp_path_factory.mktemp("release")
    (folder / "model.pb").write_bytes(export_graph(build_model(6, seed=1)))
    (folder / "params.yaml").write_text(CHECKOUT.params.read_text())
    write_json(folder / "labels.json", list(LABELS))
    engine = Engine(folder / "model.pb", embeddings=True)
    photos = enlarge(np.stack([photo(n % 6, n) for n in range(60)]), engine.size)
    np.savez(
        folder / "reference.npz",
        labels=np.full(6, 10),
        confidences=np.array([0] * 9 + [60]),
        embeddings=np.array([*engine.stream(photos)], np.float16),
    )
    return folder


def keep(store: FolderStore, pictures: list[np.ndarray], reason: str = "sample") -> None:
    for number, picture in enumerate(pictures):
        values = {"time": datetime.now(UTC), "reason": reason, "label": "0"}
        name = Capture.model_validate(
            {**values, "probabilities": {"0": 1.0}, "version": 1, "release": RELEASE}
        ).id(number)
        content = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
        store.put(f"photos/{name[:10]}/{name}.jpg", content)


def verdicts(release: Path, store: FolderStore, counts: Counts) -> dict[str, str]:
    found = compare_with_reference(release, counts, store, hours=24)
    return {one.name: one.verdict for one in found}


def test_usual_photos_are_no_drift_and_noise_is(release: Path, tmp_path: Path) -> None:
    usual, other = FolderStore(tmp_path / "usual"), FolderStore(tmp_path / "other")
    keep(usual, [photo(n % 6, 1000 + n) for n in range(60)])
    counts = Counts()
    for number in range(600):
        counts.add(LABELS[number % 6], 0.97)
    expected = dict.fromkeys(("labels", "confidences", "embeddings"), "no drift")
    assert verdicts(release, usual, counts) == expected

    random = np.random.default_rng(1)
    keep(other, [random.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(60)])
    for _ in range(600):
        counts.add("5", 0.35)
    assert set(verdicts(release, other, counts).values()) == {"drift"}


def test_only_the_random_sample_is_compared(release: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    keep(store, [photo(0, n) for n in range(3)], reason="uncertain")
    assert set(verdicts(release, store, Counts()).values()) == {"too few samples"}
