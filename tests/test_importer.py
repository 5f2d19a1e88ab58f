"""An import is complete or has no effect, and never harms what data/ has."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.data.directory import Quarantine, restore_data
from tasks.data.images import encode
from tasks.data.importer import (
    ALREADY_THERE,
    IMPORTED,
    Candidate,
    apply_import_rules,
    import_photos,
)
from tasks.errors import BusyError, DataError, SourceError
from tasks.model.inference import Classifier, classify_files
from tasks.params import load_params
from tasks.project import Project
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.photos import CHECKOUT, LABELS, photo, with_params

PNG = [encode(photo(label, 9, 32)) for label in range(6)]
EVERY = [("train", label) for label in "012345"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return with_params(tmp_path / "checkout")


@pytest.fixture
def filled(project: Project, photos: Callable[..., Path]) -> Iterator[Project]:
    """A checkout that holds six photos, and must still hold them afterwards."""
    import_photos(project, photos("held", 1))
    before = tree(project.data)
    yield project
    assert tree(project.data) == before
    assert not project.staging.is_dir()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def listed(project: Project) -> dict[str, dict[str, str]]:
    """Kind of reason by origin, for each source in the quarantine's list."""
    found = Quarantine(project).listed()
    return {name: {file.origin: file.kind for file in files} for name, files in found.items()}


def source(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a class folder; `files` are its paths and contents."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_photos_are_stored_under_their_content_and_added_to_what_is_there(
    project: Project, photos: Callable[..., Path]
) -> None:
    report = import_photos(project, photos("a", 2))
    assert report.imported == dict.fromkeys(EVERY, 2)
    assert sorted(tree(project.data).values()) == sorted(tree(photos("a", 2)).values())
    assert not project.staging.exists()
    assert not project.quarantine.exists()

    def state() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in project.data.rglob("*.png")}
        return {path: (facts.st_ino, facts.st_mtime_ns) for path, facts in found.items()}

    before, folder = state(), project.data.stat().st_ino
    report = import_photos(project, photos("a", 2))
    assert (report.imported, report.already_there) == ({}, dict.fromkeys(EVERY, 2))
    assert state() == before
    assert project.data.stat().st_ino == folder
    report = import_photos(project, photos("b", 1, seed=1), photos("c", 1, seed=2))
    assert report.imported == dict.fromkeys([*EVERY, *(("test", label) for _, label in EVERY)], 1)
    assert len(tree(project.data)) == 24
    assert before.items() <= state().items()


def test_links_into_a_cache_stay_links(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 1))
    path = next(project.data.rglob("*.png"))
    cached = path.rename(project.root / "cached")
    cached.chmod(0o444)
    path.symlink_to(os.path.relpath(cached, path.parent))
    import_photos(project, photos("b", 1, seed=1))
    assert path.is_symlink()
    assert path.resolve() == cached
    assert len(tree(project.data)) == 12


def test_replace_keeps_the_new_photos_alone(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 2))
    shutil.rmtree(photos("a", 1))
    report = import_photos(project, photos("a", 1), replace=True)
    assert (sum(report.already_there.values()), report.imported, report.removed) == (6, {}, 6)
    assert set(tree(project.data).values()) == set(tree(photos("a", 1)).values())
    report = import_photos(project, photos("b", 1, seed=1), replace=True)
    assert (report.imported, report.removed) == (dict.fromkeys(EVERY, 1), 6)
    moved = photos("b", 1, seed=1)
    (moved / "4/0000.png").rename(moved / "5/moved.png")
    report = import_photos(project, moved, replace=True)
    assert report.imported == {("train", "5"): 1}
    assert report.removed == 1


@pytest.mark.parametrize("replace", [False, True])
def test_source_with_nothing_usable_is_refused_and_listed(
    replace: bool, project: Project, tmp_path: Path, photos: Callable[..., Path]
) -> None:
    import_photos(project, source(photos("a", 1), {"0/b.png": b"text"}))
    before = tree(project.data)
    bad = source(tmp_path / "bad", {"0/a.png": b"text", "1/b.png": b"", "2/c.png": b"t"})
    with pytest.raises(SourceError, match="no usable photo: 2 not an image, 1 zero bytes"):
        import_photos(project, bad, replace=replace)
    assert tree(project.data) == before
    assert set(listed(project)) == {str(bad), str(tmp_path / "a")}


