"""Moving the champion by hand: through Prefect where it lets us in, and else without it."""

import logging
from pathlib import Path

import pytest

from flows.commands.moves import promote
from flows.loopback.local import Services
from flows.settings import Settings
from flows.workspace import Workspace
from tasks.errors import PromotionError
from tasks.layout import Layout
from tests.fixtures.prefect_api import PrefectApi


def test_a_prefect_that_lets_nobody_in_is_gone_without(
    prefect_api: PrefectApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api.url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "some:body")
    workspace = Workspace(Layout(tmp_path), Settings())
    moved = []

    def move(*said: object) -> None:
        moved.append(said)
        raise PromotionError("without Prefect")

    monkeypatch.setattr(workspace, "promote", move)
    workspace.services = Services(workspace.settings, tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(PromotionError, match="without Prefect"):
        promote(workspace, 3, "a test", True)
    assert moved == [(3, "a test", True)]
    assert "(401); its UI will not show this" in caplog.text
