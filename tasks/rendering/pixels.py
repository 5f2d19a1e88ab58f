"""What is done to whole pictures: soft edges, textures, and the camera's own marks.

As in `tasks.rendering.raycast`, only correctly rounded operations on single elements, and
running totals in one order, so that the bytes do not depend on the processor.
Brightness is linear until `develop`, whose square root stands for the display's
gamma because, unlike a power, it is correctly rounded.
"""

import numpy as np
from numpy.typing import NDArray

from tasks.rendering.hand import Floats

SIDE = 64
SUPERSAMPLED = 2
FRAME = SIDE * SUPERSAMPLED


def linear(colour: Floats) -> Floats:
    """Levels of a display, 0 to 255, as linear brightness, 0 to 1."""
    share = np.clip(colour, 0.0, 255.0) / 255.0
    return share * share


def shift(values: Floats, down: int, right: int) -> Floats:
    """`values`, (size, size), moved; edges are repeated."""
    places = np.arange(len(values))
    rows = np.clip(places - down, 0, len(values) - 1)
    columns = np.clip(places - right, 0, len(values) - 1)
    return values.take(rows, axis=0).take(columns, axis=1)


def blur(values: Floats, radius: int) -> Floats:
    """Mean over a square of `2 radius + 1` pixels, (size, size); edges are repeated."""
    wide = 2 * radius + 1
    columns = np.clip(np.arange(-radius - 1, len(values) + radius), 0, len(values) - 1)
    for _ in range(2):
        padded = values.take(columns, axis=1)
        # A running total has one order of addition; a sum over an axis has not.
        total = np.cumsum(padded, axis=1)
        values = ((total[:, wide:] - total[:, :-wide]) / wide).T
    return values


def clouds(random: np.random.Generator, cells: int, size: int) -> Floats:
    """Random values on a grid with straight lines between them, 0 to 1, (size, size)."""
    grid = random.uniform(0.0, 1.0, (cells + 1, cells + 1))
    steps = (np.arange(size) + 0.5) * cells / size
    cell = steps.astype(np.int64)
    share = steps - cell
    rows = grid[cell] + share[:, None] * (grid[cell + 1] - grid[cell])
    clouds: Floats = rows[:, cell] + share * (rows[:, cell + 1] - rows[:, cell])
    return clouds


def enlarge(picture: Floats) -> Floats:
    """Repeat pixels of (3, SIDE, SIDE) to (3, FRAME, FRAME)."""
    return picture.repeat(SUPERSAMPLED, axis=1).repeat(SUPERSAMPLED, axis=2)


def develop(picture: Floats, random: np.random.Generator) -> NDArray[np.uint8]:
    """What a phone's camera does: exposure, lens, colour, tone, sharpening and noise.

    Args:
        picture: float64, (3, FRAME, FRAME), linear brightness.
        random: source of the camera's settings.

    Returns:
        uint8, (64, 64, 3).
    """
    values = np.sqrt(np.clip(random.uniform(0.85, 1.25) * picture, 0.0, 1.0))
    pairs = values[:, 0::2, :] + values[:, 1::2, :]
    small = (pairs[:, :, 0::2] + pairs[:, :, 1::2]) / 4.0
    grey = (small[0] + small[1] + small[2]) / 3.0
    small = (grey + random.uniform(0.6, 1.15) * (small - grey)) * random.uniform(
        0.95, 1.05, (3, 1, 1)
    )
    contrast = random.uniform(-0.1, 0.5)
    small = small + contrast * (small * small * (3.0 - 2.0 * small) - small)
    # Below zero it sharpens.
    softness = random.uniform(-0.7, 0.1) if random.uniform() < 0.4 else random.uniform(-0.2, 0.7)
    small = small + softness * (np.stack([blur(channel, 1) for channel in small]) - small)
    # Four bytes added up are close to normal, and integers on every processor.
    grains = random.integers(0, 256, (4, 3, SIDE, SIDE), dtype=np.int64)
    grain = (grains[0] + grains[1] + grains[2] + grains[3] - 510) / 148.0
    levels = 255.0 * small + random.uniform(0.3, 2.5) * grain
    # The odd offset keeps values that are meant to be equal off the rounding edge.
    rounded = np.floor(np.clip(levels, 0.0, 255.0) + 0.5 + 2.0**-21)
    return np.ascontiguousarray(np.minimum(rounded, 255.0).astype(np.uint8).transpose(1, 2, 0))
