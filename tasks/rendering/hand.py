"""A right hand of capsules that makes the six signs, in cm.

The wrist is the origin: x points to the thumb's side, y to the fingertips, z out of the palm.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

THUMB, INDEX, MIDDLE, RING, LITTLE = range(5)
RAISED: dict[int, tuple[int, ...]] = {
    0: (),
    1: (INDEX,),
    2: (INDEX, MIDDLE),
    3: (THUMB, INDEX, MIDDLE),
    4: (INDEX, MIDDLE, RING, LITTLE),
    5: (THUMB, INDEX, MIDDLE, RING, LITTLE),
}
"""Fingers that each sign shows; 0 is a ring of all of them."""

BASES = np.array(
    [[2.0, 2.0, 0.7], [2.75, 8.9, 0.0], [0.9, 9.3, 0.1], [-0.95, 8.9, 0.0], [-2.65, 8.0, -0.2]]
)
CARPALS = np.array([[1.35, 0.9, 0.0], [0.5, 0.8, 0.1], [-0.5, 0.8, 0.1], [-1.35, 0.9, 0.0]])
BONES = np.array(
    [[4.2, 3.3, 2.6], [4.3, 2.6, 2.0], [4.8, 3.0, 2.1], [4.4, 2.8, 2.1], [3.5, 2.0, 1.8]]
)
RADII = np.array(
    [
        [1.50, 1.15, 0.98, 0.74],
        [1.02, 0.86, 0.76, 0.62],
        [1.04, 0.88, 0.78, 0.64],
        [1.00, 0.83, 0.74, 0.60],
        [0.88, 0.70, 0.63, 0.52],
    ]
)
SPREAD = (0.0, 7.0, 0.0, -7.0, -15.0)  # degrees away from the middle finger
PALM, FINGER, TIP, ARM = range(4)  # what a capsule belongs to


@dataclass(frozen=True)
class Hand:
    """A posed hand: thumb to little finger, base to tip."""

    joints: Floats  # (5, 4, 3)
    dorsal: Floats  # (5, 3, 3), out of the back of each bone
    arm: Floats  # (3,), from wrist to elbow
    girth: float  # a factor on every radius


@dataclass(frozen=True)
class Capsules:
    """Spheres swept along n segments, with a radius at each end."""

    starts: Floats
    ends: Floats
    radii: Floats
    dorsal: Floats
    parts: NDArray[np.int64]


def circle(degrees: float) -> tuple[float, float]:
    """Cosine and sine, rounded so that mathematics libraries agree on them."""
    angle = math.radians(degrees)
    return round(math.cos(angle), 12), round(math.sin(angle), 12)


def length(vector: Floats) -> float:
    """Euclidean length of (3,), added up in a fixed order."""
    x, y, z = (float(part) for part in vector)
    return math.sqrt(x * x + y * y + z * z)


def unit(vector: Floats) -> Floats:
    return vector / length(vector)


def pose(label: int, random: np.random.Generator) -> Hand:
    """Draw a natural pose of a sign, 0 to 5."""
    bones = BONES * random.uniform(0.92, 1.08) * random.uniform(0.95, 1.05, (5, 1))
    bases = BASES * np.array([random.uniform(0.94, 1.1), random.uniform(0.94, 1.06), 1.0])
    joints = np.zeros((5, 4, 3))
    dorsal = np.zeros((5, 3, 3))
    spreads = _spreads(label, random)
    bends = _ring_bends(random) if label == 0 else _finger_bends(label, random)
    for finger in (INDEX, MIDDLE, RING, LITTLE):
        joints[finger], dorsal[finger] = _finger(
            bases[finger], bones[finger], spreads[finger], bends[finger - 1]
        )
    straight = THUMB in RAISED[label]
    first, target, pole, back = (
        _straight_thumb(label, random) if straight else _bent_thumb(label, joints, random)
    )
    knuckle = bases[THUMB] + bones[THUMB, 0] * unit(first)
    target = knuckle + target if straight else target
    bent, tip = _reach(knuckle, target, pole, *bones[THUMB, 1:].tolist())
    joints[THUMB] = bases[THUMB], knuckle, bent, tip
    dorsal[THUMB] = [_across(back, bone) for bone in np.diff(joints[THUMB], axis=0)]
    sideways, forward = circle(random.uniform(-30, 30)), circle(random.uniform(-22, 22))
    arm = np.array([sideways[1], -sideways[0] * forward[0], sideways[0] * forward[1]])
    return Hand(joints, dorsal, arm, random.uniform(0.9, 1.2))


def _spreads(label: int, random: np.random.Generator) -> Floats:
    """Degrees by which each finger leans towards the thumb's side, (5,)."""
    opening = random.uniform(-0.4, 1.7)  # below zero the tips of neighbours touch
    leans = np.array(SPREAD)
    if label in (2, 3):
        apart = 7.0 if label == 2 else 4.0
        leans = leans + np.array([0.0, apart, -apart, 0.0, 0.0])
    if label in (4, 5) and random.uniform() < 0.15:
        leans = leans + random.uniform(3.0, 9.0) * np.array([0.0, 1.0, 1.0, -1.0, -1.0])
    if random.uniform() < 0.3:
        leans[LITTLE] -= random.uniform(0.0, 18.0)
    raised = np.isin(np.arange(5), RAISED[label])
    # The fingertips of the ring meet; those of a fist just lie close.
    closed = np.array(SPREAD) * (-0.4 if label == 0 else random.uniform(0.1, 0.6))
    spreads: Floats = np.where(raised, leans * opening, closed) + random.uniform(-3.0, 3.0, 5)
    return spreads


