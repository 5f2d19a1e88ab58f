"""A release: written, read back, fetched."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import PromotionError, ReleaseError, first_fault
from tasks.io import read_json
from tasks.model.inference import Classifier, load_classifier
from tasks.params import LABELS, PreprocessParams
from tasks.releases.signing import SIGNATURE, Trust, canonical
from tasks.services.s3 import ChangedError, MissingObjectError, Storage

MANIFEST = "manifest.json"
DATASET_INDEX = "dataset.json"
"""Name in a release of the list that says which photo was in which split."""
AGAIN = "Do not use it; publish it again by a retrain, or roll back."
"""What to do with a release that is not what it was."""

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
_ID = re.compile(r"[0-9a-f]{32}")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Digest(BaseModel):
    """What one file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class Manifest(BaseModel):
    """`manifest.json`: the id, what it stands for, and facts that do not change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    id: str
    files: dict[Name, Digest] = Field(min_length=1, max_length=100)
    facts: dict[str, Any] = {}
    signature: dict[str, Any] | None = None

    def signed(self, trust: Trust) -> "Manifest":
        """Return the same manifest with our signature, where signatures are demanded."""
        return Manifest(**trust.sign(MANIFEST, self.model_dump()))

    def to_bytes(self) -> bytes:
        left_out = {SIGNATURE} if self.signature is None else None
        return canonical(self.model_dump(exclude=left_out)) + b"\n"


def content_id(files: Mapping[str, Digest]) -> str:
    """Return the first 32 hex digits of SHA-256 over the canonical JSON of `files`."""
    plain = {name: digest.model_dump() for name, digest in files.items()}
    return hashlib.sha256(canonical(plain)).hexdigest()[:32]


def check_id(release_id: str) -> str:
    """Return `release_id`, or raise `ReleaseError` if it is not 32 hex digits."""
    if not _ID.fullmatch(release_id):
        raise ReleaseError(
            f"A release is named by 32 hex digits. Received: {release_id!r}. "
            "`handsigns status` shows the champion's and the challenger's."
        )
    return release_id


def describe(files: Mapping[str, Path], facts: Mapping[str, Any] | None = None) -> Manifest:
    """Make the manifest of local files.

    Args:
        files: path by the plain name that the file gets in the release.
        facts: JSON values that help people, such as the git revision; not in the id.

    Returns:
        The manifest, not signed yet.

    Raises:
        ReleaseError: no file, a file that cannot be read, or a name that is not plain.
    """
    if MANIFEST in files:
        raise ReleaseError(f"A release writes its own manifest. Received: {MANIFEST} as a file.")
    try:
        digests = {name: _file_digest(path) for name, path in files.items()}
        return Manifest(id=content_id(digests), files=digests, facts=dict(facts or {}))
    except OSError as error:
        raise ReleaseError(
            f"A file of the release cannot be read ({error.strerror}). "
            f"Received: {error.filename}. Run the pipeline again."
        ) from error
    except ValidationError as error:
        raise ReleaseError(f"A release needs plain file names. {first_fault(error)}.") from error


def parse(content: bytes, release_id: str | None, where: str, trust: Trust) -> Manifest:
    """Read a manifest and check that it is the one of `release_id`, and whose it is.

    Args:
        content: bytes of `manifest.json`.
        release_id: the release it must belong to; None takes whichever it names.
        where: its folder, for messages.
        trust: whose signature it must have.

    Returns:
        The manifest.

    Raises:
        ReleaseError: it is broken, another release's, or not signed as it must be.
    """
    try:
        fields = json.loads(content, parse_constant=refuse_constant)
        manifest = Manifest.model_validate(fields)
    except (ValueError, RecursionError) as error:
        raise ReleaseError(
            f"The manifest cannot be understood. Received: {where} ({first_fault(error)}.) {AGAIN}"
        ) from None
    derived = content_id(manifest.files)
    wanted = manifest.id if release_id is None else release_id
    if manifest.id != wanted or derived != wanted:
        raise ReleaseError(
            f"The manifest belongs to another release. Received: {manifest.id} with files of "
            f"{derived} in {where}. {AGAIN}"
        )
    trust.verify(MANIFEST, fields, where)
    return manifest


def compare_sizes(manifest: Manifest, sizes: Mapping[str, int], where: str) -> None:
    """Compare which files there are, and how large, before any of them is read.

    Raises:
        ReleaseError: one is missing, added, or has another size.
    """
    if missing := sorted(manifest.files.keys() - sizes.keys()):
        raise ReleaseError(
            f"A file of the release is missing. Received: {where} without {missing}. {AGAIN}"
        )
    if added := sorted(sizes.keys() - manifest.files.keys()):
        raise ReleaseError(
            f"A file was added to the release. Received: {where} with {added}. Remove it."
        )
    for name, wanted in manifest.files.items():
        if sizes[name] != wanted.bytes:
            raise ReleaseError(
                f"A file of the release has another size. Received: {sizes[name]} bytes for "
                f"{name} in {where}, where the manifest says {wanted.bytes}. {AGAIN}"
            )


def verify_folder(folder: Path, release_id: str | None, trust: Trust) -> Manifest:
    """Compare a local folder with its manifest, and the manifest with id and signature.

    Args:
        folder: the release.
        release_id: which it must be; None takes whichever its manifest names.
        trust: whose signature it must have.

    Returns:
        The manifest.

    Raises:
        ReleaseError: anything is missing, added, or differs, or the signature is not one
            that is believed; the message says which.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError:
        raise ReleaseError(
            f"A folder is a release by its {MANIFEST}. Received: {folder}, which has none. {AGAIN}"
        ) from None
    manifest = parse(content, release_id, str(folder), trust)
    sizes = {path.name: path.lstat().st_size for path in folder.iterdir() if path.name != MANIFEST}
    compare_sizes(manifest, sizes, str(folder))
    for name, wanted in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or _file_digest(path) != wanted:
            raise damaged(str(path))
    return manifest


