"""Import photos into `data/`."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.data.directory import (
    Place,
    Quarantine,
    SetAside,
    build,
    held_photos,
    locked,
    mend,
    swap,
    workshop,
    writing,
)
from tasks.data.folders import Item, Source
from tasks.data.images import MAX_BYTES, printable, read_photo
from tasks.data.sources import as_test, open_source
from tasks.errors import ImageError, SourceError
from tasks.project import FOLDERS, Project
from tasks.stage import Progress, silent

TAKEN = "taken"
ALREADY_THERE = "already there"


@dataclass(frozen=True)
class Candidate:
    """A sound photo of the source: its stored name and where it belongs."""

    origin: str
    name: str
    place: Place


def verdicts(candidates: Iterable[Candidate], held: Mapping[str, Place]) -> list[str]:
    """Decide for each photo; the order of the files makes no difference to what is held.

    A photo that is held stays as it is: the same photo under another label or in the
    other split is set aside. Within one import, the same photo under two labels is set
    aside everywhere, and of one in both splits the test keeps it.

    Args:
        candidates: all sound photos of one import.
        held: name and place of each photo in `data/`.

    Returns:
        `TAKEN`, `ALREADY_THERE` or a reason, for each candidate in order.
    """
    candidates = list(candidates)
    wanted: dict[str, set[Place]] = {}
    for candidate in candidates:
        wanted.setdefault(candidate.name, set()).add(candidate.place)
    taken: set[str] = set()
    decided = []
    for candidate in candidates:
        verdict = _verdict(candidate, wanted[candidate.name], held.get(candidate.name))
        if verdict == TAKEN and candidate.name in taken:
            verdict = ALREADY_THERE
        if verdict == TAKEN:
            taken.add(candidate.name)
        decided.append(verdict)
    return decided


def _verdict(candidate: Candidate, wanted: set[Place], held: Place | None) -> str:
    split, label = candidate.place
    if held == candidate.place:
        return ALREADY_THERE
    labels = sorted({label for _, label in wanted} | ({held[1]} if held else set()))
    if held and held[1] != label:
        return f"same photo under two labels: it is held as {held[1]}"
    if not held and len(labels) > 1:
        return f"same photo under two labels: {' and '.join(labels)}"
    kept = held or (("test", label) if ("test", label) in wanted else candidate.place)
    if kept[0] != split:
        return f"same photo in train and test: {kept[0]} keeps it"
    return TAKEN


@dataclass(frozen=True)
class ImportReport:
    """What became of each file of an import.

    Args:
        taken: photos per split and label that are new in `data/`.
        already_there: photos per split and label that were held, or came twice.
        quarantined: files that were set aside, in the order of the source.
        ignored: hidden files and system clutter.
        removed: photos that `replace` took out of `data/`.
    """

    taken: dict[Place, int]
    already_there: dict[Place, int]
    quarantined: tuple[SetAside, ...]
    ignored: int
    removed: int

    @property
    def usable(self) -> bool:
        """Whether any file is a photo that is held now."""
        return bool(self.taken or self.already_there)

    def kinds(self) -> dict[str, int]:
        """Files set aside by kind of reason, most frequent first."""
        return dict(Counter(aside.kind for aside in self.quarantined).most_common())

    def told_kinds(self) -> str:
        """The same in words."""
        return ", ".join(f"{count} {kind}" for kind, count in self.kinds().items())

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return {
            "taken": _by_split(self.taken),
            "already_there": _by_split(self.already_there),
            "quarantined": [aside.to_json() for aside in self.quarantined],
            "ignored": self.ignored,
            "removed": self.removed,
        }


def _by_split(counts: dict[Place, int]) -> dict[str, dict[str, int]]:
    return {
        split: {label: n for (s, label), n in sorted(counts.items()) if s == split}
        for split in FOLDERS
    }


def import_photos(
    project: Project,
    source: Path,
    test: Path | None = None,
    replace: bool = False,
    progress: Progress = silent,
    wait: float = 60.0,
) -> ImportReport:
    """Add a source's photos to `data/`.

    `data/` is the former or the new state at every moment but for the instant between
    two renames, which `held.recover` and the next import mend. Where nothing is new, nothing
    is touched. Versioning with DVC is the caller's part, also when nothing was taken: an
    import that was killed right after the renames has not been versioned yet.

    Args:
        project: the checkout.
        source: class folders, a .zip of them, or the Kaggle files; see `tasks.data.sources`.
        test: the test set, where it is a source of its own.
        replace: hold this import's photos alone instead of adding them.
        progress: told about each file.
        wait: seconds to wait for another import.

    Returns:
        What was taken, was there, and was set aside with its reason.

    Raises:
        SourceError: a source is refused as a whole.
        BusyError: another import runs for longer than `wait`.
        DataError: `data/` or the quarantine cannot be written.
    """
    name = printable(os.path.realpath(source))  # which takes a link to itself, too
    with _bench(project, wait), _items(project, source, test) as opened:
        report = _take_in(project, opened, name, replace, progress)
    if not report.usable:
        raise SourceError(
            f"Source has no usable photo. Received: '{name}' with {report.told_kinds()}. "
            "The data held was kept; see quarantine.json."
        )
    return report


def import_items(
    project: Project,
    source: Source,
    name: str,
    standing: Container[str] = (),
    replace: bool = False,
    progress: Progress = silent,
    wait: float = 60.0,
) -> ImportReport:
    """Add to `data/` what is new in a source that is looked at again and again.

    Works like `import_photos`. That nothing is usable is no error here: the files are
    set aside, and `data/` stays as it is.

    Args:
        project: the checkout.
        source: the files to look at.
        name: what the quarantine's list calls their source.
        standing: origins of the same source that are there still and are not looked at
            again; those that were set aside stay in the list.
        replace: hold these photos alone, if any is usable.
        progress: told about each file.
        wait: seconds to wait for another import.

    Returns:
        What was taken, was there, and was set aside with its reason.

    Raises:
        BusyError: another import runs for longer than `wait`.
        DataError: `data/` or the quarantine cannot be written.
    """
    with _bench(project, wait):
        return _take_in(project, source, name, replace, progress, standing)


@contextmanager
def _bench(project: Project, wait: float) -> Iterator[None]:
    with locked(project, wait):
        mend(project)
        with workshop(project):
            yield


def _take_in(
    project: Project,
    source: Source,
    name: str,
    replace: bool,
    progress: Progress,
    standing: Container[str] = (),
) -> ImportReport:
    quarantine = Quarantine(project)
    intake = _Intake(project, quarantine, replace, progress)
    intake.read(source.items)
    report = intake.settle(source.ignored)
    if report.usable and (report.taken or report.removed):
        intake.put_in_place()
    # Last, for it forgets what a source that is replaced had set aside.
    quarantine.finish(name, report.quarantined, replace and report.usable, standing)
    return report


class _Intake:
    """One import under way."""

    def __init__(
        self, project: Project, quarantine: Quarantine, replace: bool, progress: Progress
    ) -> None:
        self._project = project
        self._quarantine = quarantine
        self._replace = replace
        self._progress = progress
        self._incoming = project.intake / "incoming"
        with writing(project.data):
            self._held = held_photos(project)
        self._candidates: list[Candidate] = []
        self._next: dict[str, Place] = {}
        self._aside: list[SetAside] = []

    def read(self, items: Sequence[Item]) -> None:
        """Judge each file by itself; sound new ones are stored beside `data/`."""
        with writing(self._incoming):
            self._incoming.mkdir()
        for done, item in enumerate(items, start=1):
            self._read_one(item)
            self._progress("read", done, len(items))

    def _read_one(self, item: Item) -> None:
        content = b""
        try:
            content = b"" if item.read is None else item.read(MAX_BYTES + 1)
            if item.fault or item.label is None:
                raise ImageError(item.fault or "no label: it lies in no class folder")
            photo = read_photo(content, item.origin)
        except ImageError as error:
            reason = item.fault or error.reason
            self._aside.append(self._quarantine.keep(item.origin, reason, content[:MAX_BYTES]))
            return
        candidate = Candidate(item.origin, photo.name, (item.split, item.label))
        self._candidates.append(candidate)
        stored = self._incoming / photo.name
        if self._held.get(photo.name) != candidate.place and not stored.exists():
            with writing(stored):
                stored.write_bytes(photo.content)

    def settle(self, ignored: int) -> ImportReport:
        """Judge the photos against each other and against what is held."""
        taken: Counter[Place] = Counter()
        there: Counter[Place] = Counter()
        decided = verdicts(self._candidates, {} if self._replace else self._held)
        for candidate, verdict in zip(self._candidates, decided, strict=True):
            if verdict == ALREADY_THERE or self._is_held(candidate, verdict):
                there[candidate.place] += 1
            elif verdict == TAKEN:
                taken[candidate.place] += 1
            else:
                content = self._content(candidate)
                self._aside.append(self._quarantine.keep(candidate.origin, verdict, content))
            if verdict == TAKEN:
                self._next[candidate.name] = candidate.place
        removed = set(self._held.items()) - set(self._next.items()) if self._replace else ()
        aside = sorted(self._aside, key=lambda aside: (aside.origin, aside.reason))
        return ImportReport(dict(taken), dict(there), tuple(aside), ignored, len(removed))

    def put_in_place(self) -> None:
        """Build the next state beside `data/` and swap it in."""
        paths = {name: "/".join((*place, name)) for name, place in self._next.items()}
        with writing(self._project.data):
            keep = set(paths.values()) if self._replace else None
            new = build(self._project, keep, self._progress)
            for name, path in paths.items():
                target = new / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_symlink() and not target.exists():
                    (self._incoming / name).rename(target)
            swap(self._project, new, self._progress)

    def _is_held(self, candidate: Candidate, verdict: str) -> bool:
        return verdict == TAKEN and self._held.get(candidate.name) == candidate.place

    def _content(self, candidate: Candidate) -> bytes:
        stored = self._incoming / candidate.name
        if not stored.exists():
            stored = self._project.data.joinpath(*self._held[candidate.name], candidate.name)
        try:
            return stored.read_bytes()
        except OSError:  # a link into a cache that was emptied: listed, without a copy
            return b""


@contextmanager
def _items(project: Project, source: Path, test: Path | None) -> Iterator[Source]:
    with ExitStack() as stack:
        spools = [project.intake / "source", project.intake / "test"]
        with writing(project.intake):
            for spool in spools:
                spool.mkdir()
        main = stack.enter_context(open_source(source, spools[0]))
        if test is None:
            yield main
            return
        if any(item.split == "test" for item in main.items):
            raise SourceError(
                f"Source has a test set of its own. Received: '{printable(str(source))}' and "
                f"--test '{printable(str(test))}'. Leave out --test, or name the train part alone."
            )
        other = as_test(stack.enter_context(open_source(test, spools[1])), test)
        yield Source((*main.items, *other.items), main.ignored + other.ignored)