def _ring_bends(random: np.random.Generator) -> Floats:
    """Degrees by which the joints of the four fingers of sign 0 bend, (4, 3)."""
    tight = random.uniform(-1.0, 1.0)
    bends = np.array([51.0, 67.0, 44.0]) + tight * np.array([9.0, 14.0, 6.0])
    fan = random.uniform(-4.0, 1.0) * np.arange(4)[:, None]
    return bends + fan + random.uniform(-4.0, 4.0, (4, 3))


def _finger_bends(label: int, random: np.random.Generator) -> Floats:
    """Degrees by which the joints of the four fingers of signs 1 to 5 bend, (4, 3)."""
    droop, loose = random.uniform(0.0, 1.0, 2)
    droop = droop * droop * droop
    # No thumb holds the folded fingers of sign 3.
    loose = 0.7 * loose if label == 3 else 0.8 * loose * loose
    own = random.uniform(-1.0, 1.0, (4, 3))
    straight = np.array([-3.0, 5.0, 4.0]) + droop * np.array([26.0, 26.0, 16.0])
    straight = straight + own * (np.array([6.0, 5.0, 4.0]) + 6.0 * droop)
    folded = np.array([86.0, 106.0, 54.0]) - loose * np.array([34.0, 14.0, 20.0])
    folded = folded + own * np.array([8.0, 7.0, 9.0])
    raised = np.isin(np.arange(1, 5), RAISED[label])[:, None]
    bends: Floats = np.where(raised, straight, folded)
    return bends


def _finger(base: Floats, bones: Floats, spread: float, bends: Floats) -> tuple[Floats, Floats]:
    cos, sin = circle(spread)
    along, out = np.array([sin, cos, 0.0]), np.array([0.0, 0.0, 1.0])
    joints, dorsal, total = [base], [], 0.0
    for bone, bend in zip(bones.tolist(), bends.tolist(), strict=True):
        total += bend
        cos, sin = circle(total)
        joints.append(joints[-1] + bone * (cos * along + sin * out))
        dorsal.append(sin * along - cos * out)
    return np.stack(joints), np.stack(dorsal)


_Thumb = tuple[Floats, Floats, Floats, Floats]
"""Direction of the bone in the ball of the thumb, where the tip goes, from the wrist or, of a
straight thumb, from the knuckle, where the middle joint points to, and the back of the thumb."""


