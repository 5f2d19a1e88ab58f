"""The gate passes only what meets every limit, and nothing it cannot read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import CORRUPTIONS, Verdict, judge, run
from tasks.io import write_json
from tasks.params import LABELS, GateParams, Params
from tasks.project import Project
from tasks.stage import Context

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
FIELDS = (
    *("accuracy", "loss", "ece", "n", "cross-split duplicates"),
    *(f"recall {label}" for label in LABELS),
    *CORRUPTIONS,
)

bad_values = st.one_of(
    st.none(),
    st.booleans(),
    st.text(),
    st.sampled_from(
        ["0.95", "nan", math.nan, math.inf, -math.inf, -0.01, [0.9], {"value": 1}, 1j, 10**400]
    ),
    st.floats(max_value=-1e-9),
)
shares = st.floats(0, 1)


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


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


def test_a_good_model_passes_every_check() -> None:
    verdict = judge(metrics(), 0, LIMITS)
    assert verdict.passed
    assert [check.name for check in verdict.checks] == [
        "accuracy",
        *(f"recall of {label}" for label in LABELS),
        *(f"accuracy under {kind}" for kind in CORRUPTIONS),
        "loss",
        "calibration error",
        "cross-split duplicates",
        "test photos",
    ]
    assert verdict.reasons == ()


def test_values_exactly_at_the_limit_pass() -> None:
    at_limit = {f"recall {label}": 0.75 for label in LABELS}
    content = metrics(accuracy=0.9, loss=0.5, ece=0.1, n=50, **at_limit)
    assert judge(content, 0, LIMITS).passed


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("accuracy", 0.8999, "accuracy"),
        ("loss", 0.5001, "loss"),
        ("ece", 0.1001, "calibration error"),
        ("n", 49, "test photos"),
        ("n", 120.0, "test photos"),
        ("recall 2", 0.74, "recall of 2"),
        ("blur", 0.79, "accuracy under blur"),
        ("accuracy", 1.01, "accuracy"),
        ("ece", 5.0, "calibration error"),
    ],
)
def test_one_value_past_its_limit_fails_that_check_only(
    field: str, value: float, name: str
) -> None:
    assert failed(judge(metrics(**{field: value}), 0, LIMITS)) == [name]


def test_a_leak_fails_the_gate() -> None:
    assert failed(judge(metrics(), 1, LIMITS)) == ["cross-split duplicates"]


@FEW
@given(st.sampled_from(FIELDS), bad_values)
def test_no_unusable_value_ever_passes(field: str, value: Any) -> None:
    changes = {} if field == "cross-split duplicates" else {field: value}
    verdict = judge(metrics(**changes), value if field == "cross-split duplicates" else 0, LIMITS)
    assert not verdict.passed
    assert len(failed(verdict)) == 1
    check = next(check for check in verdict.checks if not check.passed)
    assert check.value is None
    assert check.detail
    json.dumps(verdict.to_json(), allow_nan=False)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["accuracy", "loss", "ece", "n", "per_class", "robustness"]),
        st.one_of(bad_values, shares, st.lists(st.one_of(bad_values, st.just({"label": "0"})))),
    ),
    st.one_of(bad_values, st.integers(0, 3)),
)
def test_anything_but_a_whole_report_fails_without_an_exception(
    content: dict[str, Any], leaks: Any
) -> None:
    assert not judge(content, leaks, LIMITS).passed


@FEW
@given(
    shares, st.lists(shares, min_size=6, max_size=6), st.floats(0, 5), shares, st.integers(0, 99)
)
def test_the_verdict_is_the_conjunction_of_the_limits(
    accuracy: float, recalls: list[float], loss: float, ece: float, n: int
) -> None:
    named = {f"recall {label}": recall for label, recall in zip(LABELS, recalls, strict=True)}
    verdict = judge(metrics(accuracy=accuracy, loss=loss, ece=ece, n=n, **named), 0, LIMITS)
    expected = accuracy >= 0.9 and min(recalls) >= 0.75 and loss <= 0.5 and ece <= 0.1 and n >= 50
    assert verdict.passed == expected == (not verdict.reasons)


def test_gate_refuses_when_no_threshold_is_set() -> None:
    verdict = judge(metrics(), 0, GateParams())
    assert not verdict.passed
    assert "no limit is set" in verdict.reasons[0]


def test_a_limit_that_is_left_out_is_not_checked() -> None:
    verdict = judge({"accuracy": 0.95}, None, GateParams(min_accuracy=0.9))
    assert verdict.passed
    assert len(verdict.checks) == 1


def test_with_a_confidence_the_lower_bound_must_reach_the_limit() -> None:
    sure = LIMITS.model_copy(update={"confidence": 0.95})
    few, many = (judge(metrics(accuracy=0.95, n=n), 0, sure) for n in (120, 1000))
    assert failed(few) == ["accuracy"]
    assert many.passed
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.
    assert judge(metrics(accuracy=81 / 263, n=263), 0, sure).checks[0].interval == pytest.approx(
        (0.2553, 0.3662), abs=5e-5
    )
    assert "at 95% confidence at least 0.8952" in few.reasons[0]
    assert failed(judge(metrics(n=None), 0, sure)) == ["accuracy", "test photos"]


def test_every_share_and_mean_has_an_interval_and_counts_have_none() -> None:
    for level in (None, 0.9, 0.99):
        limits = LIMITS.model_copy(update={"confidence": level})
        for check in judge(metrics(), 0, limits).checks:
            if check.name in ("cross-split duplicates", "test photos"):
                assert check.interval is None
            else:
                assert check.interval is not None
                assert check.interval[0] < float(check.value or 0) < check.interval[1]


def test_each_class_can_have_a_limit_of_its_own(params: Params) -> None:
    own = params.gate.model_dump() | {"min_recall": {0: 0.95, 1: 0, 2: 0, 3: 0.5, 4: 0, 5: 0}}
    limits = GateParams.model_validate(own | {"confidence": None})
    assert failed(judge(metrics(**{"recall 3": 0.49}), 0, limits)) == ["recall of 0", "recall of 3"]


def test_a_model_that_was_not_corrupted_fails() -> None:
    content = metrics()
    del content["robustness"]["accuracy"]["jpeg"]
    assert failed(judge(content, 0, LIMITS)) == ["accuracy under jpeg"]
    content["robustness"] = [0.9]
    assert len(failed(judge(content, 0, LIMITS))) == len(CORRUPTIONS)


def test_a_class_that_is_missing_or_named_twice_fails() -> None:
    content = metrics()
    content["per_class"][4] = {"label": "3", "recall": 1.0}
    assert failed(judge(content, 0, LIMITS)) == ["recall of 3", "recall of 4"]


def test_json_and_reasons_name_value_and_limit() -> None:
    verdict = judge(metrics(loss=0.75, ece=math.nan), 0, LIMITS)
    content = verdict.to_json()
    by_name = {check["name"]: check for check in content["checks"]}
    assert by_name["loss"] == {
        "name": "loss",
        "value": 0.75,
        "limit": 0.5,
        "interval": (0.652002, 0.847998),
        "passed": False,
    }
    assert by_name["calibration error"] == {
        "name": "calibration error",
        "value": None,
        "limit": 0.1,
        "interval": None,
        "passed": False,
        "detail": "not finite: nan",
    }
    assert verdict.reasons == (
        "loss: 0.7500 misses the limit of 0.5000",
        "calibration error: not finite: nan",
    )


def gated(root: Path, params: Params, metrics_text: str | None, index: Any) -> dict[str, Any]:
    project = Project(root)
    write_json(project.dataset / "index.json", index)
    if metrics_text is not None:
        project.metrics.write_text(metrics_text)
    run(Context(project, params))
    content: dict[str, Any] = json.loads(project.gate.read_text())
    return content


def test_the_stage_writes_and_shows_the_verdict_either_way(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = json.dumps(metrics()), json.dumps(metrics(accuracy=0.1))
    assert gated(tmp_path, params, good, {"leaks": 0})["passed"] is True
    printed = capsys.readouterr().out
    assert printed.startswith("Gate: passed\n")
    assert "passed  accuracy 0.9700, limit 0.8500" in printed
    assert gated(tmp_path, params, bad, {"leaks": 0})["passed"] is False
    assert "Gate: failed" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "{", "[]", "NaN", '{"accuracy": NaN}'])
def test_broken_metrics_fail_the_stage_s_verdict(
    tmp_path: Path, params: Params, text: str | None
) -> None:
    content = gated(tmp_path, params, text, {"leaks": 0})
    assert content["passed"] is False
    assert content["checks"][0]["value"] is None


@pytest.mark.parametrize("index", [{}, {"leaks": None}, {"leaks": 1}, {"leaks": "0"}, []])
def test_unknown_or_present_leaks_fail_the_stage_s_verdict(
    tmp_path: Path, params: Params, index: Any
) -> None:
    content = gated(tmp_path, params, json.dumps(metrics()), index)
    assert [c["name"] for c in content["checks"] if not c["passed"]] == ["cross-split duplicates"]
