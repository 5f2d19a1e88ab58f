"""The gate passes only what meets every limit, and nothing it cannot read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import CORRUPTIONS, LARGEST, judge, reasons, run
from tasks.io import read_json, write_json
from tasks.params import GateParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import LABELS

FEW = settings(max_examples=100, deadline=None)  # a busy machine is no fault
LIMITS = GateParams(
    min_accuracy=0.9,
    min_recall=0.75,
    min_robust_accuracy=0.8,
    max_loss=0.5,
    max_calibration_error=0.1,
    max_cross_split_duplicates=0,
    min_test_photos=50,
)
NAMES = {
    "accuracy": "accuracy",
    **{f"recall {label}": f"recall of {label}" for label in LABELS},
    **{kind: f"accuracy under {kind}" for kind in CORRUPTIONS},
    "loss": "loss",
    "ece": "calibration error",
    "cross-split duplicates": "cross-split duplicates",
    "n": "test photos",
}
"""Values of the report, and the checks of them, in their order."""

wrong = ["0.95", "nan", math.nan, math.inf, -math.inf, -0.01, [0.9], {"value": 1}, 1j, 10**400]
bad_values = st.one_of(
    st.none(), st.booleans(), st.text(), st.sampled_from(wrong), st.floats(max_value=-1e-9)
)


def metrics(**changes: Any) -> dict[str, Any]:
    """A good model's metrics with some values changed, `recall 3` for one class."""
    content: dict[str, Any] = {"accuracy": 0.97, "loss": 0.2, "ece": 0.02, "n": 120}
    content |= {key: value for key, value in changes.items() if key in content}
    content["per_class"] = [
        {"label": label, "recall": changes.get(f"recall {label}", 0.9), "support": 20}
        for label in LABELS
    ]
    corrupted = {kind: changes.get(kind, 0.9) for kind in CORRUPTIONS}
    content["robustness"] = {"photos": 120, "accuracy": corrupted}
    content["standard_errors"] = {"loss": 0.05, "ece": 0.01}
    return content


def judged(content: Any, duplicates: Any = 0, **limits: Any) -> dict[str, Any]:
    verdict = judge(content, duplicates, LIMITS.model_copy(update=limits), LABELS)
    assert verdict["passed"] == (not reasons(verdict))
    json.dumps(verdict, allow_nan=False)
    return verdict


def failed(content: Any, duplicates: Any = 0, **limits: Any) -> list[str]:
    """Names of the checks that fail."""
    checks = judged(content, duplicates, **limits)["checks"]
    return [check["name"] for check in checks if not check["passed"]]


def named(verdict: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in verdict["checks"] if check["name"] == name)


def test_a_good_model_passes_every_check_and_so_do_values_at_the_limit() -> None:
    at_limit = dict.fromkeys(CORRUPTIONS, 0.8) | {f"recall {label}": 0.75 for label in LABELS}
    for content in (metrics(), metrics(accuracy=0.9, loss=0.5, ece=0.1, n=50, **at_limit)):
        verdict = judged(content)
        assert verdict["passed"]
        assert [check["name"] for check in verdict["checks"]] == list(NAMES.values())
    largest = {"accuracy": 1.0, "recall 2": 1, "blur": 1, "n": int(LARGEST), "loss": LARGEST}
    generous = {"max_loss": LARGEST, "max_calibration_error": 1.0}
    assert judged(metrics(**largest, ece=1), **generous)["passed"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("accuracy", 0.8999), ("accuracy", 1.01), ("loss", 0.5001), ("loss", LARGEST * 2)],
        *[("ece", 0.1001), ("ece", 5.0), ("n", 49), ("n", 120.0), ("n", 2 * int(LARGEST))],
        *[("recall 2", 0.74), ("recall 5", 1.5), ("blur", 0.79), ("jpeg", 1.01)],
        *[("cross-split duplicates", bad) for bad in (1, True, 0.0, None, "0")],
    ],
)
def test_one_value_past_its_limit_fails_that_check_only(field: str, value: Any) -> None:
    duplicates = value if field == "cross-split duplicates" else 0
    assert failed(metrics(**{field: value}), duplicates) == [NAMES[field]]


@FEW
@given(st.sampled_from(list(NAMES)), bad_values)
def test_no_unusable_value_ever_passes(field: str, value: Any) -> None:
    duplicates = value if field == "cross-split duplicates" else 0
    verdict = judged(metrics(**{field: value}), duplicates)
    (check,) = (check for check in verdict["checks"] if not check["passed"])
    assert (check["name"], check["value"], check["interval"]) == (NAMES[field], None, None)
    assert check["detail"] == "missing" or check["detail"].startswith("not a number in range: ")


