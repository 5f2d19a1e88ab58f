"""One untrusted file: what is kept, what is converted, what is refused and why."""

import hashlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.data.images import MAX_BYTES, MAX_SCANS, StoredPhoto, decode, encode, normalize
from tasks.errors import ImageError
from tests.fixtures.photos import photo

PICTURE = photo(3, 0, 48)
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_in(mode: str) -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def png(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """A colour PNG with this header, whatever `rows` holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


JPEG = saved(Image.fromarray(PICTURE), "JPEG", quality=90)
PNG = saved(Image.fromarray(PICTURE), "PNG")


@pytest.mark.parametrize(("data", "suffix"), [(JPEG, ".jpg"), (PNG, ".png")])
def test_plain_photo_keeps_its_bytes(data: bytes, suffix: str) -> None:
    taken = normalize(data, "IMG_1" + suffix.upper())
    assert taken == StoredPhoto(data, suffix)
    assert taken.name == hashlib.sha256(data).hexdigest()[:32] + suffix


def test_progressive_jpeg_is_plain() -> None:
    data = saved(Image.fromarray(PICTURE), "JPEG", progressive=True)
    assert normalize(data, "a.jpeg").content == data


def test_first_picture_of_a_multi_picture_jpeg_is_the_photo() -> None:
    first, second = (Image.new("RGB", (48, 48), colour) for colour in ("red", "blue"))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    taken = normalize(data, "phone.jpg")
    assert taken.content == data
    assert decode(taken.content)[..., 0].mean() > 240


def test_transparent_parts_become_white() -> None:
    image = picture_in("RGBA")
    image.putpixel((5, 6), (10, 20, 30, 0))
    pixels = decode(normalize(saved(image, "PNG"), "a.png").content)
    assert pixels[6, 5].tolist() == [255, 255, 255]
    pixels[6, 5] = PICTURE[6, 5]
    assert np.array_equal(pixels, PICTURE)


def test_colour_marked_as_transparent_becomes_white() -> None:
    image = Image.fromarray(PICTURE)
    image.putpixel((5, 6), (1, 2, 3))
    data = saved(image, "PNG", transparency=(1, 2, 3))
    pixels = decode(normalize(data, "a.png").content)
    assert pixels[6, 5].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    pixels = decode(normalize(saved(Image.fromarray(deep), "PNG"), "a.png").content)
    assert np.array_equal(pixels[..., 0], np.round(deep / 257).astype(np.uint8))
    assert pixels.shape == (48, 48, 3)


def test_sixteen_bit_colour_png_is_stored_with_eight() -> None:
    deep = (PICTURE.astype(np.uint16) << 8).astype(">u2")
    data = png(48, 48, b"".join(b"\0" + row.tobytes() for row in deep), depth=16)
    taken = normalize(data, "a.png")
    assert taken.content != data
    assert taken.content[24] == 8
    assert np.array_equal(decode(taken.content), PICTURE)


@pytest.mark.parametrize(
    ("image", "kind", "suffix", "tolerance"),
    [
        (picture_in("CMYK"), "JPEG", ".jpg", 12),
        (picture_in("CMYK"), "TIFF", ".tif", 0),
        (picture_in("L"), "JPEG", ".jpg", 12),
        (picture_in("1"), "PNG", ".png", 0),
        (picture_in("LA"), "PNG", ".png", 0),
        (picture_in("P"), "PNG", ".png", 0),
        (picture_in("P"), "GIF", ".gif", 0),
        (picture_in("RGB"), "BMP", ".bmp", 0),
        (picture_in("RGB"), "TIFF", ".tiff", 0),
        (picture_in("RGB"), "WEBP", ".webp", 12),
    ],
)
def test_other_kinds_become_rgb_png(
    image: Image.Image, kind: str, suffix: str, tolerance: float
) -> None:
    taken = normalize(saved(image, kind), "a" + suffix)
    assert taken.suffix == ".png"
    stored = Image.open(io.BytesIO(taken.content))
    assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (48, 48))
    wanted = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode(taken.content) - wanted).mean() <= tolerance


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    lying = Image.fromarray(PICTURE[:, :32])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"exif": exif} if kind == "PNG" else {"tiffinfo": {274: orientation}}
    taken = normalize(saved(lying, kind, **options), "a." + kind.lower())
    upright = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: lambda p: np.rot90(p),
    }[orientation](PICTURE[:, :32])
    assert np.array_equal(decode(taken.content), upright)


def test_rotated_jpeg_is_stored_upright_and_stays_so() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = saved(Image.fromarray(PICTURE[:, :32]), "JPEG", exif=exif)
    taken = normalize(data, "a.jpg")
    assert (taken.suffix, decode(taken.content).shape) == (".png", (32, 48, 3))
    assert normalize(taken.content, taken.name).content == taken.content


def test_metadata_does_not_reach_a_converted_photo() -> None:
    exif = Image.Exif()
    exif[0x010E] = "somebody's name"
    data = saved(picture_in("L"), "JPEG", exif=exif, icc_profile=b"profile")
    assert b"somebody" in data
    taken = normalize(data, "a.jpg").content
    assert b"somebody" not in taken
    assert b"iCCP" not in taken


FRAMES = {"save_all": True, "append_images": [Image.fromarray(photo(1, 1, 48))]}

BAD = [
    ("zero bytes", b"", "a.jpg"),
    ("not an image", b"label,file\n3,a.jpg\n" * 50, "a.jpg"),
    *[
        ("HEIC or AVIF", b"\0\0\0\x18ftyp" + brand + bytes(99), "IMG_0001.HEIC")
        for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
    ],
    ("HEIC or AVIF", b"\0\0\0\x1cftypavif" + bytes(99), "a.jpg"),
    ("HEIC or AVIF", b"\0\0\0\x1cftypMSNK\0\0\0\0miafavis" + bytes(99), "a.avif"),
    ("not an image", b"\0\0\0\x14ftypqt  " + bytes(99), "IMG_0001.MOV"),
    ("truncated", JPEG[: len(JPEG) // 2], "a.jpg"),
    ("animated", saved(picture_in("RGB"), "GIF", **FRAMES), "a.gif"),
    ("animated", saved(picture_in("RGB"), "PNG", **FRAMES), "a.png"),
    ("animated", saved(picture_in("RGB"), "WEBP", **FRAMES), "a.webp"),
    ("animated", saved(picture_in("RGB"), "TIFF", **FRAMES), "a.tif"),
    ("too small: 1x1", saved(Image.new("RGB", (1, 1)), "PNG"), "a.png"),
    ("too small: 500x8", saved(Image.new("RGB", (500, 8)), "JPEG"), "a.jpg"),
    ("too many pixels", png(30_000, 30_000, bytes(1000)), "a.png"),
    ("too many pixels: 8000x8000", png(8_000, 8_000, bytes(1000)), "a.png"),
    ("too large", b"\xff\xd8\xff" + bytes(MAX_BYTES), "a.jpg"),
    ("32-bit pixels", saved(picture_in("F"), "TIFF"), "a.tif"),
    ("compressed TIFF", saved(picture_in("RGB"), "TIFF", compression="tiff_lzw"), "a.tif"),
    ("damaged", PNG[:60] + bytes(40) + PNG[100:], "a.png"),
    ("damaged: more than", JPEG[:-2] + b"\xff\xda\0\2" * MAX_SCANS + JPEG[-2:], "a.jpg"),
]


@pytest.mark.parametrize(("reason", "data", "name"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_file_is_refused_with_its_reason(reason: str, data: bytes, name: str) -> None:
    with pytest.raises(ImageError) as refusal:
        normalize(data, name)
    assert refusal.value.reason.startswith(reason)
    assert str(refusal.value).endswith(f"('{name}')")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "name", "suffix"),
    [
        (JPEG, "upload", ".jpg"),
        (JPEG, "photo.png", ".jpg"),
        (PNG, "photo.jpg", ".png"),
        (saved(picture_in("RGB"), "WEBP", lossless=True), "photo.jpg", ".png"),
    ],
)
def test_a_file_is_read_by_its_content_whatever_its_name(
    data: bytes, name: str, suffix: str
) -> None:
    stored = normalize(data, name)
    assert stored.suffix == suffix
    assert np.array_equal(decode(stored.content), decode(data, name))


def test_hostile_name_cannot_reach_the_terminal() -> None:
    with pytest.raises(ImageError) as refusal:
        normalize(b"", "\x1b[2J\n\udc80.jpg")
    assert str(refusal.value).isprintable()


@settings(deadline=None, max_examples=50)
@given(st.integers(16, 80), st.integers(16, 80), st.integers(0, 2**31))
def test_encoded_pixels_are_a_plain_photo_and_come_back(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    taken = normalize(encode(pixels), "a.png")
    assert taken.content == encode(pixels)
    assert np.array_equal(decode(taken.content), pixels)


SEEDS = [
    (JPEG, ".jpg"),
    (PNG, ".png"),
    (saved(picture_in("P"), "GIF"), ".gif"),
    (saved(picture_in("RGB"), "WEBP"), ".webp"),
    (saved(picture_in("CMYK"), "TIFF"), ".tif"),
    (saved(picture_in("RGB"), "BMP"), ".bmp"),
]


@settings(deadline=None, max_examples=600)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=8),
    st.floats(0.05, 1.5),
)
def test_mangled_file_is_a_photo_or_an_image_error(
    seed: tuple[bytes, str], edits: list[tuple[float, bytes]], length: float
) -> None:
    data = bytearray(seed[0])
    for where, patch in edits:
        # Squared: most of what a decoder trusts stands at the front.
        start = int(where**2 * len(data))
        data[start : start + len(patch)] = patch
    try:
        taken = normalize(bytes(data[: int(length * len(data)) + 1]), "a" + seed[1])
    except ImageError:
        return
    assert decode(taken.content).shape[2] == 3


@pytest.mark.parametrize("turn", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_decoding_gives_the_pixels_that_would_be_stored(mode: str, turn: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    content = saved(picture_in(mode), "PNG", exif=exif)
    assert np.array_equal(decode(content), decode(normalize(content, "a.png").content))
