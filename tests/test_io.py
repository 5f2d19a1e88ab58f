"""Atomic file and directory writes."""

import os
import time
from pathlib import Path

import pytest

from tasks.io import STALE_SECONDS, atomic_directory, atomic_write, write_json


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_write_is_complete_or_has_no_effect(tmp_path: Path, is_folder: bool) -> None:
    write = atomic_directory if is_folder else atomic_write
    path = tmp_path / "new" / "note.txt"

    def fill(target: Path, text: str) -> None:
        (target / "inside" if is_folder else target).write_text(text)

    def content() -> str:
        return (path / "inside" if is_folder else path).read_text()

    with write(path) as temporary:
        fill(temporary, "first")
        assert not path.exists()
    assert content() == "first"
    with pytest.raises(RuntimeError), write(path) as temporary:  # noqa: PT012
        fill(temporary, "half")
        raise RuntimeError
    assert content() == "first"
    with write(path) as temporary:
        fill(temporary, "second")
        assert content() == "first"
    assert content() == "second"
    assert [found.name for found in path.parent.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_a_link_into_a_cache_is_replaced_and_not_written_through(tmp_path: Path, link: str) -> None:
    cached, path = tmp_path / "cached", tmp_path / "note.json"
    cached.write_text("old")
    cached.chmod(0o444)
    getattr(path, link)(cached)
    write_json(path, {"b": "é", "a": 1})
    assert cached.read_text() == "old"
    assert path.read_text() == '{\n "a": 1,\n "b": "é"\n}\n'
    assert not path.is_symlink()


def test_json_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_once_it_is_stale(tmp_path: Path) -> None:
    ages = {".set.a.part": 0, ".set.b.part": 2 * STALE_SECONDS, ".set.c": 2 * STALE_SECONDS}
    for name, age in ages.items():
        (tmp_path / name / "new").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
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
