"""Atomic file and directory writes."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.io import STALE_SECONDS, atomic_directory, atomic_write, read_json, write_json


@pytest.mark.parametrize("write", [atomic_write, atomic_directory])
def test_a_write_is_complete_or_has_no_effect(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "new" / "note.txt"

    def put(text: str) -> None:
        with write(path) as temporary:
            (temporary / "inside" if temporary.is_dir() else temporary).write_text(text)
            if text == "half":
                raise RuntimeError
            assert not path.exists() or content() != text

    def content() -> str:
        return (path / "inside" if path.is_dir() else path).read_text()

    put("first")
    with pytest.raises(RuntimeError):
        put("half")
    assert content() == "first"
    put("second")
    assert content() == "second"
    assert [found.name for found in path.parent.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("link", ["hardlink_to", "symlink_to"])
def test_json_replaces_a_link_into_a_cache_and_has_numbers_only(tmp_path: Path, link: str) -> None:
    cached, path = tmp_path / "cached", tmp_path / "note.json"
    cached.write_text("old")
    cached.chmod(0o444)
    getattr(path, link)(cached)
    write_json(path, {"b": "é", "a": 1})
    assert cached.read_text() == "old"
    assert path.read_text() == '{\n "a": 1,\n "b": "é"\n}\n'
    assert not path.is_symlink()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"b": "é", "a": 1}
    assert read_json(cached) is read_json(tmp_path / "missing") is None


def test_what_a_killed_writer_left_goes_once_it_is_stale(tmp_path: Path) -> None:
    ages = {".set.a.part": 0, ".set.b.part": 2 * STALE_SECONDS, ".set.c": 2 * STALE_SECONDS}
    for name, age in ages.items():
        (tmp_path / name / "new").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with atomic_directory(tmp_path / "set"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.a.part", ".set.c", "set"]
