"""Where the rays of a pinhole camera meet capsules.

Only additions, multiplications, divisions and square roots of single elements: IEEE 754 rounds
these alike on every processor, unlike matrix products, sums and transcendental functions.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.rendering.hand import Capsules, Floats

BLEND = 0.55  # depth in cm within which two capsules are one smooth surface


@dataclass(frozen=True)
class Camera:
    """Looks from (0, 0, distance) along -z; the middle of its `size` pixels shows `centre`."""

    distance: float
    focal: float
    centre: tuple[float, float]
    size: int


@dataclass(frozen=True)
class Hits:
    """The m pixels that see anything, row by row."""

    seen: NDArray[np.bool_]  # (size, size); where they are
    owners: NDArray[np.int64]  # (m,); the nearest capsules
    along: Floats  # (m,); 0 at its start and 1 at its end
    points: Floats  # (3, m); on the surface, in cm
    normals: Floats  # (3, m); out of it


_Patch = tuple[NDArray[np.int64], Floats, Floats, Floats]
"""Pixels that see one capsule, if nothing else is in the way; distance, normals and `along`."""


def cast(shapes: Capsules, camera: Camera) -> Hits:
    """Find what each pixel sees first, with normals blended where capsules meet."""
    steps = (np.arange(camera.size) + 0.5 - camera.size / 2) / camera.focal
    rays = np.empty((3, camera.size, camera.size))
    rays[0], rays[1], rays[2] = steps[None, :], -steps[:, None], -1.0
    rays = _normalise(rays.reshape(3, -1))
    eye = np.array([*camera.centre, camera.distance])
    patches = [_patch(shapes, index, rays, eye, camera) for index in range(len(shapes.starts))]
    nearest = np.full(camera.size**2, np.inf)
    owners = np.full(camera.size**2, -1, dtype=np.int64)
    along = np.zeros(camera.size**2)
    for index, (pixels, distance, _, share) in enumerate(patches):
        closer = distance < nearest[pixels]
        pixels = pixels[closer]
        nearest[pixels], along[pixels], owners[pixels] = distance[closer], share[closer], index
    normals = np.zeros_like(rays)
    for pixels, distance, normal, _ in patches:
        weight = np.maximum(1.0 - (distance - nearest[pixels]) / BLEND, 0.0)
        normals[:, pixels] += weight * weight * normal
    seen = owners >= 0
    points = eye[:, None] + nearest[seen] * rays[:, seen]
    shape = camera.size, camera.size
    return Hits(
        seen.reshape(shape), owners[seen], along[seen], points, _normalise(normals[:, seen])
    )


def inner(left: Floats, right: Floats) -> Floats:
    """Inner product over the first axis, added up in a fixed order."""
    product: Floats = left[0] * right[0] + left[1] * right[1] + left[2] * right[2]
    return product


def _normalise(vectors: Floats) -> Floats:
    return vectors / np.sqrt(inner(vectors, vectors))


def _window(ends: Floats, radii: Floats, eye: Floats, camera: Camera) -> NDArray[np.int64]:
    """Pixels of a rectangle that holds the picture of a capsule; may be none."""
    edges = []
    for (x, y, z), radius in zip((ends - eye).tolist(), radii.tolist(), strict=True):
        near = max(-z - radius, 1.0)
        edges.append((x / near, y / near, 1.1 * radius / near))
    scale, middle = camera.focal, camera.size / 2
    left = min(x - radius for x, _, radius in edges) * scale + middle
    right = max(x + radius for x, _, radius in edges) * scale + middle
    top = middle - max(y + radius for _, y, radius in edges) * scale
    bottom = middle - min(y - radius for _, y, radius in edges) * scale
    rows = np.arange(max(math.floor(top), 0), min(math.ceil(bottom), camera.size))
    columns = np.arange(max(math.floor(left), 0), min(math.ceil(right), camera.size))
    return (rows[:, None] * camera.size + columns).ravel()


def _patch(shapes: Capsules, index: int, rays: Floats, eye: Floats, camera: Camera) -> _Patch:
    """Ray and round cone, after Inigo Quilez, 'Intersectors', `roundConeIntersect`."""
    start, end = shapes.starts[index], shapes.ends[index]
    first, second = shapes.radii[index].tolist()
    pixels = _window(np.stack([start, end]), shapes.radii[index], eye, camera)
    ray = rays[:, pixels]
    axis, from_start, from_end = end - start, eye - start, eye - end
    slope = first - second
    length2, axis_start = float(inner(axis, axis)), float(inner(axis, from_start))
    axis_ray, ray_start = inner(axis, ray), inner(from_start, ray)
    side2 = length2 - slope * slope
    a = side2 - axis_ray * axis_ray
    b = side2 * ray_start + (slope * first - axis_start) * axis_ray
    c = (
        side2 * float(inner(from_start, from_start))
        - axis_start * axis_start
        + 2.0 * axis_start * slope * first
        - length2 * first * first
    )
    root = b * b - c * a
    distance = (-np.sqrt(np.maximum(root, 0.0)) - b) / np.where(np.abs(a) > 1e-9, a, 1e-9)
    height = axis_start - first * slope + distance * axis_ray
    on_side = (root >= 0.0) & (height > 0.0) & (height < side2)
    ball = np.minimum(_ball(from_start, first, ray), _ball(from_end, second, ray))
    distance = np.where(on_side, distance, ball)
    hit = distance < np.inf
    distance = distance[hit]
    point = from_start[:, None] + distance * ray[:, hit]
    height = inner(axis, point)
    foot = np.clip(height - first * slope, 0.0, side2) / side2
    normals = _normalise(point - axis[:, None] * foot)
    return pixels[hit], distance, normals, np.clip(height / length2, 0.0, 1.0)


def _ball(centre: Floats, radius: float, ray: Floats) -> Floats:
    """Distance to a sphere along each ray; infinite where it is missed."""
    middle = inner(centre, ray)
    root = middle * middle - (float(inner(centre, centre)) - radius * radius)
    return np.where(root >= 0.0, -middle - np.sqrt(np.maximum(root, 0.0)), np.inf)
