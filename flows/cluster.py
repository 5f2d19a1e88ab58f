"""What goes to a Dask cluster beside the shards: the trunk, and whose run they belong to."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import cast
from uuid import uuid4

from distributed import Client, WorkerPlugin, get_worker
from prefect import Flow, Task
from prefect.context import FlowRunContext, TaskRunContext


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