def test_what_is_missing_in_a_part_of_the_report_fails() -> None:
    content = metrics()
    del content["robustness"]["accuracy"]["jpeg"]
    content["per_class"][4] = {"label": "3", "recall": 1.0}
    assert failed(content) == ["recall of 3", "recall of 4", "accuracy under jpeg"]
    for broken in (None, True, "0.95", [0.9], [None], {"accuracy": [1]}, {"label": "0"}):
        assert len(failed(metrics() | {"robustness": broken})) == len(CORRUPTIONS)
        assert len(failed(metrics() | {"per_class": broken})) == len(LABELS)
        assert len(failed(broken)) == len(NAMES) - 1
    loss = named(judged(metrics() | {"standard_errors": None}), "loss")
    assert (loss["passed"], loss["interval"]) == (True, None)


def test_a_limit_that_is_left_out_is_not_checked_and_no_limit_at_all_fails() -> None:
    verdict = judge({"accuracy": 0.95}, None, GateParams(min_accuracy=0.9), LABELS)
    assert (verdict["passed"], len(verdict["checks"])) == (True, 1)
    nothing = judge(metrics(), 0, GateParams(), LABELS)
    assert not nothing["passed"]
    assert reasons(nothing) == [
        "limits: no limit is set; set at least one under gate in params.yaml"
    ]
    own = dict(zip(LABELS, (0.95, 0.0, 0.0, 0.5, 0.0, 0.0), strict=True))
    assert failed(metrics(**{"recall 3": 0.49}), min_recall=own) == ["recall of 0", "recall of 3"]
    del own["1"]  # as in the limits of a model with other labels
    assert "recall of 1" in failed(metrics(), min_recall=own)
    assert "recall of 1" not in failed(metrics(**{"recall 1": 1.0}), min_recall=own)


def test_with_a_confidence_the_lower_bound_must_reach_the_limit() -> None:
    assert failed(metrics(accuracy=0.95, n=1000), confidence=0.95) == []
    assert reasons(judged(metrics(accuracy=0.95, n=120), confidence=0.95)) == [
        "accuracy: 0.9500, at 95% confidence at least 0.8952, misses the limit of 0.9000"
    ]
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.
    content = metrics(accuracy=81 / 263, n=263)
    lower, upper = judged(content, confidence=0.95)["checks"][0]["interval"]
    assert (lower, upper) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert failed(content, confidence=0.95, min_accuracy=lower) == []
    for n in (None, 0):
        verdict = judged(metrics(n=n), confidence=0.95)
        assert "number of photos is missing" in reasons(verdict)[0]
        assert len(reasons(verdict)) == 2


@pytest.mark.parametrize(
    ("level", "accuracy", "loss", "ece"),
    [
        (None, (0.91742, 0.986962), (0.102002, 0.297998), (0.0004, 0.0396)),
        (0.99, (0.894403, 0.990029), (0.071209, 0.328791), (0.0, 0.045758)),
    ],
)
def test_every_share_and_mean_has_an_interval_and_counts_have_none(
    level: float | None, accuracy: Any, loss: Any, ece: Any
) -> None:
    verdict = judged(metrics(), confidence=level)
    expected = {"accuracy": accuracy, "loss": loss, "calibration error": ece}
    for name, interval in expected.items():
        assert named(verdict, name)["interval"] == pytest.approx(interval, abs=1e-9)
    for check in verdict["checks"]:
        counts = check["name"] in ("cross-split duplicates", "test photos")
        assert (check["interval"] is None) == counts
        assert counts or check["interval"][0] < check["value"] < check["interval"][1]
    assert reasons(judged(metrics(loss=0.75, ece=math.nan, n=3))) == [
        "loss: 0.7500 misses the limit of 0.5000",
        "calibration error: not a number in range: nan",
        "test photos: 3 misses the limit of 50",
    ]


@pytest.mark.parametrize(
    ("text", "index", "failures"),
    [
        (json.dumps(metrics()), {"leaks": 0}, 0),
        *[(json.dumps(metrics()), index, 1) for index in ({}, {"leaks": 1}, [])],
        *[(text, {"leaks": 0}, len(NAMES) - 1) for text in (None, "{", "[]", '{"accuracy": NaN}')],
    ],
)
def test_the_stage_writes_and_prints_the_verdict_either_way(
    tmp_path: Path, params: Params, capsys: Any, text: str | None, index: Any, failures: int
) -> None:
    project = Project(tmp_path)
    write_json(project.dataset_index, index)
    if text is not None:
        project.metrics.write_text(text)
    run(Context(project, params))
    content, printed = read_json(project.gate), capsys.readouterr().out
    assert [check["passed"] for check in content["checks"]].count(False) == failures
    assert content["passed"] == (failures == 0)
    assert printed.startswith(f"Gate: {'failed' if failures else 'passed'}\n")
    assert printed.count("FAILED") == failures
    assert ("passed  accuracy 0.9700, limit 0.8500" in printed) == (failures <= 1)
