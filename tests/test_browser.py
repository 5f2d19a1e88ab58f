"""What people see in a real browser: the page for photos, and the one that labels them."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tasks.services.s3 import S3Address
from tests.fixtures.checkouts import Trained
from tests.fixtures.photos import photo
from tests.fixtures.servers import new_bucket
from tests.fixtures.service import Place, Service, comment, grey, named, picture, serving

pytestmark = pytest.mark.skipif(not shutil.which("chromedriver"), reason="see `make packages`")

TOKEN = "a token of sixteen or more"
DESKTOP = (1200, 900)
PHONE = (320, 568)
FLAGS = (
    "headless=new disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync use-fake-device-for-media-stream "
    "use-fake-ui-for-media-stream disable-dev-shm-usage hide-scrollbars"
)
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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a fresh profile that talks to nobody of its own accord."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    flags = [*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]
    if os.geteuid() == 0:  # its sandbox refuses to start for root
        flags.append("no-sandbox")
    for flag in flags:
        options.add_argument(f"--{flag}")
    # Chromium's own complaints, such as a blocked script, are read from here.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def see(driver: Any, size: tuple[int, int], scheme: str = "light") -> None:
    """Be a screen of this size in pixels, for somebody who likes this colour scheme."""
    touch = size == PHONE
    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": touch}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})


def until(driver: Any, seen: Callable[[Any], Any]) -> Any:
    """Wait until `seen(driver)` is true, whatever the page does meanwhile."""
    return WebDriverWait(driver, 60, 0.1, ignored_exceptions=[WebDriverException]).until(seen)


def text(driver: Any, selector: str = "body") -> str:
    """What an element shows."""
    return str(driver.find_element("css selector", selector).text)


def open_page(driver: Any, url: str) -> None:
    """Open the service's page and wait until it knows its model."""
    driver.get(url)
    until(driver, lambda d: text(d, "#chip") == "ready")


@pytest.fixture(scope="module")
def service(brightness_model: Path, tmp_path_factory: Any) -> Iterator[Service]:
    """A service that reads the sign from a photo's brightness, and keeps nothing."""
    place = Place(tmp_path_factory.mktemp("page") / "checkout", brightness_model)
    with place.serve(CAPTURE="") as running:
        yield running


@pytest.fixture
def page(browser: Any, service: Service) -> Any:
    """The page, freshly loaded on a desktop by somebody who has never been here."""
    see(browser, DESKTOP)
    browser.get_log("browser")
    browser.get(str(service.client.base_url))
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    open_page(browser, str(service.client.base_url))
    yield browser
    complaints = [line["message"] for line in browser.get_log("browser")]
    assert not [line for line in complaints if "Content Security Policy" in line]


def choose(page: Any, folder: Path, content: bytes, name: str = "a.png") -> None:
    """Choose a file as a person does."""
    (folder / name).write_bytes(content)
    page.find_element(By.ID, "file").send_keys(str(folder / name))


def press(driver: Any, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def test_a_photo_shows_its_sign_or_none(page: Any, service: Service, tmp_path: Path) -> None:
    for sign in (1, 4):
        choose(page, tmp_path, grey(sign))
        until(page, lambda d, sign=sign: text(d, "#sign") == str(sign))
    shares = service.predict(grey(4)).json()["probabilities"]
    assert page.execute_script(SHARE) == pytest.approx([100 * p for p in shares.values()], abs=0.01)
    rows = page.find_elements(By.CSS_SELECTOR, "#bars tr")
    assert all("%" in row.text for row in rows)
    assert [row.get_attribute("class") for row in rows].index("best") == 4
    assert not set(text(page).lower().split()) & {"version", "release", "champion"}
    assert "not kept" in text(page, ".lead")
    assert not page.find_element(By.ID, "wrong").is_displayed()
    assert not page.find_element(By.ID, "private").is_displayed()
    # Between two signs, and 36 MB, where the service takes 10.
    Image.new("RGB", (4000, 3000), (25, 25, 26)).save(file := io.BytesIO(), "BMP")
    choose(page, tmp_path, file.getvalue(), "wall.bmp")
    until(page, lambda d: "No clear hand" in text(d, "#words"))
    assert text(page, "#sign") == "?"
    assert not page.find_elements(By.CSS_SELECTOR, "#bars .best")
    # The page about the API shows it, and loads nothing from other hosts.
    page.get(str(service.client.base_url.join("/docs")))
    until(page, lambda d: "/predict" in text(d, "#swagger-ui"))
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(str(service.client.base_url)) for name in loaded)


