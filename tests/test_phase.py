"""Which photos and views a phase sees, and in what order."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.data.dataset import open_dataset
from tasks.errors import ParamsError
from tasks.params import PhaseParams, TrainingParams
from tasks.stage import Context
from tasks.training.plan import Plan, plan_phase
from tests.fixtures.models import smaller

Workshop = Callable[..., Context]


def plan_of(photos: int, views: int, batch_size: int = 8, name: str = "full") -> Plan:
    rows = np.arange(photos, dtype=np.int64)
    return Plan(
        name=name,
        phase=PhaseParams(
            init_from="base",
            data_fraction=1.0,
            trainable_layers=10,
            learning_rate=1e-3,
            epochs=3,
            swa_fraction=0.0,
        ),
        training=TrainingParams(
            mode="cached",
            precision="float32",
            batch_size=batch_size,
            dropout=0.0,
            mixstyle_prob=0.0,
            random_erasing_prob=0.0,
            temperature=1.0,
        ),
        seed=7,
        views=views,
        train=rows,
        train_labels=rows % 6,
        synthetic=rows < 0,
        val=rows[:0],
        val_labels=rows[:0],
    )


@given(
    photos=st.integers(1, 50),
    views=st.integers(0, 5),
    batch_size=st.integers(1, 20),
    cycle=st.integers(0, 3),
)
def test_each_photo_shows_every_view_once_before_any_comes_again(
    photos: int, views: int, batch_size: int, cycle: int
) -> None:
    plan = plan_of(photos, views, batch_size)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(cycle * (views + 1), (cycle + 1) * (views + 1)):
        batches = list(plan.batches(epoch))
        assert len(batches) == plan.updates_per_epoch
        assert sorted(np.concatenate([chosen for chosen, _ in batches])) == list(range(photos))
        for chosen, numbers in batches:
            seen.update(zip(chosen.tolist(), numbers.tolist(), strict=True))
    assert seen == {(photo, view): 1 for photo in range(photos) for view in range(views + 1)}


def test_epochs_and_phases_have_orders_of_their_own() -> None:
    def order(plan: Plan, epoch: int) -> list[int]:
        return np.concatenate([chosen for chosen, _ in plan.batches(epoch)]).tolist()

    plan = plan_of(40, 2)
    assert order(plan, 0) == order(plan_of(40, 2), 0)
    assert order(plan, 0) != order(plan, 1)
    assert order(plan, 0) != order(plan_of(40, 2, name="base"), 0)


def test_phases_with_one_fraction_share_their_photos(workshop: Workshop) -> None:
    context = workshop()
    dataset = open_dataset(context.project.dataset)
    halves = {
        name: phase.model_copy(update={"data_fraction": 0.5})
        for name, phase in context.params.phases.items()
    }
    params = smaller(context.params).model_copy(update={"phases": halves})
    base, fine_tune = (plan_phase(params, name, dataset) for name in ("base", "fine_tune"))
    assert np.array_equal(base.train, fine_tune.train)
    assert len(base.train) == 12
    assert set(base.train) <= set(dataset.rows("train"))
    assert np.array_equal(base.val, dataset.rows("val"))


@pytest.mark.parametrize("name", ["head", None])
def test_unknown_phase_is_refused(workshop: Workshop, name: str | None) -> None:
    context = workshop()
    with pytest.raises(ParamsError, match=r"base, fine_tune, full\. Received: "):
        plan_phase(context.params, name, open_dataset(context.project.dataset))
