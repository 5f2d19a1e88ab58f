"""What an import may come from, and what is refused before a file of it is touched."""

import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.data.images import MAX_BYTES, decode, encode
from tasks.data.sources import SourceFile, as_test, open_source
from tasks.errors import ImageError, SourceError
from tests.fixtures.photos import photo

PNG = encode(photo(2, 0, 32))
H5_PHOTOS = np.stack([photo(label, 0, 32) for label in range(6)])


def read(path: Path) -> list[tuple[str, str, str | None, str | None]]:
    """Origin, split, label and fault of each item, all of which can be read or are faulty."""
    with open_source(path) as source:
        for item in source.files:
            assert item.fault or content(item)
        return [(item.origin, item.split, item.label, item.fault) for item in source.files]


def content(item: SourceFile) -> bytes:
    assert item.read is not None
    return item.read(MAX_BYTES)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def packed(path: Path, *members: str | zipfile.ZipInfo, data: bytes = PNG) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, data)
    return path


def h5(path: Path, **changes: Any) -> Path:
    sets: dict[str, Any] = {"train_set_x": H5_PHOTOS, "train_set_y": np.arange(6)} | changes
    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            if value is not None:
                file[name] = value
    return path


def test_class_folder_tells_the_labels(tmp_path: Path) -> None:
    source = fill(tmp_path / "signs", "0/a.png", "5/b.png", "5/person/c.png")
    assert read(source) == [
        ("signs/0/a.png", "train", "0", None),
        ("signs/5/b.png", "train", "5", None),
        ("signs/5/person/c.png", "train", "5", None),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(f"{day}/3/a.png", "train") for day in ("2026-11-27", "2026-11-28")],
        ("2026-11-28/person/4/a.png", "train"),
        *[(f"train/{label}/a.png", "train") for label in (0, 1)],
        ("valid/2/a.png", "train"),
        ("Val/2/b.png", "train"),
        ("validation/2/c.png", "train"),
        ("test/5/a.png", "test"),
        ("testing/monday/5/b.png", "test"),
    ],
)
def test_days_and_splits_of_exporters_are_passed_through(
    name: str, split: str, tmp_path: Path
) -> None:
    # Beside a second day, in which every label and another split is found, too.
    names = [name, "2026-11-29/0/x.png", "test/0/y.png"]
    for path in (fill(tmp_path / "s", *names), packed(tmp_path / "s.zip", *names)):
        found = {origin.partition("/")[2]: place for origin, *place in read(path)}
        label = next(part for part in name.split("/") if part in "012345")
        assert found == {
            name: [split, label, None],
            "2026-11-29/0/x.png": ["train", "0", None],
            "test/0/y.png": ["test", "0", None],
        }


