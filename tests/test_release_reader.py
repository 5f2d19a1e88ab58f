"""The classifier of a release, at full size, with and without the frozen graph."""

import json
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from tasks.errors import ModelError, PromotionError, ReleaseError
from tasks.model.augment import enlarge
from tasks.model.files import export_graph
from tasks.model.inference import classify_files
from tasks.model.network import backbone_of, build_model
from tasks.params import Params
from tasks.releases.release import MANIFEST, describe, open_release, verify_folder
from tasks.releases.signing import UNSIGNED
from tests.fixtures.photos import CHECKOUT, LABELS, photo


def lively(params: Params) -> Any:
    """A random model that tells photos apart, as a fresh network would not."""
    keras.utils.set_random_seed(1)
    model = build_model(6, params.augmentation, 0.3, seed=1)
    for layer in backbone_of(model).layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    photos = np.stack([photo(label, 1) for label in range(6)])
    backbone_of(model)(enlarge(photos).astype(np.float32), training=True)
    head = model.get_layer("predictions")
    head.kernel.assign(head.kernel * 8)
    return model


def release(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = describe({name: folder / name for name in files})
    (folder / MANIFEST).write_bytes(UNSIGNED.sign(MANIFEST, manifest))
    return manifest.id


def test_a_release_runs_its_graph(tmp_path: Path, params: Params) -> None:
    model = lively(params)
    photos = np.stack([photo(number % 6, number) for number in range(12)])
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for image, file in zip(photos, files, strict=True):
        Image.fromarray(image).save(file)
    folder = tmp_path / "release"
    folder.mkdir()
    content = {
        "model.pb": export_graph(model),
        "labels.json": json.dumps(LABELS).encode(),
        "params.yaml": CHECKOUT.params.read_bytes(),
    }
    verify_folder(folder, release(folder, content), UNSIGNED)
    found = [one.probabilities for one in classify_files(open_release(folder), files)]
    expected = np.asarray(model(enlarge(photos).astype(np.float32), training=False))
    assert np.abs(np.array(found) - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).max() > 0.2


def test_a_release_that_does_not_say_what_it_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps([*LABELS[:-1], "0"]))
    with pytest.raises(PromotionError, match=r"must list different labels, not"):
        open_release(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    for params in ("", "[", "[]", "preprocess: 3", "preprocess: {detail: 10000000}"):
        (tmp_path / "params.yaml").write_text(params)
        with pytest.raises(PromotionError, match=r"params\.yaml does not say .* in preprocess"):
            open_release(tmp_path)


def test_a_folder_is_the_release_that_its_manifest_names_or_none(tmp_path: Path) -> None:
    made = release(tmp_path, {"labels.json": b"[]"})
    assert verify_folder(tmp_path, None, UNSIGNED).id == made
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "id": "0" * 32}))
    with pytest.raises(ReleaseError, match=f"another release: {'0' * 32}, with the files"):
        verify_folder(tmp_path, None, UNSIGNED)
    for spoilt in ("[1]", "3", "null", '{"id": 5}'):
        (tmp_path / MANIFEST).write_text(spoilt)
        with pytest.raises(ReleaseError, match="cannot be understood"):
            verify_folder(tmp_path, None, UNSIGNED)


def test_a_damaged_graph_is_named_even_beside_a_keras_file(tmp_path: Path) -> None:
    shutil.copy(CHECKOUT.params, tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    for name in ("model.pb", "model.keras"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"'.*model\.pb' does not hold a graph"):
        open_release(tmp_path)
