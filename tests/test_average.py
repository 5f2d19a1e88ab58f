"""The running average of the weights."""

import keras
import numpy as np
import pytest

from tasks.training.average import Average


def averaged(values: list[float], decay: float) -> tuple[Average, keras.Variable]:
    variable = keras.Variable(np.zeros(2, np.float32))
    average = Average([variable], decay)
    for value in values:
        variable.assign(np.full(2, value, np.float32))
        average.update()
    return average, variable


def test_average_follows_its_definition() -> None:
    average, variable = averaged([1.0, 3.0, -2.0], 0.97)
    expected = 0.0
    for count, value in enumerate([1.0, 3.0, -2.0], 1):
        share = 1 - min(0.97, (1 + count) / (10 + count))
        expected += share * (value - expected)
    average.keep()
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


def test_start_is_soon_forgotten() -> None:
    average, variable = averaged([1.0] * 30, 0.97)
    average.keep()
    assert variable.numpy()[0] > 0.98


def test_average_in_place_gives_the_last_values_back() -> None:
    average, variable = averaged([1.0, 5.0], 0.9)
    with average.in_place():
        assert variable.numpy()[0] < 5
    assert variable.numpy()[0] == 5


def test_decay_zero_keeps_the_last_values() -> None:
    average, variable = averaged([1.0, 5.0], 0.0)
    average.keep()
    assert variable.numpy()[0] == pytest.approx(5)
