"""A release of an earlier version still loads, verifies, is compared with, and returns."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.project import Project
from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import Workshop
from tests.fixtures.earlier import COMMIT, Earlier
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.service import named
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


@pytest.mark.slow
def test_it_is_rebuilt_bit_by_bit_with_the_stages_of_its_commit(
    trained: Trained, s3: S3Address, tmp_path: Path
) -> None:
    def clone(name: str, *revision: str) -> Workshop:
        root = tmp_path / name
        subprocess.run(["git", "clone", "-q", CHECKOUT.root, root], check=True)
        subprocess.run(["git", "-C", root, "checkout", "-q", *revision], check=True)
        return Workshop(Project(root))

    environment = {**named(s3), "HANDSIGNS_DVC_REMOTE_URL": str(tmp_path / "remote")}
    then = clone("then", COMMIT)
    shutil.copytree(
        trained.workshop.project.root / ".local/backbone", then.project.root / ".local/backbone"
    )
    then.change("features", views=1)
    then.change("gate", confidence=None, min_accuracy=0.0, min_recall=0.0, min_test_photos=6)
    then.change("gate", min_robust_accuracy=0.0, max_loss=9.0, max_calibration_error=1.0)
    for phase in ("base", "fine_tune", "full"):
        then.change(f"phases.{phase}", epochs=1, data_fraction=1.0)
    then.handsigns("import", "--replace", trained.photos, **environment)
    assert then.handsigns("retrain", **environment)["status"] == "promoted"
    rebuilt = clone("now", "HEAD").handsigns("reproduce", "champion", **environment)
    assert rebuilt["identical"], rebuilt
