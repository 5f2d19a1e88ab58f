"""One untrusted file: what is kept, what is converted, what is refused and why."""

import hashlib
import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.data.images import LARGE_PIXELS, MAX_BYTES, MAX_SCANS, decode, is_large, normalize
from tasks.errors import ImageError
from tests.fixtures.photos import photo

PICTURE = photo(3, 0, 48)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_in(mode: str) -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


RGB = picture_in("RGB")
JPEG, PNG, BMP = saved(RGB, "JPEG", quality=90), saved(RGB, "PNG"), saved(RGB, "BMP")
MPO = saved(Image.new("RGB", (48, 48), "red"), "MPO", save_all=True, append_images=[RGB])
PROGRESSIVE = saved(RGB, "JPEG", progressive=True)


@pytest.mark.parametrize("data", [JPEG, PNG, MPO, PROGRESSIVE], ids=["JPEG", "PNG", "MPO", "prog"])
def test_a_plain_photo_keeps_its_bytes_whatever_its_name(data: bytes) -> None:
    suffix = ".png" if data == PNG else ".jpg"
    for name in ("IMG_1.JPG", "upload", "photo.png"):
        assert normalize(data, name) == (hashlib.sha256(data).hexdigest()[:32] + suffix, data)
    assert data != MPO or decode(data)[..., 0].mean() > 240


OTHERS = "1 PNG,LA PNG,P PNG,CMYK JPEG,CMYK TIFF,L JPEG,P GIF,RGB BMP,RGB TIFF,RGB WEBP,RGB AVIF"


@pytest.mark.parametrize("kind", OTHERS.split(","))
def test_other_kinds_become_rgb_png_without_metadata(kind: str) -> None:
    exif, (mode, name) = Image.Exif(), kind.split()
    exif[0x010E] = "somebody's name"
    more = {"exif": exif, "icc_profile": b"profile"} if name == "JPEG" else {}
    _, content = normalize(saved(picture_in(mode), name, **more), "a.jpg")
    stored = Image.open(io.BytesIO(content))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (48, 48))
    wanted = np.asarray(picture_in(mode).convert("RGB")).astype(int)
    assert np.abs(decode(content) - wanted).mean() <= 12 * (name in ("JPEG", "WEBP", "AVIF"))
    assert b"somebody" not in content
    assert b"iCCP" not in content


def test_transparent_parts_become_white_and_sixteen_bits_eight() -> None:
    image, marked = picture_in("RGBA"), picture_in("RGB")
    image.putpixel((5, 6), (10, 20, 30, 0))
    marked.putpixel((5, 6), (1, 2, 3))
    for data in (saved(image, "PNG"), saved(marked, "PNG", transparency=(1, 2, 3))):
        pixels = decode(normalize(data, "a.png")[1])
        assert pixels[6, 5].tolist() == [255, 255, 255]
        pixels[6, 5] = PICTURE[6, 5]
        assert np.array_equal(pixels, PICTURE)
    deep = PICTURE[..., 0].astype(np.uint16) * 257
    color = cv2.imencode(".png", deep[..., np.newaxis].repeat(3, axis=2))[1].tobytes()
    for data in (saved(Image.fromarray(deep), "PNG"), color):
        pixels = decode(normalize(data, "a.png")[1])
        assert np.array_equal(pixels[..., 0], PICTURE[..., 0])


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_the_upright_pixels_are_decoded_and_stored(mode: str, orientation: int, turns: int) -> None:
    lying = picture_in("L").crop((0, 0, 32, 48))
    content = saved(lying.convert(mode), "PNG", exif=turned(orientation))
    name, stored = normalize(content, "a.png")
    upright = np.rot90(np.asarray(lying.convert("RGB")), turns)
    assert np.array_equal(decode(content), upright)
    assert np.array_equal(decode(stored), upright)
    assert normalize(stored, name) == (name, stored)


@pytest.mark.parametrize("kind", ["RGB JPEG", "CMYK JPEG", "P PNG", "L TIFF"])
def test_a_large_photo_is_reduced_while_it_is_decoded(kind: str) -> None:
    side = int(LARGE_PIXELS**0.5)
    mode, name = kind.split()
    image = Image.fromarray(photo(2, 1)).resize((side + 8, side)).convert(mode)
    options = {"PNG": {"compress_level": 1}, "TIFF": {"tiffinfo": {274: 6}}}.get(name, {})
    data = saved(image, name, **({} if name == "TIFF" else {"exif": turned(6)}), **options)
    assert is_large(data)
    assert not is_large(JPEG)
    small = decode(data, min_side=256)
    assert 256 <= min(small.shape[:2]) < 512
    wanted = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    wanted = wanted.resize(small.shape[1::-1])
    assert np.abs(small.astype(int) - np.asarray(wanted)).mean() < 4


FRAMES = {"save_all": True, "append_images": [Image.fromarray(photo(1, 1, 48))]}
BAD = [
    ("zero bytes", b""),
    ("not an image", b"label,file\n3,a.jpg\n" * 50),
    *[("HEIC", b"\0\0\0\x18ftyp" + brand + bytes(99)) for brand in (b"heic", b"hevx", b"mif1")],
    ("HEIC", b"\0\0\0\x1cftypMSNK\0\0\0\0miafheic" + bytes(99)),
    ("not an image", b"\0\0\0\x18ftypavif" + bytes(99)),
    ("truncated", JPEG[: len(JPEG) // 2]),
    *[("animated", saved(RGB, kind, **FRAMES)) for kind in ("GIF", "PNG", "WEBP", "TIFF")],
    ("too small: 1x1", saved(Image.new("RGB", (1, 1)), "PNG")),
    ("too small: 500x8", saved(Image.new("RGB", (500, 8)), "JPEG")),
    *[
        (f"too many pixels{text}", BMP[:18] + struct.pack("<ii", side, side) + BMP[26:])
        for text, side in (("", 30_000), (": 8000x8000", 8_000))
    ],
    ("too large", b"\xff\xd8\xff" + bytes(MAX_BYTES)),
    ("32-bit pixels", saved(picture_in("F"), "TIFF")),
    ("compressed TIFF", saved(RGB, "TIFF", compression="tiff_lzw")),
    ("damaged", PNG[:60] + bytes(40) + PNG[100:]),
    ("damaged: more than", JPEG[:-2] + b"\xff\xda\0\2" * MAX_SCANS + JPEG[-2:]),
]


@pytest.mark.parametrize(("reason", "data"), BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_file_is_refused_with_its_reason(reason: str, data: bytes) -> None:
    with pytest.raises(ImageError) as refusal:
        normalize(data, "\x1b[2J\n\udc80.jpg")
    assert refusal.value.reason.startswith(reason)
    assert str(refusal.value).endswith("\\x1b[2J\\n\\udc80.jpg')")
    assert str(refusal.value).isprintable()


SEEDS = [JPEG, PNG, BMP, *(saved(RGB, kind) for kind in ("GIF", "WEBP", "AVIF", "TIFF"))]


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=8),
    st.floats(0.05, 1.5),
)
def test_mangled_files_raise_image_errors(seed: bytes, edits: Any, length: float) -> None:
    data = bytearray(seed)
    for where, patch in edits:
        # Squared: most of what a decoder trusts stands at the front.
        start = int(where**2 * len(data))
        data[start : start + len(patch)] = patch
    try:
        _, content = normalize(bytes(data[: int(length * len(data)) + 1]), "a")
    except ImageError:
        return
    assert decode(content).shape[2] == 3
