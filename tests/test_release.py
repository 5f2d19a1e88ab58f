"""Releases: complete or invisible, verified to the last byte, and signed by a known key."""

import json
import stat
import subprocess
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tasks.errors import ModelError, PromotionError, ReleaseError, SettingsError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion, sign_pointer
from tasks.releases.release import (
    MANIFEST,
    Release,
    content_id,
    describe,
    fetch,
    open_release,
    publish,
    sign_release,
    verify,
    verify_folder,
)
from tasks.releases.signing import UNSIGNED, Trust, fingerprint, new_keys, public_pem
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.faults import proxy_to
from tests.fixtures.photos import CHECKOUT, LABELS
from tests.fixtures.servers import new_bucket

Keys = tuple[Path, Path]
NOTE = Pointer(release="0" * 32, version=1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def bucket(s3_server: S3Address) -> S3Address:
    """One bucket for this file: a fresh one for each test takes a second each."""
    return new_bucket(s3_server)


@pytest.fixture
def signed(bucket: S3Address, ours: Keys, tmp_path: Path) -> Storage:
    """The bucket, without a champion, for a reader that requires our signature."""
    storage = Storage(bucket, Trust((ours[1],), ours[0], None, tmp_path / "seen.json"))
    storage.remove(KEY)
    return storage


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of a release that is like no other."""
    contents = {"labels.json": b"[]", "model_card.md": b"# Card"}
    contents["model.pb"] = uuid.uuid4().bytes * 100
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def _key(release: Release, name: str = MANIFEST) -> str:
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
    for name in ("../model.pb", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="files"):
            describe({name: files["model.pb"]})


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
        direct.put(f"releases/{unfinished}/model.pb", b"half of it")
        for use in (verify, lambda *one: fetch(*one, tmp_path / "cache")):
            with pytest.raises(ReleaseError, match="no complete release"):
                use(storage, unfinished)
        release = publish(storage, files, {"git": "abc"})
        assert written() == ["model.pb", "model_card.md", MANIFEST]
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
    (tmp_path / MANIFEST).write_text(
        manifest.model_copy(update={"id": NOTE.release}).model_dump_json()
    )
    with pytest.raises(ReleaseError, match=f"another release: {NOTE.release}, with the files"):
        verify_folder(tmp_path, None, UNSIGNED)


def test_a_private_key_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    private, public = new_keys(tmp_path / "a/keys", "right")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (private.parent, private, public)]
    assert modes == [0o700, 0o600, 0o644]
    for missing in (private, public):  # the other one alone protects the pair
        kept = missing.read_bytes()
        missing.unlink()
        with pytest.raises(SettingsError, match="must not be replaced"):
            new_keys(tmp_path / "a/keys")
        missing.write_bytes(kept)
    # It opens with its passphrase only.
    assert b"ENCRYPTED" in private.read_bytes()
    trust = Trust((public,), private, "right")
    content = trust.sign("x", NOTE)
    reordered = json.dumps(dict(reversed(json.loads(content).items()))).encode()
    for same in (content, reordered):
        assert Trust((public,)).read(Pointer, "x", same, "here") == NOTE
    for passphrase in (None, "another"):
        with pytest.raises(SettingsError, match="HANDSIGNS_SIGNING_PASSPHRASE") as caught:
            Trust((public,), private, passphrase).check_signer()
        assert "another" not in str(caught.value)
    assert "right" not in repr(trust)


def test_a_key_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    public, private = tmp_path / "key.pub", tmp_path / "key"
    named = (r"key\.pub.* HANDSIGNS_PUBLIC_KEYS", r"key' cannot .* HANDSIGNS_SIGNING_KEY")
    kinds = (("ED25519",), ("EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"))
    for content in (None, b"", b"no key", *kinds):
        words = named
        if isinstance(content, tuple):
            command = ["openssl", "genpkey", "-algorithm", *content, "-out", private]
            subprocess.run(command, check=True, capture_output=True)
            command = ["openssl", "pkey", "-in", private, "-pubout", "-out", public]
            subprocess.run(command, check=True)
            words = (r"one of the curves secp256r1.*`handsigns keys new`",) * 2
        elif content is not None:
            public.write_bytes(content)
            private.write_bytes(content)
        for trust, what in zip((Trust((public,)), Trust((), private)), words, strict=True):
            with pytest.raises(SettingsError, match=what) as caught:
                trust.describe()
            assert "\n" not in str(caught.value)
            assert content is not None or "(No such file or directory)" in str(caught.value)


def test_a_signed_release_is_accepted_with_any_known_key_and_an_unsigned_one_with_none(
    signed: Storage, files: dict[str, Path], ours: Keys, theirs: Keys
) -> None:
    unsigned, cache = Storage(signed.address), files["model.pb"].parent / "cache"
    # Whoever may not sign uploads nothing.
    before = unsigned.keys("")
    for trust, words in (
        (Trust((ours[1],)), "no HANDSIGNS_SIGNING_KEY"),
        (Trust((ours[1],), theirs[0]), "none of those that are accepted"),
    ):
        storage = Storage(unsigned.address, trust)
        for write in (lambda s: publish(s, files), lambda s: move_champion(s, None, NOTE)):
            with pytest.raises(SettingsError, match=words):
                write(storage)
    assert unsigned.keys("") == before
    # Without keys nothing is signed or required; with keys an unsigned one is refused.
    UNSIGNED.check_signer()
    assert "not checked" in UNSIGNED.describe()
    release = publish(unsigned, files, {"git": "abc"})
    assert "signature" not in json.loads(unsigned.get(_key(release)))
    fetch(unsigned, release.id, cache)  # nor is the copy in the cache used
    with pytest.raises(ReleaseError, match="signature is missing"):
        fetch(signed, release.id, cache)
    for facts in ({"git": "abc"}, {"git": "def"}):  # which do not sign it anew
        assert publish(signed, files, facts) == release
    # Whoever signs, and names no public key, accepts what the own key signed.
    names = [fingerprint(public_pem(keys[1]))[:16] for keys in (theirs, ours)]
    for trust, known in (
        (Trust((theirs[1], ours[1])), f"2 public key(s): {', '.join(names)}."),
        (Trust((), ours[0]), f"1 public key(s): {names[1]}."),
    ):
        reader = Storage(signed.address, trust)
        assert verify(reader, release.id) == release
        fetch(reader, release.id, cache)
        assert trust.describe().endswith(f"against {known}")


def _by_our_key(fields: Any, other: Any) -> None:
    """Another's signature that claims to be by our key."""
    hint = fields["signature"]["verificationMaterial"]
    fields["signature"] = {**other["signature"], "verificationMaterial": hint}


FORGERIES: list[tuple[str, Callable[[Any, Any], object]]] = [
    ("signature is missing", lambda fields, other: fields.pop("signature")),
    ("is not accepted", lambda fields, other: fields.update(signature=other["signature"])),
    ("key unnamed", lambda fields, other: fields.update(signature={"mediaType": "x"})),
    ("forged, or of other content", _by_our_key),
    ("of other content", lambda fields, other: fields["facts"].update(git_revision="forged")),
    ("damaged, ", lambda fields, other: fields["signature"].update(dsseEnvelope={"payload": "?"})),
]


def test_each_forgery_is_refused(
    signed: Storage, files: dict[str, Path], theirs: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    release, cache = publish(signed, files, {"git_revision": "abc"}), Path("/nonexistent")
    good = json.loads(signed.get(_key(release)))
    other = json.loads(Trust((theirs[1],), theirs[0]).sign(MANIFEST, release.manifest))
    for words, forge in FORGERIES:
        fields = json.loads(json.dumps(good))
        forge(fields, other)
        signed.put(_key(release), json.dumps(fields).encode())
        for use in (verify, lambda *one: fetch(*one, cache)):
            with pytest.raises(ReleaseError, match=words) as caught:
                use(signed, release.id)
            assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    publish(signed, files)
    verify(signed, release.id)


def test_a_pointer_from_elsewhere_or_an_older_one_is_refused(
    signed: Storage, s3: S3Address
) -> None:
    first = move_champion(signed, None, NOTE)
    assert read_champion(signed) == first
    good = signed.get(KEY)
    fields = json.loads(good)
    unsigned = {name: text for name, text in fields.items() if name != "signature"}
    for storage, forged, words in (
        (Storage(s3, Trust(signed.trust.public_keys)), fields, "of other content"),
        (signed, {**fields, "version": 2}, "of other content"),
        (signed, unsigned, "signature is missing"),
    ):
        storage.put(KEY, json.dumps(forged).encode())
        with pytest.raises(ReleaseError, match=words):
            read_champion(storage)
    signed.put(KEY, good)
    second = Pointer(release="1" * 32, version=2, history=first.pointer.moves)
    move_champion(signed, read_champion(signed), second)
    signed.put(KEY, good)
    with pytest.raises(ReleaseError, match=r"older than one seen before: it has 1 moves and had 2"):
        read_champion(signed)
    signed.remove(KEY)
    with pytest.raises(ReleaseError, match=r"has 0 moves"):
        read_champion(signed)


def test_the_slower_of_two_readers_takes_nothing_back(tmp_path: Path, ours: Keys) -> None:
    seen = tmp_path / "checkout/.local/seen.json"
    trust = Trust((ours[1],), seen_pointers=seen)
    trust.check_newest("here", 0)
    Trust(seen_pointers=seen).check_newest("here", 9)  # without keys nothing is noted
    assert not seen.exists()
    trust.check_newest("here", 1)
    with ThreadPoolExecutor() as pool:
        with FileLock(f"{seen}.lock"):
            slower = pool.submit(trust.check_newest, "here", 2)
            time.sleep(0.2)
            assert slower.running()
            seen.write_text(json.dumps({"here": 3, "there": 4}))
        slower.result()
    assert json.loads(seen.read_text()) == {"here": 3, "there": 4}
    with FileLock(f"{seen}.lock"):  # whoever has nothing to add waits for nobody
        trust.check_newest("here", 3)
    for damaged in ("", "[]", '{"there": "many"}', '{"there": true}'):
        seen.write_text(damaged)
        with pytest.raises(ReleaseError, match=r"seen\.json, cannot be read"):
            trust.check_newest("here", 4)
        assert seen.read_text() == damaged


def test_keys_are_changed_without_losing_the_champion(
    signed: Storage, files: dict[str, Path], theirs: Keys
) -> None:
    release = publish(signed, files)
    move_champion(signed, None, Pointer(release=release.id, version=1, by="who"))
    later = Storage(signed.address, Trust((theirs[1],), theirs[0]))
    with pytest.raises(ReleaseError, match="not accepted"):
        read_champion(later)
    again = sign_pointer(later)
    sign_release(later, release.id)
    assert again is not None
    assert again == read_champion(later)
    assert again.pointer.by == "who"
    assert verify(later, release.id).manifest.files == release.manifest.files
    with pytest.raises(ReleaseError, match="not accepted"):
        verify(signed, release.id)
