"""A release: written, read back, fetched, opened."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tasks.errors import PromotionError, ReleaseError, first_fault
from tasks.io import atomic_directory, read_json
from tasks.model.inference import CERTAIN_ABOVE, Classifier, load_classifier
from tasks.params import PreprocessParams
from tasks.releases.signing import Trust, canonical
from tasks.services.s3 import Storage

MANIFEST = "manifest.json"
DATASET_INDEX = "dataset.json"  # lists which photo was in which split
AGAIN = "Do not use it; publish it again by a retrain, or roll back."
ID = re.compile(r"[0-9a-f]{32}")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Digest(BaseModel):
    """What one file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=1 << 30)


class Release(BaseModel):
    """A release by its manifest: the id, the files it stands for, and facts outside of the id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    id: str
    files: dict[Name, Digest] = Field(min_length=1, max_length=100)
    facts: dict[str, Any] = {}


def content_id(files: Mapping[str, Digest]) -> str:
    """First 32 hex digits of SHA-256 over the canonical JSON of `files`."""
    plain = {name: digest.model_dump() for name, digest in files.items()}
    return hashlib.sha256(canonical(plain)).hexdigest()[:32]


def describe(files: Mapping[str, Path], facts: Mapping[str, Any] | None = None) -> Release:
    """Make the manifest of local files by the names they get; not signed yet."""
    digests = {name: _digest(path.read_bytes()) for name, path in files.items()}
    return Release(id=content_id(digests), files=digests, facts=dict(facts or {}))


def publish(
    storage: Storage, files: Mapping[str, Path], facts: Mapping[str, Any] | None = None
) -> Release:
    """Upload files by name; the manifest appears last, after every byte was read back.

    What is stored already and right stays; `facts` are for people and do not change the id.
    """
    manifest = describe(files, facts)
    signed = storage.trust.sign(MANIFEST, manifest)
    stored = _stored(storage, manifest.id)
    for name in stored.keys() - manifest.files.keys() - {MANIFEST}:
        storage.remove(_key(manifest.id, name))
    for name, wanted in sorted(manifest.files.items()):
        key = _key(manifest.id, name)
        if stored.get(name) == wanted.bytes and _digest(storage.get(key)) == wanted:
            continue
        storage.put(key, files[name])
        if _digest(storage.get(key)) != wanted:
            raise ReleaseError(
                f"The upload of {files[name]} came back different from {storage.uri(key)}. Let "
                "nothing write to the file, check the storage, then run again."
            )
    with contextlib.suppress(ReleaseError):
        return read_manifest(storage, manifest.id)
    storage.put(_key(manifest.id, MANIFEST), signed)
    return read_manifest(storage, manifest.id)


def verify(storage: Storage, release_id: str) -> Release:
    """Check the signature, read every byte and compare it with the manifest, or `ReleaseError`."""
    manifest, where = read_manifest(storage, release_id), release_uri(storage, release_id)
    _compare_content(manifest, lambda name: storage.get(_key(release_id, name)), where)
    return manifest


def fetch(storage: Storage, release_id: str, cache: Path) -> Path:
    """Return a local folder with a release's verified files; a damaged one is fetched again."""
    target = cache / check_id(release_id)
    if target.exists():
        try:
            verify_folder(target, release_id, storage.trust)
            return target
        except ReleaseError:
            shutil.rmtree(target)
    manifest = read_manifest(storage, release_id)
    with atomic_directory(target) as folder:
        for name in (*manifest.files, MANIFEST):
            (folder / name).write_bytes(storage.get(_key(release_id, name)))
        verify_folder(folder, release_id, storage.trust)
    return target


