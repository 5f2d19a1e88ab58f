"""A hand of capsules that makes the six signs.

Lengths are centimetres. A right hand lies with its wrist in the origin: x points
to the thumb's side, y to the fingertips, z out of the palm. A left hand is the
mirrored picture of a right one. Bone lengths and joint limits are those of a
middling adult hand, rounded.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

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


class Part(IntEnum):
    """What a capsule belongs to, as far as its skin looks different."""

    PALM = 0
    FINGER = 1
    TIP = 2
    ARM = 3


@dataclass(frozen=True)
class Hand:
    """Joints of a posed hand.

    Args:
        joints: float64, (5, 4, 3); thumb to little finger, base to tip, in cm.
        dorsal: float64, (5, 3, 3); unit vectors out of the back of each bone.
        arm: float64, (3,); unit vector from the wrist to the elbow.
        girth: factor on every radius.
    """

    joints: Floats
    dorsal: Floats
    arm: Floats
    girth: float


@dataclass(frozen=True)
class Capsules:
    """Spheres swept along segments, their radius changing evenly.

    Args:
        starts: float64, (n, 3), in cm.
        ends: float64, (n, 3), in cm.
        radii: float64, (n, 2), at start and end, in cm.
        dorsal: float64, (n, 3); unit vectors out of the back of the hand.
        parts: int64, (n,); see `Part`.
    """

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
    """`vector`, (3,), scaled to length 1."""
    return vector / length(vector)


def pose(label: int, random: np.random.Generator) -> Hand:
    """Draw one natural pose of a sign.

    Args:
        label: the sign, 0 to 5.
        random: source of the pose's variety.

    Returns:
        A right hand.
    """
    joints = np.zeros((5, 4, 3))
    dorsal = np.zeros((5, 3, 3))
    opening = random.uniform(0.55, 1.7)
    curl = random.uniform(-5.0, 5.0)
    for finger in (INDEX, MIDDLE, RING, LITTLE):
        spread = _spread(label, finger, opening)
        bends = _bends(label, finger, curl, random)
        joints[finger], dorsal[finger] = _finger(finger, spread + random.uniform(-2, 2), bends)
    joints[THUMB], dorsal[THUMB] = _thumb(label, joints, random)
    sideways, forward = circle(random.uniform(-22, 22)), circle(random.uniform(-14, 14))
    arm = np.array([sideways[1], -sideways[0] * forward[0], sideways[0] * forward[1]])
    return Hand(joints, dorsal, arm, random.uniform(0.94, 1.18))


def _spread(label: int, finger: int, opening: float) -> float:
    """Degrees by which a finger leans towards the thumb's side."""
    if finger not in RAISED[label]:
        # The fingertips of the ring meet; those of a fist just lie close.
        return SPREAD[finger] * (-0.4 if label == 0 else 0.4)
    apart = {INDEX: 5.0, MIDDLE: -5.0}[finger] if label == 2 else 0.0
    return (SPREAD[finger] + apart) * opening


def _bends(label: int, finger: int, curl: float, random: np.random.Generator) -> list[float]:
    """Degrees by which the three joints of a finger bend towards the palm."""
    if label == 0:
        loose = -2.0 * (finger - INDEX)
        limits = ((50.0 + curl + loose, 4.0), (64.0 + curl + loose, 4.0), (46.0, 5.0))
    elif finger in RAISED[label]:
        limits = ((4.0 + curl, 5.0), (7.0, 6.0), (5.0, 4.0))
    else:
        limits = ((80.0 + curl, 6.0), (104.0, 6.0), (52.0, 8.0))
    return [middle + random.uniform(-width, width) for middle, width in limits]


def _finger(finger: int, spread: float, bends: list[float]) -> tuple[Floats, Floats]:
    cos, sin = circle(spread)
    along, out = np.array([sin, cos, 0.0]), np.array([0.0, 0.0, 1.0])
    joints, dorsal, total = [BASES[finger]], [], 0.0
    for bone, bend in zip(BONES[finger], bends, strict=True):
        total += bend
        cos, sin = circle(total)
        joints.append(joints[-1] + bone * (cos * along + sin * out))
        dorsal.append(sin * along - cos * out)
    return np.stack(joints), np.stack(dorsal)


