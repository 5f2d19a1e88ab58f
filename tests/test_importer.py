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

from tasks.data.directory import restore_data
from tasks.data.images import encode
from tasks.data.importer import (
    ALREADY_THERE,
    IMPORTED,
    Candidate,
    apply_import_rules,
    import_photos,
)
from tasks.data.quarantine import Quarantine
from tasks.errors import BusyError, DataError, SourceError
from tasks.model.inference import Classifier, classify_files
from tasks.params import load_params
from tasks.project import Project
from tests.fixtures.checkouts import make_checkout
from tests.fixtures.photos import CHECKOUT, photo, write_photos

PNG = [encode(photo(label, 9, 32)) for label in range(6)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "checkout")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def listed(project: Project) -> dict[str, list[dict[str, str | None]]]:
    """Content of the quarantine's list."""
    return {
        name: [asdict(file) for file in files]
        for name, files in Quarantine(project).listed().items()
    }


def source(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a class folder; `files` are its paths and contents."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_photos_are_stored_under_their_content(
    project: Project, photos: Callable[..., Path]
) -> None:
    report = import_photos(project, photos("a", 2))
    assert report.imported == {("train", label): 2 for label in "012345"}
    stored = tree(project.data)
    assert len(stored) == 12
    assert set(stored.values()) == set(tree(photos("a", 2)).values())
    assert not project.staging.exists()
    assert not project.quarantine.exists()


def test_second_import_touches_nothing(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 2))

    def state() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in project.data.rglob("*")}
        return {path: (facts.st_ino, facts.st_mtime_ns) for path, facts in found.items()}

    before = state()
    report = import_photos(project, photos("a", 2))
    assert report.imported == {}
    assert report.already_there == {("train", label): 2 for label in "012345"}
    assert state() == before


def test_import_adds_and_shares_what_is_held(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 2))
    held = {path: path.stat().st_ino for path in project.data.rglob("*.png")}
    report = import_photos(project, photos("b", 1, seed=1))
    assert sum(report.imported.values()) == 6
    assert len(tree(project.data)) == 18
    assert all(path.stat().st_ino == inode for path, inode in held.items())


def test_links_into_a_cache_stay_links(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 1))
    path = next(project.data.rglob("*.png"))
    cached = project.root / "cached"
    cached.write_bytes(path.read_bytes())
    cached.chmod(0o444)
    path.unlink()
    path.symlink_to(os.path.relpath(cached, path.parent))
    import_photos(project, photos("b", 1, seed=1))
    assert path.is_symlink()
    assert path.resolve() == cached
    assert len(tree(project.data)) == 12


def test_replace_holds_the_new_photos_alone(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 2))
    shared = photos("a", 1)
    shutil.rmtree(shared)
    report = import_photos(project, photos("a", 1), replace=True)
    assert (sum(report.already_there.values()), report.imported, report.removed) == (6, {}, 6)
    assert set(tree(project.data).values()) == set(tree(shared).values())
    report = import_photos(project, photos("b", 1, seed=1), replace=True)
    assert (sum(report.imported.values()), report.removed) == (6, 6)


@pytest.mark.parametrize("replace", [False, True])
def test_source_with_nothing_usable_is_refused_and_listed(
    replace: bool, project: Project, tmp_path: Path, photos: Callable[..., Path]
) -> None:
    import_photos(project, source(photos("a", 1), {"0/b.png": b"text"}))
    before = tree(project.data)
    bad = source(tmp_path / "bad", {"0/a.png": b"text", "1/b.png": b""})
    with pytest.raises(SourceError, match="no usable photo: 1 not an image, 1 zero bytes"):
        import_photos(project, bad, replace=replace)
    assert tree(project.data) == before
    assert set(listed(project)) == {str(bad), str(tmp_path / "a")}


def test_test_source_goes_to_the_test_split(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("a", 1), photos("b", 1, seed=1))
    assert {path.split("/")[0] for path in tree(project.data)} == {"train", "test"}


def test_two_test_sets_are_refused(project: Project, tmp_path: Path) -> None:
    both = source(tmp_path / "both", {"train/0/a.png": PNG[0], "test/0/b.png": PNG[1]})
    with pytest.raises(SourceError, match="test set of its own"):
        import_photos(project, both, source(tmp_path / "more", {"0/a.png": PNG[2]}))
    assert not project.data.exists()


def reasons(project: Project, *arguments: Path) -> dict[str, str]:
    report = import_photos(project, *arguments)
    return {aside.origin: aside.reason for aside in report.quarantined}


