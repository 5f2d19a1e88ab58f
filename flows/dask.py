"""Features on a Dask cluster."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from distributed import Client, WorkerPlugin, get_worker
from distributed.core import rpc
from distributed.security import Security
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext, TaskRunContext

from tasks.errors import ServiceError
from tasks.model.feature_store import Key, Row
from tasks.model.shards import Runner, Shard, compute_anywhere

_log = logging.getLogger(__name__)


def shard_runner(dask_address: str | None, patience: float = 30.0) -> Runner:
    """Say who computes the features stage's shards.

    Args:
        dask_address: scheduler of a Dask cluster; None for this process.
        patience: longest wait in seconds for the scheduler's first answer.

    Returns:
        What goes into `tasks.model.shards.runner`.
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


class CarriedTrunk(WorkerPlugin):
    """Holds the trunk in a worker.

    Args:
        graph: content of the trunk's file.
    """

    def __init__(self, graph: bytes) -> None:
        self.graph = graph


@contextmanager
def carried(client: Client, graph: bytes) -> Iterator[Callable[[], bytes]]:
    """Give the trunk to every worker once, and to those that join later.

    Args:
        client: of the cluster.
        graph: content of the trunk's file.

    Yields:
        What gives `graph` where a worker calls it.
    """
    name = f"trunk-{uuid4().hex}"
    client.register_plugin(CarriedTrunk(graph), name=name)
    try:
        yield partial(_of_this_worker, name)
    finally:
        # A cluster that is gone has nothing to forget.
        with suppress(OSError, TimeoutError):
            client.unregister_worker_plugin(name)  # type: ignore[no-untyped-call]


def _of_this_worker(name: str) -> bytes:
    return cast(CarriedTrunk, get_worker().plugins[name]).graph


@contextmanager
def sendable_context() -> Iterator[None]:
    """Let Prefect send the run that it is in, without what flow and task hold.

    With every task it sends the flow and the task around it, functions and all. Ours
    hold a console, connections and locks, which cannot be sent, and a worker needs no
    more of them than their names.
    """
    with ExitStack() as stack:
        flow_run, task_run = FlowRunContext.get(), TaskRunContext.get()
        if flow_run and flow_run.flow:
            flow = Flow(_stand_in, name=flow_run.flow.name)
            stack.enter_context(flow_run.model_copy(update={"flow": flow}))
        if task_run:
            task = Task(_stand_in, name=task_run.task.name)
            stack.enter_context(task_run.model_copy(update={"task": task}))
        yield


def _stand_in() -> None:
    """Is never called."""


def check_scheduler(address: str, seconds: float) -> None:
    """Ask whoever answers at an address whether it is a scheduler.

    Args:
        address: `tcp://host:port` or `tls://host:port`.
        seconds: longest wait.

    Raises:
        ServiceError: what answers there, if anything, is no scheduler.
    """

    async def ask() -> Any:
        security = Security().get_connection_args("client")  # type: ignore[no-untyped-call]
        async with rpc(address, timeout=seconds, connection_args=security) as scheduler:  # type: ignore[no-untyped-call]
            return await scheduler.identity()

    try:
        told = asyncio.run(asyncio.wait_for(ask(), seconds))
        if told["type"] == "Scheduler":
            return
        reason = f"a {told['type']}"
    except Exception as error:  # whatever another program's answer leads to
        reason = str(error) or type(error).__name__
    raise ServiceError(
        f"No Dask scheduler answers at {address} ({reason}). "
        "Check HANDSIGNS_DASK_ADDRESS and the scheduler, or unset it to compute here."
    )
