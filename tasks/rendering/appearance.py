"""What a hand and the wall behind it look like: skin, light, shadow, and the camera's own marks.

As in `raycast`, only correctly rounded operations; `develop` takes the square root for a gamma.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.rendering.hand import ARM, FINGER, PALM, TIP, Capsules, Floats, circle, unit
from tasks.rendering.raycast import Camera, Hits, inner

SIDE = 64
SUPERSAMPLED = 2
FRAME = SIDE * SUPERSAMPLED

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
PALM_COLOUR = np.array([232, 176, 150])
NAIL_COLOUR = np.array([240, 196, 184])


def skin(hits: Hits, shapes: Capsules, places: Floats, random: np.random.Generator) -> Floats:
    """Reflectance of what was hit, (3, m), at `places` in the hand's own coordinates, (3, m)."""
    tone = random.uniform() * random.uniform(0.5, 1.0) * (len(SKINS) - 1.001)
    below = int(tone)
    colour = SKINS[below] + (tone - below) * (SKINS[below + 1] - SKINS[below])
    colour = colour * (1.0 + random.uniform(-0.08, 0.08, 3))
    palm = colour + (0.10 + 0.05 * tone) * (PALM_COLOUR - colour)
    parts = shapes.parts[hits.owners]
    outside = inner(shapes.dorsal.T[:, hits.owners], hits.normals)
    inside = np.clip(0.5 - 1.2 * outside, 0.0, 1.0)
    colours = colour[:, None] + inside * (palm - colour)[:, None]
    colours = colours * (1.0 + 0.07 * (clouds(random, 9, FRAME)[hits.seen] - 0.5))
    finger = (parts == FINGER) | (parts == TIP)
    fold = np.clip(1.0 - np.abs(hits.along - 0.03) / 0.11, 0.0, 1.0) * finger
    creases = random.uniform(0.1, 1.1)
    colours = colours * (1.0 - 0.12 * creases * fold)
    colours = colours * (1.0 - creases * _lines(places, parts) * inside)
    red = np.where(parts == TIP, hits.along, 0.0)
    colours = colours * (1.0 + red * np.array([[0.03], [-0.05], [-0.04]]))
    nail = (parts == TIP) & (hits.along > 0.45) & (outside > 0.62)
    varnished = random.uniform() < 0.08
    paint = random.uniform(20, 220, 3) if varnished else 0.45 * colour + 0.55 * NAIL_COLOUR
    colours = np.where(nail, paint[:, None], colours)
    return linear(_dressed(colours, hits, parts, random))


def _dressed(
    colours: Floats, hits: Hits, parts: NDArray[np.int64], random: np.random.Generator
) -> Floats:
    """Cover the forearm of some with a sleeve or a band."""
    cloth, cuff = random.uniform(10, 230, 3), random.uniform(0.05, 0.7)
    worn = random.uniform()
    covered = (parts == ARM) & (hits.along > cuff)
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
    darker: Floats = 0.17 * np.clip(1.0 - nearest / 0.3, 0.0, 1.0) * (parts == PALM)
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


@dataclass(frozen=True)
class Light:
    """A lamp (`key`) and the room (`ambient`), red, green and blue; darker shadows with `depth`."""

    towards: Floats
    key: Floats
    ambient: Floats
    depth: float = 0.8


def draw_light(random: np.random.Generator) -> Light:
    """A lamp in front of the hand and above it, cold to warm."""
    cos, sin = circle(random.uniform(10, 170))
    towards = unit(np.array([cos, sin, random.uniform(0.7, 2.2)]))
    warmth = random.uniform(-1.0, 1.0)
    colour = np.array([1.0 + 0.14 * warmth, 1.0, 1.0 - 0.2 * warmth])
    share = random.uniform(0.3, 0.8)
    exposure = random.uniform(0.85, 1.1)
    cool = np.array([1.0, 1.0, 1.0 + random.uniform(-0.02, 0.1)])
    key, ambient = exposure * share * colour, exposure * (1.0 - share) * cool
    return Light(towards, key, ambient, random.uniform(0.3, 0.9))


