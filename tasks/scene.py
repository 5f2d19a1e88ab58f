"""Light, skin, wall and camera around a posed hand: one rendered photo.

As in `tasks.raycast`, pixels are computed with correctly rounded operations on
single elements only. Brightness is linear until the end; the square root stands
for the display's gamma, because unlike a power it is correctly rounded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.hand import Capsules, Floats, Hand, Part, capsules, circle, unit
from tasks.raycast import Camera, Hits, cast, inner

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
PALM = np.array([232, 176, 150])
NAIL = np.array([240, 196, 184])


@dataclass(frozen=True)
class Turn:
    """Rotation about y, then x, then z, in degrees."""

    yaw: float
    pitch: float
    roll: float

    def apply(self, points: Floats) -> Floats:
        """Turn vectors, (3, ...)."""
        return _spin(_spin(_spin(points, self.yaw, 2, 0), self.pitch, 1, 2), self.roll, 0, 1)

    def undo(self, points: Floats) -> Floats:
        """Turn vectors, (3, ...), back."""
        return _spin(_spin(_spin(points, -self.roll, 0, 1), -self.pitch, 1, 2), -self.yaw, 2, 0)


@dataclass(frozen=True)
class Light:
    """One lamp and what comes from everywhere.

    Args:
        towards: float64, (3,); unit vector to the lamp.
        key: float64, (3,); the lamp's red, green and blue.
        ambient: float64, (3,); the room's.
    """

    towards: Floats
    key: Floats
    ambient: Floats


def _spin(points: Floats, degrees: float, first: int, second: int) -> Floats:
    cos, sin = circle(degrees)
    turned = points.copy()
    turned[first] = cos * points[first] - sin * points[second]
    turned[second] = sin * points[first] + cos * points[second]
    return turned


def photograph(label: int, hand: Hand, random: np.random.Generator) -> NDArray[np.uint8]:
    """Render one photo of a hand.

    Args:
        label: the sign; the ring (0) is seen from the thumb's side.
        hand: its pose.
        random: source of view, light, skin, wall and noise.

    Returns:
        uint8, (64, 64, 3), RGB.
    """
    turn = _draw_turn(label, random)
    shapes = _turned(capsules(hand), turn)
    camera = _draw_camera(shapes, random)
    hits = cast(shapes, camera)
    light = _draw_light(random)
    lowest = float(shapes.starts[shapes.parts != Part.ARM, 2].min())
    gap = random.uniform(1.0, 7.0)
    depth = np.full((FRAME, FRAME), lowest - 1.0 - gap)
    depth[hits.seen] = np.maximum(hits.points[2], lowest - 1.0 - gap)
    picture = _wall(random) * _wall_light(hits, light, camera, gap + 2.5, random)
    skin = _skin(hits, shapes, turn, random) * _skin_light(depth, hits, light, camera)
    picture[:, hits.seen] = skin + _gloss(hits, light, random)
    if random.integers(2):
        picture = picture[:, :, ::-1]
    return _develop(picture, random)


def _draw_turn(label: int, random: np.random.Generator) -> Turn:
    yaw = random.uniform(-82, -56) if label == 0 else random.uniform(-26, 26)
    if label != 0 and random.uniform() < 0.15:
        yaw += 180.0
    roll = random.uniform(-22, 22) + random.uniform(-22, 22)
    pitch = random.uniform(-9, 9) if label == 0 else random.uniform(-16, 16)
    return Turn(yaw, pitch, roll)


def _turned(shapes: Capsules, turn: Turn) -> Capsules:
    starts, ends, dorsal = (
        turn.apply(points.T).T for points in (shapes.starts, shapes.ends, shapes.dorsal)
    )
    return Capsules(starts, ends, shapes.radii, dorsal, shapes.parts)


def _draw_camera(shapes: Capsules, random: np.random.Generator) -> Camera:
    """Put the whole hand, without the forearm, into the frame."""
    hand = shapes.parts != Part.ARM
    ends = np.concatenate([shapes.starts[hand], shapes.ends[hand]])[:, :2]
    low, high = ends.min(axis=0) - 1.0, ends.max(axis=0) + 1.0
    extent = high - low
    shown = float(extent.max()) / random.uniform(0.58, 0.9)
    slack = 0.45 * (shown - extent) * random.uniform(-1.0, 1.0, 2)
    x, y = (low + high) / 2 + slack * np.array([1.0, 0.8])
    distance = random.uniform(38.0, 80.0)
    return Camera(distance, distance * FRAME / shown, (float(x), float(y)), FRAME)


def _draw_light(random: np.random.Generator) -> Light:
    cos, sin = circle(random.uniform(10, 170))
    towards = unit(np.array([cos, sin, random.uniform(0.7, 2.2)]))
    warmth = random.uniform(-1.0, 1.0)
    colour = np.array([1.0 + 0.10 * warmth, 1.0, 1.0 - 0.14 * warmth])
    share = random.uniform(0.45, 0.75)
    exposure = random.uniform(0.85, 1.1)
    cool = np.array([1.0, 1.0, 1.0 + random.uniform(-0.02, 0.1)])
    return Light(towards, exposure * share * colour, exposure * (1.0 - share) * cool)


def _skin(hits: Hits, shapes: Capsules, turn: Turn, random: np.random.Generator) -> Floats:
    """Reflectance of what was hit, (3, m)."""
    tone = random.uniform(0.0, len(SKINS) - 1.001)
    below = int(tone)
    colour = SKINS[below] + (tone - below) * (SKINS[below + 1] - SKINS[below])
    colour = colour * (1.0 + random.uniform(-0.05, 0.05, 3))
    palm = colour + (0.10 + 0.07 * tone) * (PALM - colour)
    parts = shapes.parts[hits.owners]
    outside = inner(shapes.dorsal.T[:, hits.owners], hits.normals)
    inside = np.clip(0.5 - 1.2 * outside, 0.0, 1.0)
    skin = colour[:, None] + inside * (palm - colour)[:, None]
    skin = skin * (1.0 + 0.07 * (_clouds(random, 9)[hits.seen] - 0.5))
    finger = (parts == Part.FINGER) | (parts == Part.TIP)
    fold = np.clip(1.0 - np.abs(hits.along - 0.03) / 0.11, 0.0, 1.0) * finger
    skin = skin * (1.0 - 0.12 * fold) * (1.0 - _lines(hits, parts, turn) * inside)
    red = np.where(parts == Part.TIP, hits.along, 0.0)
    skin = skin * (1.0 + red * np.array([[0.03], [-0.05], [-0.04]]))
    nail = (parts == Part.TIP) & (hits.along > 0.45) & (outside > 0.62)
    varnished = random.uniform() < 0.08
    paint = random.uniform(20, 220, 3) if varnished else 0.45 * colour + 0.55 * NAIL
    skin = np.where(nail, paint[:, None], skin)
    cloth, cuff = random.uniform(20, 230, 3), random.uniform(0.1, 0.9)
    sleeve = (parts == Part.ARM) & (hits.along > cuff) & (random.uniform() < 0.35)
    return _linear(np.where(sleeve, cloth[:, None], skin))


def _lines(hits: Hits, parts: NDArray[np.int64], turn: Turn) -> Floats:
    """The palm's three creases, as a share of darkening, (m,)."""
    x, y, _ = turn.undo(hits.points)
    thumb = np.sqrt((x - 3.6) * (x - 3.6) + (y - 2.0) * (y - 2.0)) - 3.9
    heart = y - 7.2 - 0.28 * x + 0.05 * x * x
    head = y - 5.3 - 0.34 * x
    nearest = np.minimum(np.minimum(np.abs(thumb), np.abs(heart)), np.abs(head))
    darker: Floats = 0.17 * np.clip(1.0 - nearest / 0.3, 0.0, 1.0) * (parts == Part.PALM)
    return darker


