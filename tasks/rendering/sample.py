"""The rendered sample data set: nobody's hands, for a first run anywhere.

A photo depends on three whole numbers only: the seed, its label and its place in
the class. Redraw the picture in the documentation with

    python -c "from pathlib import Path; from tasks.rendering.sample import contact_sheet; \
contact_sheet(Path('docs/pictures/sample.png'))"
"""

import hashlib
import multiprocessing
import os
import signal
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.errors import DataError
from tasks.io import atomic_directory, atomic_write
from tasks.rendering.scene import photograph
from tasks.stage import Progress, silent

SEED = 20
MEANINGS = ("closed ring", "index", "index, middle", "thumb and two", "four fingers", "open hand")
"""What the hand shows for each label."""
SIGNS = tuple(map(str, range(len(MEANINGS))))
"""The only labels that can be rendered."""

CHUNK = 10
MAX_PROCESSES = 8

Place = tuple[int, int, int]
"""Seed, label and number of a photo; together they are the seed of its drawing."""


def render_sample(
    folder: Path, progress: Progress = silent, per_class: int = 200, seed: int = SEED
) -> None:
    """Render the sample data set; the same arguments give the same bytes.

    Args:
        folder: becomes `folder/train/<label>/<name>`, whole or not at all. What an
            earlier rendering with the same arguments left there is completed.
        progress: told after every few photos.
        per_class: photos of each label.
        seed: another one gives another data set of the same kind.

    Raises:
        DataError: `folder` holds photos that are not of this sample and would be
            lost, or `per_class` is not positive.
    """
    if per_class < 1:
        raise DataError(
            f"A sample needs at least one photo of each label. Received: per_class={per_class}. "
            "Give a positive number."
        )
    places = [(seed, label, number) for number in range(per_class) for label in range(len(SIGNS))]
    with atomic_directory(folder) as temporary:
        for label in SIGNS:
            (temporary / "train" / label).mkdir(parents=True)
        progress("render", 0, len(places))
        for done, (place, picture) in enumerate(draw_all(places), start=1):
            content = encode(picture)
            path = temporary / "train" / SIGNS[place[1]] / f"{_digest(content)}.png"
            path.write_bytes(content)
            if done % CHUNK == 0 or done == len(places):
                progress("render", done, len(places))
        _refuse_loss(folder, temporary)


def draw(place: Place) -> NDArray[np.uint8]:
    """Render one photo; uint8, (64, 64, 3), RGB."""
    return photograph(place[1], np.random.default_rng(place))


def contact_sheet(target: Path, columns: int = 12, seed: int = SEED) -> None:
    """Write a picture of the first photos of each label, named as rendered.

    Args:
        target: a .png file; replaced whole.
        columns: photos of each label.
        seed: of the data set.
    """
    side, margin, head = 96, 150, 34
    sheet = Image.new("RGB", (margin + columns * side, head + len(SIGNS) * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((10, 8), "Rendered hands: the sample data set, no photographs", "black", font)
    for label, meaning in enumerate(MEANINGS):
        top = head + label * side
        pen.text((10, top + 22), f"{label}  rendered\n{meaning}", "black", font, spacing=6)
        for number in range(columns):
            picture = Image.fromarray(draw((seed, label, number)))
            enlarged = picture.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (margin + number * side, top))
    with atomic_write(target) as temporary:
        sheet.save(temporary, optimize=True)


def _refuse_loss(folder: Path, rendered: Path) -> None:
    """Refuse to replace photos that are not among the rendered ones."""
    held = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    foreign = [path for path in held if not (rendered / path.relative_to(folder)).is_file()]
    if foreign:
        raise DataError(
            f"'{folder}' holds photos that are not of this sample, and rendering would replace "
            f"them. Received: {len(foreign)} of {len(held)} files. Move the folder away first."
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def draw_all(places: list[Place]) -> Iterator[tuple[Place, NDArray[np.uint8]]]:
    """Render photos in the order of `places`, on several processes if there are many."""
    import joblib

    processes = min(MAX_PROCESSES, joblib.cpu_count(), len(places) // (2 * CHUNK))
    if processes < 2:
        yield from ((place, draw(place)) for place in places)
        return
    # A fork would copy the locks of whatever threads the caller runs.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _serve)
    try:
        yield from zip(places, pool.map(draw, places, chunksize=CHUNK), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _serve() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode(picture: NDArray[np.uint8]) -> bytes:
    """PNG with its pixels stored in one block, not deflated.

    Deflated bytes, and even the cutting into stored blocks, differ between zlib and
    its successors, and with them between builds of imaging libraries. The sample's
    bytes are its version, so this one writer fixes them (PNG specification, third
    edition, sections 5 and 11; RFC 1950 and 1951).

    Args:
        picture: uint8, (height, width, 3), RGB; at most 65,535 bytes with one more
            byte a row.

    Returns:
        The file's content.
    """
    height, width, _ = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    size = struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF)
    stored = b"\x78\x01\x01" + size + rows + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stored), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check