def test_same_photo_under_two_labels_is_set_aside_in_both(project: Project, tmp_path: Path) -> None:
    folder = source(tmp_path / "s", {"0/a.png": PNG[0], "1/b.png": PNG[0], "2/c.png": PNG[2]})
    expected = dict.fromkeys(["s/0/a.png", "s/1/b.png"], "same photo under two labels: 0 and 1")
    assert reasons(project, folder) == expected
    assert reasons(project, folder) == expected
    assert list(tree(project.data).values()) == [PNG[2]]


def test_held_photo_stays_when_it_comes_under_another_label(
    project: Project, tmp_path: Path
) -> None:
    import_photos(project, source(tmp_path / "a", {"3/a.png": PNG[0]}))
    before = tree(project.data)
    assert reasons(project, source(tmp_path / "b", {"0/a.png": PNG[0], "3/a.png": PNG[0]})) == {
        "b/0/a.png": "same photo under two labels: data/ has it as 3"
    }
    assert tree(project.data) == before


def test_test_set_keeps_a_photo_that_is_also_in_train(project: Project, tmp_path: Path) -> None:
    folder = source(
        tmp_path / "s", {"train/0/a.png": PNG[0], "test/0/b.png": PNG[0], "train/1/c.png": PNG[1]}
    )
    expected = {"s/train/0/a.png": "same photo in train and test: it stays in test"}
    assert reasons(project, folder) == expected
    assert reasons(project, folder) == expected
    assert [path.split("/")[:2] for path in tree(project.data)] == [["test", "0"], ["train", "1"]]


def test_held_train_photo_does_not_move_to_the_test_set(project: Project, tmp_path: Path) -> None:
    import_photos(project, source(tmp_path / "a", {"train/0/a.png": PNG[0]}))
    assert reasons(
        project, source(tmp_path / "b", {"test/0/a.png": PNG[0], "1/b.png": PNG[1]})
    ) == {"b/test/0/a.png": "same photo in train and test: it stays in train"}


PLACES = st.tuples(st.sampled_from(["train", "test"]), st.sampled_from("012"))


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), PLACES), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from("abcd"), PLACES),
    st.randoms(use_true_random=False),
)
def test_what_is_taken_does_not_depend_on_the_order_of_files(
    wanted: list[tuple[str, tuple[str, str]]], held: dict[str, tuple[str, str]], random: object
) -> None:
    def settle(order: list[tuple[str, tuple[str, str]]]) -> set[tuple[str, tuple[str, str]]]:
        candidates = [Candidate("", name, place) for name, place in order]
        decided = apply_import_rules(candidates, held)
        assert len(decided) == len(order)
        taken = [pair for pair, verdict in zip(order, decided, strict=True) if verdict == IMPORTED]
        assert len({name for name, _ in taken}) == len(taken)
        assert not {name for name, _ in taken} & set(held)
        after = held | dict(taken)
        again = apply_import_rules(candidates, after)
        assert IMPORTED not in again
        assert [verdict in (IMPORTED, ALREADY_THERE) for verdict in decided] == [
            verdict == ALREADY_THERE for verdict in again
        ]
        return set(taken)

    shuffled = wanted.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert settle(wanted) == settle(shuffled)


def test_bad_files_are_copied_and_listed_once(project: Project, tmp_path: Path) -> None:
    folder = source(
        tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"text", "7/c.png": PNG[1], "1/d.png": b""}
    )
    for _ in range(2):
        report = import_photos(project, folder)
        (files,) = listed(project).values()
        assert files == [asdict(file) for file in report.quarantined]
        assert {each["origin"]: each["reason"].split(":")[0] for each in files} == {
            "s/0/b.png": "not an image",
            "s/1/d.png": "zero bytes",
            "s/7/c.png": "unknown label folder",
        }
        copies = tree(project.quarantine)
        del copies["quarantine.json"]
        assert sorted(copies.values()) == sorted([b"text", PNG[1]])
        assert set(copies) == {each["copy"] for each in files if each["copy"]}


def test_repaired_file_leaves_the_quarantine(project: Project, tmp_path: Path) -> None:
    folder = source(tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"text"})
    import_photos(project, source(tmp_path / "other", {"0/a.png": PNG[2], "0/b.png": b"more text"}))
    import_photos(project, folder)
    assert len(listed(project)) == 2
    import_photos(project, source(folder, {"0/b.png": PNG[1]}))
    assert list(listed(project)) == [str(tmp_path / "other")]
    assert [path for path in tree(project.quarantine) if path != "quarantine.json"] == [
        each["copy"] for each in listed(project)[str(tmp_path / "other")]
    ]