def _straight_thumb(label: int, random: np.random.Generator) -> _Thumb:
    """A thumb that is shown: square to the fingers, beside them, or forward."""
    angle = random.uniform(28.0, 84.0)
    forward = random.uniform(-0.05, 0.3)
    if label == 5 and random.uniform() < 0.25:
        angle, forward = angle + 12.0, forward + random.uniform(0.0, 0.5)
    cos, sin = circle(angle)
    away = unit(np.array([cos, sin, forward]))
    cos, sin = circle(0.6 * angle + 19.0)
    first = np.array([cos, sin, 0.1 + 0.6 * forward])
    # At almost full reach a thumb is straight; some bend outwards and some inwards.
    length = random.uniform(5.3, 5.9)
    pole = np.array([0.6, -0.6, -0.2]) * (1.0 if random.uniform() < 0.5 else -1.0)
    return first, length * away, pole, np.array([0.5, -0.5, -0.7])


def _bent_thumb(label: int, joints: Floats, random: np.random.Generator) -> _Thumb:
    jitter = random.uniform(-1.0, 1.0, 3)
    if label == 0:
        touch = joints[INDEX, 3] * 0.6 + joints[MIDDLE, 3] * 0.4 + np.array([0.0, -1.0, -0.5])
        pole = np.array([0.1, -0.9, 0.5])
        return np.array([0.25, 0.45, 0.8]), touch + 0.3 * jitter, pole, pole
    kind = random.uniform()
    if label == 4:
        return _thumb_on_palm(kind, jitter)
    if kind < 0.15:  # beside the fist
        touch = np.array([2.4, 8.3, 1.9]) + jitter * np.array([0.5, 0.9, 0.6])
        pole = np.array([0.8, 0.0, 0.3])
        return np.array([0.35, 0.8, 0.4]), touch, pole, pole
    if kind < 0.4:  # tip to tip with the first folded finger
        finger = MIDDLE if label == 1 else RING
        tip, before = joints[finger, 3], joints[finger, 2]
        pole = np.array([0.3, -0.7, 0.6])
        touch = tip + 0.9 * unit(tip - before) + 0.35 * jitter
        return np.array([0.3, 0.5, 0.8]) + 0.1 * jitter, touch, pole, pole
    folded = int(random.integers(MIDDLE if label == 1 else RING, LITTLE + 1))
    along = random.uniform(0.3, 1.0)
    touch = joints[folded, 1] * (1.0 - along) + joints[folded, 2] * along
    pole = np.array([0.35, -0.1, 0.9])
    touch = touch + np.array([-0.2, 0.0, 1.35]) + 0.35 * jitter
    first = np.array([0.35, 0.58, 0.8]) + 0.12 * jitter
    return first, touch, pole, pole


def _thumb_on_palm(kind: float, jitter: Floats) -> _Thumb:
    """The thumb of sign 4, which people fold in many ways; `kind` is 0 to 1."""
    pole = np.array([0.5, 0.35, 0.6])
    # How far it stands off the palm; a thumb that lies flat shows little of itself.
    flat = 0.5 * (1.0 + jitter[2])
    if kind < 0.25:  # across, to the ring or little finger
        touch = np.array([-0.9, 6.2, 1.75 + 0.9 * flat]) + jitter * np.array([1.3, 1.7, 0.0])
        return np.array([0.4, 0.75, 0.3 + 0.3 * flat]), touch, pole, pole
    if kind < 0.5:  # tip below the index or middle finger
        touch = np.array([1.1, 7.3, 1.75 + 0.7 * flat]) + jitter * np.array([1.1, 1.4, 0.0])
        return np.array([0.5, 0.75, 0.3 + 0.25 * flat]), touch, pole, pole
    if kind < 0.72:  # bent at the palm's edge
        touch = np.array([1.0, 6.4, 1.8 + 0.7 * flat]) + jitter * np.array([1.0, 1.2, 0.0])
        up = np.array([0.4, 0.8, 0.1 + 0.3 * flat])
        return np.array([0.65, 0.7, 0.2 + 0.3 * flat]), touch, up, pole
    if kind < 0.86:  # upright, beside the index finger's base
        touch = np.array([2.1, 8.7, 1.7 + 0.8 * flat]) + jitter * np.array([0.9, 1.1, 0.0])
        first = np.array([0.25, 0.85, 0.25 + 0.2 * flat])
        return first, touch, np.array([0.8, 0.0, 0.4]), pole
    if kind < 0.92:  # towards the camera
        touch = np.array([0.6, 5.0, 4.6]) + jitter * np.array([1.5, 1.2, 1.0])
        return np.array([0.4, 0.6, 0.7]), touch, pole, pole
    touch = np.array([-1.4, 3.8, 2.5]) + jitter * np.array([1.1, 0.9, 0.5])
    return np.array([0.5, 0.6, 0.6]), touch, pole, pole


