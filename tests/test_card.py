"""The model card says what the files say, and nothing that varies."""

import numpy as np

from tasks.gate import judge
from tasks.params import Params
from tasks.releases.card import model_card
from tasks.scoring.metrics import score


def card(params: Params, probabilities: np.ndarray | None = None, note: str = "") -> str:
    p = np.full((12, 6), 0.02) + np.eye(6)[np.arange(12) % 6] * 0.88
    metrics = score(p if probabilities is None else probabilities, np.arange(12) % 6).to_json()
    return model_card(
        metrics=metrics,
        gate=judge(metrics, 0, params.gate).to_json(),
        counts={"train": 100, "val": 10, "test": 12, "synthetic": 60},
        params=params.model_dump(),
        histories=[
            {
                "phase": name,
                "images": 10,
                "epochs": [{}] * 3,
                "val_loss": 0.25,
                "val_accuracy": 0.9,
            }
            for name in params.phases
        ],
        data_version="3f2a.dir",
        data_note=note,
    )


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_card_carries_data_phases_scores_and_verdict(params: Params) -> None:
    text = card(params, note="Rendered hands, no photos of people.")
    table = rows(text)
    full = params.phases["full"]
    averaged = f"{full.swa_fraction:.0%}" if full.swa_fraction else "-"
    rate = f"{full.learning_rate:g}"
    assert "Version `3f2a.dir`. Rendered hands, no photos of people." in text
    assert "used 60 synthetic (rendered) hands" in text
    assert ["train", "100"] in table
    layers = str(full.trainable_layers)
    assert ["full", "10", layers, rate, "3", averaged, "0.2500", "0.9000"] in table
    assert ["accuracy", "1.0000 (95% Wilson: 0.7575 to 1.0000)"] in table
    assert ["3", "1.0000", "1.0000", "1.0000", "2"] in table
    assert ["test photos", "12", "50", "-", "failed"] in table
    assert "Failed." in text
    assert "Apache-2.0" in text


def test_the_same_content_gives_the_same_card(params: Params) -> None:
    assert card(params) == card(params)


def test_every_table_row_has_as_many_cells_as_its_heading(params: Params) -> None:
    for block in card(params).split("\n\n"):
        widths = {len(row) for row in rows(block)}
        assert len(widths) <= 1


def test_undefined_ratios_are_dashes(params: Params) -> None:
    blind = np.zeros((12, 6))
    blind[:, 0] = 1.0
    assert ["3", "-", "0.0000", "0.0000", "2"] in rows(card(params, blind))


def test_the_card_follows_the_parameters(params: Params) -> None:
    still = params.augmentation.model_copy(update={"horizontal_flip": False})
    assert "mirrored at random" in card(params)
    assert "not mirrored" in card(params.model_copy(update={"augmentation": still}))
