"""What skin, nails, sleeves and walls reflect."""

import numpy as np
from numpy.typing import NDArray

from tasks.rendering.hand import Capsules, Floats, Part, circle
from tasks.rendering.pixels import FRAME, clouds, linear
from tasks.rendering.raycast import Hits, inner

SKINS = np.array(
    [
        [244, 210, 188],
        [238, 192, 160],
        [226, 174, 136],
        [200, 140, 102],
        [166, 110, 78],
        [132, 84, 58],
        [98, 62, 44],
        [68, 45, 35],
    ]
)
PALM = np.array([232, 176, 150])
NAIL = np.array([240, 196, 184])


def skin(hits: Hits, shapes: Capsules, places: Floats, random: np.random.Generator) -> Floats:
    """Reflectance of what was hit.

    Args:
        hits: m pixels that see the hand.
        shapes: its capsules, as the camera sees them.
        places: float64, (3, m); the same points in the hand's own coordinates.
        random: source of skin tone, nails and sleeve.

    Returns:
        float64, (3, m); linear red, green and blue.
    """
    tone = random.uniform(0.0, len(SKINS) - 1.001)
    below = int(tone)
    colour = SKINS[below] + (tone - below) * (SKINS[below + 1] - SKINS[below])
    colour = colour * (1.0 + random.uniform(-0.05, 0.05, 3))
    palm = colour + (0.10 + 0.07 * tone) * (PALM - colour)
    parts = shapes.parts[hits.owners]
    outside = inner(shapes.dorsal.T[:, hits.owners], hits.normals)
    inside = np.clip(0.5 - 1.2 * outside, 0.0, 1.0)
    colours = colour[:, None] + inside * (palm - colour)[:, None]
    colours = colours * (1.0 + 0.07 * (clouds(random, 9)[hits.seen] - 0.5))
    finger = (parts == Part.FINGER) | (parts == Part.TIP)
    fold = np.clip(1.0 - np.abs(hits.along - 0.03) / 0.11, 0.0, 1.0) * finger
    colours = colours * (1.0 - 0.12 * fold) * (1.0 - _lines(places, parts) * inside)
    red = np.where(parts == Part.TIP, hits.along, 0.0)
    colours = colours * (1.0 + red * np.array([[0.03], [-0.05], [-0.04]]))
    nail = (parts == Part.TIP) & (hits.along > 0.45) & (outside > 0.62)
    varnished = random.uniform() < 0.08
    paint = random.uniform(20, 220, 3) if varnished else 0.45 * colour + 0.55 * NAIL
    colours = np.where(nail, paint[:, None], colours)
    cloth, cuff = random.uniform(20, 230, 3), random.uniform(0.1, 0.9)
    sleeve = (parts == Part.ARM) & (hits.along > cuff) & (random.uniform() < 0.35)
    return linear(np.where(sleeve, cloth[:, None], colours))


def _lines(places: Floats, parts: NDArray[np.int64]) -> Floats:
    """The palm's three creases, as a share of darkening, (m,)."""
    x, y, _ = places
    thumb = np.sqrt((x - 3.6) * (x - 3.6) + (y - 2.0) * (y - 2.0)) - 3.9
    heart = y - 7.2 - 0.28 * x + 0.05 * x * x
    head = y - 5.3 - 0.34 * x
    nearest = np.minimum(np.minimum(np.abs(thumb), np.abs(heart)), np.abs(head))
    darker: Floats = 0.17 * np.clip(1.0 - nearest / 0.3, 0.0, 1.0) * (parts == Part.PALM)
    return darker


def wall(random: np.random.Generator) -> Floats:
    """Reflectance of the background, (3, size, size): plain, cloudy, striped or tiled."""
    if random.uniform() < 0.6:
        colour = random.uniform(150, 248) + random.uniform(-14, 14, 3)
    else:
        colour = random.uniform(50, 225) + random.uniform(-45, 45, 3)
    other = np.clip(colour + random.uniform(-60, 60) + random.uniform(-20, 20, 3), 10, 250)
    cos, sin = circle(random.uniform(0, 180))
    steps = np.arange(FRAME) - FRAME / 2 + 0.5
    across, along = cos * steps + sin * steps[:, None], cos * steps[:, None] - sin * steps
    period = random.uniform(12, 70)
    kind = int(random.integers(8))
    if kind <= 2:
        mix = 0.15 * clouds(random, 3)
    elif kind <= 4:
        mix = 0.5 * clouds(random, int(random.integers(5, 40)))
    elif kind == 5:
        mix = np.abs(across / period - np.floor(across / period) - 0.5) * clouds(random, 9)
    elif kind == 6:
        odd = np.floor(across / period) + np.floor(along / period)
        mix = 0.6 * (odd - 2.0 * np.floor(odd / 2.0))
    else:
        mix = np.clip((across - random.uniform(-45, 45)) / 2.0, 0.0, 1.0)
    return linear(colour[:, None, None] + mix * (other - colour)[:, None, None])
