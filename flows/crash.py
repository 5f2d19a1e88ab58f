"""A flow that tells people of a run which crashed and could not say so itself.

The crash automations of `flows.deployment.deploy` start it: a state that an automation sets calls
none of the run's own hooks.
"""

from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client

from flows.notification import UNHEARD, tell_bad_end


@flow(name="tell", flow_run_name="tell of {run}")
def tell(run: str) -> None:
    """Send the notification for a run that is marked as crashed.

    Args:
        run: The run's resource, `prefect.flow-run.<id>`.
    """
    with get_client(sync_client=True) as client:
        crashed = client.read_flow_run(UUID(run.rpartition(".")[2]))
        silent = client.read_flow(crashed.flow_id)
    # A heartbeat that overtakes a run's last state sets the automations off as well; such a
    # run has said itself how it ended.
    state = crashed.state
    if state and state.is_crashed() and (state.message or "").startswith(UNHEARD):
        tell_bad_end(silent, crashed, state)
