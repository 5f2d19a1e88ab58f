"""Releases in storage: complete or invisible, verified to the last byte, and repaired."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import PromotionError, ReleaseError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion
from tasks.releases.release import (
    MANIFEST,
    Digest,
    Release,
    content_id,
    describe,
    fetch,
    publish,
    verify,
)
from tasks.releases.signing import UNSIGNED
from tasks.services.s3 import S3Address, Storage

OTHER = "0" * 32


class Witness(Storage):
    """The real storage, which also remembers what was written."""

    def __init__(self, address: S3Address) -> None:
        super().__init__(address)
        self.written: list[str] = []

    def put(self, key: str, source: Path | bytes) -> None:
        super().put(key, source)
        self.written.append(key)

    def put_if_absent(self, key: str, content: bytes) -> str:
        self.written.append(key)
        return super().put_if_absent(key, content)


@pytest.fixture
def witness(s3: S3Address) -> Witness:
    return Witness(s3)


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


digests = st.builds(
    Digest,
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
    bytes=st.integers(0, 2**30),
)


@given(st.dictionaries(st.text("abc.", min_size=1), digests, min_size=1))
def test_the_id_depends_on_every_file_and_not_on_their_order(files: Mapping[str, Digest]) -> None:
    wanted = content_id(files)
    assert content_id(dict(reversed(list(files.items())))) == wanted
    for name, digest in files.items():
        larger = Digest(sha256=digest.sha256, bytes=digest.bytes + 1 if digest.bytes < 9 else 0)
        assert content_id({**files, name: larger}) != wanted
        assert content_id({other: files[other] for other in files if other != name}) != wanted


def test_what_cannot_be_a_release_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    assert describe(files, {"git": "abc"}).id == describe(files, {"git": "def"}).id
    for name in ("../model.keras", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="files"):
            describe({name: files["model.keras"]})


def test_a_published_release_is_verified_and_fetched(
    witness: Witness, files: dict[str, Path], tmp_path: Path
) -> None:
    release = publish(witness, files, {"git": "abc"})
    assert release.uri == f"s3://{witness.address.bucket}/releases/{release.id}/"
    assert witness.written[-1] == _key(release, MANIFEST)
    assert verify(witness, release.id) == release
    folder = fetch(witness, release.id, tmp_path / "cache")
    assert folder == tmp_path / "cache" / release.id
    for name, path in files.items():
        assert (folder / name).read_bytes() == path.read_bytes()
    assert json.loads((folder / MANIFEST).read_bytes())["facts"] == {"git": "abc"}
    witness.written.clear()
    assert publish(witness, files, {"git": "def"}) == release
    assert witness.written == []


def test_a_half_uploaded_release_is_invisible_and_then_completed(
    witness: Witness, files: dict[str, Path], tmp_path: Path
) -> None:
    release_id = describe(files).id
    witness.put(f"releases/{release_id}/labels.json", files["labels.json"])
    witness.put(f"releases/{release_id}/model.keras", b"half of it")
    for attempt in (
        lambda: verify(witness, release_id),
        lambda: fetch(witness, release_id, tmp_path / "c"),
    ):
        with pytest.raises(ReleaseError, match="no complete release"):
            attempt()
    witness.written.clear()
    release = publish(witness, files)
    assert witness.written == [
        _key(release, name) for name in ("model.keras", "model_card.md", MANIFEST)
    ]
    verify(witness, release.id)


def _other_manifest(release: Release, **changes: str) -> bytes:
    """The manifest of other files, under this release's name if `id` says so."""
    manifest = describe({"labels.json": Path(__file__)}).model_copy(update=changes)
    return UNSIGNED.sign(MANIFEST, manifest)


def _later_format(release: Release) -> bytes:
    return json.dumps({**release.manifest.model_dump(), "format": 2}).encode()


