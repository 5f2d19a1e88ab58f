"""Moving the champion by hand: through Prefect where it lets us in, and else without it."""

from pathlib import Path

from tests.fixtures.checkouts import make_checkout
from tests.fixtures.prefect_api import PrefectApi


def test_a_prefect_that_lets_nobody_in_is_gone_without(
    prefect_api: PrefectApi, tmp_path: Path
) -> None:
    workshop = make_checkout(tmp_path / "checkout")
    wrong = {"PREFECT_API_URL": prefect_api.url, "PREFECT_API_AUTH_STRING": "some:body"}
    warned, refused = workshop.handsigns("promote", "3", code=1, **wrong).splitlines()
    assert warned.startswith(f"Prefect refuses us at {prefect_api.url} (401)")
    assert refused.startswith("There must be such a version in the registry. Received: 3")
