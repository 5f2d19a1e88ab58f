"""Rays against shapes whose picture is known."""

import numpy as np
import pytest

from tasks.rendering.hand import Capsules, Part
from tasks.rendering.raycast import Camera, cast

CAMERA = Camera(distance=50.0, focal=200.0, centre=(0.0, 0.0), size=64)


def shapes(*rows: tuple[list[float], list[float], float, float]) -> Capsules:
    starts, ends, first, second = zip(*rows, strict=True)
    return Capsules(
        np.array(starts, dtype=float),
        np.array(ends, dtype=float),
        np.array([first, second], dtype=float).T,
        np.tile([0.0, 0.0, -1.0], (len(rows), 1)),
        np.full(len(rows), Part.PALM, dtype=np.int64),
    )


def distance_to(points: np.ndarray, start: list[float], end: list[float]) -> np.ndarray:
    axis = np.subtract(end, start)
    share = np.clip((points - start) @ axis / (axis @ axis), 0.0, 1.0)
    return np.linalg.norm(points - start - share[:, None] * axis, axis=1)


@pytest.mark.parametrize("end", [[4.0, 1.0, 2.0], [0.0, -5.0, 0.0], [-1.0, 0.5, 6.0]])
def test_hits_lie_on_the_capsule_and_normals_point_out_of_it(end: list[float]) -> None:
    start = [0.5, 0.2, -1.0]
    hits = cast(shapes((start, end, 1.5, 1.5)), CAMERA)
    assert len(hits.owners) > 50
    np.testing.assert_allclose(distance_to(hits.points.T, start, end), 1.5, rtol=1e-9)
    outside = hits.points.T + 0.01 * hits.normals.T
    np.testing.assert_allclose(distance_to(outside, start, end), 1.51, rtol=1e-9)


@pytest.mark.parametrize("end", [[4.0, 1.0, 2.0], [0.0, -3.0, 0.0], [0.3, 0.1, 3.0]])
def test_hits_on_a_tapering_capsule_touch_the_largest_of_its_spheres(end: list[float]) -> None:
    start = [0.0, 0.0, 0.0]
    hits = cast(shapes((start, end, 1.8, 0.9)), CAMERA)
    share = np.linspace(0.0, 1.0, 2001)[:, None, None]
    centres = share * np.array(end)
    depth = np.linalg.norm(hits.points.T - centres, axis=2) - (1.8 - 0.9 * share[:, :, 0])
    np.testing.assert_allclose(depth.min(axis=0), 0.0, atol=1e-5)


def test_a_sphere_at_the_plane_zero_appears_at_scale() -> None:
    hits = cast(shapes(([-0.01, 0, 0], [0.01, 0, 0], 4.0, 4.0)), CAMERA)
    radius = np.sqrt(hits.seen.sum() / np.pi)
    assert radius == pytest.approx(4.0 * 200.0 / np.sqrt(50.0**2 - 4.0**2), rel=0.01)


def test_up_is_up_and_right_is_right() -> None:
    hits = cast(shapes(([3.0, 4.0, 0], [3.1, 4.0, 0], 1.0, 1.0)), CAMERA)
    rows, columns = np.nonzero(hits.seen)
    assert rows.mean() < 32 < columns.mean()


def test_the_nearer_capsule_hides_the_farther() -> None:
    far, near = ([-5.0, 0, 0], [5.0, 0, 0], 1.0, 1.0), ([0, -5.0, 6.0], [0, 5.0, 6.0], 1.0, 1.0)
    hits = cast(shapes(far, near), CAMERA)
    owners = np.full(hits.seen.shape, -1)
    owners[hits.seen] = hits.owners
    assert owners[32, 32] == 1
    assert owners[32, 16] == 0


def test_capsules_outside_the_picture_are_not_seen() -> None:
    hits = cast(shapes(([40.0, 0, 0], [45.0, 0, 0], 1.0, 1.0)), CAMERA)
    assert not hits.seen.any()
    assert hits.points.shape == (3, 0)


def test_normals_run_smoothly_where_capsules_meet() -> None:
    left, right = ([-0.6, -4, 0], [-0.6, 4, 0], 1.5, 1.5), ([0.6, -4, 0], [0.6, 4, 0], 1.5, 1.5)
    hits = cast(shapes(left, right), CAMERA)
    sideways = np.zeros(hits.seen.shape)
    sideways[hits.seen] = hits.normals[0]
    valley = sideways[32, 28:36]
    assert np.abs(np.diff(valley)).max() < 0.3
