"""What an import may come from, and what is refused before a file of it is touched."""

import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tasks.data.images import MAX_BYTES, decode, encode
from tasks.data.sources import SourceFile, open_source
from tasks.errors import ImageError, SourceError
from tests.fixtures.photos import LABELS, photo

PNG = encode(photo(2, 0, 32))
H5_PHOTOS = np.stack([photo(label, 0, 32) for label in range(6)])


def content(item: SourceFile) -> bytes:
    assert item.read is not None
    return item.read(MAX_BYTES)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def packed(path: Path, *members: str | zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, PNG)
    return path


def h5(path: Path, **changes: Any) -> Path:
    sets: dict[str, Any] = {"train_set_x": H5_PHOTOS, "train_set_y": np.arange(6)} | changes
    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            if value is not None:
                file[name] = value
    return path


UNKNOWN, NO_LABEL = "unknown label folder: '{}' is none of 0, 1, 2, 3, 4, 5", "no label: it is in"
LAYOUTS: dict[str, dict[str, str]] = {
    "labels beside others": {
        "0/a.png": "train 0",
        "5/person/b.png": "train 5",
        "6/0/c.png": UNKNOWN.format(6),
        "2026-11-28/1/d.png": UNKNOWN.format("2026-11-28"),
        "e.png": NO_LABEL,
        "review-2026-11-29/3/f.png": "train 3",
    },
    "splits": {
        "train/0/a.png": "train 0",
        "train/six/a.png": UNKNOWN.format("six"),
        "valid/1/a.png": "train 1",
        "Val/2/a.png": "train 2",
        "testing/monday/5/a.png": "test 5",
        "README.md": NO_LABEL,
    },
    "days": {
        "me/signs/2026-11-27/3/a.png": "train 3",
        "me/signs/2026-11-28/person/4/a.png": "train 4",
        "me/signs/2026-11-29/test/4/a.png": "test 4",
    },
}


@pytest.mark.parametrize("expected", LAYOUTS.values(), ids=LAYOUTS)
def test_folders_name_labels_and_splits(expected: dict[str, str], tmp_path: Path) -> None:
    clutter = ["0/.DS_Store", "0/Thumbs.db", "__MACOSX/0/._a.png", ".git/x"]
    for path in (
        fill(tmp_path / "s", *expected, *clutter),
        packed(tmp_path / "s.zip", *expected, *clutter),
    ):
        with open_source(path, LABELS) as source:
            assert source.ignored == len(clutter)
            found = {f.origin: f.fault or f"{f.split} {f.label}" for f in source.files}
            assert {content(file) for file in source.files} == {PNG}
        assert found.keys() == {f"{path.name}/{name}" for name in expected}
        assert all(found[f"{path.name}/{name}"].startswith(what) for name, what in expected.items())


