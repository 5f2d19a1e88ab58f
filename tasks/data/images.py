"""Decode, normalize, resize and hash photos from untrusted files."""

import hashlib
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import cv2
import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from tasks.errors import DataError, ImageError
from tasks.params import PreprocessParams
from tasks.stage import Progress

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
Read = Callable[[int], bytes]
"""`read(limit)` returns at most `limit` bytes of a file, or raises `ImageError`."""
Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # checked in the header, before decoding
LARGE_PIXELS = 16_000_000  # above it, `decode` reduces a photo while decoding it, if asked to
MIN_SIDE = 16
MAX_SCANS = 64  # a progressive JPEG has about ten; thousands are made to keep a decoder busy
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
ORIENTATION = int(ExifTags.Base.Orientation)
_HEIC = re.compile(
    rb"....ftyp(?!.{0,60}avi[fs]).{0,1016}?(hei[cxms]|hev[cxms]|mif[12]|miaf|msf1)", re.S
)


def normalize(data: bytes, name: str) -> tuple[str, bytes]:
    """Check an untrusted file; its name, of the content's SHA-256, and content in `data/`.

    An upright 8-bit RGB JPEG or PNG keeps its bytes. Everything else becomes an upright 8-bit
    RGB PNG without metadata, on white; color profiles are not applied.
    """
    with _decoder_errors(name):
        image = _open(data)
        image.load()
        kept = _keeps_its_bytes(image, data)
        content = data if kept else _png(_to_rgb(ImageOps.exif_transpose(image)))
    suffix = ".jpg" if kept and image.format != "PNG" else ".png"
    return hashlib.sha256(content).hexdigest()[:32] + suffix, content


def decode(data: bytes, name: str = "", min_side: int | None = None) -> Pixels:
    """Decode an untrusted file as `normalize` does; a large photo to no less than `min_side`."""
    with _decoder_errors(name):
        image: Image.Image = _open(data)
        if min_side is not None and image.width * image.height > LARGE_PIXELS:
            image = _reduced(image, min_side)
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


def is_large(data: bytes) -> bool:
    """Whether decoding a file takes much memory; reads only its header."""
    with _decoder_errors(""):
        image = _open(data)
        return image.width * image.height > LARGE_PIXELS


def read_file(path: Path, limit: int) -> bytes:
    """Read at most `limit` bytes of a regular file."""
    # O_NONBLOCK: opening a pipe would wait for a writer. O_NOFOLLOW: the file may have been
    # replaced by a link since it was listed.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("not a file: a pipe, socket or device")
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error


def encode(pixels: Pixels) -> bytes:
    """Encode pixels as PNG; the same pixels give the same bytes."""
    return _png(Image.fromarray(pixels, "RGB"))


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Progress, what: str
) -> Iterator[Result]:
    """Yield `work` of each item, in order; decoders run in threads side by side."""
    pool = joblib.Parallel(min(4, joblib.cpu_count()), prefer="threads", return_as="generator")
    for done, result in enumerate(pool(joblib.delayed(work)(item) for item in items), start=1):
        progress(what, done, len(items))
        yield result


def each_photo(
    work: Callable[[Pixels], Result], paths: Sequence[Path], progress: Progress, what: str
) -> Iterator[Result]:
    """Decode stored photos, and yield `work` of each one's pixels, in order."""

    def read(path: Path) -> Result:
        try:
            return work(decode(path.read_bytes()))
        except (ImageError, OSError) as error:
            raise DataError(
                f"The stored photo '{path}' cannot be read ({error}). Restore it with "
                "'dvc checkout', or remove it and import it again."
            ) from error

    return in_threads(read, paths, progress, what)


def resize(picture: Pixels, params: PreprocessParams) -> Pixels:
    """Resize a photo to (image_size, image_size, 3), and blur it the more the larger it was."""
    small = resize_square(picture, params.image_size)
    ratio = params.image_size / min(picture.shape[:2])
    if params.blur_sigma and ratio < 1:
        sigma = params.blur_sigma * math.sqrt(1 - ratio * ratio)
        small = np.asarray(cv2.GaussianBlur(small, (0, 0), sigma), np.uint8)
    return small


def resize_square(picture: Pixels, size: int) -> Pixels:
    """Crop the central square of a photo, and resize it with an antialiasing bicubic filter."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    # Beyond three times the size, areas are averaged first, which is faster.
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))


def perceptual_hash(picture: Pixels) -> int:
    """64-bit `imagehash.phash`."""
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(Image.fromarray(picture)).hash).tobytes())


def printable(text: str) -> str:
    """Escape control characters and invalid UTF-8, for one line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _png(image: Image.Image) -> bytes:
    image.info = {}  # profile, gamma and resolution would be written too
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image and check its header; nothing is decoded yet."""
    if not data:
        raise ImageError("zero bytes: the file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"too large: more than {MAX_BYTES // 2**20} MB")
    if _HEIC.match(data):  # its decoders are patented, and not permissively licensed
        raise ImageError("HEIC, as some phones save photos: not supported; export it as JPEG")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 10**6
        raise ImageError(f"too many pixels: {width}x{height}, more than {limit} megapixels")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"too small: {width}x{height} pixels, less than {MIN_SIDE} a side")
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"damaged: more than {MAX_SCANS} scans in one JPEG")
    if any(tile.codec_name == "libtiff" for tile in image.tile):
        # libtiff is one more C library for hostile files to reach, and writes to stderr.
        raise ImageError("compressed TIFF: only uncompressed ones are supported; save it as PNG")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError("animated: more than one frame; save one frame as a picture")
    return image


def _keeps_its_bytes(image: Image.Image, data: bytes) -> bool:
    # Pillow opens a PNG of 16 bits a channel as plain RGB; only its header has the depth.
    plain = image.format in ("JPEG", "MPO") or (image.format == "PNG" and data[24] == 8)
    plain = plain and image.mode == "RGB" and not image.has_transparency_data
    return plain and image.getexif().get(ORIENTATION, 1) not in range(2, 9)


def _reduced(image: Image.Image, min_side: int) -> Image.Image:
    """Average a photo down while it is decoded, or before its colors are converted."""
    factor = min(image.size) // min_side
    image.draft("RGB", (image.width // factor, image.height // factor))  # JPEG only
    image.load()  # which turns a TIFF
    turn = image.getexif().get(ORIENTATION, 1)
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        image = _to_rgb(image)
    small = image.reduce(max(1, min(image.size) // min_side))
    small.getexif()[ORIENTATION] = turn
    return small


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


@contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    shown = printable(name)
    with warnings.catch_warnings():
        # Threads share the filters, so only Pillow's own warnings are ignored.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except ImageError as error:
            raise ImageError(error.reason, shown) from error
        except Image.DecompressionBombError as error:
            raise ImageError("too many pixels for any photo", shown) from error
        except UnidentifiedImageError as error:
            raise ImageError(f"not an image: none of {', '.join(FORMATS)}", shown) from error
        except Exception as error:  # decoders raise anything on damaged files
            detail = " ".join(printable(str(error)).split()) or type(error).__name__
            kind = "truncated" if "truncated" in detail.lower() else "damaged"
            raise ImageError(f"{kind}: cannot be decoded ({detail[:120]})", shown) from error