@pytest.mark.parametrize("spoilt", ["", "[]", "3", "{}", '{"sources": [3]}', '{"sources": 3}'])
def test_a_list_that_cannot_be_read_counts_for_none_and_is_written_anew(
    project: Project, tmp_path: Path, spoilt: str
) -> None:
    folder = source(tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"text"})
    project.quarantine.mkdir(parents=True)
    (project.quarantine / "quarantine.json").write_text(spoilt)
    assert listed(project) == {}
    import_photos(project, folder)
    assert [len(files) for files in listed(project).values()] == [1]


def test_copies_outlive_a_list_that_was_spoilt(project: Project, tmp_path: Path) -> None:
    (aside,) = import_photos(
        project, source(tmp_path / "a", {"0/a.png": PNG[0], "0/b.png": b"the only copy"})
    ).quarantined
    (project.quarantine / "quarantine.json").write_text("{")
    import_photos(project, source(tmp_path / "b", {"1/a.png": PNG[1], "1/b.png": b"another"}))
    import_photos(project, source(tmp_path / "c", {"2/a.png": PNG[2], "2/b.png": b"a third"}))
    assert aside.copy is not None
    assert (project.quarantine / aside.copy).read_bytes() == b"the only copy"


def test_a_failing_replacement_forgets_nothing_that_was_set_aside(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_photos(project, source(tmp_path / "a", {"0/a.png": PNG[0], "0/b.png": b"the only copy"}))
    before = tree(project.quarantine)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tasks.data.importer.replace_data", full)
    with pytest.raises(DataError, match="No space left"):
        import_photos(project, source(tmp_path / "b", {"1/a.png": PNG[1]}), replace=True)
    assert tree(project.quarantine) == before


def test_a_link_to_itself_is_refused_as_any_missing_source(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SourceError, match="cannot be read"):
        import_photos(project, tmp_path / "loop")


def test_hostile_name_stays_inside_the_quarantine(project: Project, tmp_path: Path) -> None:
    folder = source(tmp_path / "s", {"0/a.png": PNG[0]})
    (folder / "0" / "x\\..\n\x1b[31m é;rm -rf .jpg").write_bytes(b"text")
    (aside,) = import_photos(project, folder).quarantined
    assert aside.origin.isprintable()
    assert aside.copy is not None
    assert (project.quarantine / aside.copy).read_bytes() == b"text"
    assert re.fullmatch(r"[a-z_]+/[0-9a-f]{12}-[A-Za-z0-9._-]+", aside.copy)


def test_report_is_ready_for_json(project: Project, tmp_path: Path) -> None:
    report = import_photos(
        project, source(tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"x", "1/c.png": b"y"})
    )
    assert report.kinds() == {"not an image": 2}
    shown = json.loads(json.dumps(report.to_json()))
    assert shown["taken"] == {"train": {"0": 1}, "test": {}}
    assert [each["origin"] for each in shown["quarantined"]] == ["s/0/b.png", "s/1/c.png"]


# Killed, starved and locked out: each time in a process of its own.

