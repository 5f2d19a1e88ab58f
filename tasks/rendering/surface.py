"""What skin, nails, sleeves and walls reflect."""

import numpy as np
from numpy.typing import NDArray

from tasks.rendering.hand import Capsules, Floats, Part, circle
from tasks.rendering.pixels import FRAME, SIDE, blur, clouds, linear
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
    tone = random.uniform() * random.uniform(0.5, 1.0) * (len(SKINS) - 1.001)
    below = int(tone)
    colour = SKINS[below] + (tone - below) * (SKINS[below + 1] - SKINS[below])
    colour = colour * (1.0 + random.uniform(-0.08, 0.08, 3))
    palm = colour + (0.10 + 0.05 * tone) * (PALM - colour)
    parts = shapes.parts[hits.owners]
    outside = inner(shapes.dorsal.T[:, hits.owners], hits.normals)
    inside = np.clip(0.5 - 1.2 * outside, 0.0, 1.0)
    colours = colour[:, None] + inside * (palm - colour)[:, None]
    colours = colours * (1.0 + 0.07 * (clouds(random, 9, FRAME)[hits.seen] - 0.5))
    finger = (parts == Part.FINGER) | (parts == Part.TIP)
    fold = np.clip(1.0 - np.abs(hits.along - 0.03) / 0.11, 0.0, 1.0) * finger
    creases = random.uniform(0.1, 1.1)
    colours = colours * (1.0 - 0.12 * creases * fold)
    colours = colours * (1.0 - creases * _lines(places, parts) * inside)
    red = np.where(parts == Part.TIP, hits.along, 0.0)
    colours = colours * (1.0 + red * np.array([[0.03], [-0.05], [-0.04]]))
    nail = (parts == Part.TIP) & (hits.along > 0.45) & (outside > 0.62)
    varnished = random.uniform() < 0.08
    paint = random.uniform(20, 220, 3) if varnished else 0.45 * colour + 0.55 * NAIL
    colours = np.where(nail, paint[:, None], colours)
    return linear(_dressed(colours, hits, parts, random))


def _dressed(
    colours: Floats, hits: Hits, parts: NDArray[np.int64], random: np.random.Generator
) -> Floats:
    """Cover the forearm of some with a sleeve, from the wrist or later, or with a band."""
    cloth, cuff = random.uniform(10, 230, 3), random.uniform(0.05, 0.7)
    worn = random.uniform()
    covered = (parts == Part.ARM) & (hits.along > cuff)
    if worn < 0.12:  # a bracelet or a watch
        covered &= hits.along < cuff + random.uniform(0.02, 0.1)
    elif worn > 0.5:
        return colours
    return np.where(covered, cloth[:, None], colours)


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
    """Reflectance of the background, (3, SIDE, SIDE): plain, patterned or cluttered."""
    if random.uniform() < 0.7:
        colour = random.uniform(140, 248) + random.uniform(-14, 14, 3)
    else:
        colour = random.uniform(40, 225) + random.uniform(-40, 40, 3)
    other = np.clip(colour + random.uniform(-60, 60) + random.uniform(-20, 20, 3), 10, 250)
    across, along = _grid(random.uniform(0, 180))
    period = random.uniform(6, 35)
    kind = int(random.integers(14))
    if kind <= 2:
        mix = 0.15 * clouds(random, 3, SIDE)
    elif kind <= 4:
        mix = 0.4 * clouds(random, int(random.integers(5, 25)), SIDE)
        mix = mix + 0.4 * clouds(random, int(random.integers(25, 60)), SIDE)
    elif kind == 5:
        mix = np.abs(across / period - np.floor(across / period) - 0.5) * clouds(random, 9, SIDE)
    elif kind == 6:
        odd = np.floor(across / period) + np.floor(along / period)
        mix = 0.6 * (odd - 2.0 * np.floor(odd / 2.0))
    elif kind >= 10:
        mix = 0.1 * clouds(random, 3, SIDE)
    else:
        mix = np.clip(across - random.uniform(-22, 22), 0.0, 1.0)
    picture = colour[:, None, None] + mix * (other - colour)[:, None, None]
    return linear(_clutter(picture, random) if kind in (8, 9) else picture)


def _clutter(picture: Floats, random: np.random.Generator) -> Floats:
    """Put boxes and discs of any colour onto `picture`, out of focus."""
    for _ in range(int(random.integers(2, 9))):
        across, along = _grid(random.uniform(0, 180))
        x, y = random.uniform(-34, 34, 2)
        wide, high = random.uniform(2, 24, 2)
        across, along = np.abs(across - x) / wide, np.abs(along - y) / high
        reach = np.maximum(across, along) if random.integers(2) else across * across + along * along
        colour = random.uniform(15, 245) + random.uniform(-45, 45, 3)
        shade = colour[:, None, None] * (1.0 - 0.3 * random.uniform() * reach)
        picture = np.where(reach < 1.0, shade, picture)
    radius = int(random.integers(0, 4))
    return np.stack([blur(channel, radius) for channel in picture]) if radius else picture


def _grid(degrees: float) -> tuple[Floats, Floats]:
    """Turned coordinates of the photo's pixels from its middle, (SIDE, SIDE) each."""
    cos, sin = circle(degrees)
    steps = np.arange(SIDE) - SIDE / 2 + 0.5
    return cos * steps + sin * steps[:, None], cos * steps[:, None] - sin * steps
