"""The rendered sample data set: its files, its bytes, its wholeness."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tasks.errors import DataError
from tasks.rendering.sample import contact_sheet, draw, encode, render_sample
from tests.fixtures.photos import LABELS


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "data"
    render_sample(folder, per_class=4)
    return folder


def test_every_label_has_the_same_number_of_photos(sample: Path) -> None:
    assert sorted(path.name for path in (sample / "train").iterdir()) == list(LABELS)
    for label in LABELS:
        assert len(list((sample / "train" / label).iterdir())) == 4


def test_names_are_the_hashes_of_the_stored_bytes(sample: Path) -> None:
    for path, content in contents(sample).items():
        assert Path(path).name == hashlib.sha256(content).hexdigest()[:32] + ".png"


def test_photos_are_colour_pictures_of_64_pixels_a_side(sample: Path) -> None:
    for content in contents(sample).values():
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))


def test_the_same_seed_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    render_sample(tmp_path / "data", per_class=4)
    assert contents(tmp_path / "data") == contents(sample)


def test_another_seed_gives_other_photos(sample: Path, tmp_path: Path) -> None:
    render_sample(tmp_path / "data", per_class=1, seed=21)
    assert not contents(tmp_path / "data").keys() & contents(sample).keys()


def test_a_smaller_sample_is_part_of_a_larger_one(sample: Path, tmp_path: Path) -> None:
    render_sample(tmp_path / "data", per_class=1)
    assert contents(tmp_path / "data").items() < contents(sample).items()


def test_several_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    render_sample(tmp_path / "data", per_class=7)
    held = contents(tmp_path / "data")
    assert len(held) == 42
    for label in range(len(LABELS)):
        for number in range(7):
            content = encode(draw((20, label, number)))
            name = hashlib.sha256(content).hexdigest()[:32]
            assert held[f"train/{label}/{name}.png"] == content


class StopError(Exception):
    """Raised by a listener in the middle of rendering."""


@pytest.mark.parametrize("per_class", [5, 10])
def test_interrupted_rendering_leaves_nothing(tmp_path: Path, per_class: int) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > 0:
            raise StopError

    with pytest.raises(StopError):
        render_sample(tmp_path / "data", stop, per_class=per_class)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_in_place_until_all_is(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool]] = []

    def look(what: str, done: int, total: int) -> None:
        seen.append((done, total, (tmp_path / "data").exists()))

    render_sample(tmp_path / "data", look, per_class=5)
    assert seen == [(0, 30, False), (10, 30, False), (20, 30, False), (30, 30, False)]
    assert (tmp_path / "data").exists()


def test_a_damaged_sample_is_made_whole_again(sample: Path, tmp_path: Path) -> None:
    render_sample(tmp_path / "data", per_class=4)
    first, second = sorted((tmp_path / "data").rglob("*.png"))[:2]
    first.unlink()
    second.write_bytes(b"half")
    render_sample(tmp_path / "data", per_class=4)
    assert contents(tmp_path / "data") == contents(sample)


def test_other_photos_are_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "data" / "train" / "0" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"a photo")
    with pytest.raises(DataError, match=r"Received: 1 of 1 files\. Move the folder away"):
        render_sample(tmp_path / "data", per_class=1)
    assert contents(tmp_path / "data") == {"train/0/mine.jpg": b"a photo"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_photos_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="per_class=0"):
        render_sample(tmp_path / "data", per_class=0)


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
def test_encoded_pictures_decode_to_themselves(picture: np.ndarray) -> None:
    with Image.open(io.BytesIO(encode(picture))) as decoded:
        assert np.array_equal(np.asarray(decoded), picture)


def test_the_contact_sheet_has_a_row_for_each_label(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (150 + 2 * 96, 34 + 6 * 96)