def test_everything_works_from_the_keyboard_and_says_what_it_is(page: Any) -> None:
    names = []
    for _ in range(9):
        press(page, Keys.TAB)
        names.append(page.switch_to.active_element.accessible_name)
        if "sign 3" in names[-1]:
            press(page, Keys.ENTER)
            until(page, lambda d: "%" in text(d, "#words"))
    assert names[:2] == ["Choose a photo", "Use the camera"]
    assert all(names)
    assert page.find_element(By.ID, "answer").get_attribute("aria-live") == "polite"
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_photos_are_taken_and_what_cannot_be_sent_is_named(page: Any, tmp_path: Path) -> None:
    page.find_element(By.ID, "camera").click()
    until(page, lambda d: d.find_element(By.ID, "snap").is_displayed())
    page.find_element(By.ID, "snap").click()
    until(page, lambda d: not d.find_element(By.ID, "video").is_displayed())
    until(page, lambda d: "%" in text(d, "#words"))
    choose(page, tmp_path, b"no picture", "note.png")
    until(page, lambda d: "not a usable photo" in text(d, "#words"))
    assert not text(page, "#sign").isdigit()
    page.execute_cdp_cmd("Network.enable", {})
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    choose(page, tmp_path, grey(1))
    until(page, lambda d: text(d, "#chip") == "offline, retrying")
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
    until(page, lambda d: "%" in text(d, "#words"))
    assert text(page, "#chip") == "ready"