DAMAGES: list[tuple[str, str, Callable[[Release], bytes | None]]] = [
    ("differs from its digest", "labels.json", lambda _: b"{}"),
    ("has 1 bytes instead of 2", "labels.json", lambda _: b"["),
    ("labels.json has no bytes instead of 2", "labels.json", lambda _: None),
    ("extra.py has 0 bytes instead of none", "extra.py", lambda _: b""),
    ("belongs to another release", MANIFEST, _other_manifest),
    ("belongs to another release", MANIFEST, lambda one: _other_manifest(one, id=one.id)),
    ("cannot be understood", MANIFEST, lambda _: b"{not json"),
    ("cannot be understood", MANIFEST, lambda _: b"[" * 100_000),
    ("cannot be understood", MANIFEST, lambda _: b"[1]"),
    ("format", MANIFEST, _later_format),
]


def test_each_kind_of_damage_is_refused_in_its_own_words_and_repaired(
    storage: Storage, files: dict[str, Path], tmp_path: Path
) -> None:
    release = publish(storage, files)
    kept = {name: storage.get(_key(release, name)) for name in ("labels.json", MANIFEST)}
    for words, name, damage in DAMAGES:
        content = damage(release)
        if content is None:
            storage.remove(_key(release, name))
        else:
            storage.put(_key(release, name), content)
        for use in (
            lambda: verify(storage, release.id),
            lambda: fetch(storage, release.id, tmp_path / "cache"),
        ):
            with pytest.raises(ReleaseError, match=words) as caught:
                use()
            assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache").glob("*")) == []
        if name == MANIFEST:
            storage.put(_key(release, name), kept[name])
        elif name in files:
            publish(storage, files)
        else:
            with pytest.raises(ReleaseError, match="was added"):
                publish(storage, files)
            storage.remove(_key(release, name))
        verify(storage, release.id)


def test_a_damaged_local_copy_is_fetched_again_and_a_good_one_needs_no_storage(
    storage: Storage, files: dict[str, Path], tmp_path: Path
) -> None:
    release = publish(storage, files)
    folder = fetch(storage, release.id, tmp_path / "cache")
    (folder / "labels.json").write_bytes(b"{}")
    (folder / "extra.py").write_bytes(b"")
    (folder / "model_card.md").unlink()
    (folder / "model_card.md").symlink_to(files["model_card.md"])
    fetch(storage, release.id, tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, MANIFEST])
    assert (folder / "labels.json").read_bytes() == b"[]"
    assert not (folder / "model_card.md").is_symlink()
    nobody = Storage(S3Address("http://127.0.0.1:9", "artifacts", "us-east-1", "k", "s"))
    assert fetch(nobody, release.id, tmp_path / "cache") == folder


def test_a_release_is_named_by_32_hex_digits(storage: Storage, tmp_path: Path) -> None:
    for release_id in ("../..", "", "A" * 32, "0" * 31, "0" * 33):
        for call in (fetch, lambda *one: verify(*one[:2])):
            with pytest.raises(ReleaseError, match="32 hex digits"):
                call(storage, release_id, tmp_path)


def test_the_champion_is_moved_only_by_who_saw_the_present_one(storage: Storage) -> None:
    assert read_champion(storage) is None
    first = move_champion(storage, None, Pointer(release=OTHER, version=1, by="a"))
    assert read_champion(storage) == first
    second = move_champion(storage, first, Pointer(release=OTHER, version=2, previous=1))
    for stale in (None, first):
        with pytest.raises(PromotionError, match="changed meanwhile"):
            move_champion(storage, stale, Pointer(release=OTHER, version=3))
    assert read_champion(storage) == second


def test_a_broken_pointer_is_not_followed(storage: Storage) -> None:
    bad = ({"release": "../.."}, {"version": 0}, {"previous": 0}, {"pointer_moves": -1})
    broken = [json.dumps({"release": OTHER, "version": 1} | one).encode() for one in bad]
    for content in (b"", b"[]", b"[" * 100_000, *broken):
        storage.put(KEY, content)
        with pytest.raises(ReleaseError, match=r"champion\.json cannot be understood") as caught:
            read_champion(storage)
        assert "\n" not in str(caught.value)
