"""The trunk on a Dask cluster: sent to each worker once, not with every shard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import cast
from uuid import uuid4

from distributed import Client, WorkerPlugin, get_worker


class CarriedTrunk(WorkerPlugin):
    """Holds the trunk in a worker.

    Args:
        graph: content of the trunk's file.
    """

    def __init__(self, graph: bytes) -> None:
        self.graph = graph


@contextmanager
def carried(client: Client, graph: bytes) -> Iterator[Callable[[], bytes]]:
    """Give the trunk to every worker, and to those that join later.

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
