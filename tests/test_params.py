"""`params.yaml` is refused before anything runs, by the key that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import ParamsError
from tasks.params import load_params
from tests.fixtures.photos import CHECKOUT


def content() -> Any:
    return yaml.safe_load(CHECKOUT.params.read_text())


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("base", "full"),
        ("base", "fine_tune", "last"),
        ("base", "fine_tune", "full", "more"),
        ("full", "fine_tune", "base"),
    ],
)
def test_phases_that_have_no_stage_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    params = content()
    before = ("backbone", *names)
    params["phases"] = {
        name: {**params["phases"]["full"], "init_from": before[number]}
        for number, name in enumerate(names)
    }
    told = refusal(tmp_path / "params.yaml", yaml.safe_dump(params, sort_keys=False))
    assert "phases must be base, fine_tune, full, in this order" in told


@pytest.mark.parametrize(
    ("recall", "fault"),
    [
        ("90 %", "gate.min_recall: Input should be a valid number"),
        ({**dict.fromkeys(range(5), 0.9), 5: 90}, "gate.min_recall.5: Input should be less than"),
        ({0: 0.9}, "gate.min_recall: a mapping must name each of the classes 0, 1, 2, 3, 4, 5"),
    ],
)
def test_a_limit_that_is_none_is_one_fault(tmp_path: Path, recall: object, fault: str) -> None:
    params = content()
    params["gate"]["min_recall"] = recall
    told = refusal(tmp_path / "params.yaml", yaml.safe_dump(params))
    assert told.startswith(f"params.yaml has 1 fault(s): {fault}")


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    text = CHECKOUT.params.read_text().replace("  test: 0.15", "  val: 0.2\n  test: 0.15")
    number = next(n for n, line in enumerate(text.splitlines(), 1) if line == "  val: 0.2")
    told = refusal(tmp_path / "params.yaml", text)
    assert "the key 'val' stands twice" in told
    assert f"line {number}, column 3" in told


@pytest.mark.parametrize(
    "text", ["? [a]\n: b", "seed: [", "- seed", "\x00", "seed: 2024-99-99", "seed: 0x_", "[" * 3000]
)
def test_what_is_no_mapping_of_names_is_refused(tmp_path: Path, text: str) -> None:
    assert "\n" not in refusal(tmp_path / "params.yaml", text)


def test_what_is_merged_may_be_overridden(tmp_path: Path) -> None:
    text = (
        CHECKOUT.params.read_text()
        .replace("  fine_tune:\n", "  fine_tune: &tuned\n", 1)
        .replace("  full:\n", "  full:\n    <<: *tuned\n", 1)
    )
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml") == load_params(CHECKOUT.params)


def test_parameters_of_an_earlier_version_are_refused_with_their_new_names(tmp_path: Path) -> None:
    text = (
        CHECKOUT.params.read_text()
        .replace("init_from", "starts_from")
        .replace("augmented_copies", "views")
        .replace("dropout:", "label_smoothing: 0.1\n  dropout:")
    )
    assert refusal(tmp_path / "params.yaml", text) == (
        "params.yaml is of an earlier version: features.views is now features.augmented_copies; "
        "training.label_smoothing no longer exists, remove it; "
        "phases.*.starts_from is now phases.*.init_from."
    )
