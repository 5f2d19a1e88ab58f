"""What the benchmarks make of what they measured."""

from benchmarks import training
from benchmarks.variant import curve


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
    assert training.markdown_table(("", "a"), [("b", "1")]) == "|  | a |\n| --- | ---: |\n| b | 1 |"


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
