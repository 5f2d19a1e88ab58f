import threading
from collections.abc import Iterator

import pytest

from tasks.stage import in_order


def test_results_come_in_the_order_of_the_items() -> None:
    gate = threading.Event()

    def slow_first(item: int) -> int:
        if item == 0:
            gate.wait(10)
        elif item == 3:
            gate.set()
        return item * item

    assert list(in_order(slow_first, range(9), workers=4)) == [n * n for n in range(9)]


def test_few_items_are_taken_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    results = in_order(lambda item: item, items(), workers=2)
    for done in range(100):
        assert next(results) == done
        assert taken <= done + 6


def test_a_failure_comes_out_and_nothing_more_is_begun() -> None:
    begun: list[int] = []

    def fail_at_5(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    results = in_order(fail_at_5, range(1000), workers=2)
    with pytest.raises(ValueError, match="five"):
        list(results)
    assert max(begun) < 20


def test_no_items_give_no_results() -> None:
    assert list(in_order(str, [], workers=2)) == []