def _skin_light(depth: Floats, hits: Hits, light: Light, camera: Camera) -> Floats:
    """Light on what was hit, (3, m): lamp with its shadows, room, darker edges."""
    facing = inner(hits.normals, light.towards)
    lambert = np.clip((facing + 0.2) / 1.2, 0.0, 1.0)
    lit = lambert * (1.0 - 0.8 * _shadow(depth, light, camera)[hits.seen])
    hollow = _blur(depth, round(0.8 * camera.focal / camera.distance)) - depth
    open_share = 1.0 - 0.6 * np.clip(hollow[hits.seen] / 1.6, 0.0, 1.0)
    edge = 0.62 + 0.38 * np.clip(1.4 * hits.normals[2], 0.0, 1.0)
    sky = (0.75 + 0.25 * hits.normals[1]) * open_share
    key, ambient = light.key[:, None], light.ambient[:, None]
    light_in: Floats = (1.2 * key * lit * (0.5 + 0.5 * open_share) + ambient * sky) * edge
    return light_in


def _gloss(hits: Hits, light: Light, random: np.random.Generator) -> Floats:
    """Moist skin's highlight: the half vector's cosine to the sixteenth power."""
    shine = np.maximum(inner(hits.normals, unit(light.towards + np.array([0.0, 0.0, 1.0]))), 0.0)
    for _ in range(4):
        shine = shine * shine
    gloss: Floats = random.uniform(0.0, 0.07) * shine * light.key[:, None]
    return gloss


def _shadow(depth: Floats, light: Light, camera: Camera) -> Floats:
    """Share of the lamp that nearer parts of the hand hide, (size, size)."""
    scale = camera.focal / camera.distance
    hidden = np.zeros_like(depth)
    for stride in range(1, 9):
        reach = 0.55 * stride
        right, up = (round(float(part) * reach * scale) for part in light.towards[:2])
        above = _shift(depth, up, -right) - depth - reach * float(light.towards[2])
        thick = np.clip((4.5 - above) / 1.5, 0.0, 1.0)
        hidden = np.maximum(hidden, np.clip(above / (0.2 + 0.15 * reach), 0.0, 1.0) * thick)
    return _blur(hidden, 1)


