"""Runs that a service, or a whole machine, left behind when it stopped: nobody else ends them."""

import asyncio
from typing import TYPE_CHECKING, Any

from flows.client import TAG
from flows.deployment.member import POOL
from flows.exclusion import only_retrain
from tasks.layout import Layout

if TYPE_CHECKING:
    from prefect import State
    from prefect.client.schemas.objects import Flow, FlowRun

LOST = (
    "The service stopped while this run was under way. "
    "What was there before is whole; run it again."
)


def mark_lost_runs(layout: Layout) -> None:
    """Mark our own runs that a local server has as under way as crashed, and tell people of it.

    To be called while a server that was just started has no worker yet; `deploy` has
    pointed this process at it. Runs of other pools live elsewhere. Where a retrain of the
    checkout lives all the same, nothing is marked: the automations of
    `flows.deployment.deploy` see to it.

    Args:
        layout: the checkout.
    """
    from flows.notification import tell_bad_end

    with only_retrain(layout) as alone:
        lost = asyncio.run(_mark()) if alone else []
    for flow, run, state in lost:
        tell_bad_end(flow, run, state)


async def _mark() -> "list[tuple[Flow, FlowRun, State[Any]]]":
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
    kinds = FlowRunFilterStateType(any_=under_way)
    marked = []
    async with get_client() as client:
        ours = FlowRunFilter(
            state=FlowRunFilterState(type=kinds), tags=FlowRunFilterTags(all_=[TAG])
        )
        for run in await client.read_flow_runs(flow_run_filter=ours):
            if run.work_pool_name not in (None, POOL):
                continue
            state: State[Any] = Crashed(message=LOST)
            await client.set_flow_run_state(run.id, state, force=True)
            marked.append((await client.read_flow(run.flow_id), run, state))
    return marked
