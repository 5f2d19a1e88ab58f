"""The mean of the weights that a phase passes through."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.regularizers import Average


def averaged(values: list[float], share: float) -> tuple[Average, keras.Variable]:
    variable = keras.Variable(np.zeros(2, np.float32))
    average = Average([variable], len(values), share)
    for value in values:
        variable.assign(np.full(2, value, np.float32))
        average.update()
    return average, variable


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_last_updates_count_alike_and_the_first_not_at_all(
    values: list[float], share: float
) -> None:
    average, variable = averaged(values, share)
    average.keep()
    last = values[len(values) - max(round(share * len(values)), 1) :]
    np.testing.assert_allclose(variable.numpy(), np.mean(last), rtol=1e-4, atol=1e-4)


def test_before_that_the_present_values_are_scored() -> None:
    variable = keras.Variable(np.zeros(2, np.float32))
    average = Average([variable], updates=10, share=0.5)
    for value in (1.0, 5.0):
        variable.assign(np.full(2, value, np.float32))
        average.update()
    with average.in_place():
        assert variable.numpy()[0] == 5


def test_average_in_place_gives_the_last_values_back() -> None:
    average, variable = averaged([1.0, 5.0], 1.0)
    with average.in_place():
        assert variable.numpy()[0] == pytest.approx(3)
    assert variable.numpy()[0] == 5


def test_share_zero_keeps_the_last_values() -> None:
    average, variable = averaged([1.0, 5.0], 0.0)
    average.keep()
    assert variable.numpy()[0] == 5
