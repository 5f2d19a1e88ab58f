"""The gate passes only what meets every limit, and nothing it cannot read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import CORRUPTIONS, LARGEST, judge, run
from tasks.io import read_json, write_json
from tasks.params import GateParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import LABELS

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
    "duplicates": "cross-split duplicates",
    "n": "test photos",
}
"""Values of the report, and the checks of them, in their order."""


def metrics(**changes: Any) -> dict[str, Any]:
    """A good model's metrics with some values changed, `recall 3` for one class."""
    values = {"accuracy": 0.97, "loss": 0.2, "ece": 0.02, "n": 120, "duplicates": 0} | changes
    recalls = {label: values.pop(f"recall {label}", 0.9) for label in LABELS}
    rows = [{"label": label, "recall": one, "support": 20} for label, one in recalls.items()]
    corrupted = {kind: values.pop(kind, 0.9) for kind in CORRUPTIONS}
    return {**values, "per_class": rows, "robustness": {"photos": 120, "accuracy": corrupted}}


def judged(content: Any, **limits: Any) -> dict[str, Any]:
    duplicates = content.get("duplicates") if isinstance(content, dict) else 0
    verdict = judge(content, duplicates, LIMITS.model_copy(update=limits), LABELS)
    failed = [check for check in verdict["checks"] if not check["passed"]]
    assert (verdict["passed"], len(verdict["reasons"])) == (not failed, len(failed))
    json.dumps(verdict, allow_nan=False)
    return verdict


def failed(content: Any, **limits: Any) -> list[str]:
    """Names of the checks that fail."""
    return [one["name"] for one in judged(content, **limits)["checks"] if not one["passed"]]


def test_values_at_the_limits_pass_every_check() -> None:
    at_limit = dict.fromkeys(CORRUPTIONS, 0.8) | {f"recall {label}": 0.75 for label in LABELS}
    at_limit |= {"accuracy": 0.9, "loss": 0.5, "ece": 0.1, "n": 50}
    largest = {"accuracy": 1.0, "recall 2": 1, "blur": 1, "n": int(LARGEST), "loss": LARGEST}
    generous = {"max_loss": LARGEST, "max_calibration_error": 1.0}
    for values, limits in (({}, {}), (at_limit, {}), ({**largest, "ece": 1}, generous)):
        checks = judged(metrics(**values), **limits)["checks"]
        assert [one["name"] for one in checks if one["passed"]] == list(NAMES.values())


PAST = {
    "accuracy": (0.8999, 1.01),
    "loss": (0.5001, LARGEST * 2),
    "ece": (0.1001, 5.0),
    "n": (49, 120.0, 2 * int(LARGEST)),
    "recall 2": (0.74, 1.5),
    "jpeg": (0.79, 1.01),
    "duplicates": (1, True, 0.0, None, "0"),
}
unusable = st.one_of(
    *(st.none(), st.booleans(), st.text(), st.floats(max_value=-1e-9)),
    st.sampled_from(["0.95", math.nan, math.inf, -math.inf, [0.9], {"value": 1}, 1j, 10**400]),
)


@pytest.mark.parametrize("field", PAST)
def test_one_value_past_its_limit_fails_that_check_only(field: str) -> None:
    for value in PAST[field]:
        assert failed(metrics(**{field: value})) == [NAMES[field]]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(NAMES)), unusable)
def test_no_unusable_value_ever_passes(field: str, value: Any) -> None:
    (check,) = (one for one in judged(metrics(**{field: value}))["checks"] if not one["passed"])
    assert (check["name"], check["value"], check["interval"]) == (NAMES[field], None, None)
    assert check["detail"] == "missing" or check["detail"].startswith("not a number in range: ")


def test_a_missing_part_of_the_report_fails_and_a_missing_limit_is_not_checked() -> None:
    content = metrics()
    del content["robustness"]["accuracy"]["jpeg"]
    content["per_class"][4] = {"label": "3", "recall": 1.0}
    assert failed(content) == ["recall of 3", "recall of 4", "accuracy under jpeg"]
    for broken in (None, True, "0.95", [0.9], [None], {"accuracy": [1]}, {"label": "0"}):
        assert len(failed(metrics() | {"robustness": broken})) == len(CORRUPTIONS)
        assert len(failed(metrics() | {"per_class": broken})) == len(LABELS)
        assert len(failed(broken)) >= len(NAMES) - 1
    verdict = judge({"accuracy": 0.95}, None, GateParams(min_accuracy=0.9), LABELS)
    assert (verdict["passed"], len(verdict["checks"])) == (True, 1)
    nothing = judge(metrics(), 0, GateParams(), LABELS)
    fault = "limits: no limit is set; set at least one under gate in params.yaml"
    assert (nothing["passed"], nothing["reasons"]) == (False, [fault])
    own = dict(zip(LABELS, (0.95, 0.0, 0.0, 0.5, 0.0, 0.0), strict=True))
    assert failed(metrics(**{"recall 3": 0.49}), min_recall=own) == ["recall of 0", "recall of 3"]
    del own["1"]  # as in the limits of a model with other labels
    assert "recall of 1" in failed(metrics(), min_recall=own)
    assert "recall of 1" not in failed(metrics(**{"recall 1": 1.0}), min_recall=own)


def test_with_a_confidence_the_lower_bound_must_reach_the_limit() -> None:
    assert failed(metrics(accuracy=0.95, n=1000), confidence=0.95) == []
    assert judged(metrics(accuracy=0.95, n=120), confidence=0.95)["reasons"] == [
        "accuracy: 0.9500, at 95% confidence only 0.8952 < 0.9000"
    ]
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.
    content = metrics(accuracy=81 / 263, n=263)
    lower, upper = judged(content, confidence=0.95)["checks"][0]["interval"]
    assert (lower, upper) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert failed(content, confidence=0.95, min_accuracy=lower) == []
    for n in (None, 0):
        fault, _ = judged(metrics(n=n), confidence=0.95)["reasons"]
        assert "number of photos is missing" in fault
    for check in judged(metrics())["checks"]:  # which are shares of a number of photos
        share = check["name"].startswith(("accuracy", "recall"))
        assert share == (check["interval"] is not None)
        assert not share or check["interval"][0] < check["value"] < check["interval"][1]
    assert judged(metrics(loss=0.75, ece=math.nan, n=3))["reasons"] == [
        "loss 0.7500 > 0.5000",
        "calibration error: not a number in range: nan",
        "test photos 3 < 50",
    ]


@pytest.mark.parametrize(
    ("text", "index", "failures"),
    [
        (json.dumps(metrics()), {"leaks": 0}, 0),
        *[(json.dumps(metrics()), index, 1) for index in ({}, {"leaks": 1}, [])],
        *[(text, {"leaks": 0}, len(NAMES) - 1) for text in (None, "{", "[]", '{"accuracy": NaN}')],
    ],
)
def test_the_stage_writes_the_verdict_either_way_and_logs_failures(
    tmp_path: Path, params: Params, caplog: Any, text: str | None, index: Any, failures: int
) -> None:
    project = Project(tmp_path)
    write_json(project.dataset_index, index)
    if text is not None:
        project.metrics.write_text(text)
    run(Context(project, params))
    content = read_json(project.gate)
    assert [check["passed"] for check in content["checks"]].count(False) == failures
    assert content["passed"] == (failures == 0) == (not caplog.messages)
    if failures:
        (said,) = caplog.messages
        assert said.startswith("The gate rejects the model: ")
        assert said.count("; ") == failures - 1
