"""What a person sees, in a real browser: the page, a run in Prefect, a version in MLflow."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tasks.services.s3 import S3Address, Storage
from tests.fixtures.browser import DESKTOP, PHONE, SMALL, see, shoot
from tests.fixtures.prefect_api import PrefectApi
from tests.fixtures.screens import (
    log_in,
    open_page,
    open_run,
    open_version,
    read_example,
    text,
    until,
)
from tests.fixtures.servers import MlflowServer, new_bucket
from tests.fixtures.service import Service, grey, named, point, publish_graph, serving
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.program("chromedriver")

SHARE = "return [...document.querySelectorAll('.fill')].map(f => parseFloat(f.style.width))"
CONTRAST = """
const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return /rgba\\(.*, 0\\)/.test(colour) ? behind(e.parentElement) : colour;
};
return [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility())
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [getComputedStyle(e).color, behind(e)].map(light).sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.textContent];
  })
  .sort((x, y) => x[0] - y[0])[0];
"""
"""The text that stands out least, after WCAG 2.2's relative luminance."""


@pytest.fixture(scope="module")
def champion(s3_server: S3Address) -> S3Address:
    """A bucket of this file's own."""
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def service(
    champion: S3Address, graphs: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service whose champion reads the sign from a photo's brightness."""
    folder, storage = tmp_path_factory.mktemp("page"), Storage(champion)
    point(storage, publish_graph(storage, folder / "made", graphs[0]).id, 1)
    with serving(folder / "checkout", **named(champion)) as running:
        yield running


@pytest.fixture
def photo(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a photo of one brightness, which is taken for a sign."""

    def write(sign: int) -> Path:
        (tmp_path / f"{sign}.png").write_bytes(grey(sign))
        return tmp_path / f"{sign}.png"

    return write


@pytest.fixture
def page(browser: Any, service: Service) -> Any:
    """The page, freshly loaded on a desktop."""
    see(browser, DESKTOP)
    browser.get_log("browser")
    open_page(browser, str(service.client.base_url))
    yield browser
    complaints = [line["message"] for line in browser.get_log("browser")]
    assert not [line for line in complaints if "Content Security Policy" in line]


def choose(page: Any, photo: Path) -> None:
    """Choose a file as a person does."""
    page.find_element(By.ID, "file").send_keys(str(photo))


def test_a_chosen_photo_shows_its_sign_and_what_else_it_might_be(
    page: Any, service: Service, photo: Callable[[int], Path]
) -> None:
    for sign in (1, 4):
        choose(page, photo(sign))
        until(page, lambda d, sign=sign: text(d, "#sign") == str(sign))
    shares = service.predict(grey(4)).json()["probabilities"]
    assert page.execute_script(SHARE) == pytest.approx([100 * p for p in shares.values()], abs=0.01)
    rows = page.find_elements(By.CSS_SELECTOR, "#bars tr")
    assert all("%" in row.text for row in rows)
    assert [row.get_attribute("class") for row in rows].index("best") == 4
    assert not set(text(page).lower().split()) & {"version", "release", "champion"}
    page.find_element(By.TAG_NAME, "summary").click()
    assert service.health()["model"]["release"] in text(page, "#model")


def test_a_photo_without_a_clear_hand_gets_no_sign(page: Any, tmp_path: Path) -> None:
    # Between two signs, and larger than what is sent.
    Image.new("RGB", (4000, 3000), (25, 25, 26)).save(tmp_path / "wall.bmp")
    choose(page, tmp_path / "wall.bmp")  # 36 MB, where the service takes 10
    until(page, lambda d: "No clear hand" in text(d, "#words"))
    assert text(page, "#sign") == "?"
    rows = page.find_elements(By.CSS_SELECTOR, "#bars tr")
    assert "best" not in [row.get_attribute("class") for row in rows]


def test_everything_works_from_the_keyboard_and_says_what_it_is(page: Any) -> None:
    names = []
    outline = "return getComputedStyle(arguments[0].labels?.[0] ?? arguments[0]).outlineStyle"
    for _ in range(9):
        ActionChains(page).send_keys(Keys.TAB).perform()
        active = page.switch_to.active_element
        names.append(active.accessible_name)
        assert page.execute_script(outline, active) == "solid", active.accessible_name
        if "sign 3" in active.accessible_name:
            ActionChains(page).send_keys(Keys.ENTER).perform()
            until(page, lambda d: "%" in text(d, "#words"))
    assert names[:2] == ["Choose a photo", "Use the camera"]
    assert all(name for name in names)
    status = page.find_element(By.ID, "answer")
    assert status.get_attribute("aria-live") == "polite"
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_pasted_dropped_and_taken_photos_are_read(page: Any) -> None:
    content = base64.b64encode(grey(2)).decode()
    for kind in ("paste", "drop"):
        page.execute_script(
            "const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));"
            "const data = new DataTransfer();"
            "data.items.add(new File([bytes], 'a.png', { type: 'image/png' }));"
            "const event = new Event(arguments[1], { bubbles: true, cancelable: true });"
            "Object.assign(event, { clipboardData: data, dataTransfer: data });"
            "document.getElementById('words').textContent = '';"
            "document.body.dispatchEvent(event);",
            content,
            kind,
        )
        until(page, lambda d: "%" in text(d, "#words"))
    page.find_element(By.ID, "camera").click()
    until(page, lambda d: d.find_element(By.ID, "snap").is_displayed())
    page.find_element(By.ID, "snap").click()
    until(page, lambda d: not d.find_element(By.ID, "video").is_displayed())
    until(page, lambda d: "%" in text(d, "#words"))
    assert page.execute_script("return document.getElementById('preview').naturalWidth") > 100


def test_a_file_that_is_no_photo_and_a_lost_connection_are_named(
    page: Any, photo: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "note.png").write_text("no picture")
    choose(page, tmp_path / "note.png")
    until(page, lambda d: "not a usable photo" in text(d, "#words"))
    assert not text(page, "#sign").isdigit()
    page.execute_cdp_cmd("Network.enable", {})
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    choose(page, photo(1))
    until(page, lambda d: "Offline, retrying" in text(d, "#words"))
    until(page, lambda d: text(d, "#chip") == "offline, retrying")
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
    until(page, lambda d: "%" in text(d, "#words"))
    assert text(page, "#chip") == "ready"


@pytest.mark.parametrize("size", [DESKTOP, PHONE, SMALL], ids=["desktop", "phone", "small"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_every_screen(
    browser: Any, service: Service, size: tuple[int, int], scheme: str
) -> None:
    see(browser, size, scheme)
    open_page(browser, str(service.client.base_url))
    read_example(browser, 0)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    track = "return document.querySelector('.track').getBoundingClientRect().width"
    assert browser.execute_script(track) > 0.25 * min(size[0], 500)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(level) for level in ground[4:-1].split(",")) / 3
    assert (brightness > 128) == (scheme == "light")
    least, words = browser.execute_script(CONTRAST)
    assert least >= 4.5, words
    narrow = size != DESKTOP
    assert browser.find_element(By.CSS_SELECTOR, "label[for=shot]").is_displayed() == narrow
    assert len(shoot(browser)) > 20_000


@pytest.mark.slow
def test_prefect_and_mlflow_show_a_run_and_its_version(
    browser: Any,
    champion: S3Address,
    mlflow_server: MlflowServer,
    prefect_api: PrefectApi,
    trained: Trained,
    tmp_path: Path,
) -> None:
    servers = {**named(new_bucket(champion)), **mlflow_server.named, **prefect_api.named}
    servers["HANDSIGNS_MODEL_NAME"] = "seen"
    made = trained.checkout(tmp_path / "checkout")
    made.handsigns("import", trained.photos, **servers)
    report = made.handsigns("retrain", **servers)
    version = report["model"]["version"]
    assert report["status"] == "promoted", report["reason"]

    found = prefect_api.ask("flow_runs/filter", {})
    run = next(run for run in found if run["name"].startswith(f"v{version} promoted"))
    see(browser, (1400, 1000))
    address = prefect_api.url.removesuffix("/api")
    log_in(browser, address, prefect_api.login)
    open_run(browser, address, run["id"])
    shown = text(browser)
    for name in (run["name"], "Promoted", "summary", "comparison"):
        assert name in shown

    open_version(browser, mlflow_server.url, mlflow_server.login, "seen", version)
    shown = text(browser)
    for name in (f"Version {version}", "champion", report["release"]["id"]):
        assert name in shown.replace("\n", "")
