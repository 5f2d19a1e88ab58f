"""Who signed a release, and what is refused when nobody we know did."""

import json
import stat
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tasks.errors import ReleaseError, SettingsError
from tasks.releases.pointer import KEY, Pointer, move_champion, read_champion, sign_pointer
from tasks.releases.release import (
    MANIFEST,
    Release,
    fetch,
    publish,
    sign_release,
    verify,
    verify_folder,
)
from tasks.releases.signing import UNSIGNED, Trust, fingerprint, new_keys, public_pem
from tasks.services.s3 import S3Address, Storage


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return new_keys(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return new_keys(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def signer(ours: tuple[Path, Path], tmp_path: Path) -> Trust:
    return Trust((ours[1],), ours[0], seen_pointers=tmp_path / "seen.json")


@pytest.fixture(scope="module")
def bucket(s3_server: S3Address) -> S3Address:
    """One bucket for this file: a fresh one for each test takes a second each."""
    address = replace(s3_server, bucket=f"test-{uuid.uuid4().hex[:16]}")
    Storage(address)._client.create_bucket(Bucket=address.bucket)
    return address


@pytest.fixture
def unsigned(bucket: S3Address) -> Storage:
    """The bucket, without a champion, to who configured no key."""
    storage = Storage(bucket)
    storage._client.delete_object(Bucket=bucket.bucket, Key=KEY)
    return storage


@pytest.fixture
def signed(unsigned: Storage, signer: Trust) -> Storage:
    """The same to who demands our signature."""
    return Storage(unsigned.address, signer)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of a release that is like no other."""
    (tmp_path / "labels.json").write_bytes(b"[]")
    (tmp_path / "model.pb").write_bytes(uuid.uuid4().bytes * 100)
    return {name: tmp_path / name for name in ("labels.json", "model.pb")}


def _key(release: Release) -> str:
    return f"releases/{release.id}/{MANIFEST}"


def test_a_private_key_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    private, public = new_keys(tmp_path / "keys", "a passphrase")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert b"ENCRYPTED" in private.read_bytes()
    assert b"PUBLIC" in public.read_bytes()
    kept = private.read_bytes()
    with pytest.raises(SettingsError, match="must not be replaced"):
        new_keys(tmp_path / "keys")
    assert private.read_bytes() == kept


@pytest.mark.parametrize("passphrase", [None, "another"])
def test_a_locked_key_opens_with_its_passphrase_only(
    tmp_path: Path, passphrase: str | None
) -> None:
    private, public = new_keys(tmp_path, "right")
    sealed = Trust((public,), private, "right").sign("x", {"a": 1})
    Trust((public,)).verify("x", sealed, "here")
    with pytest.raises(SettingsError, match="HANDSIGNS_SIGNING_PASSPHRASE") as caught:
        Trust((public,), private, passphrase).check_signer()
    assert "another" not in str(caught.value)
    assert "right" not in repr(Trust((public,), private, "right"))


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_a_key_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"HANDSIGNS_PUBLIC_KEYS") as caught:
        Trust((path,)).describe()
    assert "key.pem" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"HANDSIGNS_SIGNING_KEY"):
        Trust((), path).describe()


def test_nothing_is_signed_or_asked_for_where_no_key_is_configured(
    unsigned: Storage, files: dict[str, Path]
) -> None:
    release = publish(unsigned, files)
    assert "signature" not in json.loads(unsigned.get(_key(release)))
    assert "not checked" in UNSIGNED.describe()
    verify(unsigned, release.id)


def test_a_signed_release_is_believed_by_who_knows_the_key(
    signed: Storage, files: dict[str, Path], ours: tuple[Path, Path], tmp_path: Path
) -> None:
    release = publish(signed, files, {"git": "abc"})
    reader = Storage(signed.address, Trust((ours[1],)))
    assert verify(reader, release.id) == release
    folder = fetch(reader, release.id, tmp_path / "cache")
    verify_folder(folder, release.id, reader.trust)
    assert fingerprint(public_pem(ours[1]))[:16] in reader.trust.describe()
    before = signed.get(_key(release))
    assert publish(signed, files, {"git": "def"}) == release
    assert signed.get(_key(release)) == before


def test_of_several_public_keys_any_one_will_do(
    signed: Storage, files: dict[str, Path], ours: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    release = publish(signed, files)
    verify(Storage(signed.address, Trust((theirs[1], ours[1]))), release.id)


def test_who_may_not_sign_cannot_publish_and_nothing_is_uploaded(
    unsigned: Storage, files: dict[str, Path], ours: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    before = list(unsigned.list(""))
    for trust, words in (
        (Trust((ours[1],)), "no HANDSIGNS_SIGNING_KEY"),
        (Trust((ours[1],), theirs[0]), "none of those that are accepted"),
    ):
        storage = Storage(unsigned.address, trust)
        with pytest.raises(SettingsError, match=words):
            publish(storage, files)
        assert list(storage.list("")) == before
        with pytest.raises(SettingsError, match=words):
            move_champion(storage, None, Pointer(release="0" * 32, version=1))
        assert list(storage.list("")) == before


def _unsigned(fields: Any, other: Any) -> str:
    del fields["signature"]
    return "signature is missing"


def _by_another_key(fields: Any, other: Any) -> str:
    fields["signature"] = other["signature"]
    return "by a key that is not accepted"


def _in_anothers_name(fields: Any, other: Any) -> str:
    """Another's signature that claims to be by our key."""
    hint = fields["signature"]["verificationMaterial"]
    fields["signature"] = {**other["signature"], "verificationMaterial": hint}
    return "forged or damaged"


def _other_facts(fields: Any, other: Any) -> str:
    fields["facts"]["git_revision"] = "forged"
    return "is of other content"


def _garbled(fields: Any, other: Any) -> str:
    fields["signature"]["dsseEnvelope"] = {"payload": "?"}
    return "cannot be understood"


def _of_no_key(fields: Any, other: Any) -> str:
    fields["signature"] = {"mediaType": "x"}
    return "key unnamed"


FORGERIES = (_unsigned, _by_another_key, _in_anothers_name, _other_facts, _garbled, _of_no_key)


def test_each_forgery_is_refused_in_its_own_words(
    signed: Storage,
    files: dict[str, Path],
    theirs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = publish(signed, files, {"git_revision": "abc"})
    good = signed.get(_key(release))
    for forge in FORGERIES:
        fields = json.loads(good)
        other = Trust((theirs[1],), theirs[0]).sign(MANIFEST, fields)
        words = forge(fields, other)
        signed.put(_key(release), json.dumps(fields).encode())
        for use in (
            lambda: verify(signed, release.id),
            lambda: fetch(signed, release.id, tmp_path / "cache"),
        ):
            with pytest.raises(ReleaseError, match=words) as caught:
                use()
            assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))
    assert capsys.readouterr().out == ""
    publish(signed, files)
    verify(signed, release.id)


def test_a_file_changed_and_its_manifest_mended_without_the_key_is_refused(
    signed: Storage, files: dict[str, Path]
) -> None:
    """The release under another id, as who can write to the bucket would make it."""
    release = publish(signed, files)
    good = json.loads(signed.get(_key(release)))
    files["model.pb"].write_bytes(b"something else")
    forged = publish(Storage(signed.address), files)
    with pytest.raises(ReleaseError, match="signature is missing"):
        verify(signed, forged.id)
    fields = {**json.loads(signed.get(_key(forged))), "signature": good["signature"]}
    signed.put(_key(forged), json.dumps(fields).encode())
    with pytest.raises(ReleaseError, match="is of other content"):
        verify(signed, forged.id)
    signed.put(_key(forged), json.dumps(good).encode())
    with pytest.raises(ReleaseError, match="belongs to another release"):
        verify(signed, forged.id)


def test_an_unsigned_copy_in_the_cache_is_not_used(
    unsigned: Storage, signed: Storage, files: dict[str, Path], tmp_path: Path
) -> None:
    release = publish(unsigned, files)
    fetch(unsigned, release.id, tmp_path / "cache")
    with pytest.raises(ReleaseError, match="signature is missing"):
        fetch(signed, release.id, tmp_path / "cache")
    publish(signed, files)
    folder = fetch(signed, release.id, tmp_path / "cache")
    verify_folder(folder, release.id, signed.trust)


def test_the_pointer_is_signed_for_its_bucket(
    signed: Storage, files: dict[str, Path], s3_server: S3Address
) -> None:
    release = publish(signed, files)
    champion = move_champion(signed, None, Pointer(release=release.id, version=1))
    assert read_champion(signed) == champion
    content = signed.get(KEY)
    elsewhere = Storage(s3_server, Trust(signed.trust.public_keys))
    elsewhere.put(KEY, content)
    try:
        with pytest.raises(ReleaseError, match="is of other content"):
            read_champion(elsewhere)
    finally:
        elsewhere._client.delete_object(Bucket=s3_server.bucket, Key=KEY)
    forged = {**json.loads(content), "version": 2}
    signed.put(KEY, json.dumps(forged).encode())
    with pytest.raises(ReleaseError, match="is of other content"):
        read_champion(signed)
    del forged["signature"]
    signed.put(KEY, json.dumps(forged).encode())
    with pytest.raises(ReleaseError, match="signature is missing"):
        read_champion(signed)


def test_an_older_pointer_put_back_is_refused_by_who_saw_a_newer_one(signed: Storage) -> None:
    first = move_champion(signed, None, Pointer(release="0" * 32, version=1))
    old = signed.get(KEY)
    after = Pointer(release="1" * 32, version=2, history=first.pointer.moves)
    move_champion(signed, first, after)
    signed.put(KEY, old)
    with pytest.raises(ReleaseError, match=r"older than one seen before: it has 1 moves and had 2"):
        read_champion(signed)
    signed._client.delete_object(Bucket=signed.address.bucket, Key=KEY)
    with pytest.raises(ReleaseError, match=r"has 0 moves"):
        read_champion(signed)


def test_of_two_who_saw_a_pointer_the_slower_takes_nothing_back(tmp_path: Path) -> None:
    memory = tmp_path / "seen.json"
    trust = Trust((new_keys(tmp_path)[1],), seen_pointers=memory)
    trust.check_newest("here", 1)
    with ThreadPoolExecutor() as pool:
        with FileLock(f"{memory}.lock"):
            slower = pool.submit(trust.check_newest, "here", 2)
            time.sleep(0.2)
            assert slower.running()
            memory.write_text(json.dumps({"here": 3, "there": 4}))
        slower.result()
    assert json.loads(memory.read_text()) == {"here": 3, "there": 4}


@pytest.mark.parametrize("spoilt", ["", "[]", "null", '{"there": "many"}'])
def test_a_note_of_seen_pointers_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, spoilt: str
) -> None:
    memory = tmp_path / "seen.json"
    trust = Trust((new_keys(tmp_path)[1],), seen_pointers=memory)
    memory.write_text(spoilt)
    with pytest.raises(ReleaseError, match=r"seen\.json, cannot be read") as caught:
        trust.check_newest("here", 2)
    assert "\n" not in str(caught.value)
    assert memory.read_text() == spoilt
    memory.unlink()
    trust.check_newest("here", 2)


def test_keys_are_changed_without_losing_the_champion(
    signed: Storage, files: dict[str, Path], theirs: tuple[Path, Path]
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