def light_on_hand(depth: Floats, hits: Hits, light: Light, camera: Camera) -> Floats:
    """Light on what was hit, (3, m); `depth` is z in cm of hand or wall, (size, size)."""
    facing = inner(hits.normals, light.towards)
    lambert = np.clip((facing + 0.2) / 1.2, 0.0, 1.0)
    lit = lambert * (1.0 - light.depth * _shadow(depth, light, camera)[hits.seen])
    hollow = blur(depth, round(0.8 * camera.focal / camera.distance)) - depth
    open_share = 1.0 - 0.75 * light.depth * np.clip(hollow[hits.seen] / 1.6, 0.0, 1.0)
    edge = 0.62 + 0.38 * np.clip(1.4 * hits.normals[2], 0.0, 1.0)
    sky = (0.75 + 0.25 * hits.normals[1]) * open_share
    key, ambient = light.key[:, None], light.ambient[:, None]
    light_in: Floats = (1.2 * key * lit * (0.5 + 0.5 * open_share) + ambient * sky) * edge
    return light_in


def gloss(hits: Hits, light: Light, random: np.random.Generator) -> Floats:
    """Moist skin's highlight: the half vector's cosine to the sixteenth power."""
    shine = np.maximum(inner(hits.normals, unit(light.towards + np.array([0.0, 0.0, 1.0]))), 0.0)
    for _ in range(4):
        shine = shine * shine
    strength = random.uniform(0.0, 0.07) * light.key[:, None]
    return np.multiply(shine, strength)


def light_on_wall(
    hits: Hits, light: Light, camera: Camera, gap: float, random: np.random.Generator
) -> Floats:
    """Light on the wall, `gap` cm behind the hand, with its shadow; (3, SIDE, SIDE)."""
    scale = camera.focal / camera.distance / SUPERSAMPLED
    right, up = (float(part) / float(light.towards[2]) * gap * scale for part in light.towards[:2])
    mask = blur(hits.seen[::SUPERSAMPLED, ::SUPERSAMPLED].astype(np.float64), round(0.5 * scale))
    soft = max(1, round(gap * scale * random.uniform(0.02, 0.3)))
    cast_shadow = blur(blur(shift(mask, round(up), -round(right)), soft), soft)
    near = blur(blur(mask, round(1.2 * scale)), round(1.2 * scale)) * random.uniform(0.0, 0.35)
    steps = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    slope = random.uniform(-0.35, 0.35, 2)
    corner = random.uniform(0.0, 1.3) * (steps[:, None] * steps[:, None] + steps * steps)
    falloff = 1.0 + slope[0] * steps[:, None] + slope[1] * steps - corner
    key, ambient = light.key[:, None, None], light.ambient[:, None, None]
    strength = random.uniform(0.35, 0.9)
    wall: Floats = (key * (1.0 - strength * cast_shadow) + ambient * (1.0 - near)) * falloff
    return wall


def _shadow(depth: Floats, light: Light, camera: Camera) -> Floats:
    """Share of the lamp that nearer parts of the hand hide, (size, size)."""
    scale = camera.focal / camera.distance
    hidden = np.zeros_like(depth)
    for stride in range(1, 9):
        reach = 0.55 * stride
        right, up = (round(float(part) * reach * scale) for part in light.towards[:2])
        above = shift(depth, up, -right) - depth - reach * float(light.towards[2])
        thick = np.clip((4.5 - above) / 1.5, 0.0, 1.0)
        hidden = np.maximum(hidden, np.clip(above / (0.2 + 0.15 * reach), 0.0, 1.0) * thick)
    return blur(hidden, 1)


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
    """Do what a phone's camera does; linear (3, FRAME, FRAME) -> uint8 (64, 64, 3)."""
    values = np.sqrt(np.clip(random.uniform(0.85, 1.25) * picture, 0.0, 1.0))
    pairs = values[:, 0::2, :] + values[:, 1::2, :]
    small = (pairs[:, :, 0::2] + pairs[:, :, 1::2]) / 4.0
    grey = (small[0] + small[1] + small[2]) / 3.0
    small = grey + random.uniform(0.6, 1.15) * (small - grey)
    small = small * random.uniform(0.95, 1.05, (3, 1, 1))
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
