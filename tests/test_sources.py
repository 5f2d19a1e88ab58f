"""What an import may come from, and what is refused before a file of it is touched."""

import os
import stat
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tasks.data.images import MAX_BYTES, decode, encode
from tasks.data.sources import SourceFile, as_test
from tasks.data.sources import open_source as open_source_
from tasks.errors import ImageError, SourceError
from tests.fixtures.photos import LABELS, photo

open_source = partial(open_source_, labels=LABELS)

PNG = encode(photo(2, 0, 32))
H5_PHOTOS = np.stack([photo(label, 0, 32) for label in range(6)])
NONE_OF = "is none of 0, 1, 2, 3, 4, 5"


def content(item: SourceFile) -> bytes:
    assert item.read is not None
    return item.read(MAX_BYTES)


def read(path: Path) -> dict[str, tuple[str, str | None, str | None]]:
    """Split, label and fault by origin; each file can be read or is faulty."""
    with open_source(path) as source:
        for item in source.files:
            assert item.fault or content(item)
        return {item.origin: (item.split, item.label, item.fault) for item in source.files}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def packed(path: Path, *members: str | zipfile.ZipInfo, kind: int = 8) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
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


LAYOUTS: list[tuple[str, dict[str, tuple[str, str | None, str | None]]]] = [
    (
        "labels beside what is none",
        {
            "0/a.png": ("train", "0", None),
            "5/person/b.png": ("train", "5", None),
            "6/0/c.png": ("train", None, f"unknown label folder: '6' {NONE_OF}"),
            "2026-11-28/1/d.png": ("train", None, f"unknown label folder: '2026-11-28' {NONE_OF}"),
            "e.png": ("train", None, "no label: it is in no label folder"),
            "review-2026-11-29/3/f.png": ("train", "3", None),
        },
    ),
    (
        "splits of exporters",
        {
            "train/0/a.png": ("train", "0", None),
            "valid/1/a.png": ("train", "1", None),
            "Val/2/a.png": ("train", "2", None),
            "validation/3/a.png": ("train", "3", None),
            "testing/monday/5/a.png": ("test", "5", None),
            "README.md": ("train", None, "no label: it is in no label folder"),
        },
    ),
    (
        "days, and folders above",
        {
            "me/signs/2026-11-27/3/a.png": ("train", "3", None),
            "me/signs/2026-11-28/person/4/a.png": ("train", "4", None),
            "me/signs/2026-11-29/test/4/a.png": ("test", "4", None),
        },
    ),
]


