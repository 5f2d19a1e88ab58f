"""The tables of the benchmarks."""

from benchmarks import training


def result(seconds: float, accuracy: float) -> dict[str, object]:
    scores = {"accuracy": accuracy, "loss": 0.25}
    stages = {"full": seconds}
    return {"seconds": seconds, "stages": stages, "peak_mib": 1234.5, "val": scores, "test": scores}


def test_ratios_are_against_plain_keras() -> None:
    _, _, plain, cached = training.table(
        {"plain": result(100.0, 0.9), "cached": result(8.0, 0.95)}
    ).splitlines()
    assert "| 100.0 | 1.0 | 90.0%, 0.250 | 90.0%, 0.250 | 1,234 | full 100.0 |" in plain
    assert "| 8.0 | 12.5 | 95.0%, 0.250 |" in cached


def test_the_variants_change_only_known_parameters() -> None:
    import yaml

    from tasks.params import Params

    committed = (training.ROOT / "params.yaml").read_text()
    for _, changes in training.VARIANTS.values():
        params = yaml.safe_load(committed)
        for change in changes:
            training.merge(params, change)
        Params.model_validate(params)
