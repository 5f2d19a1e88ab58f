"""Releases: complete or invisible in storage, verified to the last byte, repaired, and opened."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ModelError, PromotionError, ReleaseError
from tasks.releases.release import (
    MANIFEST,
    Release,
    content_id,
    describe,
    fetch,
    open_release,
    publish,
    verify,
    verify_folder,
)
from tasks.releases.signing import UNSIGNED
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.faults import proxy_to
from tests.fixtures.photos import CHECKOUT, LABELS

OTHER = "0" * 32


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    contents = {"model.keras": b"weights" * 1000, "labels.json": b"[]", "model_card.md": b"# Card"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def _key(release: Release, name: str) -> str:
    return f"releases/{release.id}/{name}"


def test_the_id_depends_on_every_file_and_on_nothing_else(files: dict[str, Path]) -> None:
    wanted = describe(files, {"git": "abc"})
    assert describe(files, {"git": "def"}).id == wanted.id
    assert content_id(dict(reversed(wanted.files.items()))) == wanted.id
    (name, digest), *others = wanted.files.items()
    for changed in (
        {},
        {name: digest.model_copy(update={"bytes": digest.bytes + 1})},
        {name: digest.model_copy(update={"sha256": "0" * 64})},
        {"a" + name: digest},
    ):
        assert content_id({**dict(others), **changed}) != wanted.id
    for name in ("../model.keras", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="files"):
            describe({name: files["model.keras"]})


def test_a_release_is_invisible_until_it_is_complete_and_its_manifest_comes_last(
    s3: S3Address, files: dict[str, Path], tmp_path: Path
) -> None:
    with proxy_to(s3.endpoint_url) as proxy:
        direct, storage = Storage(s3), Storage(replace(s3, endpoint_url=proxy.url))

        def written() -> list[str]:
            puts = [one.rpartition("/")[2] for one in proxy.requests if one.startswith("PUT")]
            proxy.requests.clear()
            return puts

        unfinished = describe(files).id
        direct.put(f"releases/{unfinished}/labels.json", files["labels.json"])
        direct.put(f"releases/{unfinished}/model.keras", b"half of it")
        for use in (verify, lambda *one: fetch(*one, tmp_path / "cache")):
            with pytest.raises(ReleaseError, match="no complete release"):
                use(storage, unfinished)
        release = publish(storage, files, {"git": "abc"})
        assert written() == ["model.keras", "model_card.md", MANIFEST]
        assert publish(storage, files, {"git": "def"}) == release
        assert written() == []
    assert release.uri == f"s3://{s3.bucket}/releases/{release.id}/"
    assert verify(direct, release.id) == release
    folder = fetch(direct, release.id, tmp_path / "cache")
    assert folder == tmp_path / "cache" / release.id
    for name, path in files.items():
        assert (folder / name).read_bytes() == path.read_bytes()
    assert json.loads((folder / MANIFEST).read_bytes())["facts"] == {"git": "abc"}


def _other_manifest(_: Release, **changes: Any) -> bytes:
    """The manifest of other files, with changes such as this release's id."""
    manifest = describe({"labels.json": Path(__file__)}).model_copy(update=changes)
    return UNSIGNED.sign(MANIFEST, manifest)


DAMAGES: list[tuple[str, str, Callable[[Release], bytes | None]]] = [
    ("differs from its digest", "labels.json", lambda _: b"{}"),
    ("labels.json has 1 bytes instead of 2", "labels.json", lambda _: b"["),
    ("labels.json has no bytes instead of 2", "labels.json", lambda _: None),
    ("extra.py has 0 bytes instead of none", "extra.py", lambda _: b""),
    ("belongs to another release", MANIFEST, _other_manifest),
    ("belongs to another release", MANIFEST, lambda one: _other_manifest(one, id=one.id)),
    ("cannot be understood", MANIFEST, lambda _: b"[" * 100_000),
    ("cannot be understood", MANIFEST, lambda _: b"[1]"),
    ("format", MANIFEST, lambda one: _other_manifest(one, format=2)),
]


def test_each_kind_of_damage_is_refused_in_its_own_words_and_repaired(
    storage: Storage, files: dict[str, Path], tmp_path: Path
) -> None:
    release, cache = publish(storage, files), tmp_path / "cache"
    kept = storage.get(_key(release, MANIFEST))
    for words, name, damage in DAMAGES:
        content = damage(release)
        if content is None:
            storage.remove(_key(release, name))
        else:
            storage.put(_key(release, name), content)
        for use in (verify, lambda *one: fetch(*one, cache)):
            with pytest.raises(ReleaseError, match=words) as caught:
                use(storage, release.id)
            assert "\n" not in str(caught.value)
        assert list(cache.glob("*")) == []
        if name == MANIFEST:
            storage.put(_key(release, name), kept)
        elif name not in files:
            with pytest.raises(ReleaseError, match="was added"):
                publish(storage, files)
            storage.remove(_key(release, name))
        publish(storage, files)
        verify(storage, release.id)
    for wrong in ("../..", "A" * 32, "0" * 31, "0" * 33):
        with pytest.raises(ReleaseError, match="32 hex digits"):
            fetch(storage, wrong, cache)
    # A damaged local copy is fetched again, and a good one needs no storage.
    folder = fetch(storage, release.id, cache)
    (folder / "labels.json").write_bytes(b"{}")
    (folder / "extra.py").write_bytes(b"")
    (folder / "model_card.md").unlink()
    (folder / "model_card.md").symlink_to(files["model_card.md"])
    fetch(storage, release.id, cache)
    assert {path.name for path in folder.iterdir()} == {*files, MANIFEST}
    assert (folder / "labels.json").read_bytes() == b"[]"
    assert not (folder / "model_card.md").is_symlink()
    nobody = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    assert fetch(nobody, release.id, cache) == folder


def test_what_a_release_lacks_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("model.pb", b"torn"),
        ("labels.json", json.dumps(LABELS).encode()),
        ("params.yaml", CHECKOUT.params.read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
    manifest = describe({path.name: path for path in tmp_path.iterdir()})
    (tmp_path / MANIFEST).write_bytes(UNSIGNED.sign(MANIFEST, manifest))
    assert verify_folder(tmp_path, None, UNSIGNED).id == manifest.id
    with pytest.raises(ModelError, match=r"'.*model\.pb' does not hold a graph"):
        open_release(tmp_path)
    for text in ("", "[", "[]", "preprocess: 3", "preprocess: {detail: 10000000}"):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(PromotionError, match=r"params\.yaml does not say .* in preprocess"):
            open_release(tmp_path)
    for labels in ([*LABELS[:-1], "0"], 6):
        (tmp_path / "labels.json").write_text(json.dumps(labels))
        with pytest.raises(PromotionError, match=r"must list different labels, not"):
            open_release(tmp_path)
    (tmp_path / MANIFEST).write_text(manifest.model_copy(update={"id": OTHER}).model_dump_json())
    with pytest.raises(ReleaseError, match=f"another release: {OTHER}, with the files"):
        verify_folder(tmp_path, None, UNSIGNED)