def test_folders_beside_label_folders_are_never_searched_for_labels(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png", "6/0/b.png", "2026-11-28/1/c.png")
    assert [label for _, _, label, _ in read(source)] == ["0", None, None]


@pytest.mark.parametrize("top", ["", "signs/", "home/me/signs/"])
def test_single_folders_above_the_labels_are_passed_through(top: str, tmp_path: Path) -> None:
    names = [top + "train/0/a.png", top + "Test/1/b.png", "README.md"]
    for path in (fill(tmp_path / "photos", *names), packed(tmp_path / "photos.zip", *names)):
        found = {(split, label) for _, split, label, _ in read(path)}
        assert found == {("train", "0"), ("test", "1"), ("train", None)}


def test_files_without_a_label_say_why(tmp_path: Path) -> None:
    names = ["0/a.png", "6/b.png", "six/d.png", "e.png"]
    faults = {origin: fault for origin, _, _, fault in read(fill(tmp_path / "s", *names))}
    assert faults == {
        "s/0/a.png": None,
        "s/6/b.png": "unknown label folder: '6' is none of 0, 1, 2, 3, 4, 5",
        "s/six/d.png": "unknown label folder: 'six' is none of 0, 1, 2, 3, 4, 5",
        "s/e.png": "no label: it is in no label folder",
    }


def test_hidden_files_and_clutter_are_only_counted(tmp_path: Path) -> None:
    names = ["0/a.png", "0/.DS_Store", "0/Thumbs.db", "__MACOSX/0/._a.png", ".git/x"]
    for path in (fill(tmp_path / "s", *names), packed(tmp_path / "s.zip", *names)):
        with open_source(path) as source:
            assert (len(source.files), source.ignored) == (1, 4)


def test_links_to_files_elsewhere_are_not_followed(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    secret = fill(tmp_path / "elsewhere", "0/secret.png")
    (source / "0/b.png").symlink_to(secret / "0/secret.png")
    (source / "0/c.png").symlink_to(source / "nothing")
    (source / "0/d.png").symlink_to("a.png")
    (source / "0/e").symlink_to(source)
    assert {(origin, fault) for origin, _, _, fault in read(source)} == {
        ("s/0/a.png", None),
        ("s/0/b.png", "symbolic link: it leaves the source"),
        ("s/0/c.png", "symbolic link: its target does not exist"),
        ("s/0/d.png", None),
        ("s/0/e", "symbolic link: it leads back to a folder above it"),
    }


def test_linked_label_folders_of_ones_own_are_followed(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    elsewhere = fill(tmp_path / "elsewhere", "one/b.png", "day/2/c.png")
    (source / "1").symlink_to(elsewhere / "one")
    (source / "5").symlink_to(elsewhere / "day" / "2")
    assert read(source) == [
        ("s/0/a.png", "train", "0", None),
        ("s/1/b.png", "train", "1", None),
        ("s/5/c.png", "train", "5", None),
    ]


def test_linked_folders_of_another_user_are_not_followed(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    theirs = fill(tmp_path / "theirs", "1/secret.png")
    (source / "1").symlink_to(theirs / "1")
    if os.getuid() != 0:
        pytest.skip("only root can give a folder to another user")
    os.chown(theirs / "1", 12345, -1)
    assert ("s/1", "train", None, "symbolic link: it leaves the source") in read(source)


def test_file_swapped_for_a_link_after_listing_is_not_followed(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    with open_source(source) as opened:
        (source / "0/a.png").unlink()
        (source / "0/a.png").symlink_to(__file__)
        with pytest.raises(ImageError, match="cannot be read"):
            content(opened.files[0])


def test_pipe_does_not_hang_the_import(tmp_path: Path) -> None:
    source = fill(tmp_path / "s", "0/a.png")
    os.mkfifo(source / "0/b.png")
    with open_source(source) as opened, pytest.raises(ImageError, match="not a file"):
        content(opened.files[1])
    with (
        pytest.raises(SourceError, match="neither a folder nor"),
        open_source(source / "0/b.png"),
    ):
        pass


def zip_info(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def zip_with_flag(path: Path) -> Path:
    """An archive whose member says that it is encrypted."""
    data = bytearray(packed(path, "0/a.png").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


def zip_with_size(path: Path, packed_size: int, size: int) -> Path:
    """An archive whose list states other sizes than its member has."""
    data = bytearray(packed(path, "0/a.png").read_bytes())
    struct.pack_into("<II", data, data.index(b"PK\x01\x02") + 20, packed_size, size)
    path.write_bytes(data)
    return path


def nine_gib(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"0/{number}.png", PNG)
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        struct.pack_into("<II", data, at + 20, 3 * 2**30, 3 * 2**30)
    path.write_bytes(data)
    return path


def zip_cut(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(10) + b"\xff" * 8)
    return path


def zip_on_many_disks(path: Path) -> Path:
    """An archive whose 64-bit end record speaks of three disks."""
    data = packed(path, "0/a.png").read_bytes()
    path.write_bytes(data[:-22] + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 3) + data[-22:])
    return path


def zip_with_long_list(path: Path) -> Path:
    """An archive that says its list of members takes 20 MB, and has that much."""
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 20 * 2**20, 0, 0)
    path.write_bytes(bytes(20 * 2**20) + end)
    return path


def lzma_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("0/a.png", PNG)
    return path


BAD_ZIPS: list[tuple[str, Callable[[Path], Path]]] = [
    ("leaves its folder", lambda p: packed(p, "0/a.png", "0/../../evil.png")),
    ("leaves its folder", lambda p: packed(p, "0/a.png", "..\\evil.png")),
    ("leaves its folder", lambda p: packed(p, "0/a.png", "../")),
    ("absolute", lambda p: packed(p, "0/a.png", "/etc/evil.png")),
    ("absolute", lambda p: packed(p, "0/a.png", "C:/evil.png")),
    ("symbolic link", lambda p: packed(p, "0/a.png", zip_info("0/b.png", stat.S_IFLNK | 0o777))),
    ("special file", lambda p: packed(p, "0/a.png", zip_info("0/b.png", stat.S_IFIFO | 0o777))),
    ("encrypted", zip_with_flag),
    ("bomb ('0/a.png'", lambda p: packed(p, "0/a.png", data=bytes(20 * 2**20))),
    ("is a bomb (", lambda p: packed(p, *(f"0/{n}.png" for n in range(20)), data=bytes(2**19))),
    ("more than 8 GiB", nine_gib),
    ("overlap", lambda p: zip_with_size(p, 10_000_000, 10_000_000)),
    ("neither stored nor deflated", lzma_zip),
    ("damaged", zip_cut),
    ("damaged", zip_on_many_disks),
    ("too many members", zip_with_long_list),
]


@pytest.mark.parametrize(("reason", "make"), BAD_ZIPS)
def test_hostile_archive_is_refused_as_a_whole(
    reason: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "bad.zip")
    with pytest.raises(SourceError) as refusal, open_source(path):
        pass
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.zip"}


def test_damaged_member_is_set_aside_alone(tmp_path: Path) -> None:
    path = packed(tmp_path / "s.zip", "0/a.png", "0/b.png")
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    with open_source(path) as source:
        with pytest.raises(ImageError, match="damaged in the archive"):
            content(source.files[0])
        assert content(source.files[1]) == PNG


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_h5_gives_each_row_as_a_photo(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = h5(tmp_path / "any name", train_set_y=np.arange(6).reshape(shape))
    with open_source(path) as source:
        assert [(item.split, item.label) for item in source.files] == [
            ("train", str(label)) for label in range(6)
        ]
        for item, pixels in zip(source.files, H5_PHOTOS, strict=True):
            assert np.array_equal(decode(content(item)), pixels)


def test_folder_of_h5_files_gives_both_splits(tmp_path: Path) -> None:
    folder = tmp_path / "kaggle"
    folder.mkdir()
    h5(folder / "train_signs.h5", list_classes=np.arange(6))
    nothing = {"train_set_x": None, "train_set_y": None}
    h5(folder / "test_signs.h5", **nothing, test_set_x=H5_PHOTOS, test_set_y=np.arange(6))
    (folder / "README.md").write_text("from Kaggle")
    found = read(folder)
    assert len(found) == 12
    assert ("kaggle/test_signs.h5/test_set_x/4", "test", "4", None) in found


def test_h5_label_outside_is_set_aside_by_row(tmp_path: Path) -> None:
    path = h5(tmp_path / "a.h5", train_set_y=np.array([0, 1, 2, 3, 4, 6]))
    assert read(path)[5] == (
        "a.h5/train_set_x/5",
        "train",
        None,
        "unknown label: 6 is none of 0, 1, 2, 3, 4, 5",
    )


def stored_elsewhere(path: Path) -> Path:
    (path.parent / "raw").write_bytes(H5_PHOTOS.tobytes())
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        file.create_dataset(
            "train_set_x",
            H5_PHOTOS.shape,
            np.uint8,
            external=[(str(path.parent / "raw"), 0, H5_PHOTOS.size)],
        )
    return path


def virtual(path: Path) -> Path:
    project = h5py.VirtualLayout(shape=H5_PHOTOS.shape, dtype=np.uint8)
    project[...] = h5py.VirtualSource(path.parent / "other.h5", "x", shape=H5_PHOTOS.shape)
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        file.create_virtual_dataset("train_set_x", project)
    return path


def half(path: Path) -> Path:
    data = h5(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def group(path: Path) -> Path:
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        file.create_group("train_set_x")
    return path


def compressed_bomb(path: Path) -> Path:
    shape = (40_000, 512, 512, 3)
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        file.create_dataset("train_set_x", shape, np.uint8, chunks=(1, 512, 512, 3))
    return path


def foreign_filter(path: Path) -> Path:
    """A data set that says it needs the plug-in of a filter, which would be loaded."""
    with h5py.File(h5(path, train_set_x=None), "a") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((1, *H5_PHOTOS.shape[1:]))
        plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple(H5_PHOTOS.shape)
        h5py.h5d.create(file.id, b"train_set_x", h5py.h5t.NATIVE_UINT8, space, plan)
    return path


BAD_H5: list[tuple[str, Callable[[Path], Path]]] = [
    ("link that may lead out", lambda p: h5(p, train_set_x=h5py.ExternalLink("/etc/passwd", "/x"))),
    ("link that may lead out", lambda p: h5(p, other=h5py.SoftLink("/elsewhere"))),
    ("keeps 'train_set_x' in another file", stored_elsewhere),
    ("keeps 'train_set_x' in another file", virtual),
    ("holds float32 photos", lambda p: h5(p, train_set_x=H5_PHOTOS.astype(np.float32))),
    ("holds photos of shape (6, 32, 32)", lambda p: h5(p, train_set_x=H5_PHOTOS[..., 0])),
    (
        "holds photos of shape (6, 32, 96, 1)",
        lambda p: h5(p, train_set_x=H5_PHOTOS.reshape(6, 32, 96, 1)),
    ),
    ("holds photos of shape (0, 32, 32, 3)", lambda p: h5(p, train_set_x=H5_PHOTOS[:0])),
    ("has 6 photos but 5 labels", lambda p: h5(p, train_set_y=np.arange(5))),
    ("holds float64 labels", lambda p: h5(p, train_set_y=np.arange(6.0))),
    ("holds labels of shape (2, 3)", lambda p: h5(p, train_set_y=np.arange(6).reshape(2, 3))),
    ("has no data set 'train_set_y'", lambda p: h5(p, train_set_y=None)),
    ("has neither train_set_x nor test_set_x", lambda p: h5(p, train_set_x=None)),
    ("has no data set 'train_set_x'", group),
    ("holds too much", compressed_bomb),
    ("a filter that is not part of h5py", foreign_filter),
    ("is damaged", half),
]


@pytest.mark.parametrize(("reason", "make"), BAD_H5)
def test_hostile_h5_is_refused_as_a_whole(
    reason: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as refusal, open_source(make(tmp_path / "a")):
        pass
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def file_of(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


BAD_SOURCES: list[tuple[str, Callable[[Path], Path]]] = [
    ("does not exist", lambda p: p),
    ("is empty", empty),
    ("is empty", lambda p: fill(p, ".hidden", "__MACOSX/a")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: fill(p, "six/a.png", "seven/b.png")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: fill(p, "a.png")),
    ("has no folder named 0, 1, 2, 3, 4, 5", lambda p: packed(p, "six/a.png")),
    ("neither a folder nor a .zip", file_of(b"label,file\n")),
    ("neither a folder nor a .zip", file_of(b"")),
    ("cannot be read", lambda p: p.parent / ("x" * 300)),
    ("Not a directory", lambda p: file_of(b"")(p) / "below"),
]


@pytest.mark.parametrize(("reason", "make"), BAD_SOURCES)
def test_source_that_is_none_is_refused_in_one_line(
    reason: str, make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "source")
    with pytest.raises(SourceError) as refusal, open_source(path):
        pass
    assert reason in str(refusal.value)
    assert f"'{path}'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_source_named_as_test_becomes_test(tmp_path: Path) -> None:
    path = fill(tmp_path / "s", "0/a.png")
    with open_source(path) as source:
        assert [item.split for item in as_test(source, path).files] == ["test"]
    path = fill(tmp_path / "both", "train/0/a.png", "test/0/b.png")
    with open_source(path) as source, pytest.raises(SourceError, match="training photos too"):
        as_test(source, path)


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as _archive:
    for _name in ("signs/0/a.png", "signs/5/b.png", "signs/0/c.png"):
        _archive.writestr(_name, PNG[:200])


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=6))
def test_mangled_archive_is_read_or_refused(
    tmp_path: Path, edits: list[tuple[float, bytes]]
) -> None:
    data = bytearray(ZIP.getvalue())
    for where, patch in edits:
        # Counted from the back, where the list of members stands.
        start = len(data) - 1 - int(where**2 * (len(data) - 1))
        data[start : start + len(patch)] = patch
    path = tmp_path / "mangled.zip"
    path.write_bytes(data)
    try:
        with open_source(path) as source:
            for item in source.files:
                if item.read is not None:
                    assert len(item.read(1000)) <= 1000
    except (SourceError, ImageError):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["mangled.zip"]


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
        results = []
        for file in source.files:
            try:
                results.append(np.array_equal(decode(content(file)), H5_PHOTOS[len(results)]))
            except ImageError as error:
                results.append(error.reason.split(":")[0])
    assert results == [True] * 3 + ["damaged in the HDF5 file"] + [True] * 2
