"""A person's word before a challenger becomes champion: the run waits in the Prefect UI."""

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from pydantic import Field

GRACE = 600
"""Seconds that Prefect waits longer than we do: what it ends by itself, it calls failed."""
AGAIN = 2.0
"""Seconds between two tries to end the wait."""

_log = logging.getLogger(__name__)


class Approval(RunInput):
    """What the Prefect UI asks for.

    Neither field has a default: else resuming with nothing filled in would approve.
    """

    name: str = Field(
        title="Your name", description="Kept in the champion's history.", min_length=1
    )
    decision: Literal["approve", "reject"] = Field(
        title="Decision", description="Shall the challenger become champion?"
    )
    comment: str = Field(default="", title="Comment", description="Why; kept in the history.")


@dataclass(frozen=True)
class Answer:
    """What came of the question.

    Args:
        approved: whether the challenger may become champion.
        by: who said so; None where nobody did.
        told: the answer in words.
    """

    approved: bool
    by: str | None
    told: str


def ask(question: str, seconds: int) -> Answer:
    """Pause the flow run that this is called from until a person answers.

    Args:
        question: Markdown; stands above the form.
        seconds: longest wait; then the answer is no.

    Returns:
        The answer.
    """
    ended, expired = threading.Event(), threading.Event()
    end = threading.Thread(
        target=_give_up, args=(UUID(str(flow_run.id)), seconds, ended, expired), daemon=True
    )
    end.start()
    _log.info("Waiting for approval in the Prefect UI, %d s at most.", seconds)
    try:
        given = pause_flow_run(
            wait_for_input=Approval.with_initial_data(description=question),
            timeout=seconds + GRACE,
            poll_interval=min(5, max(1, seconds // 10)),
        )
    except FlowPauseTimeout:
        given = None
    finally:
        ended.set()
        end.join(AGAIN)  # it may be about to say that it answered
    if given is None or expired.is_set():
        return Answer(False, None, f"nobody approved it within {seconds} s")
    approved = given.decision == "approve"
    comment = f": {given.comment}" if given.comment else ""
    return Answer(
        approved, given.name, f"{'approved' if approved else 'rejected'} by {given.name}{comment}"
    )


def _give_up(run: UUID, seconds: int, ended: threading.Event, expired: threading.Event) -> None:
    """Answer in nobody's name, so that the run goes on and ends as what it is.

    A server that does not hear it, or not yet, is asked again until the wait is over.
    """
    comment = f"no answer within {seconds} s"
    answer = {"name": "nobody", "decision": "reject", "comment": comment}
    pause: float = seconds
    while not expired.is_set() and not ended.wait(pause):
        pause = AGAIN
        with suppress(HTTPError), get_client(sync_client=True) as client:
            if client.resume_flow_run(run, run_input=answer).status == "ACCEPT":
                expired.set()