def _wall_light(
    hits: Hits, light: Light, camera: Camera, gap: float, random: np.random.Generator
) -> Floats:
    """Light on the wall, (3, size, size): lamp, the hand's soft shadow, dark corners.

    It is soft, so it is computed at the photo's own size.
    """
    scale = camera.focal / camera.distance / SUPERSAMPLED
    right, up = (float(part) / float(light.towards[2]) * gap * scale for part in light.towards[:2])
    mask = _blur(hits.seen[::SUPERSAMPLED, ::SUPERSAMPLED].astype(np.float64), round(0.5 * scale))
    soft = max(1, round(gap * scale * random.uniform(0.08, 0.3)))
    cast_shadow = _blur(_blur(_shift(mask, round(up), -round(right)), soft), soft)
    near = _blur(_blur(mask, round(1.2 * scale)), round(1.2 * scale)) * random.uniform(0.0, 0.35)
    steps = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    slope = random.uniform(-0.35, 0.35, 2)
    corner = random.uniform(0.0, 0.7) * (steps[:, None] * steps[:, None] + steps * steps)
    falloff = 1.0 + slope[0] * steps[:, None] + slope[1] * steps - corner
    key, ambient = light.key[:, None, None], light.ambient[:, None, None]
    strength = random.uniform(0.35, 0.9)
    wall: Floats = (key * (1.0 - strength * cast_shadow) + ambient * (1.0 - near)) * falloff
    return wall.repeat(SUPERSAMPLED, axis=1).repeat(SUPERSAMPLED, axis=2)


def _wall(random: np.random.Generator) -> Floats:
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
        mix = 0.15 * _clouds(random, 3)
    elif kind <= 4:
        mix = 0.5 * _clouds(random, int(random.integers(5, 40)))
    elif kind == 5:
        mix = np.abs(across / period - np.floor(across / period) - 0.5) * _clouds(random, 9)
    elif kind == 6:
        odd = np.floor(across / period) + np.floor(along / period)
        mix = 0.6 * (odd - 2.0 * np.floor(odd / 2.0))
    else:
        mix = np.clip((across - random.uniform(-45, 45)) / 2.0, 0.0, 1.0)
    return _linear(colour[:, None, None] + mix * (other - colour)[:, None, None])


def _clouds(random: np.random.Generator, cells: int) -> Floats:
    """Random values on a grid with straight lines between them, 0 to 1, (size, size)."""
    grid = random.uniform(0.0, 1.0, (cells + 1, cells + 1))
    steps = (np.arange(FRAME) + 0.5) * cells / FRAME
    cell = steps.astype(np.int64)
    share = steps - cell
    rows = grid[cell] + share[:, None] * (grid[cell + 1] - grid[cell])
    clouds: Floats = rows[:, cell] + share * (rows[:, cell + 1] - rows[:, cell])
    return clouds


def _develop(picture: Floats, random: np.random.Generator) -> NDArray[np.uint8]:
    """Lens blur, gamma, camera noise and rounding, to (64, 64, 3)."""
    values = np.sqrt(np.clip(picture, 0.0, 1.0))
    pairs = values[:, 0::2, :] + values[:, 1::2, :]
    small = (pairs[:, :, 0::2] + pairs[:, :, 1::2]) / 4.0
    blurred = np.stack([_blur(channel, 1) for channel in small])
    small = small + random.uniform(0.0, 0.35) * (blurred - small)
    # Four bytes added up are close to normal, and integers on every processor.
    grains = random.integers(0, 256, (4, 3, SIDE, SIDE), dtype=np.int64)
    grain = (grains[0] + grains[1] + grains[2] + grains[3] - 510) / 148.0
    levels = 255.0 * small + random.uniform(0.5, 3.5) * grain
    # The odd offset keeps values that are meant to be equal off the rounding edge.
    rounded = np.floor(np.clip(levels, 0.0, 255.0) + 0.5 + 2.0**-21)
    return np.ascontiguousarray(np.minimum(rounded, 255.0).astype(np.uint8).transpose(1, 2, 0))


def _linear(colour: Floats) -> Floats:
    share = np.clip(colour, 0.0, 255.0) / 255.0
    return share * share


def _shift(values: Floats, down: int, right: int) -> Floats:
    """`values`, (size, size), moved; edges are repeated."""
    places = np.arange(len(values))
    rows = np.clip(places - down, 0, len(values) - 1)
    columns = np.clip(places - right, 0, len(values) - 1)
    return values[rows[:, None], columns]


def _blur(values: Floats, radius: int) -> Floats:
    """Mean over a square of `2 radius + 1` pixels, (size, size); edges are repeated."""
    wide = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(values, ((0, 0), (radius + 1, radius)), mode="edge")
        # A running total has one order of addition; a sum over an axis has not.
        total = np.cumsum(padded, axis=1)
        values = ((total[:, wide:] - total[:, :-wide]) / wide).T
    return values