def _across(vector: Floats, axis: Floats) -> Floats:
    """Unit vector of the part of `vector` that is square to `axis`."""
    along = unit(axis)
    x, y, z = (float(part) for part in vector * along)
    return unit(vector - (x + y + z) * along)


def _reach(
    start: Floats, target: Floats, pole: Floats, first: float, second: float
) -> tuple[Floats, Floats]:
    """Joint and end of two bones from `start` towards `target`, by the law of cosines."""
    chord = target - start
    reach = min(max(length(chord), abs(first - second) + 0.5), 0.995 * (first + second))
    along = (reach * reach + first * first - second * second) / (2 * reach)
    height = math.sqrt(max(first * first - along * along, 0.0))
    direction = unit(chord)
    return start + along * direction + height * _across(pole, chord), start + reach * direction


def capsules(hand: Hand) -> Capsules:
    """Shape fingers, palm, webs and forearm about the bones of a hand."""
    rows: list[tuple[Floats, Floats, float, float, Floats, int]] = []
    behind = np.array([0.0, 0.0, -1.0])
    for finger in range(5):
        for bone, part in enumerate((FINGER, FINGER, TIP)):
            if finger == THUMB and bone == 0:
                part = PALM
            start, end = hand.joints[finger, bone : bone + 2]
            radii = RADII[finger, bone : bone + 2]
            rows.append((start, end, radii[0], radii[1], hand.dorsal[finger, bone], part))
    bases, thumb = hand.joints[:, 0], hand.joints[THUMB, 1]
    for finger in (INDEX, MIDDLE, RING, LITTLE):
        rows.append((CARPALS[finger - 1], bases[finger], 1.4, 1.12, behind, PALM))
        if finger != LITTLE:
            web = (bases[finger] * 0.93, bases[finger + 1] * 0.93)
            rows.append((*web, 1.1, 1.1, behind, PALM))
            near, far = hand.joints[finger : finger + 2, :2]
            low, high = near[0] + 0.34 * (near[1] - near[0]), far[0] + 0.34 * (far[1] - far[0])
            rows.append((low, high, 0.85, 0.8, behind, PALM))
    pads = (
        (np.array([1.0, 2.2, 0.5]), bases[THUMB] * 0.35 + thumb * 0.65, 1.45, 1.25),
        (np.array([2.3, 5.6, 0.0]), bases[THUMB] * 0.4 + thumb * 0.6, 1.1, 0.8),
        (np.array([-1.6, 1.6, 0.4]), bases[LITTLE] + np.array([0.15, -1.4, 0.3]), 1.45, 1.15),
    )
    rows.extend((*pad, behind, PALM) for pad in pads)
    for side in (-1.0, 1.0):
        offset = np.array([side, 0.0, 0.0])
        start = np.array([0.0, 0.6, 0.0]) + 0.95 * offset
        rows.append((start, start + 26.0 * hand.arm + 0.8 * offset, 1.5, 2.5, behind, ARM))
    starts, ends, first, second, dorsal, parts = zip(*rows, strict=True)
    return Capsules(
        np.stack(starts),
        np.stack(ends),
        np.stack([first, second], axis=1) * hand.girth,
        np.stack(dorsal),
        np.array(parts, dtype=np.int64),
    )
