"""Features on a Dask cluster."""

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tasks.errors import ServiceError
from tasks.features import Key, Row, Runner, Shard, compute_anywhere, run_here

_log = logging.getLogger(__name__)


def shard_runner(dask_address: str | None, patience: float = 30.0) -> Runner:
    """Return what computes the features stage's shards: a Dask cluster, or this process."""
    return partial(_on_dask, dask_address, patience) if dask_address else run_here


def _on_dask(
    address: str, patience: float, shards: Iterable[Shard], graph: Path
) -> Iterator[tuple[Key, Row]]:
    """Keep two shards waiting for each worker, so that memory stays bounded."""
    from distributed import Client

    try:
        with Client(address, timeout=patience, set_as_default=False) as client:  # type: ignore[no-untyped-call]
            workers = len(client.scheduler_info(n_workers=-1)["workers"])
            _log.info("Computing features on the Dask cluster at %s.", address)
            if not workers:
                _log.warning("The Dask cluster at %s has no worker; waiting for one.", address)
            with warnings.catch_warnings():  # a task, so that it outlives the workers that hold it
                warnings.filterwarnings("ignore", "Sending large graph")
                trunk = client.submit(bytes, graph.read_bytes())
            waiting = iter(shards)
            under_way: deque[tuple[Shard, Any]] = deque()

            def submit(count: int) -> None:
                for shard in islice(waiting, count):
                    task = client.submit(compute_anywhere, shard, trunk, pure=False, retries=2)
                    under_way.append((shard, task))

            submit(2 * max(workers, 1))
            while under_way:
                shard, task = under_way.popleft()
                rows = task.result()
                submit(1)
                yield from zip(shard.keys, rows, strict=True)
    except (OSError, TimeoutError, CancelledError) as error:
        raise ServiceError(
            f"No Dask scheduler answers at {address} ({type(error).__name__}). "
            "Check HANDSIGNS_DASK_ADDRESS and the scheduler, or unset it to compute here."
        ) from error
