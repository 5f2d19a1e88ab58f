"""What a release consists of: digests of its files, and the id they give.

The id is derived from the digests alone, so the same files are the same release,
and a manifest cannot be moved to another one. A signature covers the manifest, and
with its digests every file (see `tasks.services.signature`).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import ReleaseError, first_fault
from tasks.services.signature import SIGNATURE, Trust, canonical

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
        return Manifest(**trust.seal(MANIFEST, self.model_dump()))

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
        digests = {name: _digest(path) for name, path in files.items()}
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
    trust.check(MANIFEST, fields, where)
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
        if path.is_symlink() or not path.is_file() or _digest(path) != wanted:
            raise damaged(str(path))
    return manifest


def damaged(place: str) -> ReleaseError:
    """Return the error for a file of the right size but with other bytes."""
    return ReleaseError(
        f"A file of the release differs from its digest. Received: {place}. {AGAIN}"
    )


def _digest(path: Path) -> Digest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(sha256=sha256, bytes=file.tell())


def refuse_constant(name: str) -> None:
    """Hook of `json.loads` for NaN and infinity, which only Python takes for JSON."""
    raise ValueError(f"{name} is no JSON")
