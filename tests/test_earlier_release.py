"""A release of an earlier version still loads, verifies, is compared with, and returns."""

from pathlib import Path

import pytest

from tests.fixtures.checkouts import Workshop
from tests.fixtures.earlier import COMMIT, Earlier
from tests.fixtures.trained import Trained

RELEASES = {"1": "646b9a4d37e1b222c8639efc5ee8c0b8", "2": "5640018f52a3ccefbca53f50ea7a419e"}


@pytest.fixture(scope="module")
def checkout(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = trained.checkout(tmp_path_factory.mktemp("later") / "checkout")
    made.handsigns("import", trained.photos)
    return made


@pytest.fixture(scope="module")
def environment(checkout: Workshop, earlier: Earlier) -> dict[str, str]:
    return earlier.adopt(checkout)


@pytest.mark.parametrize("version", RELEASES)
def test_it_verifies_and_predicts_as_it_did_then(
    version: str, checkout: Workshop, environment: dict[str, str], earlier: Earlier
) -> None:
    verified = checkout.handsigns("verify", version, **environment)
    assert verified["id"] == RELEASES[version]
    assert verified["facts"]["git_revision"].startswith(COMMIT)
    then = earlier.predictions(version)
    now = checkout.handsigns("predict", "--model", version, *then, **environment)
    for one in now["predictions"]:
        assert one["probabilities"] == pytest.approx(then[Path(one["file"])], abs=0.02)


def test_a_new_model_is_compared_with_it_and_it_can_be_rolled_back_to(
    checkout: Workshop, environment: dict[str, str]
) -> None:
    before = checkout.handsigns("status", **environment)
    assert before["champion"]["release"] == RELEASES["2"]
    assert [move["version"] for move in before["history"]] == [1, 2]
    run = checkout.handsigns("retrain", **environment)
    assert run["status"] == "promoted", run["reason"]
    assert run["model"]["version"] == 3
    assert run["comparison"]["champion"]["accuracy"] < run["comparison"]["challenger"]["accuracy"]
    assert run["data"]["changes"]["since"] == 2
    for version in (2, 1):
        move = checkout.handsigns("rollback", "--from", str(version + 1), **environment)
        assert (move["version"], move["release"]) == (version, RELEASES[str(version)])
    after = checkout.handsigns("status", **environment)
    assert after["champion"]["release"] == RELEASES["1"]
    assert [move["version"] for move in after["history"]] == [1, 2, 3, 2, 1]
    assert checkout.handsigns("verify", "champion", **environment)["id"] == RELEASES["1"]
