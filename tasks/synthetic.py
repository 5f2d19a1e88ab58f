"""Rendered hands: the sample data set, and the stage whose hands join the training split."""

import hashlib
import logging
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

from tasks.errors import DataError
from tasks.io import atomic_directory, atomic_write
from tasks.rendering.appearance import SIDE
from tasks.rendering.scene import Place, draw
from tasks.stage import Context, Progress, silent

SIGNS = ("0", "1", "2", "3", "4", "5")  # the only labels that can be rendered
SAMPLE_SEED = 20
FIRST_SEED = 1_000_000  # added to `seed`, so that no synthetic hand is one of the sample's
CHUNK, MAX_PROCESSES = 10, 8

_log = logging.getLogger(__name__)


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/synthetic.npy`, uint8, (6, per_class, 64, 64, 3), RGB."""
    per_class, seed = context.params.synthetic.per_class, FIRST_SEED + context.params.seed
    if per_class and context.params.labels != SIGNS:
        per_class = 0
        _log.info("Synthetic hands are off: they show the signs 0 to 5, and labels has others.")
    _log.info(
        "Synthetic hands: %d a class, seed %d (the sample has %d).", per_class, seed, SAMPLE_SEED
    )
    hands = np.empty((len(SIGNS), per_class, SIDE, SIDE, 3), np.uint8)
    places = [(seed, label, number) for label in range(len(SIGNS)) for number in range(per_class)]
    for done, ((_, label, number), picture) in enumerate(draw_all(places), start=1):
        hands[label, number] = picture
        context.progress("render hands", done, len(places))
    with atomic_write(context.project.synthetic) as temporary, temporary.open("wb") as file:
        np.save(file, hands)


def render_sample(
    folder: Path, progress: Progress = silent, per_class: int = 200, seed: int = SAMPLE_SEED
) -> None:
    """Render the sample data set into `folder/train/<label>/`, the same bytes every time."""
    places = [(seed, label, number) for number in range(per_class) for label in range(len(SIGNS))]
    with atomic_directory(folder) as new:
        for sign in SIGNS:
            (new / "train" / sign).mkdir(parents=True)
        for done, ((_, label, _), picture) in enumerate(draw_all(places), start=1):
            content = encode(picture)
            name = hashlib.sha256(content).hexdigest()[:32]
            (new / "train" / SIGNS[label] / f"{name}.png").write_bytes(content)
            progress("render", done, len(places))
        present = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
        others = [path for path in present if not (new / path.relative_to(folder)).is_file()]
        if others:
            raise DataError(
                f"{len(others)} of {len(present)} files in '{folder}' are not of this sample, and "
                "rendering would replace them. Move the folder away first."
            )


def draw_all(places: list[Place]) -> Iterator[tuple[Place, NDArray[np.uint8]]]:
    """Render photos in the order of `places`, on several processes if there are many."""
    import joblib

    processes = min(MAX_PROCESSES, joblib.cpu_count(), len(places) // (2 * CHUNK))
    if processes < 2:
        yield from ((place, draw(place)) for place in places)
        return
    # A fork would copy the locks of whatever threads the caller runs.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        yield from zip(places, pool.map(draw, places, chunksize=CHUNK), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def encode(picture: NDArray[np.uint8]) -> bytes:
    """PNG without compression, in which libraries differ; the sample's bytes are its version."""
    height, width, _ = picture.shape
    stored = zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture), 0)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", stored), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        png += struct.pack(">I", len(content)) + name + content + check
    return png
