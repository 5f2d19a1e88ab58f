"""Whether a Dask scheduler answers; apart from all that imports Prefect, which comes later."""

import asyncio
from typing import Any

from distributed.core import rpc
from distributed.security import Security

from tasks.errors import ServiceError


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