A, B = ({"0/a.png": PNG[0]}, {"1/b.png": PNG[1]})
IN_TEST = "same photo in train and test: it stays in test"
IN_TRAIN = "same photo in train and test: it stays in train"
RULES = [
    (
        {},
        {"0/a.png": PNG[0], "1/b.png": PNG[0], "2/c.png": PNG[2]},
        dict.fromkeys(["0/a.png", "1/b.png"], "same photo under two labels: 0 and 1"),
        {"train/2"},
    ),
    (
        {"3/a.png": PNG[0]},
        {"0/a.png": PNG[0], "3/a.png": PNG[0]},
        {"0/a.png": "same photo under two labels: data/ has it as 3"},
        {"train/3"},
    ),
    (
        {},
        {"train/0/a.png": PNG[0], "test/0/b.png": PNG[0], "train/1/c.png": PNG[1]},
        {"train/0/a.png": IN_TEST},
        {"test/0", "train/1"},
    ),
    (
        {"train/0/a.png": PNG[0]},
        {"test/0/a.png": PNG[0], "1/b.png": PNG[1]},
        {"test/0/a.png": IN_TRAIN},
        {"train/0", "train/1"},
    ),
]


@pytest.mark.parametrize(("there", "new", "rejected", "places"), RULES)
def test_the_same_photo_twice_is_decided_alike_however_often_it_comes(
    there: dict[str, bytes],
    new: dict[str, bytes],
    rejected: dict[str, str],
    places: set[str],
    project: Project,
    tmp_path: Path,
) -> None:
    if there:
        import_photos(project, source(tmp_path / "a", there))
    for _ in range(2):
        report = import_photos(project, source(tmp_path / "b", new))
        assert {f.origin[2:]: f.reason for f in report.quarantined} == rejected
        assert {path.rpartition("/")[0] for path in tree(project.data)} == places


PLACES = st.tuples(st.sampled_from(["train", "test"]), st.sampled_from("012"))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), PLACES), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from("abcd"), PLACES),
    st.randoms(use_true_random=False),
)
def test_what_is_imported_does_not_depend_on_the_order_of_files(
    wanted: list[tuple[str, tuple[str, str]]], stored: dict[str, tuple[str, str]], random: object
) -> None:
    def settle(order: list[tuple[str, tuple[str, str]]]) -> set[tuple[str, tuple[str, str]]]:
        candidates = [Candidate("", name, place) for name, place in order]
        decided = apply_import_rules(candidates, stored)
        imported = [pair for pair, why in zip(order, decided, strict=True) if why == IMPORTED]
        assert len({name for name, _ in imported}) == len(imported)
        assert not {name for name, _ in imported} & set(stored)
        again = apply_import_rules(candidates, stored | dict(imported))
        assert IMPORTED not in again
        assert [why in (IMPORTED, ALREADY_THERE) for why in decided] == [
            why == ALREADY_THERE for why in again
        ]
        return set(imported)

    shuffled = wanted.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert settle(wanted) == settle(shuffled)


def test_bad_files_are_copied_and_listed_until_they_are_repaired(
    project: Project, tmp_path: Path
) -> None:
    files = {"0/a.png": PNG[0], "0/b.png": b"text", "7/c.png": PNG[1], "1/d.png": b""}
    folder = source(tmp_path / "s", files)
    (folder / "0" / "x\\..\n\x1b[31m é;rm -rf .jpg").write_bytes(b"hostile")
    expected = {"s/0/b.png": "not an image", "s/1/d.png": "zero bytes"}
    expected |= {"s/7/c.png": "unknown label folder"}
    expected |= {r"s/0/x\..\n\x1b[31m é;rm -rf .jpg": "not an image"}
    for _ in range(2):
        report = import_photos(project, folder)
        assert {file.origin: file.kind for file in report.quarantined} == expected
        assert listed(project) == {str(folder): expected}
        assert report.kinds() == {"not an image": 2, "unknown label folder": 1, "zero bytes": 1}
        copies = tree(project.quarantine)
        del copies["quarantine.json"]
        assert sorted(copies.values()) == sorted([b"text", b"hostile", PNG[1]])
        assert set(copies) == {file.copy for file in report.quarantined if file.copy}
        assert all(re.fullmatch(r"[a-z_]+/[0-9a-f]{12}-[A-Za-z0-9._-]+", one) for one in copies)
    shown = json.loads(json.dumps(report.to_json()))
    assert shown["already_there"] == {"train": {"0": 1}, "test": {}}
    assert shown["quarantined"] == [asdict(file) for file in report.quarantined]
    shutil.rmtree(folder)
    import_photos(project, source(tmp_path / "other", {"0/a.png": PNG[2], "0/b.png": b"text"}))
    import_photos(project, source(folder, {"0/a.png": PNG[0], "0/b.png": PNG[1]}))
    assert listed(project) == {str(tmp_path / "other"): {"other/0/b.png": "not an image"}}
    assert next(iter(tree(project.quarantine).values())) == b"text"
    assert len(tree(project.quarantine)) == 2


