"""What both training modes do alike in one phase: which photos, which views, in what order."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.data.dataset import SYNTHETIC, Dataset
from tasks.data.splits import stratified_sample
from tasks.errors import ParamsError
from tasks.params import LABELS, Params, PhaseParams, TrainingParams


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve; training figures are with dropout, as it ran."""

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True, eq=False)
class Plan:
    """One phase, settled before its first update.

    Args:
        name: of the phase.
        phase: its parameters.
        training: parameters of all phases.
        seed: of every random choice.
        views: augmented views that exist of each training photo; a synthetic hand has none.
        train: int64, (n,); dataset rows trained on.
        train_labels: int64, (n,).
        synthetic: bool, (n,); which of `train` are synthetic hands.
        val: int64, (m,); dataset rows validated on.
        val_labels: int64, (m,).
    """

    name: str
    phase: PhaseParams
    training: TrainingParams
    seed: int
    views: int
    train: NDArray[np.int64]
    train_labels: NDArray[np.int64]
    synthetic: NDArray[np.bool_]
    val: NDArray[np.int64]
    val_labels: NDArray[np.int64]

    @property
    def updates_per_epoch(self) -> int:
        return ceil(len(self.train) / self.training.batch_size)

    @property
    def updates(self) -> int:
        return self.updates_per_epoch * self.phase.epochs

    def batches(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield one epoch: each photo once, in a new order, in one of its views.

        Each photo goes through its views in an order of its own and sees all of
        them, the plain one too, before any comes again. An epoch so costs the same
        however many views there are.

        Args:
            epoch: from 0.

        Yields:
            int64, (batch,) positions in `train`, and int64, (batch,) view numbers.
        """
        cycle, place = divmod(epoch, self.views + 1)
        every = np.tile(np.arange(self.views + 1), (len(self.train), 1))
        orders = self.random(0, cycle).permuted(every, axis=1)
        shuffled = self.random(1, epoch).permutation(len(self.train))
        for start in range(0, len(shuffled), self.training.batch_size):
            chosen = shuffled[start : start + self.training.batch_size]
            yield chosen, np.where(self.synthetic[chosen], 0, orders[chosen, place])

    def random(self, purpose: int, number: int) -> np.random.Generator:
        """Give the random numbers of one purpose in one epoch or update of this phase."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), purpose, number])

    def targets(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """One-hot labels; float32, (batch, 6)."""
        return np.eye(len(LABELS), dtype=np.float32)[self.train_labels[chosen]]

    def optimizer(self, adam: type[Any] | None = None) -> Any:
        """Build Adam at this phase's learning rate; `adam` is its class, Keras's by default."""
        import keras

        return (adam or keras.optimizers.Adam)(self.phase.learning_rate)


def training_rows(dataset: Dataset, fraction: float, seed: int) -> NDArray[np.int64]:
    """Choose the photos and synthetic hands that a phase trains on.

    Those of a smaller fraction are among a larger's.

    Args:
        dataset: the preprocessed photos.
        fraction: share of each class of the training split and of the synthetic hands.
        seed: `seed` of params.yaml.

    Returns:
        int64, (n,); rows of `dataset`, ascending.
    """
    rows = np.concatenate([dataset.rows("train"), dataset.rows(SYNTHETIC)])
    names = [dataset.names[row] for row in rows]
    return rows[stratified_sample(names, dataset.labels[rows], fraction, seed)]


def plan_phase(params: Params, name: str | None, dataset: Dataset) -> Plan:
    """Settle one phase of `params` for the photos of `dataset`.

    Phases with the same fraction train on the same photos.

    Raises:
        ParamsError: there is no phase of that name.
    """
    if name is None or name not in params.phases:
        raise ParamsError(
            f"Phase must be one of {', '.join(params.phases)}. Received: {name!r}. "
            "Name one: python -m tasks.train <phase>."
        )
    phase = params.phases[name]
    train = training_rows(dataset, phase.data_fraction, params.seed)
    val = dataset.rows("val")
    return Plan(
        name=name,
        phase=phase,
        training=params.training,
        seed=params.seed,
        views=params.features.augmented_copies,
        train=train,
        train_labels=dataset.labels[train],
        synthetic=np.isin(train, dataset.rows(SYNTHETIC)),
        val=val,
        val_labels=dataset.labels[val],
    )
