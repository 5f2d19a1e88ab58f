"""People are told of a bad end; that it fails never matters, and no address is shown."""

import logging
import subprocess
import sys
import uuid

import pytest

from flows.notify import notify_bad_end, notify_people
from flows.settings import load_settings
from tasks.services.notify import notify
from tests.fixtures.receiver import receiving

SECRET = "sentinel-do-not-show"


def test_a_message_has_title_reason_and_link(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(SECRET) as one, receiving(SECRET) as two:
        monkeypatch.setenv("HANDSIGNS_NOTIFY_URLS", f"{one.address} {two.address}")
        settings = load_settings()
        assert SECRET not in repr(settings)
        assert notify_people(
            settings, "retrain rejected", "The gate refused.", "http://prefect/run/1"
        )
        for receiver in (one, two):
            (message,) = receiver.messages
            assert message["title"] == "retrain rejected"
            assert message["message"] == "The gate refused.\nhttp://prefect/run/1"
            assert message["type"] == "failure"
        assert notify_people(settings, "failed before it began", "No photos.")
        assert "artifacts/run.json on " in one.messages[1]["message"]


def test_a_killed_run_is_told_by_the_hook_that_its_worker_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_UI_URL, temporary_settings
    from prefect.states import Crashed

    from flows.retrain import retrain

    assert retrain.on_crashed_hooks == retrain.on_failure_hooks == [notify_bad_end]
    assert not retrain.on_cancellation_hooks
    run = FlowRun(flow_id=uuid.uuid4(), name="dancing-monkey")
    state = Crashed(message="Process exited with status code: -9.")
    with receiving(SECRET) as receiver:
        monkeypatch.setenv("HANDSIGNS_NOTIFY_URLS", receiver.address)
        with temporary_settings({PREFECT_UI_URL: "http://ui"}):
            for hook in retrain.on_crashed_hooks:
                hook(retrain, run, state)
        # Settings that cannot be read must not stop what calls the hook.
        monkeypatch.setenv("HANDSIGNS_NONSENSE", "1")
        notify_bad_end(retrain, run, state)
    (message,) = receiver.messages
    assert message["title"] == "handsigns: retrain crashed"
    assert message["message"].startswith("Process exited with status code: -9.\nhttp://ui/runs/")


def test_nobody_is_told_where_nobody_is_named() -> None:
    assert not notify_people(load_settings(), "title", "reason")


@pytest.mark.parametrize(
    "address",
    [
        f"json://user:{SECRET}@127.0.0.1:9/",
        f"nosuchservice://{SECRET}",
        f"slack://{SECRET}",
        f"mailto://user:{SECRET}@127.0.0.1:9",
    ],
)
def test_an_address_that_fails_is_a_warning_without_the_address(address: str) -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG); "
        "from tasks.services.notify import notify; print(notify(sys.stdin.read(), 'title', 'body'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=address, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert "HANDSIGNS_NOTIFY_URLS was refused or did not answer" in done.stderr
    assert SECRET not in done.stderr


def test_one_that_refuses_does_not_keep_the_others_from_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with receiving(SECRET) as deaf, receiving(SECRET) as heard, caplog.at_level(logging.DEBUG):
        deaf.status = 500
        assert not notify(f"{deaf.address} nonsense {heard.address}", "title", "body")
        assert [message["title"] for message in heard.messages] == ["title"]
    assert SECRET not in caplog.text