@pytest.mark.parametrize("damaged", ["", "[]", "3", "{}", '{"sources": [3]}', '{"sources": 3}'])
def test_a_list_that_cannot_be_read_is_written_again_and_costs_no_copy(
    project: Project, tmp_path: Path, damaged: str
) -> None:
    (bad,) = import_photos(
        project, source(tmp_path / "a", {**A, "0/b.png": b"the only copy"})
    ).quarantined
    (project.quarantine / "quarantine.json").write_text(damaged)
    assert listed(project) == {}
    for name in ("b", "c"):
        import_photos(project, source(tmp_path / name, {**B, "1/b.png": b"another"} | A))
    assert set(listed(project)) == {str(tmp_path / "b"), str(tmp_path / "c")}
    assert bad.copy is not None
    assert (project.quarantine / bad.copy).read_bytes() == b"the only copy"


def test_a_failing_replacement_forgets_nothing(
    filled: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_photos(filled, source(tmp_path / "a", {**tree(filled.data / "train"), "0/b": b"text"}))
    before = tree(filled.quarantine)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "sync", full)
    with pytest.raises(DataError, match=r"\(No space left on device, ENOSPC\)"):
        import_photos(filled, source(tmp_path / "b", B), replace=True)
    assert tree(filled.quarantine) == before


