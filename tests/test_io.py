"""Atomic file and directory writes."""

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tasks.io import STALE_SECONDS, atomic_directory, atomic_write, write_json


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("done")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "done"
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        _fail_half_way(atomic_write(path))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_link_into_a_cache_is_replaced_and_not_written_through(tmp_path: Path, link: str) -> None:
    cached, path = tmp_path / "cached", tmp_path / "note.json"
    cached.write_text("old")
    cached.chmod(0o444)
    getattr(path, link)(cached)
    write_json(path, {"a": 1})
    assert cached.read_text() == "old"
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert not path.is_symlink()


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").write_text("old")
    with atomic_directory(path) as temporary:
        (temporary / "new").write_text("new")
        assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        _fail_half_way(atomic_directory(path))
    assert (path / "old").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_json_has_the_same_bytes_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"b": [1, 2], "a": "é"})
    write_json(tmp_path / "two.json", {"a": "é", "b": [1, 2]})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_json_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def _fail_half_way(place: AbstractContextManager[Path]) -> None:
    with place as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise RuntimeError("half way")


def test_what_a_killed_writer_left_goes_once_it_is_stale(tmp_path: Path) -> None:
    fresh, stale, foreign = (
        tmp_path / f".{name}" for name in ("set.a.part", "set.b.part", "set.c")
    )
    for folder in (fresh, stale, foreign):
        (folder / "new").mkdir(parents=True)
        age = 0 if folder == fresh else 2 * STALE_SECONDS
        os.utime(folder, (time.time() - age,) * 2)
    with atomic_directory(tmp_path / "set"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.a.part", ".set.c", "set"]


def test_the_parent_folder_is_not_scanned_for_every_file(tmp_path: Path) -> None:
    def seconds(folder: Path) -> float:
        began = time.process_time()
        for number in range(100):
            write_json(folder / f"{number}.json", number)
        return time.process_time() - began

    empty, full = tmp_path / "empty", tmp_path / "full"
    full.mkdir()
    for number in range(5_000):
        (full / f"{number}.txt").touch()
    assert seconds(full) < 5 * seconds(empty) + 0.3
