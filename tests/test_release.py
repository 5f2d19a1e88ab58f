"""Releases: complete or invisible, verified to the last byte, and signed by a known key."""

import json
import stat
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ReleaseError, SettingsError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion, sign_pointer
from tasks.releases.release import (
    MANIFEST,
    Release,
    describe,
    fetch,
    publish,
    release_uri,
    sign_release,
    verify,
)
from tasks.releases.signing import UNSIGNED, Trust, fingerprint, new_keys, public_pem
from tasks.services.s3 import S3Address, Storage
from tests.fixtures.faults import one_line, proxy_to

Keys = tuple[Path, Path]
NOTE = Pointer(release="0" * 32, version=1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return new_keys(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def signed(bucket: S3Address, ours: Keys, tmp_path: Path) -> Storage:
    """The bucket, without a champion, for a reader that requires our signature."""
    storage = Storage(bucket, Trust((ours[1],), ours[0], None, tmp_path / "seen.json"))
    storage.remove(KEY)
    return storage


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of a release that is like no other."""
    unique = uuid.uuid4().bytes * 100
    contents = {"labels.json": b"[]", "model_card.md": b"# Card", "model.pb": unique}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def _key(release: Release, name: str = MANIFEST) -> str:
    return f"releases/{release.id}/{name}"


def test_a_release_is_named_by_its_files_and_invisible_until_the_manifest_comes_last(
    bucket: S3Address, files: dict[str, Path], tmp_path: Path
) -> None:
    unfinished = describe(files)
    for name in ("../model.pb", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="files"):
            describe({name: files["model.pb"]})
    direct, cache = Storage(bucket), tmp_path / "cache"
    direct.put(f"releases/{unfinished.id}/labels.json", files["labels.json"])
    direct.put(f"releases/{unfinished.id}/model.pb", b"half of it")
    for use in (verify, lambda *one: fetch(*one, cache)):
        with pytest.raises(ReleaseError, match="no complete release"):
            use(direct, unfinished.id)
    written = []
    for facts in ({"git": "abc"}, {"git": "def"}):  # which are no part of the name
        with proxy_to(bucket.endpoint_url) as proxy:
            release = publish(Storage(replace(bucket, endpoint_url=proxy.url)), files, facts)
        assert (release.id, release.facts) == (unfinished.id, {"git": "abc"})
        puts = [one.rpartition("/")[2] for one in proxy.requests if one.startswith("PUT")]
        written.append(puts)
    assert written == [["model.pb", "model_card.md", MANIFEST], []]
    assert release_uri(direct, release.id) == f"s3://{bucket.bucket}/releases/{release.id}/"
    assert verify(direct, release.id) == release
    folder = fetch(direct, release.id, cache)
    assert folder == cache / release.id
    for name, path in files.items():
        assert (folder / name).read_bytes() == path.read_bytes()


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
    ("format", MANIFEST, lambda one: _other_manifest(one, format=2)),
]


def test_each_kind_of_damage_is_refused_in_its_own_words_and_repaired(
    bucket: S3Address, files: dict[str, Path], tmp_path: Path
) -> None:
    storage, cache = Storage(bucket), tmp_path / "cache"
    release = publish(storage, files)
    for words, name, damage in DAMAGES:
        content = damage(release)
        if content is None:
            storage.remove(_key(release, name))
        else:
            storage.put(_key(release, name), content)
        for use in (verify, lambda *one: fetch(*one, cache)):
            with one_line(ReleaseError, words):
                use(storage, release.id)
        assert list(cache.glob("*")) == []
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


def test_a_private_key_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    private, public = new_keys(tmp_path / "a/keys", "right")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (private.parent, private, public)]
    assert modes == [0o700, 0o600, 0o644]
    # It opens with its passphrase only.
    trust = Trust((public,), private, "right")
    content = trust.sign("x", NOTE)
    reordered = json.dumps(dict(reversed(json.loads(content).items()))).encode()
    for same in (content, reordered):
        assert Trust((public,)).read(Pointer, "x", same, "here") == NOTE
    for passphrase in (None, "sentinel"):
        with one_line(SettingsError, "HANDSIGNS_SIGNING_PASSPHRASE"):
            Trust((public,), private, passphrase).check_signer()
    assert "right" not in repr(trust)
    for missing in (private, public):  # the other one alone protects the pair
        kept = missing.read_bytes()
        missing.unlink()
        with pytest.raises(SettingsError, match="must not be replaced"):
            new_keys(tmp_path / "a/keys")
        missing.write_bytes(kept)


CURVES = r"one of the curves secp256r1.*`handsigns keys new`"
GENERATE = "openssl genpkey -algorithm {} -out key && openssl pkey -in key -pubout -out key.pub"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("true", r"No such file or directory.* {}"),
        ("echo no key | tee key >key.pub", "cannot be .* {}"),
        (GENERATE.format("ED25519"), CURVES),
        (GENERATE.format("EC -pkeyopt ec_paramgen_curve:secp256k1"), CURVES),
    ],
)
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, command: str, words: str) -> None:
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    with one_line(SettingsError, words.format("HANDSIGNS_PUBLIC_KEYS")):
        Trust((tmp_path / "key.pub",)).describe()
    with one_line(SettingsError, words.format("HANDSIGNS_SIGNING_KEY")):
        Trust((), tmp_path / "key").describe()


def test_a_signed_release_is_accepted_with_any_known_key_and_an_unsigned_one_with_none(
    signed: Storage, files: dict[str, Path], ours: Keys, theirs: Keys
) -> None:
    unsigned, cache = Storage(signed.address), files["model.pb"].parent / "cache"
    # Whoever may not sign uploads nothing.
    before = unsigned.keys("")
    for signer, words in (
        (None, "no HANDSIGNS_SIGNING_KEY"),
        (theirs[0], "none of those that are accepted"),
    ):
        storage = Storage(unsigned.address, Trust((ours[1],), signer))
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
    # A new key takes over, and the champion stays.
    move_champion(signed, None, Pointer(release=release.id, version=1, by="who"))
    later = Storage(signed.address, Trust((theirs[1],), theirs[0]))
    with pytest.raises(ReleaseError, match="not accepted"):
        read_champion(later)
    again = sign_pointer(later)
    sign_release(later, release.id)
    assert again
    assert again == read_champion(later)
    assert again.pointer.by == "who"
    assert verify(later, release.id) == release
    with pytest.raises(ReleaseError, match="not accepted"):
        verify(signed, release.id)


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
    release = publish(signed, files, {"git_revision": "abc"})
    good = signed.get(_key(release))
    other = json.loads(Trust((theirs[1],), theirs[0]).sign(MANIFEST, release))
    for words, forge in FORGERIES:
        fields = json.loads(good)
        forge(fields, other)
        signed.put(_key(release), json.dumps(fields).encode())
        for use in (verify, lambda *one: fetch(*one, Path("/nonexistent"))):
            with one_line(ReleaseError, words):
                use(signed, release.id)
    assert capsys.readouterr().out == ""
    publish(signed, files)
    verify(signed, release.id)


def test_a_pointer_from_elsewhere_or_older_is_refused(signed: Storage, s3: S3Address) -> None:
    first = move_champion(signed, None, NOTE)
    assert read_champion(signed) == first
    good, elsewhere = signed.get(KEY), Storage(s3, Trust(signed.trust.public_keys))
    edited = json.dumps(json.loads(good) | {"version": 2}).encode()
    for storage, content in ((elsewhere, good), (signed, edited)):
        storage.put(KEY, content)
        with pytest.raises(ReleaseError, match="of other content"):
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


def test_the_newest_pointer_of_each_place_is_remembered(tmp_path: Path, ours: Keys) -> None:
    seen = tmp_path / "checkout/.local/seen.json"
    trust = Trust((ours[1],), seen_pointers=seen)
    trust.check_newest("here", 0)
    Trust(seen_pointers=seen).check_newest("here", 9)  # without keys nothing is noted
    assert not seen.exists()
    for place, moves in (("here", 1), ("there", 4), ("here", 2), ("here", 2)):
        trust.check_newest(place, moves)
    assert json.loads(seen.read_text()) == {"here": 2, "there": 4}
    for damaged in ("", "[]", '{"there": "many"}', '{"there": true}'):
        seen.write_text(damaged)
        with pytest.raises(ReleaseError, match=r"seen\.json, cannot be read"):
            trust.check_newest("here", 4)
        assert seen.read_text() == damaged