def test_refused_source_leaves_no_trace(filled: Project, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    both = source(tmp_path / "both", {"train/0/a.png": PNG[0], "test/0/b.png": PNG[1]})
    for sources, reason in (
        ((tmp_path / "nothing",), "does not exist"),
        ((tmp_path / "loop",), "cannot be read"),
        ((both, source(tmp_path / "more", A)), "test set of its own"),
    ):
        with pytest.raises(SourceError, match=reason):
            import_photos(filled, *sources)
    assert not filled.artifacts.exists()


# Killed, starved and locked out: each time in a process of its own.

CHILD = """
    import os, resource, signal, sys
    from pathlib import Path
    from tasks.errors import HandsignsError
    from tasks.data.importer import import_photos
    from tasks.project import Project

    def killer(what, done, total):
        if (what, done) == (sys.argv[3], int(sys.argv[4])):
            os.kill(os.getpid(), signal.SIGKILL)

    if sys.argv[3] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        import_photos(Project(Path(sys.argv[1])), Path(sys.argv[2]), progress=killer)
    except HandsignsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


def import_in_a_process(project: Project, folder: Path, *arguments: object) -> tuple[int, str]:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), project.root, folder, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT.root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return child.returncode, child.stderr


@pytest.mark.parametrize(
    ("what", "done"), [("read", 1), ("read", 7), ("swap", 0), ("swap", 1), ("swap", 2)]
)
@pytest.mark.parametrize("first", [False, True])
def test_killed_import_leaves_the_old_or_the_new_data(
    what: str, done: int, first: bool, project: Project, photos: Callable[..., Path]
) -> None:
    if not first:
        import_photos(project, photos("old", 1))
    old = tree(project.data)
    more = source(photos("new", 1, seed=1), {"0/bad.png": b"text"})
    code, _ = import_in_a_process(project, more, what, done)
    assert code == -signal.SIGKILL
    interrupted = shutil.copytree(project.root, project.root.parent / "copy", symlinks=True)
    restore_data(project)
    assert len(tree(project.data)) == len(old) + 6 * ((what, done) == ("swap", 2))
    assert old.items() <= tree(project.data).items()
    # The next import repairs it, with or without that.
    for repaired in (project, Project(interrupted)):
        report = import_photos(repaired, more)
        assert sum(report.imported.values()) + sum(report.already_there.values()) == 6
        new = set(tree(more).values()) - {b"text"}
        assert set(tree(repaired.data).values()) == {*old.values(), *new}
        assert not repaired.staging.exists()


def test_interrupted_swap_is_undone_at_once(filled: Project, photos: Callable[..., Path]) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("swap", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_photos(filled, photos("new", 1, seed=1), progress=interrupt)


def test_imports_at_once_take_turns(project: Project, photos: Callable[..., Path]) -> None:
    folders = [photos(f"s{seed}", 1, seed=seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        codes = pool.map(lambda folder: import_in_a_process(project, folder, "never", 0), folders)
    for code, said in codes:
        assert code == 0
        assert said in ("", "A retrain or an import uses data/. Waiting up to 600 s for it.\n")
    assert len(tree(project.data)) == 18


def test_full_disk_is_one_line(filled: Project, photos: Callable[..., Path]) -> None:
    code, said = import_in_a_process(filled, photos("new", 1, seed=1), "limit", 2000)
    assert code == 1
    assert said.startswith("DataError: Import failed at")
    assert str(filled.staging / "incoming") in said
    assert said.count("\n") == 1


def test_place_that_cannot_be_written_is_named(filled: Project, tmp_path: Path) -> None:
    bad = source(tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"text"})
    filled.artifacts.write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"Import failed at .*ENOTDIR\)"):
        import_photos(filled, bad)
    filled.staging.write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"Import failed at '.*import' \(.*EEXIST\)"):
        import_photos(filled, bad)
    with pytest.raises(DataError, match=r"Import failed at '/proc/1/"):
        import_photos(Project(Path("/proc/1")), bad)


def test_second_import_gives_up_after_its_wait(filled: Project, tmp_path: Path) -> None:
    with FileLock(filled.data_lock), pytest.raises(BusyError, match=r"more than 0\.1 seconds"):
        import_photos(filled, source(tmp_path / "s", B), wait=0.1)


def test_unknown_folders_and_classes_with_too_few_photos_end_the_command_with_1(
    tmp_path: Path, photos: Callable[..., Path]
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    folder = photos("mine", 3)
    (folder / "4").rename(folder / "four")
    done = checkout.run("handsigns", "import", folder, "--replace", "--json", code=1)
    assert json.loads(done.stdout)["taken"]["train"] == dict.fromkeys("01235", 3)
    *_, unknown, few = done.stderr.splitlines()
    assert unknown == (
        "unknown label folder: 'four' is none of 0, 1, 2, 3, 4, 5; 3 files quarantined. To take a "
        "source's folders as the labels: --replace --set-labels."
    )
    assert "train/4" in few
    shutil.rmtree(folder / "four")
    source(folder, {"4/a.png": PNG[4]})
    assert "4 (1)" in checkout.run("handsigns", "import", folder, code=1).stderr
    source(folder, {"4/b.png": PNG[3], "4/c.png": PNG[2]})
    checkout.run("handsigns", "import", folder)


def test_a_webp_named_jpg_is_read_by_import_and_predict(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "s" / "3"
    folder.mkdir(parents=True)
    Image.fromarray(photo(3, 1)).save(folder / "a.jpg", "WEBP", lossless=True)
    assert import_photos(project, tmp_path / "s").imported == {("train", "3"): 1}
    preprocess = load_params(CHECKOUT.params).preprocess
    even = lambda images: np.full((len(images), 6), 1 / 6, np.float32)  # noqa: E731
    (found,) = classify_files(Classifier(even, preprocess, LABELS, 64), [folder / "a.jpg"])
    assert found.error is None


def test_quarantine_takes_linear_time(project: Project, tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        files = {f"0/{count}-{number}.png": b"text %d" % number for number in range(count)}
        folder = source(tmp_path / str(count), {"0/a.png": PNG[0], **files})
        began = time.process_time()
        import_photos(project, folder)
        return time.process_time() - began

    assert seconds(1800) < 6 * seconds(600) + 0.5
