"""Decode, crop and resize photos."""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tasks.errors import ImageError

SOFTNESS = 0.5
"""Standard deviation in pixels of the blur of a reduced photo; see `shrink`."""


def shrink(picture: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    """Bring one picture to the size every photo is trained, scored and predicted at.

    A photo that was larger is softened as well: thumbnails are softer than an average
    over areas leaves it, and with this its finest detail falls off as theirs does
    (docs/accuracy.md). A photo that comes at that size keeps its pixels.

    Args:
        picture: uint8, (height, width, 3), RGB.
        detail: side of the result in pixels.

    Returns:
        uint8, (detail, detail, 3); a new array.
    """
    small = resize_square(picture, detail)
    if min(picture.shape[:2]) <= detail:
        return small
    softened: NDArray[np.uint8] = cv2.GaussianBlur(small, (0, 0), SOFTNESS)
    return softened


def resize_square(picture: NDArray[np.uint8], detail: int) -> NDArray[np.uint8]:
    """Bring the largest central square to one size.

    Reducing averages over areas, so that no pixel is dropped and fine patterns do not
    alias; enlarging is bilinear.

    Args:
        picture: uint8, (height, width, 3), RGB.
        detail: side of the result in pixels.

    Returns:
        uint8, (detail, detail, 3); a new array.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(picture[top : top + side, left : left + side])
    if side == detail:
        return square.copy()
    method = cv2.INTER_AREA if side > detail else cv2.INTER_LINEAR
    shrunk: NDArray[np.uint8] = cv2.resize(square, (detail, detail), interpolation=method)
    return shrunk


Read = Callable[[int], bytes]
"""`read(limit)` gives at most `limit` bytes of a file, or raises `ImageError`."""

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
"""Checked from the header, before anything is decoded."""

LARGE_PIXELS = 16_000_000
"""Above it a picture is reduced while it is decoded, where its caller allows that."""

MIN_SIDE = 16
MAX_SCANS = 64
"""A progressive JPEG has about ten; one of thousands is made to keep a decoder busy."""

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}
"""The formats that are read at all, each with the file name endings it goes by."""

_STORED = ("JPEG", "PNG")
_PHONES = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif")
"""Kinds of HEIF, as they stand after `ftyp`; its decoders are no part of this project."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright; others are upright."""

_PNG_DEPTH = 24  # offset of the bit depth in the first chunk


@dataclass(frozen=True)
class Photo:
    """A photo as it is stored: decodable, RGB, upright.

    Args:
        content: the file's bytes.
        suffix: `.jpg` or `.png`.
    """

    content: bytes
    suffix: str

    @property
    def name(self) -> str:
        """First 32 hexadecimal digits of the content's SHA-256, and the suffix."""
        return hashlib.sha256(self.content).hexdigest()[:32] + self.suffix


def read_photo(data: bytes, name: str) -> Photo:
    """Check one file that anybody may have made, and bring it into the stored form.

    A plain photo (8-bit RGB JPEG or PNG, upright) keeps its bytes. Everything else
    becomes an 8-bit RGB PNG without metadata: EXIF rotation is applied, transparent
    parts are put on white, 16-bit grey is scaled, CMYK and palettes are converted.
    Colour profiles are not applied. Of a multi-picture JPEG (phones write them) the
    first picture is the photo.

    Args:
        data: the file's bytes.
        name: the file's name; its ending must not contradict the content.

    Returns:
        The photo as it is stored.

    Raises:
        ImageError: the file is not a usable photo; `reason` says why.
    """
    with _faults_told(name):
        image = _loaded(data, name)
        if _is_plain(image, data):
            suffix = SUFFIXES["PNG" if image.format == "PNG" else "JPEG"][0]
            return Photo(data, suffix)
        return Photo(_png(_upright(image)), ".png")


def look(data: bytes, name: str = "", least: int | None = None) -> NDArray[np.uint8]:
    """Check one file that anybody may have made, and decode it without storing it.

    Args:
        data: the file's bytes.
        name: the file's name, as for `read_photo`; without one its ending is not compared.
        least: reduce a large picture to sides of at least this many pixels, which takes a
            fraction of the memory.

    Returns:
        uint8, (height, width, 3), RGB; the pixels that `read_photo` would store.

    Raises:
        ImageError: the file is not a usable photo; `reason` says why.
    """
    with _faults_told(name):
        image = _opened(data, name)
        if least is not None and _is_large(image):
            turn, rgb = _turn(image), _reduced(image, least)
            return np.array(rgb if turn is None else rgb.transpose(turn), dtype=np.uint8)
        return np.array(_upright(image), dtype=np.uint8)


def is_large(data: bytes) -> bool:
    """Whether decoding this file takes much memory; reads its header only.

    Raises:
        ImageError: the file is not a usable photo.
    """
    with _faults_told(""):
        return _is_large(_opened(data, ""))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels as PNG; the same pixels give the same bytes.

    Args:
        pixels: uint8, (height, width, 3), RGB.

    Returns:
        The file's bytes.
    """
    return _png(Image.fromarray(pixels, "RGB"))


def printable(text: str) -> str:
    """Make a foreign name safe to show: one line, no control characters, valid UTF-8."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def _png(image: Image.Image) -> bytes:
    image.info = {}  # profile, gamma and resolution would be written too
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _loaded(data: bytes, name: str) -> Image.Image:
    image = _opened(data, name)
    image.load()
    return image


def _opened(data: bytes, name: str) -> Image.Image:
    """Check everything that the header tells; nothing is decoded yet."""
    _check_length(data)
    if data[4:8] == b"ftyp" and data[8:12] in _PHONES:
        raise ImageError("HEIC or AVIF, as phones may save photos: not read; export it as JPEG")
    image = _open(data, tuple(SUFFIXES))
    _check_suffix(image, name)
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError("animated: more than one frame; save one frame as a picture")
    return image


def _is_large(image: Image.Image) -> bool:
    return image.width * image.height > LARGE_PIXELS


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """Average a picture down in bands, so that only one copy of its full size exists."""
    factor = max(1, min(image.size) // least)
    image.draft("RGB", (image.width // factor, image.height // factor))  # JPEG only
    image.load()
    factor = max(1, min(image.size) // least)
    width, height = image.width // factor, image.height // factor
    small = Image.new("RGB", (width, height))
    for top in range(0, height, 64):
        bottom = min(top + 64, height)
        band = image.crop((0, top * factor, width * factor, bottom * factor))
        small.paste(_to_rgb(band).reduce(factor), (0, top))
    return small


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"too many pixels: {width}x{height}, more than {MAX_PIXELS // 10**6} megapixels"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"too small: {width}x{height} pixels, less than {MIN_SIDE} a side")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"damaged: more than {MAX_SCANS} scans in one JPEG")
    if any(tile.codec_name == "libtiff" for tile in image.tile):
        # One more C library for hostile files to reach, and it writes to standard error.
        raise ImageError("compressed TIFF: only plain ones are read; save it as PNG")
    return image


def _check_length(data: bytes) -> None:
    if not data:
        raise ImageError("zero bytes: the file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"too large: more than {MAX_BYTES // 2**20} MB")


def _check_suffix(image: Image.Image, name: str) -> None:
    suffix = PurePath(name).suffix.lower()
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    if suffix and suffix not in SUFFIXES[kind]:
        raise ImageError(
            f"wrong extension: the content is {kind}, the name says {printable(suffix)!r}; "
            f"rename it to {SUFFIXES[kind][0]}"
        )


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.mode != "RGB" or image.has_transparency_data:
        return False
    # Pillow shows 16 bits a channel as plain RGB; only the header tells.
    if image.format == "PNG" and data[_PNG_DEPTH] != 8:
        return False
    return image.format in ("JPEG", "MPO", "PNG") and _turn(image) is None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("32-bit pixels: their range is unknown; save it with 8 or 16 bits")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _TURNS.get(image.getexif().get(_ORIENTATION, 1))


@contextmanager
def _faults_told(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError` with a reason and the name."""
    shown = printable(name)
    with warnings.catch_warnings():
        # Threads share the filters: naming Pillow's alone does no harm if it outlives this.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except ImageError as error:
            raise ImageError(error.reason, shown) from error
        except Image.DecompressionBombError as error:
            limit = MAX_PIXELS // 10**6
            raise ImageError(f"too many pixels: more than {limit} megapixels", shown) from error
        except UnidentifiedImageError as error:
            raise ImageError("not an image: no format we read", shown) from error
        except Exception as error:  # decoders raise what they like on a damaged file
            raise ImageError(_reason(error), shown) from error


def _reason(error: Exception) -> str:
    told = " ".join(printable(str(error)).split()) or type(error).__name__
    kind = "truncated" if "truncated" in told.lower() else "damaged"
    return f"{kind}: it cannot be decoded to the end ({told[:120]})"
