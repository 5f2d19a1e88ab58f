"""Augmented copies of photos."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.params import AugmentationParams

INPUT_SIZE = 224
"""Side of EfficientNetB0's input in pixels."""


def enlarge(images: NDArray[np.uint8], size: int = INPUT_SIZE) -> NDArray[np.uint8]:
    """Enlarge photos as they are: the plain view, number 0.

    Bilinear with half-pixel centres, as `tf.image.resize` does by default, rounded
    to the nearest level. Levels stay integers: a view is a picture like any other,
    four times smaller than as float32, and rounding moves a pixel by half a level
    of 255 at most.

    Args:
        images: uint8, (n, d, d, 3), RGB in [0, 255].
        size: side of the result in pixels.

    Returns:
        uint8, (n, size, size, 3).
    """
    large = np.empty((len(images), size, size, 3), np.uint8)
    plain = _placement(images.shape[1], size)
    for image, result in zip(images, large, strict=True):
        result[...] = _warp(image, plain, size)
    return large


def view(
    image: NDArray[np.uint8],
    name: str,
    number: int,
    seed: int,
    params: AugmentationParams,
    size: int = INPUT_SIZE,
) -> NDArray[np.uint8]:
    """Make one view of one photo; the same arguments always give the same bytes.

    What is drawn depends on `(seed, name, number)` alone, not on other photos, on
    their order or on the strengths in `params`, which only scale it.

    Args:
        image: uint8, (d, d, 3), RGB in [0, 255].
        name: the photo's file name.
        number: 0 for the plain view, 1 and up for augmented ones.
        seed: `seed` of params.yaml.
        params: strength of each variation.
        size: side of the result in pixels.

    Returns:
        uint8, (size, size, 3).
    """
    if number == 0:
        return _warp(image, _placement(len(image), size), size)
    key = [seed, number, _number_of(name)]
    random, behind = np.random.default_rng(key), np.random.default_rng([*key, 1])
    if behind.random() < params.backdrop:
        image = exchange_backdrop(image, behind)
    mirror = bool(random.random() < 0.5) and params.horizontal_flip
    angle, zoom, right, down, light, contrast, *channels = random.uniform(-1, 1, 9)
    coloured = _recolour(
        image,
        light=255 * params.brightness * light,
        contrast=1 + params.contrast * contrast,
        gains=1 + params.channel * np.array(channels),
    )
    placement = _placement(
        len(image),
        size,
        mirror=mirror,
        angle=np.deg2rad(params.rotation * angle),
        zoom=_zoom((zoom + 1) / 2, params),
        shift=(params.shift * right, params.shift * down),
    )
    return _warp(coloured, placement, size)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep OpenCV from splitting single pictures, where the cores have other work.

    The setting is the whole process's; it is put back at the end.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _zoom(place: float, params: AugmentationParams) -> float:
    """Growth of the hand for a number drawn from [0, 1), small growth for small ones."""
    nearer = 1 + params.zoom
    return float(np.interp(place, (0, params.far, 1), (params.farthest, 1 - params.zoom, nearer)))


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def _recolour(
    image: NDArray[np.uint8], light: float, contrast: float, gains: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Stretch each channel about its mean, as `tf.image.adjust_contrast`, then shift and scale."""
    means = np.array(cv2.mean(image)[:3])
    levels = np.arange(256)[:, np.newaxis]
    changed: NDArray[np.float64] = ((levels - means) * contrast + means + light) * gains
    table = np.rint(np.clip(changed, 0, 255)).astype(np.uint8)
    coloured: NDArray[np.uint8] = cv2.LUT(image, table[np.newaxis])
    return coloured


def _placement(
    detail: int,
    size: int,
    mirror: bool = False,
    angle: float = 0.0,
    zoom: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.float64]:
    """Map pixel centres of the stored picture to pixel centres of the view.

    Args:
        detail: side of the stored picture.
        size: side of the view.
        mirror: left becomes right, before anything else.
        angle: turn about the centre, in radians.
        zoom: growth of what the picture shows.
        shift: to the right and down, as shares of the side.

    Returns:
        float64, (2, 3); what `cv2.warpAffine` takes.
    """
    scale = zoom * size / detail
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    if mirror:
        turn[:, 0] *= -1
    centre = np.full(2, (detail - 1) / 2)
    target = (size - 1) / 2 + size * np.array(shift)
    return np.column_stack([turn, target - turn @ centre])


def _warp(image: NDArray[np.uint8], placement: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Repeat the border beyond it: an arm and a wall go on, and no second hand appears."""
    warped: NDArray[np.uint8] = cv2.warpAffine(
        image, placement, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return warped


_LIGHTNESS, _COLOUR = 0.4, 1.5
"""Weights of the axes of CIELAB: a shadow belongs to the wall, a tint to the hand."""
_NEAR = 40.0
"""City-block distance in CIELAB up to which a pixel of the rim is of the wall's colour."""
_PLAIN = 0.5
"""Share of the rim that a wall covers; with less there is none, or no plain one."""
_HANDS = (0.1, 0.7)
"""Least and largest share of a photo that is a hand."""
_SQUARE = np.ones((3, 3), np.uint8)
_TRACE = 0.02
"""Least share of the hand around a pixel that tells its colour."""
_SCALES = (2, 4, 8, 16, 32)
"""Of the noise in clouds: how many values lie along a side."""
_POLES = 0.3
"""Share of the things that are long and thin."""
_SHIFT = 4
"""Bits behind the point of a drawn corner's place."""


def exchange_backdrop(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Put the hand before something else: an even fall of light, clouds, or things.

    Args:
        image: uint8, (d, d, 3), RGB in [0, 255].
        random: draws the backdrop.

    Returns:
        uint8, (d, d, 3); `image` itself where no hand stands out from a plain wall.
    """
    hand = find_hand(image)
    if hand is None:
        return image
    inside = cv2.erode(hand, _SQUARE)
    # At the edge the wall shines through; colours from within the hand take its place.
    weighted = np.dstack([image * inside[..., np.newaxis], inside])
    near = cv2.GaussianBlur(weighted, (5, 5), 0)
    share = near[..., 3:]
    outer = (inside == 0) & (share[..., 0] > _TRACE)
    pure = image.astype(np.float32)
    pure[outer] = near[outer, :3] / share[outer]
    cover = cv2.GaussianBlur(hand, (3, 3), 0)[..., np.newaxis]
    behind = _backdrop(len(image), random)
    result: NDArray[np.uint8] = np.rint(np.clip(behind + (pure - behind) * cover, 0, 255)).astype(
        np.uint8
    )
    return result


def find_hand(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """Tell the hand from a plain wall by colour.

    The wall is what the upper rim shows, light falling off over it evenly; the
    largest patch that differs from it is the hand. The limit between both is Otsu's.

    Args:
        image: uint8, (d, d, 3), RGB in [0, 255].

    Returns:
        float32, (d, d); 1 on the hand, 0 beside it. None where the rim is not plain, or
        what differs is too small or too large for a hand.
    """
    side = len(image)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    wall = _wall(lab)
    if wall is None:
        return None
    weights = np.array([_LIGHTNESS, _COLOUR, _COLOUR], np.float32)
    apart = (lab - wall) * weights
    distance = np.sqrt(np.einsum("ijk,ijk->ij", apart, apart))
    levels = np.clip(distance * 3, 0, 255).astype(np.uint8)
    limit, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    different = cv2.medianBlur((levels > limit).astype(np.uint8), 3)
    count, patches, statistics, _ = cv2.connectedComponentsWithStats(different)
    if count < 2:
        return None
    largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
    share = statistics[largest, cv2.CC_STAT_AREA] / side**2
    if not _HANDS[0] <= share <= _HANDS[1]:
        return None
    hand: NDArray[np.float32] = (patches == largest).astype(np.float32)
    return hand


def _wall(lab: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The wall's colour at each pixel: a plane through the rim's, wrists left out."""
    terms, rim = _rim(len(lab))
    colours = lab.reshape(-1, 3)[rim]
    near = np.abs(colours - np.median(colours, axis=0)).sum(axis=1) < _NEAR
    if near.mean() < _PLAIN:
        return None
    plane, *_ = np.linalg.lstsq(terms[rim][near], colours[near], rcond=None)
    wall: NDArray[np.float32] = (terms @ plane).reshape(lab.shape)
    return wall


@lru_cache(maxsize=4)
def _rim(side: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """What a plane is made of at each pixel, float32 (side * side, 3), and the rim's pixels."""
    down, right = np.indices((side, side)).reshape(2, -1)
    places = np.linspace(-1, 1, side, dtype=np.float32)
    terms = np.column_stack([np.ones(side * side, np.float32), places[right], places[down]])
    beside = (right < 3) | (right >= side - 3)
    return terms, np.flatnonzero((down < 3) | (beside & (down < side * 2 // 3)))


def _backdrop(side: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Draw one of three kinds; float32, (side, side, 3), not yet cut to [0, 255]."""
    kind = (_gradient, _clouds, _things)[random.integers(3)]
    return kind(side, random)


def _gradient(side: int, random: np.random.Generator) -> NDArray[np.float32]:
    """From one colour to another, in one of four directions."""
    share = np.linspace(0, 1, side, dtype=np.float32)[:, np.newaxis, np.newaxis]
    falling = _colour(random) * (1 - share) + _colour(random) * share
    turned = np.rot90(np.broadcast_to(falling, (side, side, 3)), int(random.integers(4)))
    picture: NDArray[np.float32] = turned.copy()
    return picture


def _clouds(side: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Noise of all scales about one colour, more or less of it, grey or in colours."""
    clouds = np.tile(_colour(random), (side, side, 1))
    strength, colourful = random.uniform(10, 70), 0.7 * random.random()
    for scale in _SCALES:
        noise = random.standard_normal((scale, scale, 4), np.float32)
        tinted = (1 - colourful) * noise[..., :1] + colourful * noise[..., 1:]
        tinted *= strength * (_SCALES[0] / scale) ** 0.5
        clouds += cv2.resize(tinted, (side, side), interpolation=cv2.INTER_CUBIC)
    return clouds


def _things(side: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Boards, books and poles: rectangles, upright or not, sharp or out of focus."""
    picture = _gradient(side, random)
    for _ in range(random.integers(2, 12)):
        centre, shape = random.uniform(-0.2, 1.2, 2) * side, random.uniform(0.03, 0.6, 2) * side
        if random.random() < _POLES:
            shape *= (0.1, 2.0)
        angle = random.uniform(0, 180) if random.random() < 0.5 else 0.0
        corners = cv2.boxPoints((tuple(centre), tuple(shape), angle))
        places = np.rint(corners * 2**_SHIFT).astype(np.int32)
        cv2.fillConvexPoly(picture, places, _colour(random).tolist(), cv2.LINE_AA, _SHIFT)
    blurred: NDArray[np.float32] = cv2.GaussianBlur(picture, (5, 5), random.uniform(0.1, 1.5))
    return blurred


def _colour(random: np.random.Generator) -> NDArray[np.float32]:
    """A colour, mostly a dull one, as rooms have them."""
    tint = random.normal(0, 30, 3) * random.random()
    return np.clip(random.uniform(15, 240) + tint, 0, 255).astype(np.float32)
