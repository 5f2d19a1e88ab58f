"""Two clones share git and a DVC remote: nobody's photos are lost, or trained on too late."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.project import Project
from tests.fixtures.checkouts import Repo, make_checkout
from tests.fixtures.photos import write_photos
from tests.fixtures.prefect_api import PrefectApi


def git(repo: Repo, *words: str | Path) -> None:
    author = ["-c", "user.name=tests", "-c", "user.email=tests@example.invalid"]
    subprocess.run(["git", "-C", repo.project.root, *author, *words], check=True)


def stored(repo: Repo) -> set[str]:
    return {path.name for path in repo.project.data.rglob("*.*")}


@pytest.mark.slow
def test_photos_that_were_pulled_or_changed_in_both_clones_are_never_lost(
    tmp_path: Path, prefect_api: PrefectApi
) -> None:
    first = make_checkout(tmp_path / "first")
    first.run("dvc", "remote", "add", "--default", "team", tmp_path / "remote")
    first.run("handsigns", "import", write_photos(tmp_path / "old", 3))
    git(first, "add", "-A")
    git(first, "commit", "-qm", "Import photos")
    git(first, "clone", "-q", ".", tmp_path / "second")
    # The second clone adds photos and pushes them; the first pulls git, and no photos.
    second = Repo(Project(tmp_path / "second"))
    second.run("handsigns", "import", write_photos(tmp_path / "new", 2, seed=1))
    # What ends a retrain as soon as it looks at the photos.
    train = second.project.data / "train"
    shutil.copy(next((train / "0").iterdir()), train / "1/odd.png")
    second.run("dvc", "add", "data")
    second.run("dvc", "push")
    git(second, "commit", "-qam", "Import more photos")
    git(first, "pull", "-q", tmp_path / "second", "HEAD")
    assert (len(stored(first)), len(stored(second))) == (18, 31)

    (first.project.data / "train/2/mine.png").write_bytes(b"mine")
    before, version = stored(first), first.project.data_file.read_bytes()
    more = write_photos(tmp_path / "more", 1, seed=2)
    for words in (["import", more], ["retrain"]):
        refused = first.run("handsigns", *words, code=1, **prefect_api.named)
        message = refused.stderr + refused.stdout
        assert "data/ and data.dvc both changed" in message
        assert "`dvc add data`" in message
        assert "`dvc pull --force data.dvc`" in message
    assert (stored(first), first.project.data_file.read_bytes()) == (before, version)
    (first.project.data / "train/2/mine.png").unlink()
    message = first.run("handsigns", "retrain", code=1, **prefect_api.named).stderr
    assert "The same picture has two labels" in message
    assert stored(first) == stored(second)
    assert first.project.data_file.read_bytes() == version
    first.run("handsigns", "import", more)
    assert stored(second) < stored(first)
