"""Two clones share git and a DVC remote: nobody's photos are lost, or trained on too late."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.project import Project
from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import Workshop, make_checkout
from tests.fixtures.photos import write_photos
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.servers import MlflowServer
from tests.fixtures.service import named


def git(workshop: Workshop, *words: str | Path) -> None:
    author = ["-c", "user.name=tests", "-c", "user.email=tests@example.invalid"]
    subprocess.run(["git", "-C", workshop.project.root, *author, *words], check=True)


def stored(workshop: Workshop) -> set[str]:
    return {path.name for path in workshop.project.data.rglob("*.*")}


@pytest.fixture
def clones(tmp_path: Path) -> tuple[Workshop, Workshop]:
    """The second clone added photos and pushed them; the first pulled git, and no photos."""
    first = make_checkout(tmp_path / "first")
    first.run("dvc", "remote", "add", "--default", "team", tmp_path / "remote")
    first.run("handsigns", "import", write_photos(tmp_path / "old", 3))
    git(first, "add", "-A")
    git(first, "commit", "-qm", "Import photos")
    git(first, "clone", "-q", ".", tmp_path / "second")
    second = Workshop(Project(tmp_path / "second"))
    second.run("handsigns", "import", write_photos(tmp_path / "new", 2, seed=1))
    # What ends a retrain as soon as it looks at the photos.
    train = second.project.data / "train"
    shutil.copy(next((train / "0").iterdir()), train / "1/odd.png")
    second.run("dvc", "add", "data")
    second.run("dvc", "push")
    git(second, "commit", "-qam", "Import more photos")
    git(first, "pull", "-q", tmp_path / "second", "HEAD")
    assert (len(stored(first)), len(stored(second))) == (18, 31)
    return first, second


def test_an_import_after_a_pull_adds_to_the_photos_that_were_pulled(
    clones: tuple[Workshop, Workshop], tmp_path: Path
) -> None:
    first, second = clones
    first.run("handsigns", "import", write_photos(tmp_path / "more", 1, seed=2))
    assert len(stored(first)) == 37
    assert stored(second) <= stored(first)


def test_photos_that_changed_in_both_clones_are_refused_with_how_to_keep_either(
    clones: tuple[Workshop, Workshop], tmp_path: Path
) -> None:
    first, second = clones
    (first.project.data / "train/2/mine.png").write_bytes(b"mine")
    before, version = stored(first), first.project.data_file.read_bytes()
    more = write_photos(tmp_path / "more", 1, seed=2)
    message = first.run("handsigns", "import", more, code=1).stderr
    assert message.count("\n") == 1
    assert "data/ and data.dvc both changed" in message
    assert (stored(first), first.project.data_file.read_bytes()) == (before, version)
    assert "`dvc add data`" in message
    mine = shutil.copytree(first.project.root, tmp_path / "mine", symlinks=True)
    keeping = Workshop(Project(mine))
    keeping.run("dvc", "add", "data")
    keeping.run("handsigns", "import", more)
    assert before < stored(keeping)
    assert "`dvc pull --force data.dvc`" in message
    first.run("dvc", "pull", "--force", "data.dvc")
    first.run("handsigns", "import", more)
    assert stored(second) < stored(first)


@pytest.mark.slow
def test_a_retrain_after_a_pull_works_on_the_photos_that_were_pulled(
    clones: tuple[Workshop, Workshop],
    s3: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
) -> None:
    first, second = clones
    services = {**named(s3), **mlflow_server.named, **prefect_api.named}
    version = first.project.data_file.read_bytes()
    (first.project.data / "train/2/mine.png").write_bytes(b"mine")
    message = first.run("handsigns", "retrain", code=1, **services).stderr
    assert "data/ and data.dvc both changed" in message
    (first.project.data / "train/2/mine.png").unlink()
    message = first.run("handsigns", "retrain", code=1, **services).stderr
    assert "The same picture has two labels" in message
    assert stored(first) == stored(second)
    assert first.project.data_file.read_bytes() == version