def _thumb(label: int, joints: Floats, random: np.random.Generator) -> tuple[Floats, Floats]:
    jitter = random.uniform(-1.0, 1.0, 3)
    if THUMB in RAISED[label]:
        cos, sin = circle(47.0 + 13.0 * jitter[0])
        away = np.array([cos, sin, 0.12 + 0.15 * jitter[1]])
        first, back = away + np.array([-0.05, 0.12, 0.1]), np.array([0.5, -0.5, -0.7])
        knuckle = BASES[THUMB] + BONES[THUMB, 0] * unit(first)
        target, pole = knuckle + 5.8 * unit(away), np.array([0.6, -0.6, -0.2])
    else:
        first, target, pole = _opposed(label, joints, jitter)
        knuckle = BASES[THUMB] + BONES[THUMB, 0] * unit(first)
        back = pole
    bent, tip = _reach(knuckle, target, pole, BONES[THUMB, 1], BONES[THUMB, 2])
    chain = np.stack([BASES[THUMB], knuckle, bent, tip])
    return chain, np.stack([_across(back, chain[i + 1] - chain[i]) for i in range(3)])


def _opposed(label: int, joints: Floats, jitter: Floats) -> tuple[Floats, Floats, Floats]:
    """First bone's direction, the tip's target and where the knuckle points."""
    if label == 0:
        touch = joints[INDEX, 3] * 0.6 + joints[MIDDLE, 3] * 0.4 + np.array([0.0, -1.0, -0.5])
        return np.array([0.25, 0.45, 0.8]), touch + 0.25 * jitter, np.array([0.1, -0.9, 0.5])
    if label == 4:
        touch = np.array([-1.2, 5.6, 2.5]) + jitter * np.array([0.9, 0.7, 0.2])
        return np.array([0.5, 0.75, 0.5]), touch, np.array([0.5, 0.35, 0.6])
    folded = MIDDLE if label == 1 else RING
    touch = joints[folded, 1] * 0.2 + joints[folded, 2] * 0.8 + np.array([-0.4, 0.0, 1.35])
    return np.array([0.5, 0.6, 0.75]), touch + 0.35 * jitter, np.array([0.6, 0.0, 0.8])


def _across(vector: Floats, axis: Floats) -> Floats:
    """The part of `vector` that is square to `axis`, as a unit vector."""
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
    """Clothe the bones of a hand: fingers, palm, webs and forearm."""
    rows: list[tuple[Floats, Floats, float, float, Floats, Part]] = []
    behind = np.array([0.0, 0.0, -1.0])
    for finger in range(5):
        for bone in range(3):
            part = Part.TIP if bone == 2 else Part.FINGER
            if finger == THUMB and bone == 0:
                part = Part.PALM
            start, end = hand.joints[finger, bone : bone + 2]
            radii = RADII[finger, bone : bone + 2]
            rows.append((start, end, radii[0], radii[1], hand.dorsal[finger, bone], part))
    thumb = hand.joints[THUMB, 1]
    for finger in (INDEX, MIDDLE, RING, LITTLE):
        rows.append((CARPALS[finger - 1], BASES[finger], 1.4, 1.12, behind, Part.PALM))
        if finger != LITTLE:
            web = (BASES[finger] * 0.93, BASES[finger + 1] * 0.93)
            rows.append((*web, 1.1, 1.1, behind, Part.PALM))
    pads = (
        (np.array([1.0, 2.2, 0.5]), BASES[THUMB] * 0.35 + thumb * 0.65, 1.45, 1.25),
        (np.array([2.3, 5.6, 0.0]), BASES[THUMB] * 0.4 + thumb * 0.6, 1.1, 0.8),
        (np.array([-1.6, 1.6, 0.4]), np.array([-2.5, 6.6, 0.1]), 1.45, 1.15),
    )
    rows.extend((*pad, behind, Part.PALM) for pad in pads)
    for side in (-1.0, 1.0):
        offset = np.array([side, 0.0, 0.0])
        start = np.array([0.0, 0.6, 0.0]) + 0.95 * offset
        rows.append((start, start + 26.0 * hand.arm + 0.8 * offset, 1.5, 2.5, behind, Part.ARM))
    starts, ends, first, second, dorsal, parts = zip(*rows, strict=True)
    return Capsules(
        np.stack(starts),
        np.stack(ends),
        np.stack([first, second], axis=1) * hand.girth,
        np.stack(dorsal),
        np.array(parts, dtype=np.int64),
    )