CHILD = """
    import os, resource, signal, sys
    from pathlib import Path
    from tasks.errors import HandsignsError
    from tasks.data.importer import import_photos
    from tasks.params import load_params
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


POINTS = [
    *[("read", done) for done in (1, 4, 7)],
    ("keep", 1),
    *[("swap", done) for done in (0, 1, 2)],
]


@pytest.mark.parametrize(("what", "done"), POINTS)
@pytest.mark.parametrize("repaired_by", ["restore_data", "import"])
def test_killed_import_leaves_the_old_or_the_new_data(
    what: str, done: int, repaired_by: str, project: Project, photos: Callable[..., Path]
) -> None:
    import_photos(project, photos("old", 1))
    old = tree(project.data)
    more = photos("new", 1, seed=1)
    source(more, {"0/bad.png": b"text"})
    code, _ = import_in_a_process(project, more, what, done)
    assert code == -signal.SIGKILL
    if repaired_by == "restore_data":
        restore_data(project)
        expected = 12 if (what, done) == ("swap", 2) else 6
        assert len(tree(project.data)) == expected
        assert old.items() <= tree(project.data).items()
    report = import_photos(project, more)
    assert sum(report.imported.values()) + sum(report.already_there.values()) == 6
    assert set(tree(project.data).values()) == {
        *old.values(),
        *tree(photos("new", 1, seed=1)).values(),
    } - {b"text"}
    assert not project.staging.exists()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_killed_first_import_leaves_nothing_or_all(
    done: int, project: Project, photos: Callable[..., Path]
) -> None:
    code, _ = import_in_a_process(project, photos("new", 1), "swap", done)
    assert code == -signal.SIGKILL
    restore_data(project)
    assert len(tree(project.data)) == (6 if done == 2 else 0)
    import_photos(project, photos("new", 1))
    assert len(tree(project.data)) == 6


def test_interrupted_swap_is_undone_at_once(project: Project, photos: Callable[..., Path]) -> None:
    import_photos(project, photos("old", 1))
    old = tree(project.data)

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == ("swap", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_photos(project, photos("new", 1, seed=1), progress=interrupt)
    assert tree(project.data) == old
    assert not project.staging.exists()


def test_imports_at_once_take_turns(project: Project, photos: Callable[..., Path]) -> None:
    folders = [photos(f"s{seed}", 1, seed=seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        codes = pool.map(lambda folder: import_in_a_process(project, folder, "never", 0), folders)
    for code, said in codes:
        assert code == 0
        assert said in ("", "A retrain or an import uses data/. Waiting up to 600 s for it.\n")
    assert len(tree(project.data)) == 18


@pytest.fixture
def held(project: Project, photos: Callable[..., Path]) -> Iterator[Project]:
    """A checkout that holds six photos, and must still hold them afterwards."""
    import_photos(project, photos("held", 1))
    before = tree(project.data)
    yield project
    assert tree(project.data) == before


def test_full_disk_is_told_and_harms_nothing(held: Project, photos: Callable[..., Path]) -> None:
    code, told = import_in_a_process(held, photos("new", 1, seed=1), "limit", 2000)
    assert code == 1
    assert told.startswith("DataError: Import failed at")
    assert str(held.staging / "incoming") in told
    assert told.count("\n") == 1
    assert not held.staging.exists()


def test_place_that_cannot_be_written_is_named(held: Project, photos: Callable[..., Path]) -> None:
    held.staging.write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"Import failed at '.*import' \(.*EEXIST\)"):
        import_photos(held, photos("new", 1, seed=1))


def test_quarantine_that_cannot_be_written_stops_the_import(held: Project, tmp_path: Path) -> None:
    held.artifacts.write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"Import failed at .*ENOTDIR\)"):
        import_photos(held, source(tmp_path / "s", {"0/a.png": PNG[0], "0/b.png": b"text"}))


def test_checkout_that_cannot_be_written_is_named(photos: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"Import failed at '/proc/1/"):
        import_photos(Project(Path("/proc/1")), photos("a", 1))


def test_second_import_waits_its_turn_and_says_so(
    held: Project, photos: Callable[..., Path]
) -> None:
    with (
        FileLock(held.local / "data.lock"),
        pytest.raises(BusyError, match=r"more than 0\.1 seconds"),
    ):
        import_photos(held, photos("new", 1, seed=1), wait=0.1)


def test_refused_source_leaves_no_trace(held: Project, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        import_photos(held, tmp_path / "nothing")
    assert not held.staging.exists()
    assert not held.artifacts.exists()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4))
def test_any_imports_end_in_the_union(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    root = tmp_path_factory.mktemp("union")
    project = Project(root / "checkout")
    expected = set()
    for name in names:
        folder = write_photos(root / name, 1, 16, seed=ord(name))
        import_photos(project, folder)
        expected |= set(tree(folder).values())
    assert set(tree(project.data).values()) == expected


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
        "unknown label folder: 'four' is none of 0, 1, 2, 3, 4, 5; 3 files quarantined."
    )
    assert "train/4" in few
    shutil.rmtree(folder / "four")
    source(folder, {"4/a.png": PNG[4]})
    assert "4 (1)" in checkout.run("handsigns", "import", folder, code=1).stderr
    source(folder, {"4/b.png": PNG[3], "4/c.png": PNG[2]})
    checkout.run("handsigns", "import", folder)


def test_a_webp_named_jpg_is_read_by_import_and_predict(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "3"
    folder.mkdir(parents=True)
    Image.fromarray(photo(3, 1)).save(folder / "a.jpg", "WEBP", lossless=True)
    project = Project(tmp_path / "checkout")
    assert import_photos(project, tmp_path / "s").imported == {("train", "3"): 1}
    preprocess = load_params(CHECKOUT.params).preprocess
    even = lambda images: np.full((len(images), 6), 1 / 6, np.float32)  # noqa: E731
    classifier = Classifier(even, preprocess, 64)
    (found,) = classify_files(classifier, [folder / "a.jpg"])
    assert found.error is None


def test_quarantine_takes_linear_time(project: Project, tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        files = {f"0/{count}-{number}.png": b"text %d" % number for number in range(count)}
        folder = source(tmp_path / str(count), {"0/a.png": PNG[0], **files})
        began = time.process_time()
        import_photos(project, folder)
        return time.process_time() - began

    assert seconds(1800) < 6 * seconds(600) + 0.5
