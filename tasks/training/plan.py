"""Training plan of one phase: samples and batches, the same in both training modes."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from tasks.data.dataset import SYNTHETIC, Dataset, stratified_sample
from tasks.params import Params, PhaseParams, TrainingParams


@dataclass(frozen=True)
class Epoch:
    """One point of the learning curve; training has dropout and `gce_q`, validation neither."""

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True, eq=False)
class Plan:
    """One phase, decided before its first update; `train` and `val` are dataset rows."""

    name: str
    phase: PhaseParams
    training: TrainingParams
    seed: int
    copies: int
    train: NDArray[np.int64]
    train_labels: NDArray[np.int64]
    synthetic: NDArray[np.bool_]
    val: NDArray[np.int64]
    val_labels: NDArray[np.int64]
    classes: int

    @property
    def updates_per_epoch(self) -> int:
        return ceil(len(self.train) / self.training.batch_size)

    @property
    def updates(self) -> int:
        return self.updates_per_epoch * self.phase.epochs

    def batches(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield positions in `train` and copy numbers of one epoch, counted from 0.

        Each photo goes through all of its copies before one comes again.
        """
        cycle, place = divmod(epoch, self.copies + 1)
        every = np.tile(np.arange(self.copies + 1), (len(self.train), 1))
        orders = self.random(0, cycle).permuted(every, axis=1)
        shuffled = self.random(1, epoch).permutation(len(self.train))
        for start in range(0, len(shuffled), self.training.batch_size):
            chosen = shuffled[start : start + self.training.batch_size]
            yield chosen, np.where(self.synthetic[chosen], 0, orders[chosen, place])

    @property
    def gce_q(self) -> float:
        """`training.gce_q`, but 0 without synthetic hands: rare photos then teach what is rare."""
        return self.training.gce_q if self.synthetic.any() else 0.0

    def random(self, purpose: int, number: int) -> np.random.Generator:
        """Random numbers for one purpose in one epoch or update."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), purpose, number])

    def targets(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Labels of positions in `train`, one-hot, times weights with a mean of 1 over `train`."""
        weights = np.where(self.synthetic, self.training.synthetic_weight, 1.0)
        weighted = (weights / weights.mean())[chosen, np.newaxis]
        one_hot = np.eye(self.classes)[self.train_labels[chosen]]
        return np.asarray(one_hot * weighted, np.float32)


def plan_phase(params: Params, name: str, dataset: Dataset) -> Plan:
    phase, val = params.phases[name], dataset.rows("val")
    train = training_rows(dataset, phase.data_fraction, params.seed)
    return Plan(
        name=name,
        phase=phase,
        training=params.training,
        seed=params.seed,
        copies=params.features.augmented_copies,
        train=train,
        train_labels=dataset.labels[train],
        synthetic=np.isin(train, dataset.rows(SYNTHETIC)),
        val=val,
        val_labels=dataset.labels[val],
        classes=len(dataset.classes),
    )


def training_rows(dataset: Dataset, fraction: float, seed: int) -> NDArray[np.int64]:
    """Choose a fraction of each class; smaller fractions are nested in larger ones."""
    rows = np.concatenate([dataset.rows("train"), dataset.rows(SYNTHETIC)])
    names = [dataset.names[row] for row in rows]
    return rows[stratified_sample(names, dataset.labels[rows], fraction, seed)]


def score_logits(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy of logits, (n, labels)."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    loss = -log_probabilities[np.arange(len(labels)), labels].mean()
    return float(loss), float((log_probabilities.argmax(axis=1) == labels).mean())
