"""One rendered photo: a posed hand, turned, lit, before a wall and a camera."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.rendering import appearance as look
from tasks.rendering.appearance import FRAME
from tasks.rendering.hand import (
    ARM,
    CARPALS,
    INDEX,
    LITTLE,
    RAISED,
    THUMB,
    Capsules,
    Floats,
    Hand,
    capsules,
    circle,
    pose,
)
from tasks.rendering.raycast import Camera, cast

Place = tuple[int, int, int]
"""Seed, label and number of a photo; together they are the seed of its drawing."""

MAX_TRIES = 20
# What a camera must see, in cm: least length of a raised finger, least distance of its tip from
# other fingers, and that of a thumb's tip, least if it is shown and largest if it is not.
MIN_SPAN, MIN_GAP, BESIDE, BEFORE = 3.5, 1.1, 1.9, 1.5


@dataclass(frozen=True)
class Turn:
    """Rotation about y, then x, then z, in degrees."""

    yaw: float
    pitch: float
    roll: float

    def apply(self, points: Floats) -> Floats:
        return _spin(_spin(_spin(points, self.yaw, 2, 0), self.pitch, 1, 2), self.roll, 0, 1)

    def undo(self, points: Floats) -> Floats:
        return _spin(_spin(_spin(points, -self.roll, 0, 1), -self.pitch, 1, 2), -self.yaw, 2, 0)


def _spin(points: Floats, degrees: float, first: int, second: int) -> Floats:
    cos, sin = circle(degrees)
    turned = points.copy()
    turned[first] = cos * points[first] - sin * points[second]
    turned[second] = sin * points[first] + cos * points[second]
    return turned


def draw(place: Place) -> NDArray[np.uint8]:
    """Render one photo; uint8, (64, 64, 3), RGB."""
    label, random = place[1], np.random.default_rng(place)
    for _ in range(MAX_TRIES):
        hand, turn = pose(label, random), _draw_turn(label, random)
        if is_legible(label, hand, turn):
            break
    shapes = turned(capsules(hand), turn)
    camera = frame_hand(shapes, random)
    hits = cast(shapes, camera)
    light = look.draw_light(random)
    lowest = float(shapes.starts[shapes.parts != ARM, 2].min())
    gap = random.uniform(1.0, 7.0)
    depth = np.full((FRAME, FRAME), lowest - 1.0 - gap)
    depth[hits.seen] = np.maximum(hits.points[2], lowest - 1.0 - gap)
    reflected = look.wall(random)
    behind = reflected * look.light_on_wall(hits, light, camera, gap + 2.5, random)
    picture = look.enlarge(behind)
    skin = look.skin(hits, shapes, turn.undo(hits.points), random)
    lit = skin * look.light_on_hand(depth, hits, light, camera)
    picture[:, hits.seen] = lit + look.gloss(hits, light, random)
    if random.integers(2):
        picture = picture[:, :, ::-1]
    return look.develop(picture, random)


def _draw_turn(label: int, random: np.random.Generator) -> Turn:
    """A view of the palm or the back, mostly upright and mostly from the front."""
    wide = random.uniform() < 0.2
    roll = random.uniform(-22, 22) + random.uniform(-22, 22)
    if random.uniform() < 0.05:
        roll = random.uniform(-180, 180)
    elif wide:
        roll *= 1.6
    if label == 0:  # the ring shows from the thumb's side
        return Turn(random.uniform(-115, -35), random.uniform(-20, 20), 1.3 * roll)
    yaw = random.uniform(-40, 40) if wide else random.uniform(-26, 26)
    if random.uniform() < 0.12:
        yaw += 180.0
    pitch = random.uniform(-32, 32) if wide else random.uniform(-16, 16)
    return Turn(yaw, pitch, roll)


def is_legible(label: int, hand: Hand, turn: Turn) -> bool:
    """Whether a view shows raised fingers from the side and apart, and the thumb where it is."""
    if label == 0:
        return True
    x, y, _ = turn.apply(hand.joints.transpose(2, 0, 1))
    wrist = turn.apply(CARPALS.T)
    flat = [np.column_stack([wrist[axis], (x, y)[axis][1:]]) for axis in (0, 1)]
    starts, bones = np.stack(flat)[:, :, :-1], np.diff(flat, axis=2)

    def nearest(finger: int) -> float:
        """Squared distance of a finger's tip from the bones of the other fingers."""
        others = np.arange(INDEX, LITTLE + 1) != finger
        begin, bone = starts[:, others], bones[:, others]
        tip = np.array([x[finger, 3], y[finger, 3]])[:, None, None] - begin
        share = np.clip((tip[0] * bone[0] + tip[1] * bone[1]) / _squares(bone), 0.0, 1.0)
        return float(_squares(tip - share * bone).min())

    for finger in RAISED[label]:
        if finger != THUMB:
            span = np.array([x[finger, 3] - x[finger, 0], y[finger, 3] - y[finger, 0]])
            if _squares(span) < MIN_SPAN**2 or nearest(finger) < MIN_GAP**2:
                return False
    return nearest(THUMB) > BESIDE**2 if THUMB in RAISED[label] else nearest(THUMB) < BEFORE**2


def _squares(vectors: Floats) -> Floats:
    """Squared lengths of vectors in the plane, (2, ...)."""
    squares: Floats = vectors[0] * vectors[0] + vectors[1] * vectors[1]
    return squares


def turned(shapes: Capsules, turn: Turn) -> Capsules:
    starts, ends, dorsal = (
        turn.apply(points.T).T for points in (shapes.starts, shapes.ends, shapes.dorsal)
    )
    return Capsules(starts, ends, shapes.radii, dorsal, shapes.parts)


def frame_hand(shapes: Capsules, random: np.random.Generator) -> Camera:
    """Put the whole hand, without the forearm, into the frame."""
    hand = shapes.parts != ARM
    ends = np.concatenate([shapes.starts[hand], shapes.ends[hand]])[:, :2]
    low, high = ends.min(axis=0) - 1.0, ends.max(axis=0) + 1.0
    extent = high - low
    smallest = 0.4 if random.uniform() < 0.12 else 0.62
    shown = float(extent.max()) / random.uniform(smallest, 1.0)
    x, y = (low + high) / 2 + 0.5 * (shown - extent) * random.uniform(-1.0, 1.0, 2)
    distance = random.uniform(30.0, 80.0)
    return Camera(distance, distance * FRAME / shown, (float(x), float(y)), FRAME)