def test_own_links_are_followed_and_only_files_read(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    os.mkfifo(source / "0/pipe")
    elsewhere = fill(tmp_path / "elsewhere", "one/b.png")
    for name, target in {
        "0/b.png": elsewhere / "one/b.png",
        "0/c.png": source / "nothing",
        "0/d.png": Path("a.png"),
        "0/e": source,
        "1": elsewhere / "one",
        "2": elsewhere / "one",
    }.items():
        (source / name).symlink_to(target)
    leaves, theirs = "symbolic link: it leaves the source", {"2/b.png": None}
    if os.getuid() == 0:  # only root can give a link to another user
        os.chown(source / "2", 12345, -1, follow_symlinks=False)
        theirs = {"2": leaves}
    with open_source(source, LABELS) as opened:
        assert {file.origin.removeprefix("s/"): file.fault for file in opened.files} == {
            "0/a.png": None,
            "0/b.png": leaves,
            "0/c.png": "symbolic link: its target does not exist",
            "0/d.png": None,
            "0/e": "symbolic link: it leads back to a folder above it",
            "0/pipe": None,
            "1/b.png": None,
            **theirs,
        }
        (source / "0/a.png").unlink()
        (source / "0/a.png").symlink_to(__file__)
        readable = {file.origin: file for file in opened.files}
        for name, reason in (("0/a.png", "cannot be read"), ("0/pipe", "not a file")):
            with pytest.raises(ImageError, match=reason):
                content(readable[f"s/{name}"])


def h5_with(path: Path, **options: Any) -> Path:
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        file.create_dataset("train_set_x", dtype=np.uint8, **options)
    return path


def elsewhere(path: Path) -> Path:
    raw = path.parent / "raw"
    raw.write_bytes(H5_PHOTOS.tobytes())
    return h5_with(path, shape=H5_PHOTOS.shape, external=[(str(raw), 0, H5_PHOTOS.size)])


OWN = "no data set '{}' of its own"
BAD: list[tuple[str, Callable[[Path], Any]]] = [
    ("No such file", lambda p: p),
    ("is empty", lambda p: fill(p, ".hidden", "__MACOSX/a")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: fill(p, "six/a.png", "seven/b.png")),
    ("neither a folder nor a .zip", lambda p: p.write_bytes(b"label,file\n")),
    ("neither a folder nor a .zip", os.mkfifo),
    (
        "is damaged",
        lambda p: p.write_bytes(b"PK\x03\x04" + bytes(114) + b"PK\x05\x06" + b"\xff" * 18),
    ),
    (OWN.format("train_set_x"), lambda p: h5(p, train_set_x=h5py.ExternalLink("/etc", "/x"))),
    (OWN.format("train_set_y"), lambda p: h5(p, train_set_y=h5py.SoftLink("/train_set_x"))),
    (OWN.format("train_set_x"), elsewhere),
    ("has neither train_set_x nor test_set_x", lambda p: h5(p, train_set_x=None)),
    ("float32 (6, 32, 32, 3) photos", lambda p: h5(p, train_set_x=H5_PHOTOS.astype(np.float32))),
    ("(6, 32, 96, 1) photos", lambda p: h5(p, train_set_x=H5_PHOTOS.reshape(6, 32, 96, 1))),
    ("(5,) labels, not integer (6,)", lambda p: h5(p, train_set_y=np.arange(5))),
    ("has too much", lambda p: h5_with(p, shape=(6, 9000, 9000, 3), chunks=(1, 9, 9, 3))),
    ("is damaged", lambda p: p.write_bytes(h5(p).read_bytes()[:2000])),
]


@pytest.mark.parametrize(("reason", "make"), BAD)
def test_a_bad_source_is_refused(reason: str, make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "bad"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceError) as refusal, open_source(path, LABELS):
        pass
    assert reason in str(refusal.value)
    assert f"'{path}'" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_members_of_an_archive_lead_nowhere(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("0/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["0/a.png", "0/b.png", "../0/up.png", "/etc/0/c.png", "C:\\0\\d.png", "0/../1/e.png"]
    path = packed(tmp_path / "s.zip", *names, link)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 8] |= 1  # encrypted
    path.write_bytes(data)
    with open_source(path, LABELS) as source:
        contents = {file.origin: file for file in source.files}
        for name in ("s.zip/0/a.png", "s.zip/0/b.png"):
            with pytest.raises(ImageError, match="damaged in the archive"):
                content(contents.pop(name))
        assert all(content(file) == PNG for file in contents.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.zip"]


def test_h5_rows_are_photos_of_both_splits(tmp_path: Path) -> None:
    path = h5(tmp_path / "signs.h5", train_set_x=None)
    with h5py.File(path, "a") as file:
        chunks = (1, *H5_PHOTOS.shape[1:])
        stored = file.create_dataset("train_set_x", data=H5_PHOTOS, chunks=chunks, fletcher32=True)
        offset = stored.id.get_chunk_info(3).byte_offset
        file["test_set_x"], file["test_set_y"] = H5_PHOTOS, np.array([[0, 1, 2, 3, 4, 6]])
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 0xFF
    path.write_bytes(data)
    with open_source(path, LABELS) as source:
        found = {file.origin.removeprefix("signs.h5/"): file for file in source.files}
        damaged, wrong = found.pop("train_set_x/3"), found.pop("test_set_x/5")
        assert wrong.fault == "unknown label: 6 is none of 0, 1, 2, 3, 4, 5"
        with pytest.raises(ImageError, match="damaged in the HDF5 file"):
            content(damaged)
        assert len(found) == 10
        for name, file in found.items():
            split, row = name.split("_set_x/")
            assert (file.split, file.label) == (split, row)
            assert np.array_equal(decode(content(file)), H5_PHOTOS[int(row)])
