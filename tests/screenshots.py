"""Take the pictures of the documentation, in a checkout where `make run` has run.

    python -m tests.screenshots [FOLDER]

They show what that run left in `.local/`: run it with the rendered sample, as people's
photos do not belong into a repository.
"""

import io
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from flows.local.clients import local_credentials
from flows.local.stack import embedded
from flows.settings import Settings
from tasks.io import atomic_write
from tests.fixtures.browser import DESKTOP, PHONE, chromium, see, shoot
from tests.fixtures.photos import CHECKOUT
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.screens import log_in, open_page, open_run, open_version, read_example
from tests.fixtures.service import serving

WIDE = (1280, 1020)
CLOSE = """
[...document.querySelectorAll("button")].find((button) => {
  const { right, top } = button.getBoundingClientRect();
  return right > innerWidth - 50 && top < 60;
})?.click();
"""
"""Closes the panel at the right of MLflow's page."""


def main(folder: Path) -> None:
    """Start what is to be seen, and take one picture of each."""
    local = CHECKOUT.local
    with ExitStack() as kept:
        services = kept.enter_context(embedded(Settings(), CHECKOUT))
        login = local_credentials(local).login
        running = services.start_all()
        api, tracking = str(running.prefect), str(running.mlflow)
        service = kept.enter_context(serving(CHECKOUT.root))
        profile = kept.enter_context(tempfile.TemporaryDirectory())
        driver = kept.enter_context(chromium(Path(profile)))
        version = service.health()["model"]["version"]
        url = str(service.client.base_url)

        see(driver, DESKTOP)
        open_page(driver, url)
        read_example(driver, 3)
        save(driver, folder / "page.png")

        see(driver, PHONE, "dark", dense=2)
        open_page(driver, url)
        read_example(driver, 5)
        driver.execute_script("window.scrollTo(0, 0)")
        save(driver, folder / "phone.png", whole=False)

        see(driver, WIDE)
        log_in(driver, api.removesuffix("/api"), login)
        open_run(driver, api.removesuffix("/api"), newest_run(PrefectApi(api, login)))
        save(driver, folder / "prefect.png", whole=False)
        open_version(driver, tracking, login, "hand-signs", version)
        driver.execute_script(CLOSE)
        save(driver, folder / "mlflow.png", whole=False)


def newest_run(prefect: PrefectApi) -> str:
    """Id of the last run that was completed."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "sort": "END_TIME_DESC"}
    return str(prefect.ask("flow_runs/filter", wanted)[0]["id"])


def save(driver: Any, target: Path, whole: bool = True) -> None:
    """Write what is seen once nothing moves any more, in 256 colours."""
    settled(driver)
    picture = Image.open(io.BytesIO(shoot(driver, whole))).convert("RGB").quantize(256)
    with atomic_write(target) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def settled(driver: Any) -> None:
    """Wait until two looks, half a second apart, see the same."""
    import time

    before = b""
    for _ in range(20):
        now = shoot(driver, whole=False)
        if now == before:
            return
        before = now
        time.sleep(0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT.root / "docs/pictures")
