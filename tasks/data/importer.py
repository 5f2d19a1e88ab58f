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
    """What became of the files of an import.

    Args:
        imported: new photos by split and label.
        already_there: photos that `data/` had, or that came twice, by split and label.
        quarantined: files that were not imported, sorted by origin.
        ignored: number of hidden files and system clutter.
        removed: number of photos that `replace` removed from `data/`.
    """

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
    """Decide about each photo, independently of their order.

    A photo that `data/` has stays where it is; the same photo under another label or in the
    other split is rejected. In one import, the same photo under two labels is rejected
    everywhere, and the same photo in both splits stays in the test only.

    Args:
        stored: place of each photo in `data/` by name.

    Returns:
        `IMPORTED`, `ALREADY_THERE` or the reason of the rejection, for each candidate.
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

    Args:
        source: label folders, a .zip of them, or HDF5 files, see `tasks.data.sources`.
        test: the test set, if it is a source of its own.
        replace: remove all other photos.
        wait: seconds to wait for the data lock.

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
        source: the new files.
        name: of the inbox, for the quarantine.
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
    with file_errors(project.data):
        stored = stored_photos(project)
    run = _Import(project, Quarantine(project), stored, replace)
    with file_errors(run.incoming):
        run.incoming.mkdir()
    for done, file in enumerate(source.files, start=1):
        run.read(file)
        progress("read", done, len(source.files))
    report = run.decide(source.ignored, progress)
    if report.usable and (report.imported or report.removed):
        run.put_in_place(progress)
    # Last: a replacement forgets the quarantined files of other sources.
    run.quarantine.update(name, report.quarantined, replace and report.usable, unchanged)
    return report


class _Import:
    """One import while it runs."""

    def __init__(
        self, project: Project, quarantine: Quarantine, stored: dict[str, Place], replace: bool
    ) -> None:
        self.quarantine = quarantine
        self.incoming = project.staging / "incoming"
        self._project = project
        self._stored = stored
        self._replace = replace
        self._candidates: list[Candidate] = []
        self._accepted: dict[str, Place] = {}
        self._quarantined: list[QuarantinedFile] = []

    def read(self, file: SourceFile) -> None:
        """Check one file, and write a new photo to staging."""
        content = b""
        try:
            content = b"" if file.read is None else file.read(MAX_BYTES + 1)
            if file.fault or file.label is None:
                raise ImageError(file.fault or "no label: it is in no label folder")
            photo = normalize(content, file.origin)
        except ImageError as error:
            reason = file.fault or error.reason
            self._quarantined.append(self.quarantine.add(file.origin, reason, content[:MAX_BYTES]))
            return
        candidate = Candidate(file.origin, photo.name, (file.split, file.label))
        self._candidates.append(candidate)
        path = self.incoming / photo.name
        if self._stored.get(photo.name) != candidate.place and not path.exists():
            with file_errors(path):
                path.write_bytes(photo.content)

    def decide(self, ignored: int, progress: Progress) -> ImportReport:
        """Apply the import rules to all photos."""
        imported: Counter[Place] = Counter()
        there: Counter[Place] = Counter()
        decisions = apply_import_rules(self._candidates, {} if self._replace else self._stored)
        pairs = zip(self._candidates, decisions, strict=True)
        for done, (candidate, decision) in enumerate(pairs, start=1):
            accepted = decision in (IMPORTED, ALREADY_THERE)
            known = self._stored.get(candidate.name) == candidate.place
            if decision == ALREADY_THERE or (accepted and known):
                there[candidate.place] += 1
            elif accepted:
                imported[candidate.place] += 1
            else:
                content = self._content(candidate)
                self._quarantined.append(self.quarantine.add(candidate.origin, decision, content))
            if decision == IMPORTED:
                self._accepted[candidate.name] = candidate.place
            progress("check", done, len(decisions))
        removed = self._stored.items() - self._accepted.items() if self._replace else ()
        quarantined = sorted(self._quarantined, key=lambda file: (file.origin, file.reason))
        return ImportReport(dict(imported), dict(there), tuple(quarantined), ignored, len(removed))

    def put_in_place(self, progress: Progress) -> None:
        """Build the next `data/` and replace the present one."""
        paths = {name: "/".join((*place, name)) for name, place in self._accepted.items()}
        with file_errors(self._project.data):
            keep = set(paths.values()) if self._replace else None
            new = link_photos(self._project, keep, progress)
            for name, path in paths.items():
                target = new / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(target):
                    (self.incoming / name).rename(target)
            replace_data(self._project, new, progress)

    def _content(self, candidate: Candidate) -> bytes:
        path = self.incoming / candidate.name
        if not path.exists():
            path = self._project.data.joinpath(*self._stored[candidate.name], candidate.name)
        try:
            return path.read_bytes()
        except OSError:  # a link into a cache that was emptied
            return b""
