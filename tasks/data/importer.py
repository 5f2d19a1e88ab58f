"""Import photos into `data/`, from a source that somebody names or from the inbox.

The inbox is a folder or bucket whose new photos are imported before each retrain. Files
stay there. A file that was imported is remembered in `.local/inbox.json` by its name and its
size and time (or etag), and is not read again while it stays the same and `data/` is the
version that it went into. Forgetting costs only time: `data/` knows photos by their content.
"""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tasks.data.directory import (
    Place,
    Quarantine,
    QuarantinedFile,
    change_data,
    data_lock,
    file_errors,
    staging,
    stored_photos,
)
from tasks.data.images import MAX_BYTES, normalize, printable
from tasks.data.sources import (
    UNKNOWN_FOLDER,
    UNREADABLE,
    Source,
    SourceFile,
    arrange,
    as_test,
    folder_files,
    is_clutter,
    open_source,
)
from tasks.errors import ImageError, SourceError
from tasks.io import atomic_write, read_json, write_json
from tasks.params import load_params, replace_labels
from tasks.project import FOLDERS, Project
from tasks.services.s3 import MissingObjectError, Storage
from tasks.stage import Progress, silent

IMPORTED = "imported"
ALREADY_THERE = "already there"
MAX_FILES = 200_000
"""In an inbox."""

Listing = list[tuple[SourceFile, str]]
"""Files of an inbox, each with a stamp that changes with the file."""


@dataclass(frozen=True)
class Candidate:
    """A usable photo of a source: its stored name, and where it belongs."""

    origin: str
    name: str
    place: Place


