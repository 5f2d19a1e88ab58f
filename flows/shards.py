"""Shards of features as Prefect tasks, in this process or on a Dask cluster."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from itertools import islice
from pathlib import Path
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE

from tasks.activations.feature_store import Key, Row
from tasks.activations.shards import Runner, Shard, compute_anywhere
from tasks.errors import ServiceError

_log = logging.getLogger(__name__)


def shard_runner(dask_address: str | None, patience: float = 30.0) -> Runner:
    """Say who computes the features stage's shards.

    Args:
        dask_address: scheduler of a Dask cluster; None for this process.
        patience: longest wait in seconds for the scheduler's first answer.

    Returns:
        What goes into `tasks.activations.shards.runner`.
    """

    def run(shards: Iterable[Shard], graph: Path) -> Iterator[tuple[Key, Row]]:
        content = graph.read_bytes()
        if dask_address:
            made = _on_dask(dask_address, patience, shards, content)
        else:
            made = _here(shards, content)
        for shard, rows in made:
            yield from zip(shard.keys, rows, strict=True)

    return run


def _here(shards: Iterable[Shard], graph: bytes) -> Iterator[tuple[Shard, Any]]:
    for number, shard in enumerate(shards, 1):
        yield shard, _task(number, shard, lambda: graph)()


def _on_dask(
    address: str, patience: float, shards: Iterable[Shard], graph: bytes
) -> Iterator[tuple[Shard, Any]]:
    """Keep two shards waiting for each worker, so that memory stays bounded.

    A shard whose worker dies is given to another one by Dask; one that fails otherwise
    is tried again by Prefect.
    """
    from prefect_dask.task_runners import DaskTaskRunner

    from flows.cluster import carried, sendable_context

    options = {"timeout": patience}
    try:
        with (
            DaskTaskRunner(address=address, client_kwargs=options) as cluster,
            carried(cluster.client, graph) as trunk,
        ):
            workers = len(cluster.client.scheduler_info(n_workers=-1)["workers"])
            if not workers:
                _log.warning("The Dask cluster at %s has no worker; waiting for one.", address)
            numbered = enumerate(shards, 1)
            under_way: deque[tuple[Shard, Any]] = deque()

            def submit(count: int) -> None:
                for number, shard in islice(numbered, count):
                    task = _task(number, shard, trunk)
                    with sendable_context():
                        under_way.append((shard, cluster.submit(task, {})))

            submit(2 * max(workers, 1))
            while under_way:
                shard, future = under_way.popleft()
                rows = future.result()
                submit(1)
                yield shard, rows
    except (OSError, TimeoutError, CancelledError) as error:
        raise ServiceError(
            f"The Dask cluster does not answer ({type(error).__name__}). Received: {address}. "
            "Check HANDSIGNS_DASK_ADDRESS and the scheduler, or unset it to compute here."
        ) from error


def _task(number: int, shard: Shard, trunk: Callable[[], bytes]) -> Task[Any, Any]:
    """Without parameters: Prefect would walk through every one of a shard's keys."""
    return Task(
        lambda: compute_anywhere(shard, trunk()),
        name="features shard",
        task_run_name=f"features shard {number}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=1,
    )