@pytest.mark.parametrize(("_layout", "expected"), LAYOUTS)
def test_labels_and_splits_are_found_by_the_folders(
    _layout: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    clutter = ["0/.DS_Store", "0/Thumbs.db", "__MACOSX/0/._a.png", ".git/x"]
    for path in (
        fill(tmp_path / "s", *expected, *clutter),
        packed(tmp_path / "s.zip", *expected, *clutter),
    ):
        assert read(path) == {f"{path.name}/{name}": found for name, found in expected.items()}
        with open_source(path) as source:
            assert source.ignored == len(clutter)


def test_links_are_followed_inside_and_to_folders_of_ones_own(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    elsewhere = fill(tmp_path / "elsewhere", "one/b.png", "theirs/c.png")
    targets = {
        "0/b.png": elsewhere / "one/b.png",
        "0/c.png": source / "nothing",
        "0/d.png": Path("a.png"),
        "0/e": source,
        "1": elsewhere / "one",
        "2": elsewhere / "theirs",
    }
    for name, target in targets.items():
        (source / name).symlink_to(target)
    if own := os.getuid() == 0:  # only root can give a folder to another user
        os.chown(elsewhere / "theirs", 12345, -1)
    found = read(source)
    assert {name.removeprefix("s/"): fault for name, (*_, fault) in found.items()} == {
        "0/a.png": None,
        "0/b.png": "symbolic link: it leaves the source",
        "0/c.png": "symbolic link: its target does not exist",
        "0/d.png": None,
        "0/e": "symbolic link: it leads back to a folder above it",
        "1/b.png": None,
        **({"2": "symbolic link: it leaves the source"} if own else {"2/c.png": None}),
    }
    assert found["s/1/b.png"][1] == "1"


def test_what_is_no_file_any_more_is_not_read(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    os.mkfifo(source / "0/b.png")
    with open_source(source) as opened:
        (source / "0/a.png").unlink()
        (source / "0/a.png").symlink_to(__file__)
        for file, reason in zip(opened.files, ("cannot be read", "not a file"), strict=True):
            with pytest.raises(ImageError, match=reason):
                content(file)


def patched(path: Path, offset: int, value: bytes, *names: str) -> Path:
    """An archive with other bytes at an offset of each entry in its list of members."""
    data = bytearray(packed(path, *names).read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def many_disks(path: Path) -> Path:
    """An archive whose 64-bit end record speaks of three disks."""
    data = packed(path, "0/a.png").read_bytes()
    return written(path, data[:-22] + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 3) + data[-22:])


SIZES = struct.pack("<II", 3 * 2**30, 3 * 2**30)
BAD_ZIPS: list[tuple[str, Callable[[Path], Path]]] = [
    ("more than 8 GiB", lambda p: patched(p, 20, SIZES, "0/a", "0/b", "0/c")),
    ("neither stored nor deflated", lambda p: packed(p, "0/a.png", kind=zipfile.ZIP_LZMA)),
    ("is damaged", lambda p: written(p, b"PK\x03\x04" + bytes(114) + b"PK\x05\x06" + b"\xff" * 18)),
    ("is damaged", many_disks),
]


def h5_with(path: Path, make: Callable[[h5py.File], object]) -> Path:
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        make(file)
    return path


def elsewhere(path: Path) -> Path:
    raw = written(path.parent / "raw", H5_PHOTOS.tobytes())
    external = [(str(raw), 0, H5_PHOTOS.size)]
    create = ("train_set_x", H5_PHOTOS.shape, np.uint8)
    return h5_with(path, lambda file: file.create_dataset(*create, external=external))


def virtual(path: Path) -> Path:
    layout = h5py.VirtualLayout(shape=H5_PHOTOS.shape, dtype=np.uint8)
    layout[...] = h5py.VirtualSource(path.parent / "other.h5", "x", shape=H5_PHOTOS.shape)
    return h5_with(path, lambda file: file.create_virtual_dataset("train_set_x", layout))


def huge(path: Path) -> Path:
    create = ("train_set_x", (40_000, 512, 512, 3), np.uint8)
    return h5_with(path, lambda file: file.create_dataset(*create, chunks=(1, 512, 512, 3)))


BAD_H5: list[tuple[str, Callable[[Path], Path]]] = [
    ("link that may lead out", lambda p: h5(p, train_set_x=h5py.ExternalLink("/etc/passwd", "/x"))),
    ("link that may lead out", lambda p: h5(p, other=h5py.SoftLink("/elsewhere"))),
    ("keeps 'train_set_x' in another file", elsewhere),
    ("keeps 'train_set_x' in another file", virtual),
    ("holds float32 photos", lambda p: h5(p, train_set_x=H5_PHOTOS.astype(np.float32))),
    ("and float64 labels", lambda p: h5(p, train_set_y=np.arange(6.0))),
    ("photos of shape (6, 32, 32)", lambda p: h5(p, train_set_x=H5_PHOTOS[..., 0])),
    ("of shape (6, 32, 96, 1)", lambda p: h5(p, train_set_x=H5_PHOTOS.reshape(6, 32, 96, 1))),
    ("of shape (0, 32, 32, 3)", lambda p: h5(p, train_set_x=H5_PHOTOS[:0])),
    ("labels of shape (5,), not (6,)", lambda p: h5(p, train_set_y=np.arange(5))),
    ("labels of shape (2, 3)", lambda p: h5(p, train_set_y=np.arange(6).reshape(2, 3))),
    ("has no data set 'train_set_y'", lambda p: h5(p, train_set_y=None)),
    ("has neither train_set_x nor test_set_x", lambda p: h5(p, train_set_x=None)),
    ("no data set 'train_set_x'", lambda p: h5_with(p, lambda f: f.create_group("train_set_x"))),
    ("holds too much", huge),
    ("is damaged", lambda p: written(p, h5(p).read_bytes()[:2000])),
]


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


BAD_SOURCES: list[tuple[str, Callable[[Path], Path]]] = [
    ("does not exist", lambda p: p),
    ("is empty", empty),
    ("is empty", lambda p: fill(p, ".hidden", "__MACOSX/a")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: fill(p, "six/a.png", "seven/b.png")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: packed(p, "six/a.png")),
    ("neither a folder nor a .zip", lambda p: written(p, b"label,file\n")),
    ("neither a folder nor a .zip", lambda p: written(p, b"")),
    ("neither a folder nor a .zip", pipe),
    ("cannot be read", lambda p: p.parent / ("x" * 300)),
    ("Not a directory", lambda p: written(p, b"") / "below"),
]


@pytest.mark.parametrize(("reason", "make"), [*BAD_ZIPS, *BAD_H5, *BAD_SOURCES])
def test_hostile_source_is_refused_as_a_whole_in_one_line(
    reason: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceError) as refusal, open_source(path):
        pass
    assert reason in str(refusal.value)
    assert f"'{path}'" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_members_of_an_archive_lead_nowhere_and_damaged_ones_are_refused_alone(
    tmp_path: Path,
) -> None:
    link = zipfile.ZipInfo("0/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["0/a.png", "0/b.png", "../0/up.png", "/etc/0/c.png", "C:\\0\\d.png", "0/../1/e.png"]
    path = packed(tmp_path / "s.zip", *names, link)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 8] |= 1  # encrypted
    path.write_bytes(data)
    with open_source(path) as source:
        contents = {file.origin: file for file in source.files}
        for name in ("s.zip/0/a.png", "s.zip/0/b.png"):
            with pytest.raises(ImageError, match="damaged in the archive"):
                content(contents.pop(name))
        assert all(content(file) == PNG for file in contents.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.zip"]


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_h5_gives_each_row_as_a_photo(shape: tuple[int, ...], tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 3, 4, 6]).reshape(shape)
    with open_source(h5(tmp_path / "any name", train_set_y=labels)) as source:
        assert [(item.split, item.label) for item in source.files] == [
            ("train", label) for label in [*"01234", None]
        ]
        assert source.files[5].fault == f"unknown label: 6 {NONE_OF}"
        for item, pixels in zip(source.files, H5_PHOTOS, strict=True):
            assert np.array_equal(decode(content(item)), pixels)


def test_folder_of_h5_files_gives_both_splits(tmp_path: Path) -> None:
    folder = empty(tmp_path / "kaggle")
    h5(folder / "train_signs.h5", list_classes=np.arange(6))
    nothing = {"train_set_x": None, "train_set_y": None}
    h5(folder / "test_signs.h5", **nothing, test_set_x=H5_PHOTOS, test_set_y=np.arange(6))
    (folder / "README.md").write_text("from Kaggle")
    found = read(folder)
    assert len(found) == 12
    assert found["kaggle/test_signs.h5/test_set_x/4"] == ("test", "4", None)


def test_h5_with_a_damaged_chunk_keeps_the_other_rows(tmp_path: Path) -> None:
    path = h5(tmp_path / "a.h5", train_set_x=None)
    with h5py.File(path, "a") as file:
        shape = (1, *H5_PHOTOS.shape[1:])
        stored = file.create_dataset("train_set_x", data=H5_PHOTOS, chunks=shape, fletcher32=True)
        offset = stored.id.get_chunk_info(3).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 0xFF
    path.write_bytes(data)
    with open_source(path) as source:
        for row, file in enumerate(source.files):
            if row != 3:
                assert np.array_equal(decode(content(file)), H5_PHOTOS[row])
                continue
            with pytest.raises(ImageError, match="damaged in the HDF5 file"):
                content(file)


def test_source_named_as_test_becomes_test(tmp_path: Path) -> None:
    path = fill(tmp_path / "s", "0/a.png")
    with open_source(path) as source:
        assert [item.split for item in as_test(source, path).files] == ["test"]
    path = fill(tmp_path / "both", "train/0/a.png", "test/0/b.png")
    with open_source(path) as source, pytest.raises(SourceError, match="training photos too"):
        as_test(source, path)