def damaged(place: str) -> ReleaseError:
    """Return the error for a file of the right size but with other bytes."""
    return ReleaseError(
        f"A file of the release differs from its digest. Received: {place}. {AGAIN}"
    )


def _file_digest(path: Path) -> Digest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(sha256=sha256, bytes=file.tell())


def refuse_constant(name: str) -> None:
    """Hook of `json.loads` for NaN and infinity, which only Python takes for JSON."""
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Release:
    """A release that was verified to the last byte.

    Args:
        id: 32 hex digits, derived from the files.
        uri: its `s3://` folder.
        manifest: digests and facts.
    """

    id: str
    uri: str
    manifest: Manifest = field(repr=False)


def publish(
    storage: Storage, files: Mapping[str, Path], facts: Mapping[str, Any] | None = None
) -> Release:
    """Upload a release whose manifest appears last, after every byte was read back.

    What is stored already and right is left alone, so a complete release is found
    and an incomplete or damaged one is mended.

    Args:
        storage: bucket that takes `releases/<id>/`.
        files: path by the plain name that the file gets in the release.
        facts: JSON values for people; they do not change the id.

    Returns:
        The release, whether it was uploaded or there already.

    Raises:
        ReleaseError: a file changes meanwhile, or the folder holds a foreign one.
        SettingsError: it must be signed and cannot be.
        ServiceError: the storage does not answer.
    """
    manifest = describe(files, facts).signed(storage.trust)
    stored = _stored(storage, manifest.id)
    if foreign := sorted(stored.keys() - manifest.files.keys() - {MANIFEST}):
        raise ReleaseError(
            f"A file was added to the release. Received: {_uri(storage, manifest.id)} with "
            f"{foreign}. Remove it, then run again."
        )
    for name in sorted(files):
        _upload(storage, _key(manifest.id, name), files[name], manifest.files[name])
    _put_manifest(storage, manifest, MANIFEST in stored)
    return Release(manifest.id, _uri(storage, manifest.id), read_manifest(storage, manifest.id))


def verify(storage: Storage, release_id: str) -> Release:
    """Check the signature, read every byte of a release and compare it with the manifest.

    Raises:
        ReleaseError: anything is missing, added, or differs; the message says which.
        ServiceError: the storage does not answer.
    """
    manifest = read_manifest(storage, release_id)
    for name, wanted in manifest.files.items():
        key = _key(release_id, name)
        if _digest(storage, key) != wanted:
            raise damaged(storage.uri(key))
    return Release(release_id, _uri(storage, release_id), manifest)


def fetch(storage: Storage, release_id: str, cache: Path) -> Path:
    """Return a local folder with the verified files of a release.

    What is there already is verified again, and fetched again if it is damaged.

    Args:
        storage: bucket that holds `releases/<id>/`.
        release_id: 32 hex digits.
        cache: takes one folder per release.

    Raises:
        ReleaseError: the stored release is missing, incomplete or damaged.
        ServiceError: the storage does not answer.
    """
    target = cache / check_id(release_id)
    if target.exists():
        try:
            verify_folder(target, release_id, storage.trust)
        except ReleaseError:
            shutil.rmtree(target)
        else:
            return target
    manifest = read_manifest(storage, release_id)
    part = cache / f".{release_id}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name in manifest.files:
            storage.download(_key(release_id, name), part / name)
        (part / MANIFEST).write_bytes(manifest.to_bytes())
        verify_folder(part, release_id, storage.trust)
        try:
            part.replace(target)
        except OSError:  # another process may have fetched the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    verify_folder(target, release_id, storage.trust)
    return target


