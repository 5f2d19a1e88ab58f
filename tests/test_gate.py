"""The gate passes only what meets every limit, and nothing it cannot read."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate import CORRUPTIONS, LARGEST, Verdict, run
from tasks.gate import judge as judge_
from tasks.io import read_json, write_json
from tasks.params import GateParams, Params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import LABELS

judge = partial(judge_, labels=LABELS)

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
    assert verdict.passed == (not verdict.reasons)
    return [check.name for check in verdict.checks if not check.passed]


def test_a_good_model_passes_every_check_and_so_do_values_at_the_limit() -> None:
    at_limit = dict.fromkeys(CORRUPTIONS, 0.8) | {f"recall {label}": 0.75 for label in LABELS}
    for content in (metrics(), metrics(accuracy=0.9, loss=0.5, ece=0.1, n=50, **at_limit)):
        verdict = judge(content, 0, LIMITS)
        assert verdict.passed
        assert [check.name for check in verdict.checks] == list(NAMES.values())
    largest = {"accuracy": 1.0, "recall 2": 1, "blur": 1, "n": int(LARGEST)}
    generous = LIMITS.model_copy(update={"max_loss": LARGEST, "max_calibration_error": 1.0})
    assert judge(metrics(**largest, loss=LARGEST, ece=1), 0, generous).passed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("accuracy", 0.8999), ("accuracy", 1.01), ("loss", 0.5001), ("loss", LARGEST * 2)],
        *[("ece", 0.1001), ("ece", 5.0), ("n", 49), ("n", 120.0), ("n", 2 * int(LARGEST))],
        *[("recall 2", 0.74), ("recall 5", 1.5), ("blur", 0.79), ("jpeg", 1.01)],
        *[("cross-split duplicates", bad) for bad in (1, True, 0.0)],
    ],
)
def test_one_value_past_its_limit_fails_that_check_only(field: str, value: float) -> None:
    duplicates = value if field == "cross-split duplicates" else 0
    assert failed(judge(metrics(**{field: value}), duplicates, LIMITS)) == [NAMES[field]]


@FEW
@given(st.sampled_from(list(NAMES)), bad_values)
def test_no_unusable_value_ever_passes(field: str, value: Any) -> None:
    duplicates = value if field == "cross-split duplicates" else 0
    verdict = judge(metrics(**{field: value}), duplicates, LIMITS)
    assert failed(verdict) == [NAMES[field]]
    check = next(check for check in verdict.checks if not check.passed)
    assert (check.value, check.interval) == (None, None)
    assert check.detail == "missing" or check.detail.startswith("not a number in range: ")  # type: ignore[union-attr]
    json.dumps(verdict.to_json(), allow_nan=False)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["accuracy", "loss", "ece", "n", "per_class", "robustness"]),
        st.one_of(bad_values, shares, st.lists(st.one_of(bad_values, st.just({"label": "0"})))),
    ),
    st.one_of(bad_values, st.integers(0, 3)),
)
def test_anything_but_a_complete_report_fails_without_an_exception(
    content: dict[str, Any], duplicates: Any
) -> None:
    assert not judge(content, duplicates, LIMITS).passed


def test_a_limit_that_is_left_out_is_not_checked_and_no_limit_at_all_fails() -> None:
    verdict = judge({"accuracy": 0.95}, None, GateParams(min_accuracy=0.9))
    assert (verdict.passed, len(verdict.checks)) == (True, 1)
    nothing = judge(metrics(), 0, GateParams())
    assert failed(nothing) == ["limits"]
    assert "no limit is set" in nothing.reasons[0]
    own = dict(zip(LABELS, (0.95, 0.0, 0.0, 0.5, 0.0, 0.0), strict=True))
    of_each = LIMITS.model_copy(update={"min_recall": own})
    verdict = judge(metrics(**{"recall 3": 0.49}), 0, of_each)
    assert failed(verdict) == ["recall of 0", "recall of 3"]
    del own["1"]  # as in the limits of a model with other labels
    assert "recall of 1" in failed(judge(metrics(), 0, of_each))
    assert "recall of 1" not in failed(judge(metrics(**{"recall 1": 1.0}), 0, of_each))


def test_with_a_confidence_the_lower_bound_must_reach_the_limit() -> None:
    sure = LIMITS.model_copy(update={"confidence": 0.95})
    few, many = (judge(metrics(accuracy=0.95, n=n), 0, sure) for n in (120, 1000))
    assert failed(few) == ["accuracy"]
    assert many.passed
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.
    newcombe = judge(metrics(accuracy=81 / 263, n=263), 0, sure).checks[0]
    assert newcombe.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    lower = newcombe.interval[0]  # type: ignore[index]
    at_bound = sure.model_copy(update={"min_accuracy": lower})
    assert judge(metrics(accuracy=81 / 263, n=263), 0, at_bound).checks[0].passed
    assert few.reasons == (
        "accuracy: 0.9500, at 95% confidence at least 0.8952, misses the limit of 0.9000",
    )
    for n in (None, 0):
        without = judge(metrics(n=n), 0, sure)
        assert failed(without) == ["accuracy", "test photos"]
        assert "number of photos is missing" in without.reasons[0]


@pytest.mark.parametrize(
    ("level", "accuracy", "loss", "ece"),
    [
        (None, (0.91742, 0.986962), (0.102002, 0.297998), (0.0004, 0.0396)),
        (0.9, (0.927805, 0.984949), (0.117757, 0.282243), (0.003551, 0.036449)),
        (0.99, (0.894403, 0.990029), (0.071209, 0.328791), (0.0, 0.045758)),
    ],
)
def test_every_share_and_mean_has_an_interval_and_counts_have_none(
    level: float | None, accuracy: Any, loss: Any, ece: Any
) -> None:
    limits = LIMITS.model_copy(update={"confidence": level})
    checks = {check.name: check for check in judge(metrics(), 0, limits).checks}
    expected = {"accuracy": accuracy, "loss": loss, "calibration error": ece}
    for name, interval in expected.items():
        assert checks[name].interval == pytest.approx(interval, abs=1e-6)
        assert len(str(checks[name].interval[1])) <= len("0.123456")  # type: ignore[index]
    for name, check in checks.items():
        if name in ("cross-split duplicates", "test photos"):
            assert check.interval is None
        else:
            assert check.interval is not None
            assert check.interval[0] < float(check.value or 0) < check.interval[1]


def test_what_is_missing_in_a_part_of_the_report_fails() -> None:
    content = metrics()
    del content["robustness"]["accuracy"]["jpeg"]
    content["per_class"][4] = {"label": "3", "recall": 1.0}
    expected = ["recall of 3", "recall of 4", "accuracy under jpeg"]
    assert failed(judge(content, 0, LIMITS)) == expected
    content["robustness"] = [0.9]
    assert len(failed(judge(content, 0, LIMITS))) == 2 + len(CORRUPTIONS)
    content = metrics() | {"standard_errors": None}
    loss = next(check for check in judge(content, 0, LIMITS).checks if check.name == "loss")
    assert (loss.passed, loss.interval) == (True, None)


def test_json_and_reasons_name_value_and_limit() -> None:
    verdict = judge(metrics(loss=0.75, ece=math.nan, n=3), 0, LIMITS)
    by_name = {check["name"]: check for check in verdict.to_json()["checks"]}
    loss = {"name": "loss", "value": 0.75, "limit": 0.5, "passed": False}
    assert by_name["loss"] == loss | {"interval": (0.652002, 0.847998)}
    ece = {"name": "calibration error", "value": None, "limit": 0.1, "passed": False}
    detail = "not a number in range: nan"
    assert by_name["calibration error"] == ece | {"interval": None, "detail": detail}
    assert verdict.reasons == (
        "loss: 0.7500 misses the limit of 0.5000",
        f"calibration error: {detail}",
        "test photos: 3 misses the limit of 50",
    )
    assert verdict.checks[0].describe() == "accuracy"
    impossible = judge(metrics(ece=1.5, accuracy=1.5, loss=2 * LARGEST), 0, LIMITS).reasons
    faults = [f"not a number in range: {value}" for value in (1.5, 2 * LARGEST, 1.5)]
    assert [reason.partition(": ")[2] for reason in impossible] == faults


def gated(root: Path, params: Params, metrics_text: str | None, index: Any) -> list[str]:
    """Names of the checks that fail in what the stage writes."""
    project = Project(root)
    write_json(project.dataset_index, index)
    if metrics_text is not None:
        project.metrics.write_text(metrics_text)
    run(Context(project, params))
    content = read_json(project.gate)
    names = [check["name"] for check in content["checks"] if not check["passed"]]
    assert content["passed"] == (not names)
    return names


def test_the_stage_writes_and_prints_the_verdict_either_way(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy, result, word in ((0.97, "passed", "passed"), (0.1, "failed", "FAILED")):
        content = json.dumps(metrics(accuracy=accuracy))
        assert bool(gated(tmp_path, params, content, {"leaks": 0})) == (result == "failed")
        printed = capsys.readouterr().out
        assert printed.startswith(f"Gate: {result}\n")
        assert f"{word}  accuracy {accuracy:.4f}, limit 0.8500" in printed


@pytest.mark.parametrize("text", [None, "", "{", "[]", "NaN", '{"accuracy": NaN}'])
def test_broken_metrics_fail(tmp_path: Path, params: Params, text: str | None) -> None:
    assert len(gated(tmp_path, params, text, {"leaks": 0})) == len(NAMES) - 1


@pytest.mark.parametrize("index", [{}, {"leaks": None}, {"leaks": 1}, {"leaks": "0"}, []])
def test_unknown_or_present_duplicates_fail(tmp_path: Path, params: Params, index: Any) -> None:
    content = json.dumps(metrics())
    assert gated(tmp_path, params, content, index) == ["cross-split duplicates"]
