"""Light on the hand and on the wall behind it, with the shadows between them."""

from dataclasses import dataclass

import numpy as np

from tasks.rendering.hand import Floats, circle, unit
from tasks.rendering.pixels import SIDE, SUPERSAMPLED, blur, shift
from tasks.rendering.raycast import Camera, Hits, inner


@dataclass(frozen=True)
class Light:
    """One lamp and what comes from everywhere.

    Args:
        towards: float64, (3,); unit vector to the lamp.
        key: float64, (3,); the lamp's red, green and blue.
        ambient: float64, (3,); the room's.
        depth: 0 to 1; how dark shadows and hollows of the hand are.
    """

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
    """Light on what was hit: lamp with its shadows, room, darker hollows and edges.

    Args:
        depth: float64, (size, size); z in cm of hand or wall.
        hits: m pixels that see the hand.
        light: lamp and room.
        camera: the view.

    Returns:
        float64, (3, m); red, green and blue.
    """
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
    """Light on the wall: lamp, room, the hand's soft shadow, dark corners.

    Args:
        hits: the pixels that see the hand.
        light: lamp and room.
        camera: the view.
        gap: between the wall and the middle of the hand, in cm.
        random: source of softness and falloff.

    Returns:
        float64, (3, SIDE, SIDE); smooth, so computed at the photo's own size.
    """
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
