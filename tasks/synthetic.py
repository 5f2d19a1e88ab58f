"""Stage: render the synthetic hands that a model trains on beside the photos.

`artifacts/synthetic.npy` is uint8, (6, per_class, 64, 64, 3): label, number, RGB pixels.
"""

import logging

import numpy as np

from tasks.io import atomic_write
from tasks.rendering.pixels import SIDE
from tasks.rendering.sample import SEED, SIGNS, draw_all
from tasks.stage import Context, stage_main

FIRST_SEED = 1_000_000
"""Added to `seed` of params.yaml, so that no synthetic hand is one of the sample's."""

_log = logging.getLogger(__name__)


def run(context: Context, item: str | None = None) -> None:
    """Write `artifacts/synthetic.npy`; it holds no hand where `synthetic.per_class` is 0.

    Hands show the six signs only: there is none with other labels.
    """
    per_class, seed = context.params.synthetic.per_class, FIRST_SEED + context.params.seed
    if per_class and context.params.labels != SIGNS:
        per_class = 0
        _log.info("Synthetic hands are off: they show the signs 0 to 5, and labels has others.")
    else:
        _log.info(
            "Synthetic hands: %d of each class, seed %d (the sample data set has seed %d).",
            per_class,
            seed,
            SEED,
        )
    hands = np.empty((len(SIGNS), per_class, SIDE, SIDE, 3), np.uint8)
    places = [(seed, label, number) for label in range(len(SIGNS)) for number in range(per_class)]
    for done, ((_, label, number), picture) in enumerate(draw_all(places), start=1):
        hands[label, number] = picture
        context.progress("render hands", done, len(places))
    with atomic_write(context.project.synthetic) as temporary, temporary.open("wb") as file:
        np.save(file, hands)


if __name__ == "__main__":
    stage_main(run)
