"""Import photos into `data/`."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.data.directory import (
    Place,
    data_lock,
    file_errors,
    link_photos,
    replace_data,
    staging,
    stored_photos,
)
from tasks.data.images import MAX_BYTES, normalize, printable
from tasks.data.quarantine import Quarantine, QuarantinedFile
from tasks.data.sources import UNKNOWN_FOLDER, Source, SourceFile, as_test, open_source
from tasks.errors import ImageError, SourceError
from tasks.project import FOLDERS, Project
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
class ImportReport:
    """Photos by split and label, and the files that were not imported, sorted by origin."""

    imported: dict[Place, int]
    already_there: dict[Place, int]
    quarantined: tuple[QuarantinedFile, ...]
    ignored: int
    removed: int

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
        decision = _decide(candidate, wanted[candidate.name], stored.get(candidate.name))
        if decision == IMPORTED and candidate.name in imported:
            decision = ALREADY_THERE
        if decision == IMPORTED:
            imported.add(candidate.name)
        decisions.append(decision)
    return decisions


def _decide(candidate: Candidate, wanted: set[Place], stored: Place | None) -> str:
    split, label = candidate.place
    if stored == candidate.place:
        return ALREADY_THERE
    if stored and stored[1] != label:
        return f"same photo under two labels: data/ has it as {stored[1]}"
    labels = sorted({label for _, label in wanted})
    if not stored and len(labels) > 1:
        return f"same photo under two labels: {' and '.join(labels)}"
    keeper = stored or (("test", label) if ("test", label) in wanted else candidate.place)
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
) -> ImportReport:
    """Add the photos of a source to `data/`.

    `data/` is the former or the new state at every moment, except between two renames;
    `restore_data` and the next import repair that. The caller versions `data/` with DVC,
    also if nothing was imported: an import that was killed was not versioned.

    Raises:
        SourceError: a source is refused, or has no usable photo.
        BusyError: a retrain or another import uses `data/`.
        DataError: `data/` or the quarantine cannot be written.
    """
    name = printable(os.path.realpath(source))
    with data_lock(project, wait), staging(project), _open_both(source, test) as opened:
        report = _import(project, opened, name, replace, progress)
    if not report.usable:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds().items())
        raise SourceError(
            f"Source '{name}' has no usable photo: {kinds}. data/ is unchanged; see "
            "artifacts/quarantine/quarantine.json."
        )
    return report


def import_source(
    project: Project,
    source: Source,
    name: str,
    unchanged: Container[str] = (),
    replace: bool = False,
    progress: Progress = silent,
) -> ImportReport:
    """Add the new files of an inbox to `data/`; no usable photo is no error.

    Args:
        unchanged: origins of files that were seen before.
        replace: remove all other photos, if any new one is usable.
    """
    with data_lock(project), staging(project):
        return _import(project, source, name, replace, progress, unchanged)


@contextmanager
def _open_both(source: Path, test: Path | None) -> Iterator[Source]:
    with open_source(source) as train:
        if test is None:
            yield train
            return
        if any(file.split == "test" for file in train.files):
            raise SourceError(
                f"Source '{printable(str(source))}' has a test set of its own. Leave out "
                f"--test '{printable(str(test))}', or name only its train folder."
            )
        with open_source(test) as opened:
            files = (*train.files, *as_test(opened, test).files)
            yield Source(files, train.ignored + opened.ignored)


def _import(
    project: Project,
    source: Source,
    name: str,
    replace: bool,
    progress: Progress,
    unchanged: Container[str] = (),
) -> ImportReport:
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
            candidates.append(_stage(file, file.label, content, incoming, stored))
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
        accepted.setdefault(one.name, one.place)
        new = decision == IMPORTED and stored.get(one.name) != one.place
        (imported if new else there)[one.place] += 1
    removed = stored.items() - accepted.items() if replace else ()
    rejected.sort(key=lambda file: (file.origin, file.reason))
    report = ImportReport(
        dict(imported), dict(there), tuple(rejected), source.ignored, len(removed)
    )
    if report.usable and (imported or removed):
        _put_in_place(project, incoming, accepted, replace, progress)
    # Last: a replacement forgets the quarantined files of other sources.
    quarantine.update(name, report.quarantined, replace and report.usable, unchanged)
    return report


def _stage(
    file: SourceFile, label: str, content: bytes, incoming: Path, stored: Mapping[str, Place]
) -> Candidate:
    """Check one file, and write it to staging unless `data/` has it there already."""
    photo = normalize(content, file.origin)
    path, place = incoming / photo.name, (file.split, label)
    with file_errors(path):
        if stored.get(photo.name) != place and not path.exists():
            path.write_bytes(photo.content)
    return Candidate(file.origin, photo.name, place)


def _put_in_place(
    project: Project,
    incoming: Path,
    accepted: Mapping[str, Place],
    replace: bool,
    progress: Progress,
) -> None:
    """Build the next `data/` and replace the present one."""
    paths = {name: "/".join((*place, name)) for name, place in accepted.items()}
    with file_errors(project.data):
        new = link_photos(project, set(paths.values()) if replace else None, progress)
        for name, path in paths.items():
            target = new / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(target):
                (incoming / name).rename(target)
        replace_data(project, new, progress)
