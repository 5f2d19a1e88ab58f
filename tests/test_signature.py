"""Who signed a release, and what is refused when nobody known did."""

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
from pydantic import BaseModel

from tasks.errors import ReleaseError, SettingsError
from tasks.releases.champion import KEY, Pointer, move_champion, read_champion, sign_pointer
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
from tests.fixtures.servers import new_bucket

Keys = tuple[Path, Path]


class Note(BaseModel):
    """Something to sign."""

    text: str


NOTE = Note(text="as it was")


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
def unsigned(bucket: S3Address) -> Storage:
    """The bucket, without a champion, for a reader without keys."""
    storage = Storage(bucket)
    storage.remove(KEY)
    return storage


@pytest.fixture
def signed(unsigned: Storage, ours: Keys, tmp_path: Path) -> Storage:
    """The same for a reader that requires our signature."""
    return Storage(unsigned.address, Trust((ours[1],), ours[0], None, tmp_path / "seen.json"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of a release that is like no other."""
    (tmp_path / "labels.json").write_bytes(b"[]")
    (tmp_path / "model.pb").write_bytes(uuid.uuid4().bytes * 100)
    return {name: tmp_path / name for name in ("labels.json", "model.pb")}


def _key(release: Release) -> str:
    return f"releases/{release.id}/{MANIFEST}"


def test_a_private_key_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    private, public = new_keys(tmp_path / "a" / "keys")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    kept = private.read_bytes(), public.read_bytes()
    for missing in (private, public):  # the other one alone protects the pair
        missing.unlink()
        with pytest.raises(SettingsError, match="must not be replaced"):
            new_keys(tmp_path / "a" / "keys")
        missing.write_bytes(kept[missing == public])
    assert (private.read_bytes(), public.read_bytes()) == kept


def test_a_locked_key_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    private, public = new_keys(tmp_path, "right")
    assert b"ENCRYPTED" in private.read_bytes()
    signed = Trust((public,), private, "right").sign("x", NOTE)
    assert Trust((public,)).read(Note, "x", signed, "here") == NOTE
    for passphrase in (None, "another"):
        with pytest.raises(SettingsError, match="HANDSIGNS_SIGNING_PASSPHRASE") as caught:
            Trust((public,), private, passphrase).check_signer()
        assert "another" not in str(caught.value)
    assert "right" not in repr(Trust((public,), private, "right"))


@pytest.mark.parametrize("content", [b"", b"no key", None, "ed25519", "secp256k1"])
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    public, private = tmp_path / "key.pub", tmp_path / "key"
    words = (r"key\.pub.* HANDSIGNS_PUBLIC_KEYS", r"key' cannot .* HANDSIGNS_SIGNING_KEY")
    if isinstance(content, str):
        kind = [] if content == "ed25519" else ["-pkeyopt", f"ec_paramgen_curve:{content}"]
        command = ["openssl", "genpkey", "-algorithm", "EC" if kind else content, *kind]
        subprocess.run([*command, "-out", private], check=True, capture_output=True)
        command = ["openssl", "pkey", "-in", private, "-pubout", "-out", public]
        subprocess.run(command, check=True)
        words = (r"one of the curves secp256r1.*`handsigns keys new`",) * 2
    elif content is not None:
        public.write_bytes(content)
        private.write_bytes(content)
    for trust, named in zip((Trust((public,)), Trust((), private)), words, strict=True):
        with pytest.raises(SettingsError, match=named) as caught:
            trust.describe()
        assert "\n" not in str(caught.value)
        assert content is not None or "(No such file or directory)" in str(caught.value)


def test_without_a_configured_key_nothing_is_signed_or_required(
    unsigned: Storage, files: dict[str, Path]
) -> None:
    release = publish(unsigned, files)
    assert "signature" not in json.loads(unsigned.get(_key(release)))
    assert "not checked" in UNSIGNED.describe()
    UNSIGNED.check_signer()
    verify(unsigned, release.id)


def test_a_signed_release_is_accepted_with_any_known_key(
    signed: Storage, files: dict[str, Path], ours: Keys, theirs: Keys, tmp_path: Path
) -> None:
    release = publish(signed, files, {"git": "abc"})
    reader = Storage(signed.address, Trust((theirs[1], ours[1])))
    assert verify(reader, release.id) == release
    verify_folder(fetch(reader, release.id, tmp_path / "cache"), release.id, reader.trust)
    names = [fingerprint(public_pem(keys[1]))[:16] for keys in (theirs, ours)]
    assert reader.trust.describe().endswith(f"against 2 public key(s): {', '.join(names)}.")
    # Whoever signs, and names no public key, accepts what the own key signed.
    own = Storage(signed.address, Trust((), ours[0]))
    assert verify(own, release.id) == release
    assert own.trust.describe().endswith(f"against 1 public key(s): {names[1]}.")
    before = signed.get(_key(release))
    assert publish(signed, files, {"git": "def"}) == release
    assert signed.get(_key(release)) == before


def test_without_the_right_to_sign_nothing_is_uploaded(
    unsigned: Storage, files: dict[str, Path], ours: Keys, theirs: Keys
) -> None:
    before = list(unsigned.list(""))
    for trust, words in (
        (Trust((ours[1],)), "no HANDSIGNS_SIGNING_KEY"),
        (Trust((ours[1],), theirs[0]), "none of those that are accepted"),
    ):
        storage = Storage(unsigned.address, trust)
        with pytest.raises(SettingsError, match=words):
            publish(storage, files)
        with pytest.raises(SettingsError, match=words):
            move_champion(storage, None, Pointer(release="0" * 32, version=1))
        assert list(storage.list("")) == before


def _by_our_key(fields: Any, other: Any) -> None:
    """Another's signature that claims to be by our key."""
    hint = fields["signature"]["verificationMaterial"]
    fields["signature"] = {**other["signature"], "verificationMaterial": hint}


FORGERIES: dict[str, Callable[[Any, Any], object]] = {
    "signature is missing": lambda fields, other: fields.pop("signature"),
    "by a key that is not accepted": lambda fields, other: fields.update(
        signature=other["signature"]
    ),
    "is damaged, forged": _by_our_key,
    "of other content": lambda fields, other: fields["facts"].update(git_revision="forged"),
    "or of other content": lambda fields, other: fields["signature"].update(
        dsseEnvelope={"payload": "?"}
    ),
    "key unnamed": lambda fields, other: fields.update(signature={"mediaType": "x"}),
}


def test_each_forgery_is_refused_in_its_own_words(
    signed: Storage,
    files: dict[str, Path],
    theirs: Keys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = publish(signed, files, {"git_revision": "abc"})
    good = signed.get(_key(release))
    for words, forge in FORGERIES.items():
        fields = json.loads(good)
        forge(fields, json.loads(Trust((theirs[1],), theirs[0]).sign(MANIFEST, release.manifest)))
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


def test_another_file_with_its_own_manifest_is_refused_without_the_key(
    signed: Storage, files: dict[str, Path]
) -> None:
    """The release under another id, as an intruder in the bucket would make it."""
    release = publish(signed, files)
    good = json.loads(signed.get(_key(release)))
    files["model.pb"].write_bytes(b"something else")
    forged = publish(Storage(signed.address), files)
    own = json.loads(signed.get(_key(forged)))
    for fields, words in (
        (own, "signature is missing"),
        ({**own, "signature": good["signature"]}, "of other content"),
        (good, "belongs to another release"),
    ):
        signed.put(_key(forged), json.dumps(fields).encode())
        with pytest.raises(ReleaseError, match=words):
            verify(signed, forged.id)


def test_an_unsigned_copy_in_the_cache_is_not_used(
    unsigned: Storage, signed: Storage, files: dict[str, Path], tmp_path: Path
) -> None:
    release = publish(unsigned, files)
    fetch(unsigned, release.id, tmp_path / "cache")
    with pytest.raises(ReleaseError, match="signature is missing"):
        fetch(signed, release.id, tmp_path / "cache")
    publish(signed, files)
    verify_folder(fetch(signed, release.id, tmp_path / "cache"), release.id, signed.trust)


def test_the_pointer_is_signed_for_its_bucket(
    signed: Storage, files: dict[str, Path], s3: S3Address
) -> None:
    release = publish(signed, files)
    champion = move_champion(signed, None, Pointer(release=release.id, version=1))
    assert read_champion(signed) == champion
    good = json.loads(signed.get(KEY))
    elsewhere = Storage(s3, Trust(signed.trust.public_keys))
    unsigned = {name: value for name, value in good.items() if name != "signature"}
    for storage, fields, words in (
        (elsewhere, good, "of other content"),
        (signed, {**good, "version": 2}, "of other content"),
        (signed, unsigned, "signature is missing"),
    ):
        storage.put(KEY, json.dumps(fields).encode())
        with pytest.raises(ReleaseError, match=words):
            read_champion(storage)


def test_an_older_pointer_is_refused_after_a_newer_one_was_seen(signed: Storage) -> None:
    first = move_champion(signed, None, Pointer(release="0" * 32, version=1))
    old = signed.get(KEY)
    after = Pointer(release="1" * 32, version=2, history=first.pointer.moves)
    move_champion(signed, first, after)
    signed.put(KEY, old)
    with pytest.raises(ReleaseError, match=r"older than one seen before: it has 1 moves and had 2"):
        read_champion(signed)
    signed.remove(KEY)
    with pytest.raises(ReleaseError, match=r"has 0 moves"):
        read_champion(signed)


def test_the_slower_of_two_readers_takes_nothing_back(tmp_path: Path, ours: Keys) -> None:
    seen = tmp_path / "checkout" / ".local" / "seen.json"
    trust = Trust((ours[1],), seen_pointers=seen)
    trust.check_newest("here", 0)
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
    UNSIGNED.check_newest("here", 0)
    replace(UNSIGNED, seen_pointers=seen).check_newest("here", 0)


@pytest.mark.parametrize("damaged", ["", "[]", "null", '{"there": "many"}', '{"there": true}'])
def test_a_damaged_list_of_seen_pointers_is_no_empty_one(
    tmp_path: Path, ours: Keys, damaged: str
) -> None:
    seen = tmp_path / "seen.json"
    trust = Trust((ours[1],), seen_pointers=seen)
    seen.write_text(damaged)
    with pytest.raises(ReleaseError, match=r"seen\.json, cannot be read") as caught:
        trust.check_newest("here", 2)
    assert "\n" not in str(caught.value)
    assert seen.read_text() == damaged
    seen.unlink()
    trust.check_newest("here", 2)


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


def test_the_order_of_fields_is_no_part_of_what_is_signed(ours: Keys) -> None:
    trust, pointer = Trust((), ours[0]), Pointer(release="0" * 32, version=1)
    fields = json.loads(trust.sign("x", pointer))
    turned = json.dumps(dict(reversed(fields.items()))).encode()
    assert trust.read(Pointer, "x", turned, "here") == pointer
