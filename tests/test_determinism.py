"""The default recipe gives the same bits whenever it runs on one machine."""

import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tasks.params import load_params
from tasks.project import Project
from tasks.stage import Context
from tests.conftest import THREADS
from tests.fixtures.models import SIZE, random_backbone, write_dataset
from tests.fixtures.photos import CHECKOUT

Digests = dict[str, str]


def run_recipe(root: Path, seed: int) -> Digests:
    """Run the committed recipe's features and phases on small pictures; hash what they wrote."""
    from tasks.features import extract
    from tasks.train import train

    for name in THREADS:
        os.environ.pop(name, None)  # as many as there are cores
    project = Project(root)
    write_dataset(project, per_class=15)
    random_backbone(project)
    params = load_params(CHECKOUT.params).model_copy(update={"seed": seed})
    context = Context(project, params)
    extract(context, SIZE)
    for phase in params.phases:
        train(context, phase, SIZE)
    written = [project.features, *map(project.weights, params.phases)]
    return {
        str(path.relative_to(project.artifacts)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in written
        for path in sorted(folder.iterdir())
    }


@pytest.mark.slow
def test_default_recipe_gives_the_same_digests_in_another_process(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as processes:
        # Two runs at once: they share the cores, so their threads keep other times.
        first, again = (
            processes.submit(run_recipe, tmp_path / name, 20) for name in ("first", "again")
        )
        assert first.result() == again.result()
        other = processes.submit(run_recipe, tmp_path / "other", 21).result()
    assert other.keys() == first.result().keys()
    assert not [name for name, digest in first.result().items() if other[name] == digest]