def sign_release(storage: Storage, release_id: str) -> None:
    """Replace a release's signature, whoever made it, by ours; every byte is read before.

    Raises:
        ReleaseError: the release is not what its manifest says.
        SettingsError: there is no usable signing key.
        ServiceError: the storage does not answer, or another writer came between.
    """
    anybody = Storage(storage.address)
    content, etag = anybody.read(_key(check_id(release_id), MANIFEST))
    manifest = verify(anybody, release_id).manifest
    if parse(content, release_id, _uri(storage, release_id), anybody.trust) == manifest:
        signed = manifest.signed(storage.trust)
        storage.put_if_match(_key(release_id, MANIFEST), signed.to_bytes(), etag)


def _upload(storage: Storage, key: str, source: Path, wanted: Digest) -> None:
    if _digest(storage, key) == wanted:
        return
    storage.put(key, source)
    if _digest(storage, key) != wanted:
        raise ReleaseError(
            f"An uploaded file came back different. Received: {storage.uri(key)} from {source}. "
            "Let nothing write to the file, check the storage, then run again."
        )


def _put_manifest(storage: Storage, manifest: Manifest, stored: bool) -> None:
    """Write the manifest; one that is there, of another run with the same files, stands.

    One that lacks our signature where it must have one is replaced.
    """
    key = _key(manifest.id, MANIFEST)
    if not stored:
        with contextlib.suppress(ChangedError):
            storage.put_if_absent(key, manifest.to_bytes())
    if manifest.signature is None:
        return
    content, etag = storage.read(key)
    try:
        parse(content, manifest.id, _uri(storage, manifest.id), storage.trust)
    except ReleaseError:
        with contextlib.suppress(ChangedError):
            storage.put_if_match(key, manifest.to_bytes(), etag)


def read_manifest(storage: Storage, release_id: str) -> Manifest:
    stored = _stored(storage, check_id(release_id))
    where = _uri(storage, release_id)
    if MANIFEST not in stored:
        raise ReleaseError(f"There is no complete release. Received: {where}. Publish it first.")
    if stored.pop(MANIFEST) > MAX_MANIFEST_BYTES:
        raise ReleaseError(f"The manifest is too large to be one. Received: {where}{MANIFEST}.")
    manifest = parse(storage.get(_key(release_id, MANIFEST)), release_id, where, storage.trust)
    compare_sizes(manifest, stored, where)
    return manifest


def list_releases(storage: Storage) -> list[str]:
    """Ids of the releases in storage that have a manifest."""
    keys = (entry.key for entry in storage.list("releases/"))
    return sorted(key.split("/")[1] for key in keys if key.endswith(f"/{MANIFEST}"))


def _stored(storage: Storage, release_id: str) -> dict[str, int]:
    prefix = _key(release_id, "")
    return {entry.key.removeprefix(prefix): entry.size for entry in storage.list(prefix)}


def _digest(storage: Storage, key: str) -> Digest | None:
    try:
        sha256, size = storage.digest(key)
    except MissingObjectError:
        return None
    return Digest(sha256=sha256, bytes=size)


def _key(release_id: str, name: str) -> str:
    return f"releases/{release_id}/{name}"


def _uri(storage: Storage, release_id: str) -> str:
    return storage.uri(_key(release_id, ""))


def open_release(folder: Path) -> Classifier:
    """Load the classifier of a verified release.

    Args:
        folder: what `tasks.releases.release.fetch` returned. It may hold no `model.pb`; then
            `model.keras` is loaded.

    Returns:
        The classifier, which reduces photos as the release's training photos were.

    Raises:
        PromotionError: its labels are not ours, in our order, or its parameters say
            nothing of photos.
        ModelError: its model does not fit.
    """
    labels = read_json(folder / "labels.json")
    if labels != list(LABELS):
        raise PromotionError(
            f"A release must have the labels {list(LABELS)} in this order. Received: {labels} "
            f"in release {folder.name}. Promote a release of this project."
        )
    detail = _detail(folder / "params.yaml")
    graph = folder / "model.pb"
    model = graph if graph.is_file() else folder / "model.keras"
    return load_classifier(model, detail, vouched=True)


def _detail(path: Path) -> int:
    """Read the one parameter that a prediction needs; the rest may be another version's."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return PreprocessParams(detail=content["preprocess"]["detail"]).detail
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise PromotionError(
            f"A release's params.yaml must say how photos are reduced, as preprocess.detail. "
            f"Received: {path} ({type(error).__name__}). Promote a release of this project."
        ) from error
