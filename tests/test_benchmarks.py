"""What the benchmarks make of what they measured."""

import shutil
from pathlib import Path

import pytest

from benchmarks import growth, halves, increment, markdown, tail, training
from benchmarks.variant import curve
from tasks.data.dataset import INDEX
from tasks.io import read_json, write_json
from tasks.params import LABELS, load_params
from tasks.project import Project
from tests.fixtures.photos import CHECKOUT


def result(seconds: float, points: list[tuple[float, float]], rows: int = 0) -> dict[str, object]:
    """One variant's measurement."""
    scores = {"accuracy": points[-1][1], "loss": 0.25}
    return {
        "seconds": seconds,
        "stages": {"full": seconds},
        "work": {"full": seconds - 1},
        "rows": rows,
        "peak_mib": 1234.5,
        "features_mib": 10.0,
        "curve": points,
        "val": scores,
        "test": scores,
    }


def test_tables_are_markdown() -> None:
    assert markdown.table(("", "a"), [("b", "1")]) == "|  | a |\n| --- | ---: |\n| b | 1 |"


def test_ratios_are_against_plain_keras_and_its_last_accuracy() -> None:
    results = {
        "plain": result(100.0, [(50.0, 0.8), (98.0, 0.9)]),
        "cached": result(10.0, [(4.0, 0.85), (4.9, 0.92), (9.0, 0.89)], rows=7),
        "default": result(40.0, [(39.0, 0.7)]),
    }
    _, _, plain, cached, default = training.table(results).splitlines()
    assert "| 100.0 | 1.0 | - | 98.0 s, 1.0 times sooner | 90.0%, 0.250 |" in plain
    assert "| 10.0 | 10.0 | - | 4.9 s, 20.0 times sooner | 89.0%, 0.250 |" in cached
    assert "| 40.0 | 2.5 | - | not reached |" in default
    assert "| 7 | 10.0 (1.0) |" in training.stages(results).splitlines()[3]


def test_an_epochs_moment_is_its_last_update() -> None:
    updates = [("full", done, 6, float(done)) for done in range(1, 7)]
    history = {"full": {"epochs": [{"val_accuracy": 0.5}, {"val_accuracy": 0.75}]}}
    assert curve(history, updates) == [(3.0, 0.5), (6.0, 0.75)]


def test_growth_is_against_the_first_size() -> None:
    first, second = result(10.0, [(1.0, 0.5)]), result(30.0, [(1.0, 0.5)])
    second["peak_mib"] = 1334.5
    last = growth.table({100: first, 300: second}).splitlines()[-1]
    assert last.startswith("| 300 | 30.0 | 3.00 | 1,334 | 100 |")


def test_a_products_speed_is_counted_in_both_its_factors() -> None:
    products = {f"product {number}": 1.0 for number in range(2 * len(tail.PRODUCTS))}
    last = tail.tables({"updates": {"one way": 30.0}, "products": products}).splitlines()[-1]
    assert last == "| product 5 | 1.00 | 1285 |"  # 2 x 1,568 x 320 x 1,280 in a thousandth second


def test_all_ways_to_compute_an_update_learn_the_same() -> None:
    first, *others = ([run() for _ in range(3)] for run in tail.updates().values())
    assert len(others) == 3
    assert first[2] < first[0]
    for losses in others:
        assert losses == pytest.approx(first, rel=0.02)


def test_five_percent_of_the_photos_come_later(tmp_path: Path) -> None:
    for label in LABELS:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(40):
            (tmp_path / "photos" / label / f"{number:02d}.png").touch()
    increment.divide(tmp_path / "photos", tmp_path / "first", tmp_path / "later")
    counts = [len(list((tmp_path / part).rglob("*.png"))) for part in ("first", "later")]
    assert counts == [38 * len(LABELS), 2 * len(LABELS)]


def test_a_changes_share_is_of_the_first_retrain() -> None:
    features = {"computed": 5, "reused": 95}
    whole = {"wall": 60.0, "stages": {"full": 30.0}, "status": "promoted", "features": features}
    nothing = {"wall": 1.5, "stages": {}, "status": "unchanged", "features": features}
    last = increment.table({"everything": whole, "nothing": nothing}).splitlines()[-1]
    assert last == "| nothing | 1.5 | 2% | 0.0 | 0% | 5 | 95 | unchanged |"


def test_a_half_is_the_photos_that_the_camera_numbered_first(tmp_path: Path) -> None:
    project = Project(tmp_path)
    photos = [
        {"name": f"{label}-{number}.png", "label": label, "split": "test"}
        for label in LABELS
        for number in range(5)
    ]
    write_json(project.dataset / INDEX, {"photos": photos})
    numbers = {str(photo["name"]): 100 - place for place, photo in enumerate(photos)}
    for half, trained in ((0, {0, 1}), (1, {2, 3, 4})):
        halves.hold_out(project, numbers, half)
        told = read_json(project.dataset / INDEX)["photos"]
        assert {photo["split"] for photo in told} == {"train", "val"}
        kept = {int(photo["name"][2]) for photo in told if photo["split"] == "train"}
        assert kept == trained


def test_a_setting_of_a_trial_goes_into_the_parameters(tmp_path: Path) -> None:
    project = Project(tmp_path)
    shutil.copy(CHECKOUT.params, project.params)
    halves.change(project, ["training.style_mixing=0.5", "phases.full.epochs=3", "seed=7"])
    params = load_params(project.params)
    assert (params.training.style_mixing, params.phases["full"].epochs, params.seed) == (0.5, 3, 7)


def test_a_cameras_number_is_the_last_in_a_files_name() -> None:
    names = ("IMG_4242.JPG", "2026 hand 7.png", "hand.png")
    assert [halves.camera_number(Path(name)) for name in names] == [4242, 7, 0]
