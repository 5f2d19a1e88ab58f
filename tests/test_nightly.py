"""A night of the service: photos from the inbox, versions on a branch, people told."""

import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tests.fixtures.photos import CHECKOUT
from tests.fixtures.receiver import receiving
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.slow
SECRET = "sentinel-do-not-show"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_inbox_is_trained_on_once_and_its_versions_reach_the_branch(
    tmp_path: Path, trained: Trained
) -> None:
    made = trained.checkout(tmp_path / "checkout")
    root = made.project.root
    shutil.copy(CHECKOUT.root / "data.dvc", root)  # names the rendered sample
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "origin"], check=True)
    _git(root, "remote", "add", "origin", str(tmp_path / "origin"))
    inbox = tmp_path / "inbox"
    shutil.copytree(trained.photos, inbox)
    (inbox / "3/torn.jpg").write_bytes(b"no picture")
    with receiving(SECRET) as receiver:
        named = {
            "HANDSIGNS_INBOX": str(inbox),
            "HANDSIGNS_GIT_PUSH": "handsigns/data",
            "HANDSIGNS_DVC_REMOTE_URL": str(tmp_path / "remote"),
            "HANDSIGNS_NOTIFY_URLS": receiver.address,
        }
        first = made.handsigns("retrain", **named)
        assert first["status"] == "promoted", first["reason"]
        assert first["data"]["quarantined"] == 1
        counts = first["data"]
        assert counts["train"] + counts["val"] + counts["test"] == 120
        remote = tmp_path / "remote/files/md5"
        assert len([path for path in remote.rglob("*") if path.is_file()]) == 121
        for name in ("data.dvc", "dvc.lock"):
            pushed = _git(tmp_path / "origin", "show", f"handsigns/data:{name}")
            assert pushed == (root / name).read_text().strip()
        assert len(list(inbox.rglob("*.*"))) == 121

        # Nothing new: told without a server, and without reading a photo again.
        began = time.monotonic()
        again = made.handsigns("retrain", fresh=True, **named)
        assert again["status"] == "unchanged"
        assert again["data"]["quarantined"] == 1
        assert time.monotonic() - began < 30
        assert receiver.messages == []

        # A bad inbox is one line, said to those who are named too; what is held stays.
        version = (root / "data.dvc").read_bytes()
        wrong = {**named, "HANDSIGNS_INBOX": str(tmp_path / "nowhere")}
        failed = made.handsigns("retrain", code=1, **wrong)
        assert "is not a folder" in failed["reason"]
        (message,) = receiver.messages
        assert message["message"].startswith(failed["reason"])
        assert (root / "data.dvc").read_bytes() == version

    with sqlite3.connect(made.project.local / "prefect/prefect.db") as database:
        runs = [name for (name,) in database.execute("select name from flow_run")]
    assert runs[0].startswith("v1 promoted: accuracy ")
    left = [*made.project.local.rglob("*"), *made.project.artifacts.rglob("*")]
    assert not [path for path in left if path.is_file() and SECRET.encode() in path.read_bytes()]
