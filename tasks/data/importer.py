"""Import photos into `data/`, from a source that somebody names or from the inbox.

The inbox is a folder or bucket whose new photos are imported before each retrain. Files stay
there; `.local/inbox.json` remembers them by name and time, or etag, while `data/` is the
version that they went into. Forgetting costs only time: `data/` knows photos by their content.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

from tasks.data.directory import INCOMING, Place, change_data, staging, stored_photos
from tasks.data.images import MAX_BYTES, normalize, printable
from tasks.data.sources import (
    UNKNOWN_FOLDER,
    Source,
    SourceFile,
    arrange,
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


@dataclass(frozen=True)
class Candidate:
    """A usable photo of a source: its stored name, and where it belongs."""

    origin: str
    name: str
    place: Place


@dataclass(frozen=True)
class QuarantinedFile:
    """A file that was not imported: its path in the source, and `kind: detail`."""

    origin: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]


@dataclass(frozen=True)
class ImportReport:
    """Photos by split and label, and the files that were not imported."""

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
        return {
            "taken": _by_split(self.imported),
            "already_there": _by_split(self.already_there),
            "quarantined": [asdict(file) for file in self.quarantined],
            "ignored": self.ignored,
            "removed": self.removed,
        }


def _by_split(counts: dict[Place, int]) -> dict[str, dict[str, int]]:
    found = sorted(counts.items())
    return {split: {label: n for (s, label), n in found if s == split} for split in FOLDERS}


def apply_import_rules(candidates: Sequence[Candidate], stored: Mapping[str, Place]) -> list[str]:
    """`IMPORTED`, `ALREADY_THERE` or a reason for each photo, independent of their order.

    A photo that `data/` has stays where it is. The same photo under two labels is rejected
    everywhere, and one in both splits stays in the test only.
    """
    wanted: dict[str, set[Place]] = {}
    for one in candidates:
        wanted.setdefault(one.name, set()).add(one.place)
    there = set(stored)
    decisions = []
    for one in candidates:
        places = {stored[one.name]} if one.name in stored else wanted[one.name]
        labels = sorted({label for _, label in places | {one.place}})
        split = min(places)[0]  # the test before train
        if len(labels) > 1:
            decisions.append(f"same photo under two labels: {' and '.join(labels)}")
        elif split != one.place[0]:
            decisions.append(f"same photo in train and test: it stays in {split}")
        else:
            decisions.append(ALREADY_THERE if one.name in there else IMPORTED)
            there.add(one.name)
    return decisions


def import_photos(
    project: Project,
    source: Path,
    test: Path | None = None,
    replace: bool = False,
    progress: Progress = silent,
    set_labels: bool = False,
) -> ImportReport:
    """Add the photos of a source to `data/`; with `set_labels` and `replace` take its labels.

    The caller versions `data/` also if nothing was imported: a killed import was not versioned.
    """
    name, params = printable(os.path.realpath(source)), None
    with staging(project):
        known = None if set_labels else load_params(project.params).labels
        with _open_both(source, test, known) as opened:
            labels = known or opened.labels
            if set_labels:
                params = replace_labels(project.params, labels)
            report = _import(project, opened, name, labels, replace, progress)
        if params and report.usable:
            with atomic_write(project.params) as temporary:
                temporary.write_text(params, encoding="utf-8")
    if not report.usable:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds().items())
        raise SourceError(
            f"Source '{name}' has no usable photo: {kinds}. data/ is unchanged; see "
            "artifacts/quarantine/quarantine.json."
        )
    return report


@contextmanager
def _open_both(source: Path, test: Path | None, labels: Sequence[str] | None) -> Iterator[Source]:
    with open_source(source, labels) as train:
        if test is None:
            yield train
            return
        with open_source(test, labels) as opened:
            splits = {file.split for file in opened.files}
            if any(file.split == "test" for file in train.files) or len(splits) > 1:
                raise SourceError(
                    f"With --test '{printable(str(test))}' each of both must be one set of photos, "
                    "and one has a train and a test folder. Leave --test out, or name one folder."
                )
            tested = (changed(file, split="test") for file in opened.files)
            yield Source((*train.files, *tested), train.ignored + opened.ignored)


def _import(
    project: Project,
    source: Source,
    name: str,
    labels: Sequence[str],
    replace: bool,
    progress: Progress,
) -> ImportReport:
    """Import the files of a source; the quarantine lists what it rejects."""
    stored, incoming = stored_photos(project), project.staging / INCOMING
    incoming.mkdir()
    candidates: list[Candidate] = []
    rejected: list[QuarantinedFile] = []
    for done, file in enumerate(source.files, start=1):
        try:
            if file.fault or file.read is None or file.label is None:
                raise ImageError(file.fault or "no label: it is in no label folder")
            stored_name, content = normalize(file.read(MAX_BYTES + 1), file.origin)
            path, place = incoming / stored_name, (file.split, file.label)
            if stored.get(stored_name) != place and not path.exists():
                path.write_bytes(content)
            candidates.append(Candidate(file.origin, stored_name, place))
        except ImageError as error:
            rejected.append(QuarantinedFile(file.origin, error.reason))
        progress("read", done, len(source.files))

    counts: dict[str, Counter[Place]] = {IMPORTED: Counter(), ALREADY_THERE: Counter()}
    accepted: dict[str, Place] = {}
    decisions = apply_import_rules(candidates, {} if replace else stored)
    for one, decision in zip(candidates, decisions, strict=True):
        if decision not in counts:
            rejected.append(QuarantinedFile(one.origin, decision))
            continue
        accepted[one.name] = one.place
        there = stored.get(one.name) == one.place
        counts[ALREADY_THERE if there else decision][one.place] += 1
    replace = replace and bool(accepted)  # nothing usable replaces nothing
    removed = len(stored.items() - accepted.items()) if replace else 0
    rejected.sort(key=lambda file: (file.origin, file.reason))
    files = [asdict(file) for file in rejected]
    write_json(project.quarantine / "quarantine.json", {"source": name, "files": files})
    if counts[IMPORTED] or removed:
        change_data(project, accepted, replace, progress)
    imported, already_there = map(dict, counts.values())
    return ImportReport(
        imported, already_there, tuple(rejected), source.ignored, removed, tuple(labels)
    )


class Inbox:
    """New files of an inbox, since they were imported into this version of `data/`."""

    def __init__(
        self, project: Project, name: str, listing: Sequence[SourceFile], version: str | None
    ) -> None:
        self.name = printable(name)
        self._project = project
        self._labels = load_params(project.params).labels
        self._stamps = {file.origin: file.stamp for file in listing}
        visible = [file for file in listing if not is_clutter(file)]
        files = arrange(visible, name, self._labels).files if visible else ()
        last = read_json(project.inbox) or {}
        known = (last.get("inbox"), last.get("data")) == (self.name, version)
        seen = last["seen"] if known else {}
        self.new = tuple(file for file in files if seen.get(file.origin) != file.stamp)

    def import_new(self, replace: bool = False, progress: Progress = silent) -> ImportReport:
        """Import the new files; with `replace` usable ones replace all other photos."""
        source = Source(self.new)
        with staging(self._project):
            report = _import(self._project, source, self.name, self._labels, replace, progress)
        for file in report.quarantined:
            self._stamps.pop(file.origin, None)
        return report

    def remember(self, version: str) -> None:
        """Remember that all files but the quarantined ones are part of this version of `data/`."""
        seen = {"inbox": self.name, "data": version, "seen": self._stamps}
        write_json(self._project.inbox, seen)


def list_folder(folder: Path) -> list[SourceFile]:
    """List a folder's files with size and time of change."""
    if not folder.is_dir():
        raise SourceError(
            f"HANDSIGNS_INBOX='{printable(str(folder))}' is not a folder. Create it, or correct "
            "the setting."
        )
    files = [(file, folder.joinpath(*file.parts).lstat()) for file in folder_files(folder)]
    return [changed(file, stamp=f"{one.st_size}-{one.st_mtime_ns}") for file, one in files]


def list_bucket(storage: Storage) -> list[SourceFile]:
    """List the objects of a bucket, or of a folder in it, with their etags."""
    return [
        SourceFile(
            tuple(one.key.split("/")),
            partial(_read_object, storage, one.key),
            stamp=f"{one.size}-{one.etag}",
        )
        for one in storage.list("")
        if one.size or not one.key.endswith("/")  # a folder, as consoles create it
    ]


def _read_object(storage: Storage, key: str, limit: int) -> bytes:
    try:
        return storage.get(key, limit)
    except (ValueError, MissingObjectError) as error:  # such a name, or it was removed meanwhile
        raise ImageError(f"cannot be read: {error}") from None