def verify_folder(folder: Path, release_id: str | None, trust: Trust) -> Release:
    """Compare a local folder with its manifest; without an id, whichever release that names."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError:
        raise ReleaseError(f"{folder} has no {MANIFEST}, so it is no release. {AGAIN}") from None
    manifest = _parse(content, release_id, str(folder), trust)
    sizes = {path.name: path.lstat().st_size for path in folder.iterdir() if path.name != MANIFEST}
    _compare_sizes(manifest, sizes, str(folder))
    _compare_content(manifest, lambda name: (folder / name).read_bytes(), f"{folder}/")
    return manifest


def read_manifest(storage: Storage, release_id: str) -> Release:
    """Read a stored manifest; check its signature, and names and sizes of the files."""
    stored = _stored(storage, check_id(release_id))
    where = release_uri(storage, release_id)
    if MANIFEST not in stored:
        raise ReleaseError(f"There is no complete release at {where}. Publish it first.")
    del stored[MANIFEST]
    manifest = _parse(storage.get(_key(release_id, MANIFEST)), release_id, where, storage.trust)
    _compare_sizes(manifest, stored, where)
    return manifest


def list_releases(storage: Storage) -> list[str]:
    """Ids of the releases in storage that have a manifest."""
    keys = storage.keys("releases/")
    return sorted(key.split("/")[1] for key in keys if key.endswith(f"/{MANIFEST}"))


def sign_release(storage: Storage, release_id: str) -> None:
    """Replace a release's signature, whoever made it, by ours; every byte is read before."""
    manifest = verify(Storage(storage.address), release_id)
    storage.put(_key(release_id, MANIFEST), storage.trust.sign(MANIFEST, manifest))


def open_release(folder: Path) -> Classifier:
    """Load the classifier of a verified release; it resizes photos as in training."""
    try:
        labels = json.loads((folder / "labels.json").read_bytes())
        section = yaml.safe_load((folder / "params.yaml").read_bytes())["preprocess"]
        # Releases of earlier versions call the size `detail`, and have this one blur.
        size = section["image_size"] if "image_size" in section else section["detail"]
        preprocess = PreprocessParams(image_size=size, blur_sigma=section.get("blur_sigma", 0.5))
        if len({*map(str, labels)}) != len(labels):
            raise ValueError(f"labels.json must list different labels, not {str(labels)[:200]}")
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise PromotionError(
            f"Release {folder.name} does not say its labels and how photos are resized "
            f"({type(error).__name__}: {first_fault(error)}). Promote a release of this project."
        ) from error
    found = load_classifier(folder / "model.pb", preprocess, labels)
    certainty = (read_json(folder / "metrics.json") or {}).get("certainty") or {}
    above = certainty.get("certain_above", CERTAIN_ABOVE)
    return replace(found, certain_above=float(above))


def check_id(release_id: str) -> str:
    """Return `release_id`, or raise `ReleaseError` if it is not 32 hex digits."""
    if not ID.fullmatch(release_id):
        raise ReleaseError(f"A release is named by 32 hex digits, not {release_id!r}.")
    return release_id


def _parse(content: bytes, release_id: str | None, where: str, trust: Trust) -> Release:
    """Read a manifest; check that it is the one of `release_id` and signed as required."""
    manifest = trust.read(Release, MANIFEST, content, f"The manifest of {where}")
    derived = content_id(manifest.files)
    if {manifest.id, derived} != {release_id or manifest.id}:
        raise ReleaseError(
            f"The manifest in {where} belongs to another release: {manifest.id}, with the files "
            f"of {derived}. {AGAIN}"
        )
    return manifest


def _compare_sizes(manifest: Release, sizes: Mapping[str, int], where: str) -> None:
    """Compare which files there are, and how large, before any of them is read."""
    wanted = {name: digest.bytes for name, digest in manifest.files.items()}
    if wrong := sorted(dict(wanted.items() ^ sizes.items())):
        found, listed = sizes.get(wrong[0], "no"), wanted.get(wrong[0], "none")
        raise ReleaseError(
            f"The release {where} holds other files than its manifest lists: {wrong[0]} has "
            f"{found} bytes instead of {listed}. {AGAIN}"
        )


def _compare_content(manifest: Release, read: Callable[[str], bytes], where: str) -> None:
    for name, wanted in manifest.files.items():
        if _digest(read(name)) != wanted:
            raise ReleaseError(f"{where}{name} differs from its digest in the manifest. {AGAIN}")


def _stored(storage: Storage, release_id: str) -> dict[str, int]:
    prefix = _key(release_id, "")
    return {found.key.removeprefix(prefix): found.size for found in storage.list(prefix)}


def _digest(content: bytes) -> Digest:
    return Digest(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def _key(release_id: str, name: str) -> str:
    return f"releases/{release_id}/{name}"


def release_uri(storage: Storage, release_id: str) -> str:
    return storage.uri(_key(release_id, ""))
