"""People are told of a bad end; that it fails never matters, and no address is shown."""

import logging
import uuid
from collections.abc import Iterator

import pytest

from flows.notify import notify_bad_end, notify_people
from flows.settings import load_settings
from tasks.services.notify import notify
from tests.fixtures.receiver import Receiver, receiving

SECRET = "sentinel-do-not-show"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving(SECRET) as listening:
        monkeypatch.setenv("HANDSIGNS_NOTIFY_URLS", listening.address)
        yield listening


def test_a_message_has_title_reason_and_link(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings()
    assert SECRET not in repr(settings)
    assert notify_people(settings, "retrain rejected", "The gate refused.", "http://prefect/run/1")
    assert notify_people(settings, "failed before it began", "No photos.")
    first, second = receiver.messages
    assert (first["title"], first["type"]) == ("retrain rejected", "failure")
    assert first["message"] == "The gate refused.\nhttp://prefect/run/1"
    assert "artifacts/run.json on " in second["message"]
    monkeypatch.delenv("HANDSIGNS_NOTIFY_URLS")
    assert not notify_people(load_settings(), "title", "reason")


def test_a_killed_run_is_told_by_the_hook_that_its_worker_calls(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_UI_URL, temporary_settings
    from prefect.states import Crashed

    from flows.retrain import retrain

    assert retrain.on_crashed_hooks == retrain.on_failure_hooks == [notify_bad_end]
    assert not retrain.on_cancellation_hooks
    run = FlowRun(flow_id=uuid.uuid4(), name="dancing-monkey")
    state = Crashed(message="Process exited with status code: -9.")
    with temporary_settings({PREFECT_UI_URL: "http://ui"}):
        notify_bad_end(retrain, run, state)
    # Settings that cannot be read must not stop what calls the hook.
    monkeypatch.setenv("HANDSIGNS_NONSENSE", "1")
    notify_bad_end(retrain, run, state)
    (message,) = receiver.messages
    assert message["title"] == "handsigns: retrain crashed"
    assert message["message"].startswith("Process exited with status code: -9.\nhttp://ui/runs/")


@pytest.mark.parametrize(
    "address",
    [
        f"json://user:{SECRET}@127.0.0.1:9/",
        f"nosuchservice://{SECRET}",
        f"slack://{SECRET}",
        f"mailto://user:{SECRET}@127.0.0.1:9",
    ],
)
def test_an_address_that_fails_keeps_nobody_else_from_it_and_is_not_shown(
    receiver: Receiver,
    address: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert not notify(f"{address} {receiver.address}", "title", "body")
    assert [message["title"] for message in receiver.messages] == ["title"]
    assert "HANDSIGNS_NOTIFY_URLS was refused or did not answer" in caplog.text
    assert SECRET not in caplog.text + "".join(capfd.readouterr())