def test_it_can_be_read_on_every_screen(browser: Any, service: Service) -> None:
    for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
        see(browser, size, scheme)
        open_page(browser, str(service.client.base_url))
        browser.find_element(By.CSS_SELECTOR, "#examples button").click()
        until(browser, lambda d: "%" in text(d, "#words"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
        track = "return document.querySelector('.track').getBoundingClientRect().width"
        assert browser.execute_script(track) > 0.25 * min(size[0], 500)
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(level) for level in ground[4:-1].split(",")) / 3
        assert (brightness > 128) == (scheme == "light")
        least, words = browser.execute_script(CONTRAST)
        assert least >= 4.5, words
        phone = browser.find_element(By.CSS_SELECTOR, "label[for=shot]").is_displayed()
        assert phone == (size != DESKTOP)


def begin(driver: Any, service: Service, name: str) -> None:
    """Open the review and say who labels, which the page asks once."""
    driver.get(str(service.client.base_url.join("/review")))
    until(driver, lambda d: d.find_element(By.ID, "name").is_displayed())
    driver.find_element(By.ID, "name").send_keys(name)
    driver.find_element(By.ID, "token").send_keys(TOKEN, Keys.ENTER)
    until(driver, shown)


def shown(driver: Any) -> Any:
    """The photo on the screen has arrived and waits for a decision."""
    return driver.execute_script(
        "return document.getElementById('photo').naturalWidth > 0"
        " && !document.querySelector('[aria-current=true]').classList.contains('done')"
    )


def chip(driver: Any, words: str) -> None:
    until(driver, lambda d: text(d, "#chip") == words)


def reviews(place: Place) -> list[tuple[str, str]]:
    """Who put a photo under which label, in the inbox."""
    found = [comment(path)["review"] for path in place.inbox]
    return sorted((review["by"], review["label"]) for review in found)


def test_keys_and_thumbs_label_photos_and_a_reload_loses_nothing(page: Any, place: Place) -> None:
    place.fill(8, flagged=3)
    with place.serve(SERVE_TOKEN=TOKEN) as running:
        begin(page, running, "Ana")
        chip(page, "0 of 8 done")
        assert "A user says 5" in text(page, "#facts")
        press(page, Keys.ENTER)  # what the user says
        press(page, "2", "x", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, "4")
        chip(page, "4 of 8 done")
        until(page, lambda _: reviews(place) == [("Ana", "2"), ("Ana", "4"), ("Ana", "5")])
        press(page, "u")
        chip(page, "3 of 8 done")
        until(page, lambda _: reviews(place) == [("Ana", "2"), ("Ana", "5")])
        see(page, PHONE)
        page.refresh()  # nothing is asked again
        until(page, shown)
        assert page.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        buttons = page.find_elements(By.CSS_SELECTOR, "#work button")
        assert all(button.rect["height"] >= 44 and button.accessible_name for button in buttons)
        assert page.execute_script(CONTRAST)[0] >= 4.5
        assert page.find_element(By.ID, "facts").get_attribute("aria-live") == "polite"
        assert "read as 3, " in page.find_element(By.ID, "photo").accessible_name
        for done in range(4, 7):
            until(page, shown)
            page.find_element(By.CSS_SELECTOR, "[data-label='1']").click()
            chip(page, f"{done} of 8 done")
        until(page, lambda _: len(place.inbox) == 5)
        # Somebody else is faster with the two photos that are left.
        until(page, shown)
        running.client.headers["Authorization"] = f"Bearer {TOKEN}"
        for left in running.client.get("/review/photos?by=Cleo").json()["photos"]:
            sent = {"label": "2", "by": "Cleo"}
            assert running.client.post(f"/review/photos/{left['id']}", json=sent).is_success
        page.find_element(By.ID, "discard").click()
        until(page, lambda d: "Cleo labelled it 2 before" in text(d, "#problem"))
    ana = [("Ana", label) for label in ("1", "1", "1", "2", "5")]
    assert reviews(place) == [*ana, *[("Cleo", "2")] * 2]


def test_a_wrong_reading_is_corrected_with_one_tap(page: Any, place: Place, tmp_path: Path) -> None:
    with place.serve() as running:
        page.get(str(running.client.base_url))
        until(page, lambda d: "may be kept" in text(d, ".lead"))
        for seed, kept in ((2, 0), (1, 1)):  # the first one is private
            page.find_element(By.ID, "private").click()
            choose(page, tmp_path, picture(seed), f"{seed}.jpg")
            until(page, lambda d: d.find_element(By.ID, "wrong").is_displayed())
            until(page, lambda _, kept=kept: len(place.kept) == kept)
        assert comment(place.kept[0])["suggestion"] is None
        page.find_element(By.ID, "wrong").click()
        offered = {one.text: one for one in page.find_elements(By.CSS_SELECTOR, "#right button")}
        offered["4"].click()
        until(page, lambda d: "A person will look at it" in text(d, "#thanks"))
        (kept_one,) = place.kept
        assert comment(kept_one)["suggestion"] == "4"


def night(label: int, seed: int) -> bytes:
    """A photo as the champion has never seen one: dark bars before a bright wall."""
    file = io.BytesIO()
    Image.fromarray(255 - photo(label, seed)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_photos_from_production_make_the_next_champion_better(
    browser: Any, tmp_path: Path, trained: Trained, s3_server: S3Address
) -> None:
    made = trained.checkout(tmp_path / "checkout")
    place = Place(made.project.root, tmp_path)
    (made.project.root / "inbox").mkdir()
    environment = {**named(new_bucket(s3_server)), **place.settings(CAPTURE_SHARE="1")}
    made.handsigns("import", trained.photos, **environment)
    assert made.handsigns("retrain", **environment)["status"] == "promoted"

    def right(service: Service) -> int:
        """How many photos that nobody labels are read right."""
        private = {"Handsigns-No-Capture": "1"}
        photos = [(label, seed) for label in range(6) for seed in range(1000, 1008)]
        answers = [service.predict(night(*one), headers=private).json()["label"] for one in photos]
        return sum(int(answer) == label for answer, (label, _) in zip(answers, photos, strict=True))

    with serving(made.project.root, **environment) as service:
        before = right(service)
        assert not place.kept
        for seed in range(96):
            sent = {"file": ("a", night(seed % 6, seed))}
            assert service.client.post(f"/feedback?label={seed % 6}", files=sent).is_success
        count = len(place.kept)
        assert count > 48
        see(browser, DESKTOP)
        begin(browser, service, "Ana")
        for done in range(1, count + 1):  # batch after batch
            until(browser, shown)
            press(browser, Keys.ENTER)
            chip(browser, f"{done} of {count} done")
        until(browser, lambda _: len(place.inbox) == count)
        made.change("phases.full", epochs=10)
        second = made.handsigns("retrain", **environment)
        assert second["status"] == "promoted", second["reason"]
        new = second["model"]["version"]
        until(browser, lambda _: service.health()["model"]["version"] == new)
        after = right(service)
    assert after > before + 6, (before, after)