@dataclass(frozen=True)
class ImportReport:
    """Photos by split and label, and the files that were not imported, sorted by origin."""

    imported: dict[Place, int]
    already_there: dict[Place, int]
    quarantined: tuple[QuarantinedFile, ...]
    ignored: int
    removed: int
    labels: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether any file is a photo that `data/` has now."""
        return bool(self.imported or self.already_there)

    def kinds(self) -> dict[str, int]:
        """Number of quarantined files by kind of reason, most frequent first."""
        return dict(Counter(file.kind for file in self.quarantined).most_common())

    def unknown_folders(self) -> list[str]:
        """One line for each folder whose name is not a label."""
        faults = Counter(f.reason for f in self.quarantined if f.kind == UNKNOWN_FOLDER)
        return [f"{reason}; {count} files quarantined" for reason, count in faults.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "taken": _by_split(self.imported),
            "already_there": _by_split(self.already_there),
            "quarantined": [asdict(file) for file in self.quarantined],
            "ignored": self.ignored,
            "removed": self.removed,
        }


def _by_split(counts: dict[Place, int]) -> dict[str, dict[str, int]]:
    return {
        split: {label: n for (s, label), n in sorted(counts.items()) if s == split}
        for split in FOLDERS
    }


def apply_import_rules(candidates: Iterable[Candidate], stored: Mapping[str, Place]) -> list[str]:
    """`IMPORTED`, `ALREADY_THERE` or a reason for each photo, independent of their order.

    A photo that `data/` has stays where it is; the same photo under another label or in the
    other split is rejected. In one import, the same photo under two labels is rejected
    everywhere, and the same photo in both splits stays in the test only.
    """
    candidates = list(candidates)
    wanted: dict[str, set[Place]] = {}
    for candidate in candidates:
        wanted.setdefault(candidate.name, set()).add(candidate.place)
    imported: set[str] = set()
    decisions = []
    for candidate in candidates:
        decision = _decide(candidate.place, wanted[candidate.name], stored.get(candidate.name))
        if decision == IMPORTED and candidate.name in imported:
            decision = ALREADY_THERE
        if decision == IMPORTED:
            imported.add(candidate.name)
        decisions.append(decision)
    return decisions


def _decide(place: Place, wanted: set[Place], stored: Place | None) -> str:
    if stored == place:
        return ALREADY_THERE
    split, label = place
    labels = sorted({label for _, label in wanted})
    if stored and stored[1] != label:
        return f"same photo under two labels: data/ has it as {stored[1]}"
    if not stored and len(labels) > 1:
        return f"same photo under two labels: {' and '.join(labels)}"
    keeper = stored or (("test", label) if ("test", label) in wanted else place)
    if keeper[0] != split:
        return f"same photo in train and test: it stays in {keeper[0]}"
    return IMPORTED


def import_photos(
    project: Project,
    source: Path,
    test: Path | None = None,
    replace: bool = False,
    progress: Progress = silent,
    wait: float | None = None,
    set_labels: bool = False,
) -> ImportReport:
    """Add the photos of a source to `data/`.

    With `set_labels` the source's labels become those of params.yaml; photos of others must
    not stay, so it needs `replace`.

    `data/` is the former or the new state at every moment, except between two renames;
    `restore_data` and the next import repair that. The caller versions `data/` with DVC,
    also if nothing was imported: an import that was killed was not versioned.
    """
    name = printable(os.path.realpath(source))
    with data_lock(project, wait), staging(project):
        known = None if set_labels else load_params(project.params).labels
        with _open_both(source, test, known) as opened:
            labels = known or opened.labels
            params = replace_labels(project.params, labels) if set_labels else None
            report = _import(project, opened, name, labels, replace, progress)
    if not report.usable:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds().items())
        raise SourceError(
            f"Source '{name}' has no usable photo: {kinds}. data/ is unchanged; see "
            "artifacts/quarantine/quarantine.json."
        )
    if params is not None:
        with file_errors(project.params), atomic_write(project.params) as temporary:
            temporary.write_text(params, encoding="utf-8")
    return report


@contextmanager
def _open_both(source: Path, test: Path | None, labels: Sequence[str] | None) -> Iterator[Source]:
    with open_source(source, labels) as train:
        if test is None:
            yield train
            return
        if any(file.split == "test" for file in train.files):
            raise SourceError(
                f"Source '{printable(str(source))}' has a test set of its own. Leave out "
                f"--test '{printable(str(test))}', or name only its train folder."
            )
        with open_source(test, labels) as opened:
            files = (*train.files, *as_test(opened, test).files)
            yield Source(files, train.ignored + opened.ignored)


def _import(
    project: Project,
    source: Source,
    name: str,
    labels: Sequence[str],
    replace: bool,
    progress: Progress,
    unchanged: Container[str] = (),
) -> ImportReport:
    """Import the files of a source; `unchanged` are origins of files that were seen before."""
    quarantine = Quarantine(project)
    incoming = project.staging / "incoming"
    with file_errors(project.data):
        stored = stored_photos(project)
        incoming.mkdir()
    candidates: list[Candidate] = []
    rejected: list[QuarantinedFile] = []
    for done, file in enumerate(source.files, start=1):
        content = b""
        try:
            content = b"" if file.read is None else file.read(MAX_BYTES + 1)
            if file.fault or file.label is None:
                raise ImageError(file.fault or "no label: it is in no label folder")
            stored_name, stored_content = normalize(content, file.origin)
            path, place = incoming / stored_name, (file.split, file.label)
            with file_errors(path):
                if stored.get(stored_name) != place and not path.exists():
                    path.write_bytes(stored_content)
            candidates.append(Candidate(file.origin, stored_name, place))
        except ImageError as error:
            reason = file.fault or error.reason
            rejected.append(quarantine.add(file.origin, reason, content[:MAX_BYTES]))
        progress("read", done, len(source.files))

    imported: Counter[Place] = Counter()
    there: Counter[Place] = Counter()
    accepted: dict[str, Place] = {}
    decisions = apply_import_rules(candidates, {} if replace else stored)
    for one, decision in zip(candidates, decisions, strict=True):
        if decision not in (IMPORTED, ALREADY_THERE):
            content = (incoming / one.name).read_bytes()
            rejected.append(quarantine.add(one.origin, decision, content))
            continue
        accepted[one.name] = one.place
        new = decision == IMPORTED and stored.get(one.name) != one.place
        (imported if new else there)[one.place] += 1
    replace = replace and bool(accepted)  # nothing usable replaces nothing
    removed = len(stored.items() - accepted.items()) if replace else 0
    rejected.sort(key=lambda file: (file.origin, file.reason))
    report = ImportReport(
        dict(imported), dict(there), tuple(rejected), source.ignored, removed, tuple(labels)
    )
    if imported or removed:
        change_data(project, incoming, accepted, replace, progress)
    # Last: a replacement forgets the quarantined files of other sources.
    quarantine.update(name, report.quarantined, replace, unchanged)
    return report


class Inbox:
    """New files of an inbox, since they were imported into this version of `data/`."""

    def __init__(self, project: Project, name: str, listing: Listing, version: str | None) -> None:
        self.name = printable(name)
        if len(listing) > MAX_FILES:
            raise SourceError(
                f"Inbox '{self.name}' has more than {MAX_FILES} files. Name a smaller folder."
            )
        self._project = project
        self._stamps = {file.origin: stamp for file, stamp in listing}
        visible = [file for file, _ in listing if not any(map(is_clutter, file.parts))]
        self._labels = load_params(project.params).labels
        files = arrange(visible, name, self._labels).files if visible else ()
        last = read_json(project.inbox)
        known = isinstance(last, dict) and (last.get("inbox"), last.get("data"))
        seen = last.get("seen") if known == (self.name, version) else None
        seen = seen if isinstance(seen, dict) else {}
        self.new = tuple(f for f in files if seen.get(f.origin) != self._stamps[f.origin])
        self._already_seen = {f.origin for f in files} - {f.origin for f in self.new}
        self._unread: set[str] = set()

    def import_new(self, replace: bool = False, progress: Progress = silent) -> ImportReport:
        """Import the new files, in place of all other photos with `replace`.

        No usable photo is no error, and replaces nothing.
        """
        source = Source(self.new)
        with data_lock(self._project), staging(self._project):
            report = _import(
                self._project,
                source,
                self.name,
                self._labels,
                replace,
                progress,
                self._already_seen,
            )
        self._unread = {file.origin for file in report.quarantined if file.kind == UNREADABLE}
        return report

    def remember(self, version: str) -> None:
        """Remember that all readable files are part of this version of `data/`."""
        seen = {name: stamp for name, stamp in self._stamps.items() if name not in self._unread}
        write_json(self._project.inbox, {"inbox": self.name, "data": version, "seen": seen})


def list_folder(folder: Path) -> Listing:
    """List a folder's files with size and time of change."""
    if not folder.is_dir():
        raise SourceError(
            f"HANDSIGNS_INBOX='{printable(str(folder))}' is not a folder. Create it, or correct "
            "the setting."
        )
    return [(file, _stamp(folder.joinpath(*file.parts))) for file in folder_files(folder)]


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "unreadable"
    return f"{found.st_size}-{found.st_mtime_ns}"


def list_bucket(storage: Storage, prefix: str) -> Listing:
    """List the objects below a prefix with their etags."""
    folder = f"{prefix.strip('/')}/".lstrip("/")
    listing = []
    for stored in storage.list(folder, MAX_FILES + 1):
        if stored.key.endswith("/") and not stored.size:
            continue  # a folder, as consoles create it
        parts = tuple(stored.key.removeprefix(folder).split("/"))
        if {"", ".", ".."}.isdisjoint(parts):
            file = SourceFile(parts, partial(_read_object, storage, stored.key))
        else:
            file = SourceFile(parts, None, "name: it has empty or dotted parts")
        listing.append((file, f"{stored.size}-{stored.etag}"))
    return listing


def _read_object(storage: Storage, key: str, limit: int) -> bytes:
    try:
        return storage.read_start(key, limit)
    except MissingObjectError:
        raise ImageError(f"{UNREADABLE}: it was removed meanwhile") from None
